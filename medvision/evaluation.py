"""A trained model measured on a split, summarised at a threshold, which another split has chosen."""

import csv
import io
import logging
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from medvision import figures
from medvision.data import ImageDataModule
from medvision.errors import MedvisionError
from medvision.metrics import (
    COUNTS,
    GRID,
    OF_LABELS,
    OF_MASKS,
    Bootstrap,
    best_decision,
    best_threshold,
    decide,
    one_hot,
    scores,
    summarise,
    summarise_intervals,
    summarise_label_intervals,
    summarise_labels,
)
from medvision.tasks import ClassificationTask, ImageCounts, SegmentationTask, Task, resize_probability

log = logging.getLogger(__name__)


class Evaluation(ABC):
    """A split, measured.

    Attributes:
        split: Name of the split.
        classes: The K names.
    """

    split: str
    classes: tuple[str, ...]

    @abstractmethod
    def choose(self, monitor: str) -> list[float]:
        """The best threshold of each class, in the sense of the metric that chose the epoch; none if none is used."""

    @abstractmethod
    def summary(self, threshold: Sequence[float]) -> dict[str, float]:
        """Metrics of the whole split at a threshold for each class."""

    @abstractmethod
    def intervals(self, threshold: Sequence[float]) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals over images of the entries of `summary`, over groups of them where there are any.

        What less than two images or groups have a value of has no interval.
        """

    @abstractmethod
    def challenge(self, name: str, threshold: Sequence[float]) -> dict[str, float]:
        """The scores of a challenge, as its organisers compute them (see `metrics.challenge`)."""

    @abstractmethod
    def rows(self, threshold: Sequence[float]) -> Iterator[list[object]]:
        """A header, then a row for each image and class, from which any summary and interval can be recomputed."""

    @abstractmethod
    def draw(self, path: Path, task: Task, data: ImageDataModule, threshold: Sequence[float]) -> None:
        """Draws images from the worst to the best, evenly spaced, so that a sheet shows no choice of ours."""

    def table(self, threshold: Sequence[float]) -> str:
        """`rows` as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows(threshold))
        return text.getvalue()


@dataclass(frozen=True)
class MaskEvaluation(Evaluation):
    """Every image of a split, counted at its own size.

    Attributes:
        split: Name of the split.
        classes: The K names.
        images: One entry for each image, in the order of their ids.
        thresholds: The T thresholds at which they were counted, ascending.
        groups: What each image belongs to, as a sequence or a patient; None where that is not known.
    """

    split: str
    classes: tuple[str, ...]
    images: tuple[ImageCounts, ...]
    thresholds: NDArray[np.float32]
    groups: tuple[str, ...] | None = None

    def counts(self, threshold: Sequence[float]) -> NDArray[np.int64]:
        """Counts (N, K, 4) at a threshold for each class.

        Raises:
            MedvisionError: If nothing was counted at one of them.
        """
        if missing := [value for value in threshold if np.float32(value) not in self.thresholds]:
            raise MedvisionError(f"threshold {missing[0]} was not counted; name it in evaluate(..., also=[...])")
        at = np.searchsorted(self.thresholds, np.asarray(threshold, np.float32))
        return np.stack([image.counts[at, np.arange(len(self.classes))] for image in self.images])

    def choose(self, monitor: str) -> list[float]:
        """For each class the threshold of the grid with the highest Jaccard: pooled if the monitor pools pixels."""
        pooled = monitor.split("/")[1] in ("dice", "jaccard")
        grid = np.searchsorted(self.thresholds, GRID)
        counts = np.stack([image.counts[grid] for image in self.images])
        return [best_threshold(counts[:, :, k], GRID, pooled=pooled) for k in range(len(self.classes))]

    def summary(self, threshold: Sequence[float]) -> dict[str, float]:
        """Pooled metrics and means over images at a threshold for each class."""
        return summarise(self.counts(threshold), self.classes)

    def intervals(self, threshold: Sequence[float]) -> dict[str, tuple[float, float]]:
        """95 % intervals of the entries of `summary`."""
        bootstrap = Bootstrap(len(self.images), self.groups)
        return _known(summarise_intervals(self.counts(threshold), self.classes, bootstrap))

    def challenge(self, name: str, threshold: Sequence[float]) -> dict[str, float]:
        """The scores of a challenge of masks, one of `metrics.OF_MASKS`."""
        return OF_MASKS[name](self.counts(threshold), self.classes)

    def rows(self, threshold: Sequence[float]) -> Iterator[list[object]]:
        """A header, then counts and metrics of each image and class."""
        counts = self.counts(threshold)
        metrics = scores(counts)
        yield ["id", "group", "height", "width", "class", "threshold", *COUNTS, *metrics]
        groups = self.groups or [""] * len(self.images)
        for n, image in enumerate(self.images):
            for k, name in enumerate(self.classes):
                values = [float(column[n, k]) for column in metrics.values()]
                shown = ["" if np.isnan(value) else value for value in values]
                yield [image.id, groups[n], *image.size, name, threshold[k], *counts[n, k].tolist(), *shown]

    def draw(self, path: Path, task: Task, data: ImageDataModule, threshold: Sequence[float]) -> None:
        """Draws images with truth, prediction and errors, from the worst to the best per-image Jaccard."""
        title = f"{self.split}: from the worst to the best of {len(self.images)} images, threshold {_text(threshold)}"
        figures.sheet(path, self.examples(task, data, threshold), self.classes, title)

    def examples(
        self, task: Task, data: ImageDataModule, threshold: Sequence[float], number: int = 6
    ) -> list[figures.Example]:
        """Images from the worst to the best per-image Jaccard, evenly spaced."""
        jaccard = scores(self.counts(threshold))["jaccard"].mean(1)
        order = np.argsort(jaccard, kind="stable")
        dataset, result = data.dataset(self.split, full=True), []
        positions = {str(name): position for position, name in enumerate(dataset.ids)}
        task.eval()
        for n in _spaced(order, number):
            image = self.images[n]
            item: dict[str, Any] = dataset[positions[image.id]]
            with torch.inference_mode():
                probability = task.probability(item["image"][None].to(task.device))[0]
            full = resize_probability(probability, image.size).cpu().numpy()
            prediction = full >= np.asarray(threshold, np.float32)[:, None, None]
            rank = int(np.flatnonzero(order == n)[0]) + 1
            caption = f"{image.id}   jaccard {jaccard[n]:.3f}   (rank {rank} of {len(order)})"
            picture, _ = data.splits[self.split][positions[image.id]].read(data.spec.in_channels)
            result.append(figures.Example(caption, picture, item["mask"].numpy() > 0, prediction))
        return result


