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
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torchmetrics import Metric

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
    decided = decide(probability, threshold)
    cells = (decided & truth, decided & ~truth, ~decided & truth, ~decided & ~truth)
    counted = scores(np.stack([cell.sum(0) for cell in cells], -1), empty=np.nan)
    by_class = {name: counted[name] for name in ("sensitivity", "specificity", "precision")}
    by_class["f1"] = counted["dice"]
    by_class["brier"] = ((probability - truth) ** 2).mean(0, dtype=np.float64)
    both: Bools = np.asarray(truth.any(0) & ~truth.all(0))
    by_class["auroc"] = np.array(
        [roc_auc_score(truth[:, k], probability[:, k]) if both[k] else np.nan for k in range(len(classes))]
    )
    by_class["average_precision"] = np.array(
        [
            average_precision_score(truth[:, k], probability[:, k]) if truth[:, k].any() else np.nan
            for k in range(len(classes))
        ]
    )
    result: dict[str, float] = {}
    if len(threshold):
        by_class["accuracy"] = counted["accuracy"]
        by_class["balanced_accuracy"] = (counted["sensitivity"] + counted["specificity"]) / 2
    else:
        result["accuracy"] = float(cells[0].any(1).mean())
        result["balanced_accuracy"] = _mean(counted["sensitivity"])
    for name, values in by_class.items():
        result[name] = _mean(values)
        if len(classes) > 1:
            result |= {f"{name}/{c}": float(v) for c, v in zip(classes, values, strict=True)}
    order = sorted(result, key=lambda key: NAMES.index(key.split("/")[0]))
    return {key: result[key] for key in order if not np.isnan(result[key])}


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


def _mean(values: NDArray[np.float64]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # none has a value: then neither has the mean
        return float(np.nanmean(values))


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
