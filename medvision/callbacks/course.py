"""When a training stops, when its encoder thaws, and what it says after each epoch."""

import logging
import time

import pytorch_lightning as pl

from medvision import figures
from medvision.errors import MedvisionError
from medvision.models import EncoderModel

log = logging.getLogger(__name__)


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Lightning's, except that a run which had stopped early and is resumed does not train on.

    Args:
        monitor: The logged metric that decides.
        mode: `max` or `min`.
        patience: Epochs without an improvement after which training stops.
        min_delta: Least change that is an improvement.

    Raises:
        MedvisionError: If patience is negative.
    """

    def __init__(self, monitor: str, mode: str, patience: int, min_delta: float = 0.0) -> None:
        if patience < 0:
            raise MedvisionError(f"callbacks.early_stopping.patience is {patience}; expected 0 epochs or more")
        super().__init__(monitor, mode=mode, patience=patience, min_delta=min_delta)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops at once where patience had run out."""
        if self.wait_count >= max(self.patience, 1) or self.stopped_epoch > 0:
            trainer.should_stop = True


class Thaw(pl.Callback):
    """Freezes the encoder until the epoch that the model's `freeze_encoder` names, if it names one.

    The optimizer has all parameters from the beginning; those that get no gradient it leaves alone.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells the model which epoch begins, in a resumed run as in any other."""
        if isinstance(pl_module.model, EncoderModel):
            pl_module.model.start_epoch(trainer.current_epoch + 1)


class EpochLines(pl.Callback):
    """Says one line after each epoch and keeps the seconds that each took, validation and checkpoint included.

    Attributes:
        seconds: One number for each epoch of this process.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Speaks of the epoch before, whose numbers are complete now, and starts the clock."""
        self._say(trainer)
        self._started = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Speaks of the last epoch."""
        self._say(trainer)

    def _say(self, trainer: pl.Trainer) -> None:
        if self._started is None:
            return
        self.seconds.append(time.perf_counter() - self._started)
        metrics = trainer.callback_metrics
        monitor = str(trainer.lightning_module.monitor)
        shown = dict.fromkeys(["train/loss", "val/loss", *figures.watched(metrics), monitor])
        numbers = [f"{name} {float(metrics[name]):.4f}" for name in shown if name in metrics]
        log.info(
            "epoch %d/%s  %s  %.1f s",
            trainer.current_epoch,
            trainer.max_epochs,
            "  ".join(numbers),
            self.seconds[-1],
        )
