"""Metrics of labels from probabilities: of the ranking, and of the decision at a threshold.

Several classes are averaged with equal weight. A metric that a split cannot have is left out: AUROC, average precision
or sensitivity of a class that no image or, for AUROC and specificity, every image shows.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from medvision.metrics.intervals import Bootstrap, interval
from medvision.metrics.overlap import scores

NAMES = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "average_precision",
    "sensitivity",
    "specificity",
    "precision",
    "f1",
    "brier",
)

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def decide(probability: Floats, threshold: Sequence[float]) -> Bools:
    """Which classes are said to be there.

    Args:
        probability: (N, K).
        threshold: Of each class; none where exactly one class is there, which is then the most probable.

    Returns:
        bool (N, K).
    """
    if len(threshold):
        return np.asarray(probability >= np.asarray(threshold, probability.dtype))
    return np.asarray(np.arange(probability.shape[1]) == probability.argmax(1)[:, None])


def label_scores(probability: Floats, truth: Bools, decided: Bools, weights: Floats) -> dict[str, NDArray[np.float64]]:
    """Every metric of each class, for each of R ways to weigh the images.

    Args:
        probability: (N, K), in 0 to 1.
        truth: bool (N, K), the classes that are there.
        decided: bool (N, K), from `decide`.
        weights: (R, N), how often each image counts.

    Returns:
        (R, K) for each name, NaN where there is no value.
    """
    cells = (decided & truth, decided & ~truth, ~decided & truth, ~decided & ~truth)
    counted = scores(np.stack([weights @ cell for cell in cells], -1), empty=np.nan)
    result = {name: counted[name] for name in ("accuracy", "sensitivity", "specificity", "precision")}
    result["balanced_accuracy"] = (counted["sensitivity"] + counted["specificity"]) / 2
    result["f1"] = counted["dice"]
    errors = (probability.astype(np.float64) - truth) ** 2
    result["brier"] = _ratio(weights @ errors, weights.sum(1, keepdims=True))
    ranked = [_ranking(probability[:, k], truth[:, k], weights) for k in range(probability.shape[1])]
    result["auroc"], result["average_precision"] = (np.stack(columns, -1) for columns in zip(*ranked, strict=True))
    return result


def _ranking(probability: Floats, truth: Bools, weights: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC and average precision (R,) of one class; equal probabilities are one step of either curve."""
    order = np.argsort(-probability, kind="stable")
    first = np.flatnonzero(np.diff(probability[order], prepend=np.inf))
    there, not_there = (np.add.reduceat(weights[:, order] * flags[order], first, axis=1) for flags in (truth, ~truth))
    hits, false = there.cumsum(1), not_there.cumsum(1)
    below = false[:, -1:] - false + not_there / 2
    auroc = _ratio((there * below).sum(1), hits[:, -1] * false[:, -1])
    precision = np.nan_to_num(_ratio(hits, hits + false))
    return auroc, _ratio((there * precision).sum(1), hits[:, -1])


def _ratio(above: Floats, below: Floats) -> NDArray[np.float64]:
    """NaN for 0/0."""
    above, below = np.broadcast_arrays(above, below)
    return np.asarray(np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0))


def weighed_labels(
    probability: Floats, truth: Bools, decided: Bools, classes: Sequence[str], exclusive: bool, weights: Floats
) -> dict[str, NDArray[np.float64]]:
    """What `summarise_labels` answers, for each of R ways to weigh the images.

    Args:
        probability: (N, K), in 0 to 1.
        truth: bool (N, K).
        decided: bool (N, K), from `decide`.
        classes: The K names.
        exclusive: Whether each image has exactly one class, and the most probable was decided for.
        weights: (R, N), how often each image counts.

    Returns:
        (R,) for each name, NaN where there is no value.
    """
    by_class = label_scores(probability, truth, decided, weights)
    result = {name: _mean(by_class[name]) for name in NAMES}
    if exclusive:
        result["accuracy"] = _ratio(weights @ (decided & truth).any(1), weights.sum(1))
        result["balanced_accuracy"] = result["sensitivity"]
    if len(classes) > 1:
        for name in NAMES:
            if not exclusive or name not in ("accuracy", "balanced_accuracy"):
                result |= {f"{name}/{c}": by_class[name][:, k] for k, c in enumerate(classes)}
    return dict(sorted(result.items(), key=lambda item: NAMES.index(item[0].split("/")[0])))


