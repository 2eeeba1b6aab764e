"""LightningModules: how a model is trained and measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.losses import DeepSupervision
from medvision.metrics import (
    CHOICES,
    GRID,
    YOUDEN,
    Overlap,
    Ranking,
    boundary_scores,
    check_operating_point,
    count,
    histogram,
    lower_is_better,
)
from medvision.metrics.calibration import Calibration
from medvision.mixing import mix
from medvision.models import EncoderModel
from medvision.optim import OneCycle, Parameters, needs_metric
from medvision.postprocess import option_counts
from medvision.spec import DataSpec
from medvision.tta import TestTimeAugmentation

WATCHED = ("val", "paper")
"""What each loader of a validation is: the split that chooses, and the one that a paper chose by and reported."""


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of one image counted at its own size.

    Attributes:
        id: The image.
        size: Height and width, pixels.
        counts: int64 (T, K, 4): true and false positives, false and true negatives at each threshold.
        network: int64 (K, 4): the same at network size and a probability of one half.
        surface: The metrics of `boundary_scores` with the task's `decision`, (K,); empty without one.
        cleaned: int64 (K, 4): counts of the cleaned masks; none where the decision cleans none.
        options: int64 (O, K, 4): counts after each post-processing to choose among; none where none is chosen.
    """

    id: str
    size: tuple[int, int]
    counts: NDArray[np.int64]
    network: NDArray[np.int64]
    surface: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    cleaned: NDArray[np.int64] | None = None
    options: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class ImageScores:
    """What a model says of one image.

    Attributes:
        id: The image.
        probability: (K,), of each class.
        target: The class number, or (K,) of 0 and 1.
    """

    id: str
    probability: Tensor
    target: Tensor


