"""LightningModules: how a model is trained and measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from medvision.errors import MedvisionError
from medvision.losses import DeepSupervision
from medvision.metrics import GRID, Overlap, histogram, summarise
from medvision.models import EncoderModel
from medvision.optim import OneCycle, Parameters, needs_metric
from medvision.spec import DataSpec


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of one image counted at its own size.

    Attributes:
        id: The image.
        size: Height and width, pixels.
        counts: int64 (T, K, 4): true and false positives, false and true negatives at each threshold.
    """

    id: str
    size: tuple[int, int]
    counts: NDArray[np.int64]


class SegmentationTask(pl.LightningModule):
    """Trains and measures a model whose logits (N, K, H, W) have one sigmoid per class.

    While it trains, the validation split is measured at network size and a probability of one half; `test_step`
    measures at the original size of each mask and counts at every threshold.

    Args:
        model: `forward(image) -> logits`, or a list of logits while training with deep supervision.
        loss: `loss(logits, target) -> scalar`.
        optimizer: Makes the optimizer of the parameters that are to be trained, an iterable (see `optim.Parameters`).
        scheduler: Makes the learning-rate schedule of an optimizer, stepped each epoch, a `OneCycle` each batch; None
            keeps it constant.
        spec: The facts of the data set.
        monitor: The logged metric that chooses the epoch.
        mode: Whether more of it is better (`max`) or less (`min`).
        supervision_weights: Weights of deep supervision, the main output first; None is the mean.
        seed: Decides dropout and all else that a training step draws.
        channels_last: Keep tensors in the memory order that 16-bit convolutions are fast in.

    Raises:
        MedvisionError: If `monitor` is not logged or `mode` is neither.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None,
        spec: DataSpec,
        monitor: str = "val/jaccard_image",
        mode: Literal["max", "min"] = "max",
        supervision_weights: Sequence[float] | None = None,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.metrics = [f"val/{name}" for name in summarise(np.zeros((1, len(spec.classes), 4)), spec.classes)]
        if monitor not in ["val/loss", *self.metrics] or mode not in ("max", "min"):
            raise MedvisionError(
                f"task.monitor={monitor} task.mode={mode}: expected mode max or min and one of val/loss, "
                + ", ".join(self.metrics)
            )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.loss = DeepSupervision(loss, supervision_weights)
        self.optimizer, self.scheduler, self.spec, self.seed = optimizer, scheduler, spec, seed
        self.monitor, self.mode = monitor, mode
        self.overlap = Overlap(spec.classes)
        self.losses: dict[str, list[tuple[Tensor, int]]] = {"train": [], "val": []}
        self.thresholds: NDArray[np.float32] = GRID
        self.counted: list[ImageCounts] = []

    def forward(self, image: Tensor) -> Any:
        """Logits of normalised images (N, C, H, W)."""
        return self.model(image.contiguous(memory_format=self.memory_format))

    def probability(self, image: Tensor) -> Tensor:
        """Probabilities (N, K, H, W), float32, of normalised images (N, C, H, W)."""
        result: Tensor = self(image).float().sigmoid()
        return result

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Makes what a step draws a function of (seed, epoch, step, process): resumption repeats it.

        Logs the learning rate of an epoch's last step, if `training_step` will not.
        """
        state = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(state).generate_state(1, np.uint64)[0] >> 1))
        if self.trainer.is_last_batch and not self._logs_step():
            self.log("lr", self._rate(), on_step=False, on_epoch=True, batch_size=1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss: Tensor = self._step(batch, "train")[1]
        if self._logs_step():  # `log` takes a millisecond, on other steps for nothing
            self.log_dict({"train/loss_step": loss, "lr": self._rate()}, batch_size=len(batch["image"]))
        return loss

    def on_train_epoch_end(self) -> None:
        """Logs `train/loss`, the mean over the images of the epoch."""
        self.log("train/loss", self._mean_loss("train"), sync_dist=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Counts one batch; returns its probabilities, for callbacks that draw."""
        probability: Tensor = self._step(batch, "val")[0].float().sigmoid()
        self.overlap.update(probability, batch["target"])
        return probability

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the validation split as `val/<metric>`."""
        self.log("val/loss", self._mean_loss("val"), sync_dist=True)
        values = {f"val/{name}": value for name, value in self.overlap.compute().items()}
        # one without a value this time is NaN: Lightning would repeat a number that is not logged again
        self.log_dict(dict.fromkeys(self.metrics, float("nan")) | values)
        self.overlap.reset()

    def on_test_start(self) -> None:
        """Forgets an earlier evaluation."""
        self.counted = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Counts each image of a batch at the size of its `mask`, into `counted`."""
        for probability, mask, name in zip(self.probability(batch["image"]), batch["mask"], batch["id"], strict=True):
            if not bool(torch.isfinite(probability).all()):
                raise MedvisionError(
                    f"the model answers NaN for {name}; expected probabilities: these weights are broken"
                )
            full = resize_probability(probability, mask.shape[-2:])
            counts = histogram(full, mask.to(full.device), self.thresholds)
            self.counted.append(ImageCounts(name, (mask.shape[-2], mask.shape[-1]), counts))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and, if there is one, the schedule."""
        optimizer = self.optimizer(self._trained())
        if self.scheduler is None:
            return optimizer
        if isinstance(self.scheduler, OneCycle):
            steps = None if self._trainer is None else int(self.trainer.estimated_stepping_batches)
            settings = {"scheduler": self.scheduler(optimizer, steps), "interval": "step"}
        else:
            schedule = self.scheduler(optimizer)
            settings = {"scheduler": schedule, "interval": "epoch", "monitor": self.monitor}
            settings["reduce_on_plateau"] = needs_metric(schedule)
        return {"optimizer": optimizer, "lr_scheduler": settings}  # type: ignore[return-value]  # a TypedDict by shape

    def _logs_step(self) -> bool:
        """Whether the trainer hands the numbers of this step to its loggers."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of its class
        return bool(every) and (self.global_step + 1) % every == 0

    def _rate(self) -> float:
        """The learning rate now, with `optimizer.layer_decay` that of the head."""
        return float(max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

    def _trained(self) -> Parameters:
        """Those to be trained; in layers too, if the model has an encoder."""
        model = self.model
        trained = [p for p in model.parameters() if p.requires_grad]
        if not isinstance(model, EncoderModel):
            return Parameters(trained)

        def layers() -> list[list[nn.Parameter]]:
            image = trained[0].new_zeros(1, self.spec.in_channels, *self.spec.image_size)
            return [[p for _, p in layer if p.requires_grad] for layer in model.layers(image)]

        return Parameters(trained, layers)

    def _step(self, batch: dict[str, Any], split: str) -> tuple[Any, Tensor]:
        outputs = self(batch["image"])
        loss: Tensor = self.loss(outputs, batch["target"])
        self.losses[split].append((loss.detach(), len(batch["image"])))
        return outputs, loss

    def _mean_loss(self, split: str) -> Tensor:
        losses, images = zip(*self.losses[split], strict=True)
        self.losses[split] = []
        values = torch.stack(losses).float()
        mean: Tensor = values @ values.new_tensor(images) / sum(images)
        return mean


def resize_probability(probability: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes probabilities (K, H, W) to (K, *size), bilinear."""
    if tuple(probability.shape[-2:]) == tuple(size):
        return probability
    return F.interpolate(probability[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
