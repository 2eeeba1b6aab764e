"""The end of a run: both splits measured, everything written to its folder, a table on the terminal."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl

from medvision import figures
from medvision.build import Run, load_run
from medvision.errors import MedvisionError
from medvision.evaluation import Evaluation, LabelEvaluation, MaskEvaluation, choose_decision, evaluate
from medvision.files import write_json, write_text
from medvision.logger import read_history
from medvision.metrics import NAMES
from medvision.runs import RunFolder
from medvision.selection import draw
from medvision.tasks import SegmentationTask
from medvision.terminal import print_rows

log = logging.getLogger(__name__)

SHOWN = (
    "dice_image",
    "jaccard_image",
    "threshold_jaccard_image",
    "dice",
    "jaccard",
    "sensitivity_image",
    "specificity_image",
    "precision_image",
    "hd95_image",
    "assd_image",
    "nsd_image",
    "ece",
    "brier",
    "unetpp_iou",
)
PER_CLASS = ("dice", "jaccard", "auroc", "average_precision", "sensitivity/", "ece")


def finish(place: RunFolder) -> None:
    """Measures validation and test with the best epoch's weights and writes the results; `metrics.json` is the last.

    The threshold of each class is chosen on validation, unless the config gives a number, and applied to test.
    """
    run = load_run(place.path)
    trainer, wanted = run.evaluating(), run.config.threshold
    decision, val = choose_decision(
        trainer,
        run.task,
        run.data,
        None if wanted == "validation" else run.fixed(wanted).threshold,
        *(None if run.config.get(choice) == "validation" else () for choice in ("temperature", "cleaning")),
    )
    if isinstance(val, MaskEvaluation) and wanted == "validation":
        val.draw_choice(place.choice, run.task.chosen_by, decision.at(()))
    val = val.at(decision.temperature) if isinstance(val, LabelEvaluation) else None  # masks need a second pass
    results: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    challenge: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for split in ("val", "test") if run.config.get("test", True) else ("val",):  # an older run has no such option
        if split in run.data.splits:
            found = val if split == "val" and val else evaluate(trainer, run.task, run.data, split, decision)
            reported = found
            results[split], beside[split] = found.summary(decision), found.beside(decision)
            intervals[split] = found.intervals(decision)
            details[split] = found.details(decision)
            if run.data.spec.challenge is not None:
                challenge[split] = found.challenge(run.data.spec.challenge, decision)
            write_text(place.results(split), found.table(decision))
            draw(place.picture(split), run, found, decision)
            if isinstance(found, MaskEvaluation):
                found.draw_calibration(place.calibration(split), decision)
    figures.curves(place.path / "curves.png", {place.path.name: read_history(place.history)})
    best = run.best
    if run.config.get("protocol") == "paper":
        results["paper"] = both_protocols(run, trainer, reported)
    write_json(
        place.metrics,
        results
        | decision.entries()
        | {
            "beside": beside,
            "intervals": intervals,
            "details": details,
            "challenge": {run.data.spec.challenge: challenge} if challenge else {},
            **({} if run.task.tta.name == "none" else {"tta": run.task.tta.name}),
            "epoch": best["best_epoch"],
            "monitor": {"name": run.task.monitor, "value": best["best"]},
            "fingerprint": run.data.cache.digest,
        },
    )


def both_protocols(run: Run, trainer: pl.Trainer, found: Evaluation) -> dict[str, Any]:
    """Masks of a split at network size and one half: of the epoch that validation chose, and as papers have them.

    The latter are of the epoch that was chosen on the reported split itself, of which `paper.ckpt` has the weights;
    the task is left with these. Of a run without it there are the former alone.
    """

    def at_network_size(evaluation: Evaluation) -> dict[str, float]:
        return cast(MaskEvaluation, evaluation).at_network_size()  # labels were refused

    result: dict[str, Any] = {"split": found.split, "clean": {"epoch": run.best["best_epoch"]} | at_network_size(found)}
    if run.folder is not None and run.folder.paper.exists():
        epoch = run.load_weights(run.folder.paper)["callbacks"]["Checkpoint"]["paper_epoch"]
        again = evaluate(trainer, run.task, run.data, found.split)
        result["paper"] = {"epoch": epoch} | at_network_size(again)
    return result


def print_protocols(run: Run, found: Mapping[str, Any]) -> None:
    """Prints what `both_protocols` found, and what is what."""
    size, chooser = "x".join(map(str, run.data.spec.image_size)), run.data.reported_split
    columns = {name: found[name] for name in ("clean", "paper") if name in found}
    print_table(f"{found['split']} at network size {size}, probability 0.5", columns, {}, {})
    print(f"clean: epoch {found['clean']['epoch']}, chosen on val by {run.task.monitor}")
    if "paper" in found:
        print(
            f"paper: epoch {found['paper']['epoch']}, chosen on {chooser} itself, the split that is reported, by its "
            "pooled Dice: to compare with numbers that were published so; it flatters"
        )
    print("unetpp_iou: pooled over batches of 16 images in the order of their ids, then the mean over batches")


def print_distances(run: Run, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Prints of how many masks distances between boundaries are means."""
    for split, values in columns.items():
        if "distances" in values and isinstance(run.task, SegmentationTask):
            masks = len(run.data.splits[split]) * len(run.data.spec.classes)
            print(
                f"{split}: hd95 and assd (pixels) are means over {values['distances']:.0f} of {masks} masks: where one "
                f"of truth and prediction is empty there is none, and nsd (tolerance {run.task.tolerance:g}) is 0"
            )