class Task(pl.LightningModule):
    """What training any model has in common: its loss, optimizer and schedule, the metrics of an epoch.

    Args:
        model: `forward(image) -> logits`, or a list of logits while training with deep supervision.
        loss: `loss(outputs, target) -> scalar`.
        optimizer: Makes the optimizer of the parameters that are to be trained, an iterable (see `optim.Parameters`).
        scheduler: Makes the learning-rate schedule of an optimizer, stepped each epoch, a `OneCycle` each batch; None
            keeps it constant.
        spec: The facts of the data set.
        measures: For a split, `train` or `val`, what measures its probabilities while training.
        monitor: The logged metric that chooses the epoch.
        mode: Whether more of it is better (`max`) or less (`min`).
        seed: Decides dropout and all else that a training step draws.
        channels_last: Keep tensors in the memory order that 16-bit convolutions are fast in.

    Raises:
        MedvisionError: If `monitor` is not logged, or `mode` is not in its sense.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[Parameters], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None,
        spec: DataSpec,
        measures: dict[str, Overlap | Ranking],
        monitor: str,
        mode: Literal["max", "min"],
        seed: int,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.measures = nn.ModuleDict({f"of_{split}": measure for split, measure in measures.items()})
        known = ["val/loss", *self._names("val")]
        if monitor not in known or mode not in ("max", "min"):
            raise MedvisionError(
                f"task.monitor={monitor} task.mode={mode}: expected mode max or min and one of {', '.join(known)}"
            )
        if (best := "min" if lower_is_better(monitor.removeprefix("val/")) else "max") != mode:
            raise MedvisionError(
                f"task.monitor={monitor} task.mode={mode} would keep the worst epoch; expected task.mode={best}"
            )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.loss = loss
        self.optimizer, self.scheduler, self.spec, self.seed = optimizer, scheduler, spec, seed
        self.monitor, self.mode = monitor, mode
        self.chosen_by = monitor  # the threshold
        self.tta = TestTimeAugmentation("none")
        self.losses: dict[str, list[tuple[Tensor, int]]] = {split: [] for split in ("train", *WATCHED)}

    def forward(self, image: Tensor) -> Any:
        """Logits of normalised images (N, C, H, W)."""
        return self.model(image.contiguous(memory_format=self.memory_format))

    def activate(self, logits: Tensor) -> Tensor:
        """Probabilities of logits (N, K, ...), float32: a sigmoid for each class."""
        return logits.float().sigmoid()

    def probability(self, image: Tensor) -> Tensor:
        """Probabilities (N, K, ...), float32, of normalised images (N, C, H, W): the mean over the views of `tta`."""
        return self.tta(self, self.activate, image)

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
        outputs, loss = self._step(batch, "train")
        if "of_train" in self.measures:
            self._measure("train").update(self.activate(outputs.detach()), batch["target"])
        if self._logs_step():  # `log` takes a millisecond, on other steps for nothing
            numbers: dict[str, Tensor | float] = {"train/loss_step": loss, "lr": self._rate()}
            self.log_dict(numbers, batch_size=len(batch["image"]), sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Logs `train/loss`, the mean over the images of the epoch, and what is measured of it."""
        self._log_epoch("train")

    def on_validation_epoch_start(self) -> None:
        """Gives each process the buffers of the first, as statistics of batch norms: all measure one network."""
        if isinstance(network := self.trainer.model, DistributedDataParallel):
            network.broadcast_buffers = (
                False  # at each forward, of which processes with unequal shares have unequally many
            )
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Measures one batch of what is watched; returns its probabilities, for callbacks that draw."""
        split = WATCHED[dataloader_idx]
        probability = self.activate(self._step(batch, split)[0])
        self._measure(split).update(probability, batch["target"])
        return probability

    def on_validation_epoch_end(self) -> None:
        """Logs loss and metrics of the validation split as `val/<metric>`, and of a second one as `paper/<metric>`."""
        for split in WATCHED:
            if self.losses[split]:
                self._log_epoch(split)

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
        outputs, loss = self._loss(batch, split)
        self.losses[split].append((loss.detach(), len(batch["image"])))
        return outputs, loss

    def _loss(self, batch: dict[str, Any], split: str) -> tuple[Any, Tensor]:
        outputs = self(batch["image"])
        return outputs, self.loss(outputs, batch["target"])

    def _log_epoch(self, split: str) -> None:
        losses, images = zip(*self.losses[split], strict=True)
        self.losses[split] = []
        values = torch.stack(losses).float()
        weights = values.new_tensor(images)
        sums = self.trainer.strategy.reduce(torch.stack([values @ weights, weights.sum()]), reduce_op="sum")
        self.log(f"{split}/loss", sums[0] / sums[1])
        if f"of_{split}" in self.measures:
            measure = self._measure(split)
            found = {f"{split}/{name}": value for name, value in measure.compute().items()}
            # one without a value this time is NaN: Lightning would repeat a number that is not logged again
            self.log_dict(dict.fromkeys(self._names(split), float("nan")) | found)
            measure.reset()

    def _measure(self, split: str) -> Overlap | Ranking:
        return cast(Overlap | Ranking, self.measures[f"of_{split}"])

    def _names(self, split: str) -> list[str]:
        return [f"{split}/{name}" for name in self._measure(split).names]


class SegmentationTask(Task):
    """Trains and measures a model whose logits (N, K, H, W) have one sigmoid per class.

    While it trains, the validation split is measured at network size and a probability of one half; `test_step`
    measures at the original size of each mask and counts at every threshold.

    Attributes:
        decision: With which `test_step` measures boundaries too; None: it does not.

    Args:
        model: `forward(image) -> logits`, or a list of logits while training with deep supervision.
        loss: `loss(logits, target) -> scalar`, of one output.
        optimizer: See `Task`; so are `scheduler`, `spec`, `monitor`, `mode`, `seed`, `channels_last`.
        supervision_weights: Weights of deep supervision, the main output first; None is the mean.
        threshold_by: Metric by which thresholds are chosen, one of `metrics.CHOICES`; None: the monitor if it is one of
            a class or of all, else `jaccard_image`.
        empty: What an image counts that has neither truth nor prediction: 1, 0, or None, which leaves it out.
        tolerance: Of the normalised surface Dice, pixels; None: no boundaries are measured.

    Raises:
        MedvisionError: If `monitor` is not logged, `mode` is not in its sense, or another option has no meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[Parameters], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None,
        spec: DataSpec,
        monitor: str = "val/jaccard_image",
        mode: Literal["max", "min"] = "max",
        supervision_weights: Sequence[float] | None = None,
        seed: int = 0,
        channels_last: bool = False,
        threshold_by: str | None = None,
        empty: float | None = 1,
        tolerance: float | None = 2,
    ) -> None:
        if empty not in (0, 1, None):
            raise MedvisionError(f"task.empty={empty}: expected 1, 0, or null, which leaves the image out")
        if tolerance is not None and not tolerance >= 0:
            raise MedvisionError(f"task.tolerance={tolerance}: expected 0 pixels or more, or null for no boundaries")
        if threshold_by not in (None, *CHOICES):
            raise MedvisionError(f"task.threshold_by={threshold_by}: expected null or one of {', '.join(CHOICES)}")
        nothing = float("nan" if empty is None else empty)
        measures: dict[str, Overlap | Ranking] = {s: Overlap(spec.classes, empty=nothing) for s in WATCHED}
        loss = DeepSupervision(loss, supervision_weights)
        super().__init__(model, loss, optimizer, scheduler, spec, measures, monitor, mode, seed, channels_last)
        self.empty, self.tolerance = nothing, tolerance
        of_monitor = monitor.split("/")[1]
        self.chosen_by = threshold_by or (of_monitor if of_monitor in CHOICES else "jaccard_image")
        self.thresholds: NDArray[np.float32] = GRID
        self.decision: Decision | None = None
        self.choosing = False
        self.calibration = Calibration(len(spec.classes))
        self.counted: list[ImageCounts] = []

    def on_test_start(self) -> None:
        """Forgets an earlier evaluation."""
        self.counted, self.calibration = [], Calibration(len(self.spec.classes))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Counts each image of a batch at the size of its `mask`, into `counted`."""
        answers = zip(self.probability(batch["image"]), batch["target"], batch["mask"], batch["id"], strict=True)
        for probability, target, mask, name in answers:
            require_numbers(probability, name)
            full, truth = resize_probability(probability, mask.shape[-2:]), mask.to(probability.device)
            self.calibration.update(full[None], truth[None])
            network = count(probability >= 0.5, target).cpu().numpy()
            full = self.decision.calibrated(full) if self.decision else full
            counts = histogram(full, truth, self.thresholds)
            size, decided = (mask.shape[-2], mask.shape[-1]), self._decided(full, truth)
            self.counted.append(ImageCounts(name, size, counts, network, **decided))

    def _decided(self, probability: Tensor, truth: Tensor) -> dict[str, Any]:
        """What is known of the masks of the decision alone, of calibrated probabilities (K, H, W)."""
        decision, found = self.decision, dict[str, Any]()
        if decision is None or not (decision.cleaning or self.choosing or self.tolerance is not None):
            return {}
        masks, truths = decision.masks(probability.cpu().numpy()), truth.bool().cpu().numpy()
        if self.choosing:
            return {"options": option_counts(masks, truths)}
        if decision.cleaning:
            found["cleaned"] = count(torch.from_numpy(masks)[None], torch.from_numpy(truths)[None])[0].numpy()
        if self.tolerance is not None:
            found["surface"] = boundary_scores(masks, truths, self.tolerance, both_empty=self.empty)
        return found


class ClassificationTask(Task):
    """Trains and measures a model whose logits (N, K) are those of an image's labels.

    Exactly one class (`multiclass`) has a softmax over the logits, else each class a sigmoid. While it trains, the
    most probable class is decided for, or those with one half or more; `test_step` keeps each image's probabilities.

    Args:
        model: `forward(image) -> logits`.
        loss: `loss(logits, target) -> scalar`.
        optimizer: See `Task`; so are `scheduler`, `spec`, `monitor`, `mode`, `seed`, `channels_last`.
        mixup: See `mixing.mix`, by which training batches are mixed; so is `cutmix`. Metrics of training are then of
            mixed images, whose truth is that of the larger share.
        operating_point: What the threshold of each class is chosen for, see `metrics.best_decision`.

    Raises:
        MedvisionError: If `monitor` is not logged, `mode` is not in its sense, a strength is negative, or
            `operating_point` is unknown or asked for where the most probable class is decided for.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[Parameters], Optimizer],
        scheduler: Callable[[Optimizer], Any] | None,
        spec: DataSpec,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        operating_point: str | Mapping[str, float] = YOUDEN,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        self.exclusive = spec.kind == "multiclass"
        for name, strength in (("mixup", mixup), ("cutmix", cutmix)):
            if strength < 0:
                raise MedvisionError(f"task.{name} is {strength}; expected 0 (off) or more")
        check_operating_point(operating_point)
        if self.exclusive and operating_point != YOUDEN:
            raise MedvisionError(
                f"task.operating_point={operating_point}: {spec.name} has exclusive classes, of which the most "
                "probable is decided for; leave it out"
            )
        measures: dict[str, Overlap | Ranking] = {s: Ranking(spec.classes, self.exclusive) for s in ("train", "val")}
        super().__init__(model, loss, optimizer, scheduler, spec, measures, monitor, mode, seed, channels_last)
        self.mixup, self.cutmix, self.operating_point = mixup, cutmix, operating_point
        self.scored: list[ImageScores] = []

    def activate(self, logits: Tensor) -> Tensor:
        """Probabilities of logits (N, K), float32."""
        return logits.float().softmax(1) if self.exclusive else super().activate(logits)

    def on_test_start(self) -> None:
        """Forgets an earlier evaluation."""
        self.scored = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keeps the probabilities of each image, in `scored`."""
        probability = self.probability(batch["image"]).cpu()
        for name, values, target in zip(batch["id"], probability, batch["target"].cpu(), strict=True):
            require_numbers(values, name)
            self.scored.append(ImageScores(name, values, target))

    def _loss(self, batch: dict[str, Any], split: str) -> tuple[Any, Tensor]:
        if split != "train" or not (self.mixup or self.cutmix):
            return super()._loss(batch, split)
        image, order, share = mix(batch["image"], self.mixup, self.cutmix)
        outputs, target = self(image), batch["target"]
        return outputs, share * self.loss(outputs, target) + (1 - share) * self.loss(outputs, target[order])


def require_numbers(probability: Tensor, name: str) -> None:
    """Refuses what is no probability.

    Raises:
        MedvisionError: If the model answers NaN for the image of this name.
    """
    if not bool(torch.isfinite(probability).all()):
        raise MedvisionError(f"the model answers NaN for {name}; expected probabilities: these weights are broken")


def resize_probability(probability: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes probabilities (K, H, W) to (K, *size), bilinear."""
    if tuple(probability.shape[-2:]) == tuple(size):
        return probability
    return F.interpolate(probability[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
