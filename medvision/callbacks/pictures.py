"""Pictures of validation images while training goes on: predictions, curves and heat maps."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.seed import isolate_rng

from medvision import figures
from medvision.data import ImageDataModule
from medvision.errors import MedvisionError
from medvision.explanation import RULES, Target, explain, row
from medvision.explanation.maps import default_layers
from medvision.logger import read_history
from medvision.metrics import one_hot
from medvision.tasks import Task


class _FirstImages(pl.Callback):
    """Looks at the first images of the validation split, in each validation anew.

    Args:
        images: Number of images.
    """

    _rows: list[Any]

    def __init__(self, images: int) -> None:
        self.images = images
        self._rows = []

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
        """Looks at what is missing; a second data loader is of another split."""
        if not dataloader_idx and (missing := self.images - len(self._rows)) > 0:
            self._look(trainer, cast(Task, pl_module), batch, outputs, missing)

    def _look(self, trainer: pl.Trainer, task: Task, batch: Any, outputs: Any, most: int) -> None:
        """Adds to `_rows` what is to be drawn of so many images at most."""
        raise NotImplementedError


class Pictures(_FirstImages):
    """Draws `validation.png`, the first validation images with truth and prediction, and `curves.png`.

    They go to the trainer's `default_root_dir`, the run folder.

    It uses the probabilities that validation computed anyway and draws nothing from a random state, so that the
    course of the training is the same without it.

    Args:
        images: Number of images.
        every_seconds: Least time between two drawings; the last epoch is always drawn.
    """

    def __init__(self, images: int = 6, every_seconds: float = 60) -> None:
        super().__init__(images)
        self.every_seconds = every_seconds
        self._drawn = time.monotonic()

    def _look(self, trainer: pl.Trainer, task: Task, batch: Any, outputs: Any, most: int) -> None:
        """Keeps images with their probabilities."""
        data = _data(trainer)
        for i in range(min(len(batch["id"]), most)):
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


class Explanations(_FirstImages):
    """Draws the heat of the same validation images at chosen epochs, to files and to TensorBoard and wandb.

    The files go to `explanations` in the trainer's `default_root_dir`, the run folder. The weights explained are those
    that validation measures, also where they are averages. Neither gradients nor random states are touched, so that the
    course of the training is the same without it, bit for bit.

    Args:
        images: Number of images.
        epochs: A number n for every nth epoch, or a list of epochs, counted from 1.
        layers: Names of layers; None chooses them (see `maps.default_layers`).
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
        super().__init__(images)
        self.epochs, self.layers = epochs, [*dict.fromkeys(layers or [])]
        self.method, self.target = method, target

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what cannot be explained before an epoch is spent on it."""
        if trainer.is_global_zero:
            data = _data(trainer)
            shape, draw = (1, data.spec.in_channels, *data.spec.image_size), torch.Generator().manual_seed(0)
            with isolate_rng():
                self._explain(data, cast(Task, pl_module), torch.randn(shape, generator=draw), ["noise"])
            self._rows = []

    def _look(self, trainer: pl.Trainer, task: Task, batch: Any, outputs: Any, most: int) -> None:
        """Explains images while the weights are those of validation."""
        if self._due(trainer):
            with isolate_rng():
                self._explain(_data(trainer), task, batch["image"][:most], batch["id"])

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
            images = batch.detach().clone().to(next(task.model.parameters()))
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
