"""`python -m medvision.evaluate run=<folder>`: measures a run again, from its folder alone."""

import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_json, write_text

if TYPE_CHECKING:
    from medvision.build import Run

CHOICES = ("threshold", "temperature", "cleaning")
log = logging.getLogger("medvision.evaluate")  # __name__ is __main__ here


def start(cfg: DictConfig, _: Path, __: list[str]) -> None:
    """Evaluates a split at the stored threshold, or at another; writes below `<run>/evaluations`.

    Raises:
        MedvisionError: If the run is not finished, the threshold is no probability, or the model cannot be pruned so.
    """
    if cfg.run is None:
        raise MedvisionError("which run? run=<folder>, as train printed it")
    if cfg.threshold not in ("stored", "validation") and not isinstance(cfg.threshold, int | float):
        raise MedvisionError(
            f"threshold={cfg.threshold}: expected 'stored', 'validation' or a probability above 0 and below 1"
        )
    for choice in CHOICES[1:]:
        if cfg[choice] not in ("stored", "none", "validation"):
            raise MedvisionError(f"{choice}={cfg[choice]}: expected 'stored', 'none' or 'validation'")
    from medvision.build import load_run
    from medvision.evaluation import MaskEvaluation, choose_decision, evaluate
    from medvision.report import (
        both_protocols,
        print_challenge,
        print_details,
        print_distances,
        print_protocols,
        print_table,
        require_finished,
    )
    from medvision.runs import RunFolder
    from medvision.tta import TestTimeAugmentation

    place = RunFolder(Path(cfg.run).expanduser().resolve())
    if place.config.exists():
        require_finished(place)
    given = {str(key): value for key, value in cfg.task.items() if value != "stored"}
    run = load_run(place.path, **given)
    split = cfg.split or run.data.reported_split
    data = run.data.dataset(split)
    if run.metrics["fingerprint"] != run.data.cache.digest:
        log.warning("the data in %s is not what the run was trained on: other images, masks or splits", run.data.root)
    name, facts = f"{split}_{cfg.threshold}", {"epoch": run.metrics["epoch"]}
    if "operating_point" in given and cfg.threshold != "validation":
        raise MedvisionError(
            f"task.operating_point={given['operating_point']} is what a threshold is chosen for, but threshold="
            f"{cfg.threshold} is no choice; expected threshold=validation"
        )
    name += "".join(f"_{key}_" + re.sub(r"[^\w.]+", "_", str(value)).strip("_") for key, value in given.items())
    name += "".join(f"_{choice}_{cfg[choice]}" for choice in CHOICES[1:] if cfg[choice] != "stored")
    decided = run.decision
    stored: dict[str, Any] = {
        "threshold": decided,
        "temperature": decided.temperature,
        "cleaning": decided.cleaning,
    }
    asked = {choice: {"stored": of_run, "validation": None}.get(cfg[choice], ()) for choice, of_run in stored.items()}
    if isinstance(cfg.threshold, int | float):
        asked["threshold"] = run.fixed(cfg.threshold).threshold
    if cfg.protocol not in ("clean", "paper"):
        raise MedvisionError(f"protocol={cfg.protocol}: expected clean or paper")
    if cfg.protocol == "paper" and (cfg.model.depth is not None or run.data.spec.target == "label"):
        raise MedvisionError("protocol=paper measures masks of the whole network; leave it out, or model.depth")
    if (depth := cfg.model.depth) is not None:
        name += f"_depth{depth}"
        facts |= {"depth": depth, **_prune(run, depth, split)}
        if cfg.threshold == "stored":
            log.info("the stored threshold was chosen with the whole network; threshold=validation chooses it anew")
    views = TestTimeAugmentation(cfg.tta, cfg.tta_mean)  # refuses what it does not know
    output = writable_folder(place.path / "evaluations", "a run folder that can be written")
    trainer = run.evaluating()
    others: dict[str, dict[str, float]] = {}  # columns to compare with
    if cfg.tta != "none":
        name += f"_{cfg.tta}" + ("" if cfg.tta_mean == "probability" else f"_{cfg.tta_mean}")
        facts |= {"tta": cfg.tta, "tta_mean": cfg.tta_mean}
        log.info("measuring %d images of %s without tta", len(data), split)
        known = {choice: stored[choice] if value is None else value for choice, value in asked.items()}
        plain = choose_decision(trainer, run.task, run.data, **known)[0]
        started = time.perf_counter()
        others["without tta"] = evaluate(trainer, run.task, run.data, split, plain).summary(plain)
        seconds = [time.perf_counter() - started]
        run.task.tta = views
    if chosen := [choice for choice, value in asked.items() if value is None]:
        log.info("choosing the %s on %d images of val", ", ".join(chosen), len(run.data.dataset("val")))
    decision, val = choose_decision(trainer, run.task, run.data, **asked)
    if cfg.threshold == "validation" and isinstance(val, MaskEvaluation):
        val.draw_choice(output / f"{name}_threshold.png", run.task.chosen_by, decision.at(()))
    log.info("measuring %d images of %s", len(data), split)
    started = time.perf_counter()
    found = evaluate(trainer, run.task, run.data, split, decision)
    if cfg.tta != "none":
        seconds.append(time.perf_counter() - started)
        log.info("tta=%s: %.1f s instead of %.1f s", cfg.tta, seconds[1], seconds[0])
        facts |= {"seconds": round(seconds[1], 3), "seconds_without_tta": round(seconds[0], 3)}
    summary, intervals = found.summary(decision), {split: found.intervals(decision)}
    details = {split: found.details(decision)}
    if any(value != 0.5 for value in decision.threshold):
        half = replace(decision, threshold=(0.5,) * len(decision.threshold), cleaning=())
        others["at 0.5"] = found.summary(half)
    others |= found.beside(decision)
    write_text(output / f"{name}.csv", found.table(decision))
    found.draw(output / f"{name}.png", run.task, run.data, decision)
    if isinstance(found, MaskEvaluation):
        found.draw_calibration(output / f"{name}_calibration.png", decision)
    if depth is not None and split in run.metrics:
        others["whole network"] = run.metrics[split]
    elif (
        all(cfg[choice] == "stored" for choice in CHOICES) and cfg.tta == "none" and not given and split in run.metrics
    ):
        before = run.metrics[split]  # an older run has fewer metrics
        same = before == {key: summary.get(key) for key in before}
        log.info("%s the numbers in %s", "equal to" if same else "DIFFERENT from", place.metrics)
        if not same:
            others["after training"] = run.metrics[split]
    title = ", ".join(filter(None, [split, str(decision), *(f"{key} {value}" for key, value in facts.items())]))
    facts = decision.entries() | facts
    if cfg.protocol == "paper":
        facts |= {"paper": both_protocols(run, trainer, found)}
    write_json(
        output / f"{name}.json", {split: summary} | others | {"intervals": intervals, "details": details} | facts
    )
    print_table(title, {split: summary} | others, intervals, details)
    print_details(split, details[split])
    print_distances(run, {split: summary})
    if cfg.protocol == "paper":
        print_protocols(run, facts["paper"])
    if (challenge := run.data.spec.challenge) is not None:
        print_challenge(challenge, split, found.challenge(challenge, decision))
    print(f"pictures: {output / name}.png\nresults:  {output / name}.json")


def _prune(run: "Run", depth: int, split: str) -> dict[str, Any]:
    """Replaces a U-Net++ by its part of a depth; says and returns what that saves."""
    from medvision.evaluation import step_times
    from medvision.models import UNetPP

    whole = run.task.model
    if not isinstance(whole, UNetPP):
        raise MedvisionError(
            f"model.depth={depth} prunes a U-Net++ (model=unetpp), but this is a run of {type(whole).__name__}; "
            "leave it out"
        )
    networks = [whole, whole.prune(depth)]
    run.task.model = networks[1]
    image = next(iter(run.data.evaluation_dataloader(split)))["image"]
    milliseconds = [1000 * seconds for seconds in step_times(run.evaluating(), run.task, networks, image)]
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks]
    log.info("model.depth=%d: %d of %d parameters", depth, parameters[1], parameters[0])
    log.info("a batch of %d images: %.1f ms, the whole network %.1f ms", len(image), milliseconds[1], milliseconds[0])
    return {"parameters": parameters[1], "milliseconds_per_batch": round(milliseconds[1], 3)}


if __name__ == "__main__":
    cli.main("evaluate", start)
