"""The end of a run: both splits measured, everything written to its folder, a table on the terminal."""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medvision import figures
from medvision.build import Run, load_run
from medvision.errors import MedvisionError
from medvision.evaluation import evaluate
from medvision.files import write_json, write_text
from medvision.logger import read_history
from medvision.metrics import NAMES
from medvision.runs import RunFolder

log = logging.getLogger(__name__)

SHOWN = (
    "dice_image",
    "jaccard_image",
    "dice",
    "jaccard",
    "sensitivity_image",
    "specificity_image",
    "precision_image",
)
PER_CLASS = ("dice", "jaccard", "auroc", "average_precision", "sensitivity/")


def finish(place: RunFolder) -> None:
    """Measures validation and test with the best epoch's weights and writes the results; `metrics.json` is the last.

    The threshold of each class is chosen on validation, unless the config gives a number, and applied to test.
    """
    run = load_run(place.path)
    trainer, wanted = run.evaluating(), run.config.threshold
    val = evaluate(trainer, run.task, run.data, "val", [] if wanted == "validation" else [wanted])
    decision = val.choose(run.task.monitor) if wanted == "validation" else run.fixed(wanted)
    results: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    challenge: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for split in ("val", "test"):
        if split in run.data.splits:
            found = val if split == "val" else evaluate(trainer, run.task, run.data, split, decision.threshold)
            results[split] = found.summary(decision)
            intervals[split] = found.intervals(decision)
            details[split] = found.details(decision)
            if run.data.spec.challenge is not None:
                challenge[split] = found.challenge(run.data.spec.challenge, decision)
            write_text(place.results(split), found.table(decision))
            found.draw(place.picture(split), run.task, run.data, decision)
    figures.curves(place.path / "curves.png", read_history(place.history))
    best = run.best
    write_json(
        place.metrics,
        results
        | decision.entries()
        | {
            "intervals": intervals,
            "details": details,
            "challenge": {run.data.spec.challenge: challenge} if challenge else {},
            "epoch": best["best_epoch"],
            "monitor": {"name": run.task.monitor, "value": best["best"]},
            "fingerprint": run.data.cache.digest,
        },
    )


def show(place: RunFolder, run: Run) -> None:
    """Prints the results of a finished run."""
    metrics = run.metrics
    splits: dict[str, dict[str, float]] = {name: metrics[name] for name in ("val", "test") if name in metrics}
    if "test" not in splits:
        log.warning(
            "%s has no test split here: the numbers are of the validation split, which also chose the epoch%s, so they "
            "flatter",
            run.data.spec.name,
            " and the threshold" if run.decision.threshold else "",
        )
    title = f"epoch {metrics['epoch']}"
    if run.decision.threshold:
        title += f", {run.decision}" + (" chosen on validation" if run.config.threshold == "validation" else "")
    details = metrics.get("details", {})
    print_table(title, splits, metrics.get("intervals", {}), details)
    for split in splits:
        print_details(split, details.get(split, {}))
    for name, scored in metrics.get("challenge", {}).items():
        for split, values in scored.items():
            print_challenge(name, split, values)
    print(f"pictures: {place.picture(run.data.reported_split)}\nresults:  {place.metrics}")
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


def print_rows(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """Prints a table, columns of words to the left, numbers to the right; plain text where that is no terminal."""
    terminal = sys.stdout.isatty()
    table = Table(box=box.ROUNDED if terminal else box.ASCII2)
    for n, name in enumerate(header):
        table.add_column(name, justify="left" if n in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # [ and ] are no markup
    print(title)
    Console(width=None if terminal else 1000).print(table)  # a line of a file is not broken


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
    """Refuses what needs a finished run.

    Raises:
        MedvisionError: If the run has no results yet.
    """
    if not place.metrics.exists():
        raise MedvisionError(f"{place.path} is not finished; go on with python -m medvision.train resume={place.path}")