def show(place: RunFolder, run: Run) -> None:
    """Prints the results of a finished run."""
    metrics = run.metrics
    splits: dict[str, dict[str, float]] = {name: metrics[name] for name in ("val", "test") if name in metrics}
    if "test" not in splits and "test" in run.data.splits:
        log.info("test=false: nobody has looked at test; python -m medvision.evaluate run=%s measures it", place.path)
    elif "test" not in splits:
        log.warning(
            "%s has no test split here: the numbers are of the validation split, which also chose the epoch%s, so they "
            "flatter",
            run.data.spec.name,
            " and the threshold" if run.decision.threshold else "",
        )
    title = f"epoch {metrics['epoch']}" + (f", tta {metrics['tta']}" if "tta" in metrics else "")
    if run.decision.threshold:
        title += f", {run.decision}" + (" chosen on validation" if run.config.threshold == "validation" else "")
    beside = {f"{s} {name}": of for s, found in metrics.get("beside", {}).items() for name, of in found.items()}
    details = metrics.get("details", {})
    print_table(title, splits | beside, metrics.get("intervals", {}), details)
    for split in splits:
        print_details(split, details.get(split, {}))
    print_distances(run, splits)
    if "paper" in metrics:
        print_protocols(run, metrics["paper"])
    for name, scored in metrics.get("challenge", {}).items():
        for split, values in scored.items():
            print_challenge(name, split, values)
    print(f"pictures: {place.picture([*splits][-1])}\nresults:  {place.metrics}")
    if hint := precision_hint(str(run.config.trainer.precision)):
        print(hint)


def print_table(
    title: str,
    columns: dict[str, dict[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
    details: Mapping[str, Mapping[str, Any]],
) -> None:
    """Prints metrics, a column for each split, and beside it one for its intervals if it has any."""
    missing = {name: found.get("not_defined", {}) for name, found in details.items()}
    known = [key for values in [*columns.values(), *missing.values()] for key in values]
    per_class = sorted({k for k in known if k.startswith(PER_CLASS) and "/" in k})
    shown = [*(name for name in (SHOWN if SHOWN[0] in known else NAMES) if name in known), *per_class]
    header, cells = ["metric"], [shown]
    for name, values in columns.items():
        header.append(name)
        undefined = missing.get(name, {})
        cells.append([f"{values[m]:.4f}" if m in values else "not defined" if m in undefined else "-" for m in shown])
        if bounds := intervals.get(name):
            header.append("95 %")
            cells.append(["{:.3f} to {:.3f}".format(*bounds[m]) if m in bounds else "-" for m in shown])
    print_rows(title, header, [*zip(*cells, strict=True)])


def print_details(split: str, details: Mapping[str, Any]) -> None:
    """Prints what `Evaluation.details` has of AUROCs by DeLong and of metrics without a value."""
    for name, (low, high) in details.get("delong", {}).items():
        print(f"{name} of {split}, 95 % by DeLong: {low:.3f} to {high:.3f}")
    reasons: dict[str, list[str]] = {}
    for name, reason in details.get("not_defined", {}).items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"not defined on {split}, where {reason}: {', '.join(names)}")


def print_challenge(name: str, split: str, values: Mapping[str, float]) -> None:
    """Prints a line of the scores of a challenge."""
    numbers = ", ".join(f"{key} {value:.4f}" for key, value in values.items() if "/" not in key)
    print(f"{name}, {split} as the organisers score: {numbers or 'nothing to rank'}")


def precision_hint(precision: str) -> str | None:
    """Says where 16-bit arithmetic would help and is not used."""
    import torch

    if "16" in precision:
        return None
    flags = Path("/proc/cpuinfo")
    cpu = flags.exists() and "avx512_bf16" in flags.read_text(encoding="utf-8")
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if not (gpu or (cpu and not torch.cuda.is_available())):
        return None
    device = "GPU" if gpu else "CPU"
    return f"this {device} computes in bfloat16: trainer.precision=bf16-mixed can halve the time of a step"


def require_finished(place: RunFolder) -> None:
    """Refuses a run that is not finished; of a folder that holds none `load_run` says so.

    Raises:
        MedvisionError: If the run has no results yet.
    """
    if place.config.exists() and not place.metrics.exists():
        raise MedvisionError(f"{place.path} is not finished; go on with python -m medvision.train resume={place.path}")
