"""`python -m medvision.evaluate run=<folder>`: measures a run again, from its folder alone."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_json, write_text

log = logging.getLogger("medvision.evaluate")  # __name__ is __main__ here


def start(cfg: DictConfig, _: Path, __: list[str]) -> None:
    """Evaluates a split at the stored threshold, or at another; writes below `<run>/evaluations`.

    Raises:
        MedvisionError: If the run is not finished, or the threshold is no probability.
    """
    if cfg.run is None:
        raise MedvisionError("which run? run=<folder>, as train printed it")
    if cfg.threshold != "stored" and not isinstance(cfg.threshold, int | float):
        raise MedvisionError(f"threshold={cfg.threshold}: expected 'stored' or a probability above 0 and below 1")
    from medvision.build import load_run
    from medvision.evaluation import evaluate
    from medvision.report import print_table, require_finished, stored
    from medvision.runs import RunFolder

    place = RunFolder(Path(cfg.run).expanduser().resolve())
    if place.config.exists():
        require_finished(place)
    run = load_run(place.path)
    split = cfg.split or run.data.reported_split
    data = run.data.dataset(split)
    if run.metrics["fingerprint"] != run.data.cache.digest:
        log.warning("the data in %s is not what the run was trained on: other images, masks or splits", run.data.root)
    threshold = run.threshold if cfg.threshold == "stored" else run.fixed(cfg.threshold)
    output = writable_folder(place.path / "evaluations", "a run folder that can be written")
    name = f"{split}_{cfg.threshold}"
    log.info("measuring %d images of %s", len(data), split)
    found = evaluate(run.evaluating(), run.task, run.data, split, threshold)
    summary = found.summary(threshold)
    write_text(output / f"{name}.csv", found.table(threshold))
    found.draw(output / f"{name}.png", run.task, run.data, threshold)
    facts = stored(threshold) | {"epoch": run.metrics["epoch"]}
    write_json(output / f"{name}.json", {split: summary} | facts)
    columns = {split: summary}
    if cfg.threshold == "stored" and split in run.metrics:
        same = run.metrics[split] == summary
        log.info("%s the numbers in %s", "equal to" if same else "DIFFERENT from", place.metrics)
        if not same:
            columns["after training"] = run.metrics[split]
    print_table(", ".join([split, *(f"{key} {value}" for key, value in facts.items())]), columns)
    print(f"pictures: {output / name}.png\nresults:  {output / name}.json")


if __name__ == "__main__":
    cli.main("evaluate", start)
