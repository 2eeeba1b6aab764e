"""Lightning callbacks: checkpoints that resume exactly, averages of weights, early stopping, lines, pictures."""

import itertools
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from PIL import Image
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.seed import isolate_rng
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_avg_fn
from torch.utils.serialization import config as serialization

from medvision import figures
from medvision.data import ImageDataModule
from medvision.errors import MedvisionError
from medvision.explanation import RULES, Target, default_layers, explain, row
from medvision.files import replacing
from medvision.logger import read_history
from medvision.metrics import one_hot
from medvision.models import EncoderModel
from medvision.tasks import Task

log = logging.getLogger(__name__)


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


class Average(WeightAveraging):
    """What averages of weights share: validation measures the average, training goes on with the weights themselves.

    In a checkpoint `state_dict` is the average, so that whatever loads a run has it, and `current_model_state` are the
    weights, from which a run is resumed. Buffers are averaged like weights: the statistics of batch norms are then
    means of what the averaged networks had, and need no pass over the data of their own.

    Args:
        **options: `avg_fn` or `multi_avg_fn` of torch's AveragedModel.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(use_buffers=True, **options)

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses what cannot be averaged, before anything is begun.

        Raises:
            MedvisionError: If the weights themselves are kept in 16 bit.
        """
        precision = str(trainer.precision)
        if precision in ("16-true", "bf16-true"):
            raise MedvisionError(
                f"trainer.precision={precision} keeps weights in 16 bit, too coarse to be averaged; set "
                f"trainer.precision={precision.removesuffix('-true')}-mixed or callbacks=default"
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the average, at first a copy."""
        self.check(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follows the model to its device, which it moves to after `setup`."""
        # the count of updates stays where asking for it does not wait for a GPU
        self._average_model.module.to(pl_module.device)  # type: ignore[union-attr]  # made by setup

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the weights to `Checkpoint`, which comes after and keeps both."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the average in the model."""
        super().on_train_end(trainer, pl_module)


class EMA(Average):
    """The exponential moving average of the weights, updated after each optimizer step (Polyak & Juditsky 1992).

    `decay * average + (1 - decay) * weights`: about the last `1 / (1 - decay)` steps count.

    Args:
        decay: Above 0 and below 1.
        warmup: Step n, from 0, has at most the decay `(1 + n) / (10 + n)`, so that the random weights of the beginning
            are forgotten in a short training too.

    Raises:
        MedvisionError: If `decay` is none.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise MedvisionError(f"callbacks.average.decay is {decay}; expected a number above 0 and below 1")

        def update(averages: Any, weights: Any, count: Any) -> None:
            n = int(self._average_model.n_averaged)  # type: ignore[union-attr]  # it calls this
            now = min(decay, (1 + n) / (10 + n)) if warmup else decay
            get_ema_multi_avg_fn(now)(averages, weights, count)  # type: ignore[no-untyped-call]

        super().__init__(multi_avg_fn=update)


class SWA(Average):
    """Stochastic weight averaging (arXiv:1803.05407): the mean of the weights at the ends of the last epochs.

    The learning rate is that of the schedule; one that falls to nothing, as with scheduler=cosine, leaves little to
    average. Before its epochs begin, the average is the weights themselves. Lightning's StochasticWeightAveraging
    makes the average when training ends: validation and the best epoch would not be those of the average.

    Args:
        share: Which part of the epochs counts, above 0 and at most 1; one epoch at the least.

    Raises:
        MedvisionError: If `share` is none.
    """

    def __init__(self, share: float = 0.25) -> None:
        if not 0 < share <= 1:
            raise MedvisionError(f"callbacks.average.share is {share}; expected a number above 0, at most 1")
        self.share = share
        super().__init__(avg_fn=get_swa_avg_fn())  # type: ignore[no-untyped-call]

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses a training without a last epoch, too.

        Raises:
            MedvisionError: If the number of epochs is not known.
        """
        super().check(trainer)
        if not trainer.max_epochs or trainer.max_epochs < 1 or trainer.max_steps != -1:
            raise MedvisionError(
                f"callbacks=swa averages the last epochs, but trainer.max_epochs is {trainer.max_epochs} and "
                f"trainer.max_steps {trainer.max_steps}; set trainer.max_epochs alone, or callbacks=ema"
            )

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Not by itself."""
        return False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Averages at the end of an epoch, but before its validation."""
        average = self._average_model
        if average is None or not trainer.is_last_batch:
            return
        epochs = trainer.max_epochs or 1
        if trainer.current_epoch <= epochs - max(1, round(self.share * epochs)):
            average.n_averaged.zero_()  # a copy
        average.update_parameters(pl_module)


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


class Pictures(pl.Callback):
    """Draws `validation.png`, the first validation images with truth and prediction, and `curves.png`.

    They go to the trainer's `default_root_dir`, the run folder.

    It uses the probabilities that validation computed anyway and draws nothing from a random state, so that the
    course of the training is the same without it.

    Args:
        images: Number of images.
        every_seconds: Least time between two drawings; the last epoch is always drawn.
    """

    def __init__(self, images: int = 6, every_seconds: float = 60) -> None:
        self.images, self.every_seconds = images, every_seconds
        self._rows: list[figures.Example | figures.Tile] = []
        self._drawn = time.monotonic()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the pictures of the epoch before."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first images of the validation split with their probabilities."""
        if dataloader_idx:
            return
        data = _data(trainer)
        for i in range(min(len(batch["id"]), self.images - len(self._rows))):
            image = figures.to_pixels(batch["image"][i].float().cpu().numpy(), *data.normalisation)
            probability, target = outputs[i].float().cpu().numpy(), batch["target"][i].cpu()
            if data.spec.target == "mask":
                self._rows.append(
                    figures.Example(batch["id"][i], image, (target > 0).numpy(), probability >= 0.5),
                )
            else:
                truth = figures.named(data.spec.classes, one_hot(target[None], len(probability))[0])
                said = data.spec.classes[int(probability.argmax())]
                caption = f"{truth}: {said} {probability.max():.2f}"
                self._rows.append(figures.Tile(caption, image, np.zeros((0, *image.shape[:2]), bool)))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws both if the last drawing is old enough."""
        if trainer.is_global_zero and time.monotonic() - self._drawn >= self.every_seconds:
            self._draw(trainer, pl_module)
            folder = Path(trainer.default_root_dir)
            figures.curves(folder / "curves.png", {folder.name: read_history(folder / "metrics.csv")})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the images of the last epoch; the whole curves are drawn with the results."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if not (trainer.is_global_zero and self._rows):
            return
        after = f"after epoch {trainer.current_epoch}"
        path = Path(trainer.default_root_dir) / "validation.png"
        if examples := [row for row in self._rows if isinstance(row, figures.Example)]:
            title = f"validation at network size {after}, probability 0.5"
            figures.sheet(path, examples, _data(trainer).spec.classes, title)
        if tiles := [row for row in self._rows if isinstance(row, figures.Tile)]:
            figures.gallery(path, tiles, [], f"validation {after}: truth, and the most probable class")
        self._drawn = time.monotonic()


class Explanations(pl.Callback):
    """Draws the heat of the same validation images at chosen epochs, to files and to TensorBoard and wandb.

    The files go to `explanations` in the trainer's `default_root_dir`, the run folder. The weights explained are those
    that validation measures, also where they are averages. Neither gradients nor random states are touched, so that the
    course of the training is the same without it, bit for bit.

    Args:
        images: Number of images.
        epochs: A number n for every nth epoch, or a list of epochs, counted from 1.
        layers: Names of layers; None chooses them (see `explanation.default_layers`).
        method: A key of `explanation.RULES`.
        target: `predicted`, `positive` or the name of a class.

    Raises:
        MedvisionError: If a number or the method is none of those.
    """

    def __init__(
        self,
        images: int = 4,
        epochs: int | Sequence[int] = 1,
        layers: Sequence[str] | None = None,
        method: str = "grad_cam",
        target: str = "predicted",
    ) -> None:
        if images < 1 or min([epochs] if isinstance(epochs, int) else epochs, default=0) < 1:
            raise MedvisionError(f"callbacks.explain: images={images}, epochs={epochs}; expected numbers of 1 or more")
        if method not in RULES:
            raise MedvisionError(f"callbacks.explain.method={method}: expected one of {', '.join(RULES)}")
        self.images, self.epochs, self.layers = images, epochs, layers
        self.method, self.target = method, target
        self._rows: list[list[figures.Tile]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the pictures of the epoch before."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Explains the first images of the validation split while the weights are those of validation."""
        missing = self.images - len(self._rows)
        if missing > 0 and not dataloader_idx and self._due(trainer):
            with isolate_rng():
                self._explain(_data(trainer), cast(Task, pl_module), batch["image"][:missing], batch["id"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the sheet."""
        if self._rows and self._due(trainer):
            with isolate_rng():
                self._draw(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return False
        epoch = trainer.current_epoch + 1
        return epoch % self.epochs == 0 if isinstance(self.epochs, int) else epoch in self.epochs

    def _explain(self, data: ImageDataModule, task: Task, batch: torch.Tensor, names: Sequence[str]) -> None:
        with torch.inference_mode(False):
            images = batch.detach().clone().to(next(task.model.parameters()).dtype)
            self.layers = self.layers or default_layers(task.model, images[:1])
            target = Target(data.spec, task.activate, self.target)
            for image, name in zip(images, names, strict=False):  # one at a time: little memory beside the training's
                found = explain(task.model, image[None], self.layers, [self.method], target)
                pixels = figures.to_pixels(image.float().cpu().numpy(), *data.normalisation)
                heat = dict(zip(self.layers, found.heat[self.method][0].cpu().numpy(), strict=True))
                choice = found.choices[0]
                where = [] if choice.where is None else [choice.where.cpu().numpy() > 0]
                caption = f"{name}\n{found.probability[0]:.3f} {choice.name}"  # either may be long
                self._rows.append(row(pixels, heat, caption, np.array(where, bool)))

    def _draw(self, trainer: pl.Trainer) -> None:
        epoch = trainer.current_epoch + 1
        path = Path(trainer.default_root_dir) / "explanations" / f"epoch_{epoch:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = [tile for row in self._rows for tile in row]
        title = f"{self.method} of what is {self.target} after epoch {epoch}"
        figures.gallery(path, tiles, [], title, columns=len(self._rows[0]))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(Image.open(path))
                logger.experiment.add_image("explanations", pixels, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("explanations", [str(path)], step=trainer.global_step)


def _data(trainer: pl.Trainer) -> ImageDataModule:
    """The data set that every trainer of ours is given."""
    return cast(ImageDataModule, trainer.datamodule)  # type: ignore[attr-defined]  # set by fit
