"""`python -m medvision.evaluate run=<folder>`: measures a run again, from its folder alone."""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_json, write_text

if TYPE_CHECKING:
    from medvision.build import Run
    from medvision.decision import Decision
    from medvision.evaluation import Evaluation

log = logging.getLogger("medvision.evaluate")  # __name__ is __main__ here


def start(cfg: DictConfig, _: Path, __: list[str]) -> None:
    """Evaluates a split with the stored decision, or with another; writes below `<run>/evaluations`.

    Raises:
        MedvisionError: If the run is not finished, a value is none of those expected, or the model cannot be pruned so.
    """
    given = {str(key): value for key, value in cfg.task.items() if value != "stored"}
    _require_values(cfg, given)
    from medvision.build import load_run
    from medvision.evaluation import MaskEvaluation, choose_decision, evaluate
    from medvision.report import both_protocols, require_finished
    from medvision.runs import RunFolder
    from medvision.selection import draw
    from medvision.tta import TestTimeAugmentation

    views = None if cfg.tta == "stored" else TestTimeAugmentation(cfg.tta, cfg.tta_mean)
    place = RunFolder(Path(cfg.run).expanduser().resolve())
    require_finished(place)
    run = load_run(place.path, **given)
    split = cfg.split or run.data.reported_split
    if views is None or (views.name == run.task.tta.name and views.mean_of == run.task.tta.mean_of):
        views, cfg.tta = run.task.tta, "stored"
    data, name = run.data.dataset(split), _name(cfg, given, split)
    if cfg.protocol == "paper" and run.data.spec.target == "label":
        raise MedvisionError("protocol=paper measures masks, and these are labels; leave it out")
    if run.metrics["fingerprint"] != run.data.cache.digest:
        log.warning("the data in %s is not what the run was trained on: other images, masks or splits", run.data.root)
    facts: dict[str, Any] = {"epoch": run.metrics["epoch"]}
    if cfg.model.depth is not None:
        facts |= {"depth": cfg.model.depth, **_prune(run, cfg.model.depth, split)}
        if cfg.threshold == "stored":
            log.info("the stored threshold was chosen with the whole network; threshold=validation chooses it anew")
    output = writable_folder(place.path / "evaluations", "a run folder that can be written")
    trainer, parts = run.evaluating(), _parts(cfg, run)
    others: dict[str, dict[str, float]] = {}  # columns to compare with
    beside = cfg.tta not in ("stored", "none")
    if beside:
        log.info("measuring %d images of %s without tta", len(data), split)
        run.task.tta = TestTimeAugmentation("none")
        stored = _stored(run)
        known = {part: stored[part] if value is None else value for part, value in parts.items()}
        plain = choose_decision(trainer, run.task, run.data, **known)[0]
        started = time.perf_counter()
        others["without tta"] = evaluate(trainer, run.task, run.data, split, plain).summary(plain)
        without = time.perf_counter() - started
    run.task.tta = views
    if chosen := [part for part, value in parts.items() if value is None]:
        log.info("choosing the %s on %d images of val", ", ".join(chosen), len(run.data.dataset("val")))
    decision, val = choose_decision(trainer, run.task, run.data, **parts)
    if cfg.threshold == "validation" and isinstance(val, MaskEvaluation):
        val.draw_choice(output / f"{name}_threshold.png", run.task.chosen_by, decision.at(()))
    log.info("measuring %d images of %s", len(data), split)
    started = time.perf_counter()
    found = evaluate(trainer, run.task, run.data, split, decision)
    seconds = time.perf_counter() - started
    if views.name != "none":
        facts |= {"tta": views.name, "tta_mean": views.mean_of}
    if beside:
        log.info("tta=%s: %.1f s instead of %.1f s", views.name, seconds, without)
        facts |= {"seconds": round(seconds, 3), "seconds_without_tta": round(without, 3)}
    summary = found.summary(decision)
    if any(value != 0.5 for value in decision.threshold):
        half = replace(decision, threshold=(0.5,) * len(decision.threshold), cleaning=())
        others["at 0.5"] = found.summary(half)
    others |= found.beside(decision)
    if cfg.model.depth is not None and split in run.metrics:
        others["whole network"] = run.metrics[split]
    elif name in (f"{split}_stored", f"{split}_stored_paper") and split in run.metrics:
        before = run.metrics[split]  # an older run has fewer metrics
        same = before == {key: summary.get(key) for key in before}
        log.info("%s the numbers in %s", "equal to" if same else "DIFFERENT from", place.metrics)
        if not same:
            others["after training"] = before
    write_text(output / f"{name}.csv", found.table(decision))
    draw(output / f"{name}.png", run, found, decision)
    if isinstance(found, MaskEvaluation):
        found.draw_calibration(output / f"{name}_calibration.png", decision)
    results = {
        split: summary,
        **others,
        "intervals": {split: found.intervals(decision)},
        "details": {split: found.details(decision)},
        **decision.entries(),
        **facts,
    }
    if cfg.protocol == "paper":
        results["paper"] = both_protocols(run, trainer, found)
    write_json(output / f"{name}.json", results)
    _print(run, found, decision, others, results)
    print(f"pictures: {output / name}.png\nresults:  {output / name}.json")