@dataclass(frozen=True)
class LabelEvaluation(Evaluation):
    """The probabilities of every image of a split.

    Attributes:
        split: Name of the split.
        classes: The K names.
        exclusive: Whether each image has exactly one of them: the most probable is decided for, without a threshold.
        ids: N images, sorted.
        probability: float32 (N, K).
        truth: bool (N, K).
        groups: What each image belongs to, as a patient; None where that is not known.
    """

    split: str
    classes: tuple[str, ...]
    exclusive: bool
    ids: tuple[str, ...]
    probability: NDArray[np.float32]
    truth: NDArray[np.bool_]
    groups: tuple[str, ...] | None = None

    def choose(self, monitor: str) -> list[float]:
        """For each class the threshold with the highest sensitivity plus specificity."""
        if self.exclusive:
            return []
        result = []
        for k, name in enumerate(self.classes):
            best = best_decision(self.probability[:, k], self.truth[:, k])
            if best is None:
                log.warning(
                    "%s is shown by all images of %s or by none: no threshold can be chosen there, it is 0.5",
                    name,
                    self.split,
                )
            result.append(0.5 if best is None else best)
        return result

    def summary(self, threshold: Sequence[float]) -> dict[str, float]:
        """Metrics of the ranking, and of the decision at a threshold for each class."""
        return summarise_labels(self.probability, self.truth, self.classes, threshold)

    def intervals(self, threshold: Sequence[float]) -> dict[str, tuple[float, float]]:
        """95 % intervals of the entries of `summary`."""
        bootstrap = Bootstrap(len(self.ids), self.groups)
        found = summarise_label_intervals(self.probability, self.truth, self.classes, threshold, bootstrap)
        return _known(found)

    def challenge(self, name: str, threshold: Sequence[float]) -> dict[str, float]:
        """The scores of a challenge of labels, one of `metrics.OF_LABELS`; none where nothing can be ranked."""
        both = self.truth.any() and not self.truth.all()
        return OF_LABELS[name](self.probability, self.truth) if both else {}

    def rows(self, threshold: Sequence[float]) -> Iterator[list[object]]:
        """A header, then truth, probability and decision of each image and class."""
        decided = decide(self.probability, threshold)
        yield ["id", "group", "class", "threshold", "truth", "probability", "decision"]
        groups = self.groups or [""] * len(self.ids)
        for n, image in enumerate(self.ids):
            for k, name in enumerate(self.classes):
                at = threshold[k] if len(threshold) else ""
                yield [
                    image,
                    groups[n],
                    name,
                    at,
                    int(self.truth[n, k]),
                    float(self.probability[n, k]),
                    int(decided[n, k]),
                ]

    def draw(self, path: Path, task: Task, data: ImageDataModule, threshold: Sequence[float]) -> None:
        """Draws images from the one to whose truth the least probability is given to that with the most."""
        given = np.where(self.truth, self.probability, 1 - self.probability).min(1)
        decided, order = decide(self.probability, threshold), np.argsort(given, kind="stable")
        samples = {sample.id: sample for sample in data.splits[self.split]}
        tiles = []
        for n in _spaced(order, 24):
            picture, masks = samples[self.ids[n]].read(data.spec.in_channels)
            said, there = (figures.named(self.classes, values[n]) for values in (decided, self.truth))
            verdict = there if said == there else f"{there}, not {said}"
            tiles.append(figures.Tile(f"{given[n]:.2f} {verdict}", picture, masks.transpose(2, 0, 1)[:0] > 0))
        title = f"{self.split}: {len(tiles)} of {len(self.ids)} images, by the probability that their truth was given"
        figures.gallery(path, tiles, [], title)


