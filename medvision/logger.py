"""The record of a training: one row for each logged number, in the run folder, right after any stop."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from medvision.files import as_csv, write_text

HEADER = ["epoch", "step", "metric", "value"]
Row = tuple[int, int, str, float]


class HistoryLogger(Logger):
    """Appends to `metrics.csv`; a resumed run takes back the rows that it is about to repeat.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._resuming = path.exists()

    @property
    def name(self) -> str:
        """Word of this logger."""
        return "history"

    @property
    def version(self) -> str:
        """There is one per run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run folder holds the config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one row a metric; epochs count from 1, steps from 0."""
        step = int(step or 0)
        epoch = int(metrics.get("epoch", 0)) + 1
        if self._resuming:
            kept = [row for row in read_history(self.path) if row[1] < step]
            write_text(self.path, as_csv([HEADER, *kept]))
            self._resuming = False
        rows = [[epoch, step, name, float(value)] for name, value in metrics.items() if name != "epoch"]
        new = [] if self.path.exists() else [HEADER]
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            handle.write(as_csv([*new, *rows]))


def read_history(path: Path) -> list[Row]:
    """The rows of `metrics.csv`: epoch (from 1), step (from 0), metric, value. A half-written last row is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [(int(epoch), int(step), name, float(value)) for epoch, step, name, value in csv.reader(lines[1:])]