def _require_values(cfg: DictConfig, given: Mapping[str, Any]) -> None:
    if cfg.run is None:
        raise MedvisionError("which run? run=<folder>, as train printed it")
    if cfg.threshold not in ("stored", "validation") and not isinstance(cfg.threshold, int | float):
        raise MedvisionError(
            f"threshold={cfg.threshold}: expected 'stored', 'validation' or a probability above 0 and below 1"
        )
    for part in ("temperature", "cleaning"):
        if cfg[part] not in ("stored", "none", "validation"):
            raise MedvisionError(f"{part}={cfg[part]}: expected 'stored', 'none' or 'validation'")
    if "operating_point" in given and cfg.threshold != "validation":
        raise MedvisionError(
            f"task.operating_point={given['operating_point']} is what a threshold is chosen for, but threshold="
            f"{cfg.threshold} is no choice; expected threshold=validation"
        )
    if cfg.tta == "stored" and cfg.tta_mean != "probability":
        raise MedvisionError(
            f"tta_mean={cfg.tta_mean} is of views that are asked for; expected tta=flips or others too"
        )
    if cfg.protocol not in ("clean", "paper"):
        raise MedvisionError(f"protocol={cfg.protocol}: expected clean or paper")
    if cfg.protocol == "paper" and cfg.model.depth is not None:
        raise MedvisionError("protocol=paper measures the whole network; leave it out, or model.depth")


def _name(cfg: DictConfig, given: Mapping[str, Any], split: str) -> str:
    """What files are called: `<split>_stored`, and then each value that is not the run's own."""
    name = f"{split}_{cfg.threshold}"
    name += "".join(f"_{key}_" + re.sub(r"[^\w.]+", "_", str(value)).strip("_") for key, value in given.items())
    name += "".join(f"_{part}_{cfg[part]}" for part in ("temperature", "cleaning") if cfg[part] != "stored")
    name += "" if cfg.model.depth is None else f"_depth{cfg.model.depth}"
    if cfg.tta == "none":
        name += "_without_tta"
    elif cfg.tta != "stored":
        name += f"_{cfg.tta}" + ("" if cfg.tta_mean == "probability" else f"_{cfg.tta_mean}")
    return name + ("_paper" if cfg.protocol == "paper" else "")


def _stored(run: "Run") -> dict[str, Any]:
    """The parts of the run's decision."""
    decision = run.decision
    return {"threshold": decision, "temperature": decision.temperature, "cleaning": decision.cleaning}


def _parts(cfg: DictConfig, run: "Run") -> dict[str, Any]:
    """The parts of the decision that are known; None: to be chosen on validation."""
    parts = {
        part: () if cfg[part] == "none" else None if cfg[part] == "validation" else of_run
        for part, of_run in _stored(run).items()
    }
    if isinstance(cfg.threshold, int | float):
        parts["threshold"] = run.fixed(cfg.threshold).threshold
    return parts


def _print(
    run: "Run", found: "Evaluation", decision: "Decision", others: dict[str, dict[str, float]], results: dict[str, Any]
) -> None:
    from medvision.report import print_challenge, print_details, print_distances, print_protocols, print_table

    split = found.split
    shown = {key: results[key] for key in ("epoch", "depth", "tta") if key in results}
    title = ", ".join(filter(None, [split, str(decision), *(f"{key} {value}" for key, value in shown.items())]))
    print_table(title, {split: results[split]} | others, results["intervals"], results["details"])
    print_details(split, results["details"][split])
    print_distances(run, {split: results[split]})
    if "paper" in results:
        print_protocols(run, results["paper"])
    if (challenge := run.data.spec.challenge) is not None:
        print_challenge(challenge, split, found.challenge(challenge, decision))


def _prune(run: "Run", depth: int, split: str) -> dict[str, Any]:
    """Replaces a U-Net++ by its part of a depth; says and returns what that saves."""
    from medvision.costs import step_times
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
