"""A trained model measured on a split: counted at every threshold, summarised at one."""

import csv
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from medvision.data import ImageDataModule
from medvision.errors import MedvisionError
from medvision.figures import Example
from medvision.metrics import COUNTS, GRID, best_threshold, scores, summarise
from medvision.tasks import ImageCounts, SegmentationTask, resize_probability


@dataclass(frozen=True)
class Evaluation:
    """Every image of a split, counted at its own size.

    Attributes:
        split: Name of the split.
        classes: The K names.
        images: One entry for each image, in the order of their ids.
        thresholds: The T thresholds at which they were counted, ascending.
    """

    split: str
    classes: tuple[str, ...]
    images: tuple[ImageCounts, ...]
    thresholds: NDArray[np.float32]

    def counts(self, threshold: Sequence[float]) -> NDArray[np.int64]:
        """Counts (N, K, 4) at a threshold for each class.

        Raises:
            MedvisionError: If nothing was counted at one of them.
        """
        if missing := [value for value in threshold if np.float32(value) not in self.thresholds]:
            raise MedvisionError(f"threshold {missing[0]} was not counted; name it in evaluate(..., also=[...])")
        at = np.searchsorted(self.thresholds, np.asarray(threshold, np.float32))
        return np.stack([image.counts[at, np.arange(len(self.classes))] for image in self.images])

    def choose(self, pooled: bool = False) -> list[float]:
        """For each class the threshold of the grid with the highest Jaccard, the mean over images or pooled."""
        grid = np.searchsorted(self.thresholds, GRID)
        counts = np.stack([image.counts[grid] for image in self.images])
        return [best_threshold(counts[:, :, k], GRID, pooled=pooled) for k in range(len(self.classes))]

    def summary(self, threshold: Sequence[float]) -> dict[str, float]:
        """Pooled metrics and means over images at a threshold for each class."""
        return summarise(self.counts(threshold), self.classes)

    def table(self, threshold: Sequence[float]) -> str:
        """CSV with a row for each image and class: counts and metrics, from which any summary can be recomputed."""
        counts = self.counts(threshold)
        metrics = scores(counts)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "height", "width", "class", "threshold", *COUNTS, *metrics])
        for n, image in enumerate(self.images):
            for k, name in enumerate(self.classes):
                values = [float(column[n, k]) for column in metrics.values()]
                shown = ["" if np.isnan(value) else value for value in values]
                writer.writerow([image.id, *image.size, name, threshold[k], *counts[n, k].tolist(), *shown])
        return text.getvalue()


def evaluate(
    trainer: pl.Trainer, task: SegmentationTask, data: ImageDataModule, split: str, also: Sequence[float] = ()
) -> Evaluation:
    """Measures a split at the original size of each mask.

    Args:
        trainer: Decides device and precision.
        task: The trained task.
        data: The data set.
        split: `train`, `val` or `test`.
        also: Thresholds to count at besides the grid.

    Raises:
        MedvisionError: If a threshold is not between 0 and 1, or the split is not there.
    """
    if wrong := [value for value in also if not 0 < value < 1]:
        raise MedvisionError(f"threshold is {wrong[0]}; expected a probability above 0 and below 1")
    task.thresholds = np.unique(np.append(GRID, np.asarray(also, np.float32)))
    trainer.test(task, dataloaders=data.evaluation_dataloader(split), verbose=False)
    images = tuple(sorted(task.counted, key=lambda image: image.id))
    return Evaluation(split, data.spec.classes, images, task.thresholds)


def step_times(
    trainer: pl.Trainer, task: SegmentationTask, models: Sequence[torch.nn.Module], image: torch.Tensor, rounds: int = 5
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


def examples(
    task: SegmentationTask,
    data: ImageDataModule,
    evaluation: Evaluation,
    threshold: Sequence[float],
    number: int = 6,
) -> list[Example]:
    """Images from the worst to the best per-image Jaccard, evenly spaced, so that a sheet shows no choice of ours."""
    jaccard = scores(evaluation.counts(threshold))["jaccard"].mean(1)
    order = np.argsort(jaccard, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))]
    dataset, result = data.dataset(evaluation.split, full=True), []
    positions = {str(name): position for position, name in enumerate(dataset.ids)}
    task.eval()
    for n in chosen:
        image = evaluation.images[n]
        item: dict[str, Any] = dataset[positions[image.id]]
        with torch.inference_mode():
            probability = task.probability(item["image"][None].to(task.device))[0]
        full = resize_probability(probability, image.size).cpu().numpy()
        prediction = full >= np.asarray(threshold, np.float32)[:, None, None]
        caption = (
            f"{image.id}   jaccard {jaccard[n]:.3f}   (rank {int(np.flatnonzero(order == n)[0]) + 1} of {len(order)})"
        )
        picture, _ = data.splits[evaluation.split][positions[image.id]].read(data.spec.in_channels)
        result.append(Example(caption, picture, item["mask"].numpy() > 0, prediction))
    return result
