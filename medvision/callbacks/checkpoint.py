"""Checkpoints from which a run goes on exactly."""

import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.serialization import config as serialization

from medvision.errors import MedvisionError
from medvision.files import replacing


class Checkpoint(pl.callbacks.Checkpoint):
    """Writes `last.ckpt` after each epoch and `best.ckpt` when the monitored metric has improved.

    They are written as the next epoch starts, when schedules have stepped and every counter is settled, so that a
    run goes on from there as if it had not stopped. Both are whole files at any moment: links to slots,
    of which one that neither links to is written over. That takes a third of the time of a new file.

    Args:
        folder: Where they go.
        monitor: The logged metric that chooses.
        mode: `max` or `min`.
        **others: Names of further files, as `best`, each with the logged metric of which it keeps the highest.
    """

    def __init__(self, folder: Path, monitor: str, mode: str, **others: str) -> None:
        self.folder = folder
        self.monitors = {"best": (monitor, 1 if mode == "max" else -1)} | {name: (m, 1) for name, m in others.items()}
        self.values: dict[str, float | None] = dict.fromkeys(self.monitors)
        self.epochs = dict.fromkeys(self.monitors, 0)  # counted from 1
        self._improved: set[str] = set()
        self._pending = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know: for each file its value and its epoch, as `best` and `best_epoch`."""
        return self.values | {f"{name}_epoch": epoch for name, epoch in self.epochs.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best of the stopped run; one that starts from the checkpoint of another has its own best."""
        for name in self.monitors:
            if (self.folder / f"{name}.ckpt").exists():
                self.values[name], self.epochs[name] = state_dict[name], state_dict[f"{name}_epoch"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares with the best so far; of equal epochs the first stays."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        for name, (monitor, sign) in self.monitors.items():
            if monitor not in trainer.callback_metrics:
                known = sorted(trainer.callback_metrics)
                raise MedvisionError(f"task.monitor is {monitor!r}, which is not logged; expected one of {known}")
            value, best = float(trainer.callback_metrics[monitor]), self.values[name]
            if not math.isnan(value) and (best is None or sign * value > sign * best):
                self.values[name], self.epochs[name] = value, trainer.current_epoch + 1
                self._improved.add(name)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the epoch before."""
        trainer.fit_loop.restarting = False  # a resumed epoch is an epoch like any other, plateau schedules included
        if self._pending:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """There is something to save."""
        self._pending = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last epoch."""
        self._save(trainer)
        if trainer.is_global_zero:
            for slot in self.folder.glob(".*.slot"):
                slot.unlink()

    def _save(self, trainer: pl.Trainer) -> None:
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise MedvisionError(
                f"the training loss is {float(loss)} after epoch {trainer.current_epoch}; the checkpoints of the "
                "epochs before are kept. Try a smaller optimizer.lr, trainer.gradient_clip_val=1, or "
                "trainer.precision=32-true"
            )
        last, improved = self.folder / "last.ckpt", sorted(self._improved)
        self._improved, self._pending = set(), False
        if not trainer.is_global_zero:
            trainer.save_checkpoint(last)  # every process takes part, the first one writes
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        slots = (self.folder / f".{i}.slot" for i in itertools.count())
        slot = next(s for s in slots if not s.exists() or s.stat().st_nlink == 1)
        trainer.save_checkpoint(slot)
        # last.ckpt knows which epoch is best: if it came first, a kill in between would leave it an older best.ckpt
        for path in [*(self.folder / f"{name}.ckpt" for name in improved), last]:
            with replacing(path) as temporary:
                try:
                    os.link(slot, temporary)
                except OSError:  # a file system without links
                    shutil.copyfile(slot, temporary)


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file, over an older one: `Checkpoint` links to it when it is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint."""
        path = Path(path)
        with path.open("r+b" if path.exists() else "wb") as handle:
            with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # torch.load ignores it
                try:
                    torch.save(checkpoint, handle)
                except RuntimeError as error:  # torch cannot close the file that it could not write
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            handle.truncate()
