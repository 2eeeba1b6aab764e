"""Overlap metrics from counted pixels: per image and pooled, at one threshold or at every one of a grid.

Names: `dice` and `jaccard` pool the pixels of all images; `dice_image` and `jaccard_image` are means over images.
Several classes are averaged with equal weight. 0/0 is `empty` for an image with neither truth nor prediction: 1 unless
another value is given, as in the ISIC challenges, or NaN, which leaves the image out of the mean. A ratio that is 0/0
for another reason (sensitivity without truth, say) is always left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

EMPTY = 1.0
COUNTS = ("tp", "fp", "fn", "tn")
CHOICES = ("dice", "jaccard", "dice_image", "jaccard_image")
"""What a threshold can be chosen by."""
LEAST_JACCARD = 0.65
"""Below it an image counts 0 in `threshold_jaccard`: a lesion is then said to be missed (arXiv:1902.03368)."""
GRID: NDArray[np.float32] = (np.arange(1, 100) / 100).astype(np.float32)
"""The thresholds among which validation chooses: 0.01 to 0.99."""

Counts = NDArray[Any]


def count(predicted: Tensor, target: Tensor) -> Tensor:
    """Counts pixels.

    Args:
        predicted: bool (N, K, H, W).
        target: (N, K, H, W), non-zero where the class is.

    Returns:
        int64 (N, K, 4): true positives, false positives, false negatives, true negatives.
    """
    truth = target.bool()
    tp = (predicted & truth).sum((-2, -1))
    positives, trues = predicted.sum((-2, -1)), truth.sum((-2, -1))
    pixels = truth.shape[-1] * truth.shape[-2]
    return torch.stack([tp, positives - tp, trues - tp, pixels - positives - trues + tp], -1)


def scores(counts: Counts, empty: float = EMPTY) -> dict[str, NDArray[np.float64]]:
    """Every metric of each row of counts.

    Args:
        counts: int (..., 4) as `count` gives them.
        empty: The value of 0/0 where neither truth nor prediction has a pixel; NaN is none.

    Returns:
        float64 arrays of shape (...), NaN where a metric has no value.
    """
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    nothing = tp + fp + fn == 0

    def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
        value = np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)
        result: NDArray[np.float64] = np.where(np.isnan(value) & nothing, empty, value)
        return result

    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "jaccard": ratio(tp, tp + fp + fn),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "precision": ratio(tp, tp + fp),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }


def image_scores(counts: Counts, empty: float = EMPTY) -> dict[str, NDArray[np.float64]]:
    """`scores`, and `threshold_jaccard`: the Jaccard index, or 0 where it is below `LEAST_JACCARD`."""
    result = scores(counts, empty)
    missed = result["jaccard"] < LEAST_JACCARD
    return result | {"threshold_jaccard": np.where(missed, 0.0, result["jaccard"])}


def summarise(
    counts: Counts,
    classes: Sequence[str],
    empty: float = EMPTY,
    also: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, float]:
    """Summary of a split.

    Args:
        counts: int (N, K, 4).
        classes: The K names.
        empty: As for `scores`.
        also: Other metrics of each image, (N, K), NaN where one has no value.

    Returns:
        Pooled metrics under their names and means over images under `<name>_image`; with several classes the mean
        over classes, and each class under `<name>/<class>`. A metric without a value is absent.
    """
    images = image_scores(counts, empty) | dict(also or {})
    by_class = scores(counts.sum(0), empty) | {
        f"{name}_image": np.array([_mean(column) for column in values.T]) for name, values in images.items()
    }
    result: dict[str, float] = {}
    for key, values in by_class.items():
        result[key] = _mean(values)
        if len(classes) > 1:
            result |= {f"{key}/{c}": float(v) for c, v in zip(classes, values, strict=True)}
    return {key: value for key, value in result.items() if not np.isnan(value)}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


class Overlap(Metric):
    """Counts of a split, batch by batch, each image once over all processes.

    Args:
        classes: Names of the classes.
        threshold: Probability from which a pixel is predicted.
        empty: As for `scores`.
    """

    full_state_update = False
    counts: list[Tensor]

    def __init__(self, classes: Sequence[str], threshold: float = 0.5, empty: float = EMPTY) -> None:
        super().__init__()
        self.classes, self.threshold, self.empty = classes, threshold, empty
        self.add_state("counts", default=[], dist_reduce_fx="cat")

    @property
    def names(self) -> list[str]:
        """What `compute` may answer."""
        return [*summarise(np.zeros((1, len(self.classes), len(COUNTS))), self.classes)]

    def update(self, probability: Tensor, target: Tensor) -> None:
        """Adds a batch: probabilities and target (N, K, H, W)."""
        self.counts.append(count(probability >= self.threshold, target))

    def compute(self) -> dict[str, float]:
        """The summary of all that was added."""
        counts = torch.cat(self.counts) if isinstance(self.counts, list) else self.counts
        return summarise(counts.cpu().numpy(), self.classes, self.empty)


def histogram(probability: Tensor, target: Tensor, thresholds: NDArray[np.float32]) -> NDArray[np.int64]:
    """Counts of one image at every threshold, in one pass over its pixels, exactly as comparing with each.

    Args:
        probability: float (K, H, W) in [0, 1].
        target: (K, H, W) of 0 and 1.
        thresholds: Ascending, T of them.

    Returns:
        int64 (T, K, 4), as `count` of `probability >= threshold`.
    """
    # a binary search for each pixel takes three times as long: a table finds the cell of a probability, and at most the
    # thresholds of that cell are compared, of which the grid has one. Bin: cell, then how many of these are reached
    cells = 128  # a power of two: multiplied exactly
    place = (thresholds * np.float32(cells)).astype(int).clip(0, cells)
    reached = np.arange(1, len(place) + 1) - np.searchsorted(place, place)
    width = 1 + reached.max(initial=0)
    bins = (cells + 1) * width
    edges = np.full(bins, np.inf, np.float32)
    edges[place * width + reached - 1] = thresholds
    edge = torch.from_numpy(edges).to(probability.device)
    values = probability.float().flatten()
    label = (values * cells).int().clamp_(0, cells).mul_(width)
    for _ in range(width - 1):
        label += values >= edge.index_select(0, label)
    classes = probability.shape[0]
    label = label.mul_(2).add_(target.flatten().bool()).view(classes, -1)
    label += torch.arange(0, classes * 2 * bins, 2 * bins, dtype=label.dtype, device=label.device)[:, None]
    counted = torch.bincount(label.flatten(), minlength=classes * 2 * bins).view(classes, bins, 2).cpu().numpy()
    above = counted[:, ::-1].cumsum(1)[:, ::-1]  # pixels in this bin or a higher one
    predicted, total = above[:, place * width + reached], above[:, :1]
    fp, tp = predicted[..., 0], predicted[..., 1]
    tn, fn = total[..., 0] - fp, total[..., 1] - tp
    result: NDArray[np.int64] = np.stack([tp, fp, fn, tn], -1).transpose(1, 0, 2)
    return result


def best_columns(
    counts: Counts, metric: str = "jaccard", pooled: bool = False, empty: float = EMPTY
) -> NDArray[np.intp]:
    """Which of several ways to decide have the highest mean of a per-image metric: all that are equally good.

    Args:
        counts: int (N, T, 4) of one class, T ways.
        metric: A key of `scores`.
        pooled: Whether to pool the pixels of all images instead: where a class is absent from most images, which
            then count 1, the mean over images is highest where nothing is found.
        empty: As for `scores`.

    Returns:
        Ascending; none where the metric has no value in any way.
    """
    if pooled:
        counts = counts.sum(0, keepdims=True)
    means = np.array([_mean(column) for column in scores(counts, empty)[metric].T])
    return np.flatnonzero(np.isclose(means, np.fmax.reduce(means), rtol=0, atol=1e-12))


def best_threshold(
    counts: Counts,
    thresholds: NDArray[np.float32],
    metric: str = "jaccard",
    pooled: bool = False,
    empty: float = EMPTY,
) -> float | None:
    """Of the best thresholds, in the sense of `best_columns`, the nearest to 0.5; None where there is none.

    Args:
        counts: int (N, T, 4) of one class, from `histogram`.
        thresholds: The T thresholds.
        metric: As for `best_columns`.
        pooled: As for `best_columns`.
        empty: As for `scores`.
    """
    best = thresholds[best_columns(counts, metric, pooled, empty)]
    return round(float(best[np.abs(best - 0.5).argmin()]), 6) if best.size else None
