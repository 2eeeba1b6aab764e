"""The trial of a search, while it trains: it reports each epoch, and is stopped when others were better."""

import logging
import math
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from medvision.files import read_json, write_json
from medvision.study import Report

log = logging.getLogger(__name__)


class Pruning(pl.Callback):
    """Reports the monitored metric after each epoch to the search's journal, and stops the training if told so.

    That is written to a file. A trial in its last epoch is left to finish.

    Args:
        trial: The file that names the journal, relative to its own folder, and the trial's number.
        pruned: The file to be written.
        monitor: The logged metric.
    """

    def __init__(self, trial: Path, pruned: Path, monitor: str) -> None:
        self.trial, self.pruned, self.monitor = trial, pruned, monitor
        self._report: Report | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the journal, in one process.

        Raises:
            MedvisionError: If it is missing, or Optuna is.
        """
        if trainer.is_global_zero:
            trial = read_json(self.trial)
            self._report = Report((self.trial.parent / trial["journal"]).resolve(), trial["number"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports, and stops what is not worth going on with."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        epoch, stop = trainer.current_epoch + 1, False
        if self._report is not None and self.monitor in trainer.callback_metrics:
            value = float(trainer.callback_metrics[self.monitor])
            stop = self._report(epoch, value) and epoch != trainer.max_epochs
            if stop:
                known = value if math.isfinite(value) else None
                write_json(self.pruned, {"epoch": epoch, "metric": self.monitor, "value": known})
                log.info("stopped after epoch %d: other trials were better by then", epoch)
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True