def evaluate(
    trainer: pl.Trainer,
    task: SegmentationTask | ClassificationTask,
    data: ImageDataModule,
    split: str,
    also: Sequence[float] = (),
) -> Evaluation:
    """Measures a split: masks at their original sizes, labels by the probabilities of each image.

    Args:
        trainer: Decides device and precision.
        task: The trained task.
        data: The data set.
        split: `train`, `val` or `test`.
        also: Thresholds at which masks are counted besides the grid.

    Raises:
        MedvisionError: If a threshold is not between 0 and 1, or the split is not there.
    """
    if wrong := [value for value in also if not 0 < value < 1]:
        raise MedvisionError(f"threshold is {wrong[0]}; expected a probability above 0 and below 1")
    if isinstance(task, SegmentationTask):
        task.thresholds = np.unique(np.append(GRID, np.asarray(also, np.float32)))
    with trainer.precision_plugin.forward_context():  # around all batches: weights are cast to 16 bits once
        trainer.test(task, dataloaders=data.evaluation_dataloader(split), verbose=False)
    classes = data.spec.classes
    group = {sample.id: sample.group for sample in data.splits[split] if sample.group is not None}
    if isinstance(task, SegmentationTask):
        images = tuple(sorted(task.counted, key=lambda image: image.id))
        groups = tuple(group.get(image.id, image.id) for image in images) if group else None
        return MaskEvaluation(split, classes, images, task.thresholds, groups)
    scored = sorted(task.scored, key=lambda image: image.id)
    truth = one_hot(torch.stack([image.target for image in scored]), len(classes))
    probability = torch.stack([image.probability for image in scored]).numpy()
    ids = tuple(image.id for image in scored)
    groups = tuple(group.get(name, name) for name in ids) if group else None
    return LabelEvaluation(split, classes, task.exclusive, ids, probability, truth, groups)


def step_times(
    trainer: pl.Trainer, task: Task, models: Sequence[torch.nn.Module], image: torch.Tensor, rounds: int = 5
) -> list[float]:
    """Seconds that each model takes to answer a batch: medians of rounds in which all take turns.

    Args:
        trainer: Decides device and precision.
        task: Decides the memory order.
        models: The models, which stay on the device in evaluation mode.
        image: Normalised images (N, C, H, W).
        rounds: How many, after one that is not counted.
    """
    device = trainer.strategy.root_device
    image = image.to(device).contiguous(memory_format=task.memory_format)
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for _ in range(1 + rounds):
            for model, times in zip(models, seconds, strict=True):
                model.to(device).eval()
                begin = time.perf_counter()
                model(image)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                times.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in seconds]


def _known(intervals: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {name: bounds for name, bounds in intervals.items() if not np.isnan(bounds).any()}


def _spaced(order: NDArray[np.intp], number: int) -> list[int]:
    """Entries from the first to the last, evenly spaced."""
    places = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))
    return [int(n) for n in order[places]]


def _text(threshold: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in threshold)