def summarise_labels(
    probability: Floats, truth: Bools, classes: Sequence[str], threshold: Sequence[float]
) -> dict[str, float]:
    """Summary of a split.

    Args:
        probability: (N, K), in 0 to 1.
        truth: bool (N, K), the classes that are there.
        classes: The K names.
        threshold: As for `decide`.

    Returns:
        `NAMES`, the mean over classes, and each class under `<name>/<class>` where there are several. Without a
        threshold `accuracy` is the share of images whose class is right and `balanced_accuracy` the mean sensitivity;
        else they are those of each class against its absence. `brier` is the mean squared error of a probability.
        A metric without a value is absent; all are where a probability is no number.
    """
    if not np.isfinite(probability).all():
        return {}
    decided, exclusive = decide(probability, threshold), not len(threshold)
    found = weighed_labels(probability, truth, decided, classes, exclusive, np.ones((1, len(truth))))
    return {name: float(value[0]) for name, value in found.items() if not np.isnan(value[0])}


def summarise_label_intervals(
    probability: Floats, truth: Bools, classes: Sequence[str], threshold: Sequence[float], bootstrap: Bootstrap
) -> dict[str, tuple[float, float]]:
    """95 % intervals of what `summarise_labels` answers, under the same names.

    Args:
        probability: (N, K), in 0 to 1.
        truth: bool (N, K).
        classes: The K names.
        threshold: As for `decide`.
        bootstrap: Of the N images.

    Returns:
        Lower and upper bound, of the resamples in which a metric has a value.
    """
    parts = (probability, truth, decide(probability, threshold), classes, not len(threshold))
    blocks = [weighed_labels(*parts, weights) for weights in bootstrap.weights()]
    result = {}
    for name in summarise_labels(probability, truth, classes, threshold):
        low, high = interval(np.concatenate([block[name] for block in blocks]))
        result[name] = float(low), float(high)
    return result


def best_decision(probability: Floats, truth: Bools) -> float | None:
    """The threshold with the highest sensitivity plus specificity (Youden 1950, Cancer 3:32-35).

    Args:
        probability: (N,) of one class.
        truth: bool (N,).

    Returns:
        The middle between two neighbouring probabilities, of equally good ones the nearest to 0.5; None where the
        class is everywhere or nowhere.
    """
    if truth.all() or not truth.any():
        return None
    order = np.argsort(probability, kind="stable")
    values, right = np.asarray(probability, np.float64)[order], truth[order]
    # cut i: what stands before i is said to be negative
    specificity = np.concatenate([[0], np.cumsum(~right)]) / (~right).sum()
    sensitivity = 1 - np.concatenate([[0], np.cumsum(right)]) / right.sum()
    middle = np.concatenate([[values[0] / 2], (values[:-1] + values[1:]) / 2, [(values[-1] + 1) / 2]])
    possible = np.concatenate([[True], values[1:] > values[:-1], [True]])
    youden = np.where(possible, sensitivity + specificity, -1)
    best = middle[np.isclose(youden, youden.max(), rtol=0, atol=1e-12)]
    return float(best[np.abs(best - 0.5).argmin()])


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means (R,) over the classes (R, K) that have a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # none has a value: then neither has the mean
        return np.asarray(np.nanmean(values, axis=1))


class Ranking(Metric):
    """Probabilities and labels of a split, batch by batch, each image once over all processes.

    Args:
        classes: Names of the classes.
        exclusive: Whether exactly one of them is there, and the most probable is decided for; else those with a
            probability of one half or more.
    """

    full_state_update = False
    probability: list[Tensor]
    target: list[Tensor]

    def __init__(self, classes: Sequence[str], exclusive: bool) -> None:
        super().__init__()
        self.classes = classes
        self.threshold = [] if exclusive else [0.5] * len(classes)
        self.add_state("probability", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    @property
    def names(self) -> list[str]:
        """What `compute` may answer."""
        truth = np.eye(len(self.classes) + 1, len(self.classes), dtype=bool)  # has a value of every metric
        return [*summarise_labels(truth.astype(float), truth, self.classes, self.threshold)]

    def update(self, probability: Tensor, target: Tensor) -> None:
        """Adds a batch: probabilities (N, K), and class numbers (N,) or 0 and 1 (N, K)."""
        self.probability.append(probability.detach())
        self.target.append(target)

    def compute(self) -> dict[str, float]:
        """The summary of all that was added."""
        probability, target = (
            (torch.cat(state) if isinstance(state, list) else state).cpu() for state in (self.probability, self.target)
        )
        return summarise_labels(probability.numpy(), one_hot(target, len(self.classes)), self.classes, self.threshold)


def one_hot(target: Tensor, classes: int) -> Bools:
    """Class numbers (N,) or 0 and 1 (N, K) as bool (N, K)."""
    if target.ndim == 1:
        target = target[:, None] == torch.arange(classes)
    return np.asarray(target.numpy() > 0)
