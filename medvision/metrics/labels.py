"""Metrics of labels from probabilities: of the ranking, and of the decision at a threshold.

Several classes are averaged with equal weight. A metric that a split cannot have is left out, and `undefined_labels`
says why: AUROC or average precision of a class that every image shows or none, since there is nothing to rank,
sensitivity of one that none shows, specificity of one that all show.
"""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from medvision.errors import MedvisionError
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
    "mcc",
    "sensitivity_at_95_specificity",
    "specificity_at_95_sensitivity",
    "brier",
    "ece",
)
OF_RANKS = ("auroc", "average_precision", "sensitivity_at_95_specificity", "specificity_at_95_sensitivity")
"""Those of the order of probabilities alone."""
LEAST = 0.95
"""Of the specificity at which sensitivity is told, and the reverse."""
BINS = 15
"""Of equal width, for the expected calibration error."""
YOUDEN = "youden"

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
    tp, fp, fn, tn = counts = [weights @ cell for cell in cells]
    counted = scores(np.stack(counts, -1), empty=np.nan)
    result = {name: counted[name] for name in ("accuracy", "sensitivity", "specificity", "precision")}
    result["balanced_accuracy"] = (counted["sensitivity"] + counted["specificity"]) / 2
    result["f1"] = counted["dice"]
    result["mcc"] = _mcc(tp + tn, np.stack([tp + fp, fn + tn], -1), np.stack([tp + fn, fp + tn], -1))
    errors = (probability.astype(np.float64) - truth) ** 2
    result["brier"] = _ratio(weights @ errors, weights.sum(1, keepdims=True))
    columns = range(probability.shape[1])
    result["ece"] = np.stack([_ece(probability[:, k], truth[:, k], weights) for k in columns], -1)
    ranked = [_ranking(probability[:, k], truth[:, k], weights) for k in columns]
    return result | {name: np.stack([of_class[name] for of_class in ranked], -1) for name in ranked[0]}


def cumulate(probability: Floats, truth: Bools, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Positives and negatives above each threshold, from which the curves of a class are made.

    Args:
        probability: (N,) of one class.
        truth: bool (N,).
        weights: (R, N), how often each image counts.

    Returns:
        The T distinct probabilities, descending; true positives and false positives (R, T) of deciding for those of at
        least each.
    """
    order = np.argsort(-probability, kind="stable")
    first = np.flatnonzero(np.diff(probability[order], prepend=np.inf))
    there, not_there = (np.add.reduceat(weights[:, order] * flags[order], first, axis=1) for flags in (truth, ~truth))
    return probability[order][first], there.cumsum(1), not_there.cumsum(1)


def _ranking(probability: Floats, truth: Bools, weights: Floats) -> dict[str, NDArray[np.float64]]:
    """What needs no decision, (R,) of one class; equal probabilities are one step of either curve."""
    _, hits, false = cumulate(probability, truth, weights)
    there, not_there = (np.diff(total, axis=1, prepend=0) for total in (hits, false))
    positives, negatives = hits[:, -1], false[:, -1]
    below = negatives[:, None] - false + not_there / 2
    precision = np.nan_to_num(_ratio(hits, hits + false))
    few_false = false <= (1 - LEAST) * negatives[:, None] + 1e-9  # numbers of images: less than one is rounding
    enough_hits = hits >= LEAST * positives[:, None] - 1e-9
    sensitivity = np.where(few_false, _ratio(hits, positives[:, None]), 0).max(1)
    specificity = np.where(enough_hits, 1 - _ratio(false, negatives[:, None]), 0).max(1)
    found = {
        "auroc": _ratio((there * below).sum(1), positives * negatives),
        "average_precision": _ratio((there * precision).sum(1), positives),
        "sensitivity_at_95_specificity": sensitivity,
        "specificity_at_95_sensitivity": specificity,
    }
    return {name: np.where(positives * negatives > 0, values, np.nan) for name, values in found.items()}


def _ece(probability: Floats, right: Bools, weights: Floats) -> NDArray[np.float64]:
    """Expected calibration error (R,), of the bins of `calibration.Calibration`."""
    bins = np.minimum(probability.astype(np.float64) * BINS, BINS - 1).astype(np.int64)
    gaps = (probability.astype(np.float64) - right)[:, None] * (bins[:, None] == np.arange(BINS))
    return _ratio(np.abs(weights @ gaps).sum(1), weights.sum(1))


def _mcc(right: Floats, said: Floats, there: Floats) -> NDArray[np.float64]:
    """Matthews correlation coefficient of two or more classes (Gorodkin 2004, Comput Biol Chem 28:367-374).

    0 where all decisions are alike, no value where all truths are.

    Args:
        right: (...), how many decisions are right.
        said: (..., C), how many are for each class.
        there: (..., C), how many images show each.
    """
    spread = [number.sum(-1) ** 2 - (number**2).sum(-1) for number in (said, there)]
    covariance = right * there.sum(-1) - (said * there).sum(-1)
    known = spread[0] * spread[1] > 0
    value = np.divide(covariance, np.sqrt(spread[0] * spread[1]), out=np.zeros_like(covariance), where=known)
    return np.where(spread[1] > 0, value, np.nan)


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
        result["mcc"] = _mcc(weights @ (decided & truth).any(1), weights @ decided, weights @ truth)
        result["ece"] = _ece(probability.max(1), np.asarray((decided & truth).any(1)), weights)
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
        else they are those of each class against its absence. `mcc` is 0 where all decisions are alike. `brier` is the
        mean squared error of a probability; `ece` the expected calibration error, without a threshold that of the most
        probable class (Guo et al. 2017, arXiv:1706.04599). `sensitivity_at_95_specificity` is the highest with a
        specificity of at least 0.95, whatever the threshold. A metric without a value is absent; all are where a
        probability is no number.
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
        Lower and upper bound, of the resamples in which a metric has a value; NaN where less than two images or groups
        have one, in a class too that counts in a mean. Resamples repeat images, which makes bins look less calibrated
        than they are: the interval of `ece` lies too high, the more the fewer images there are.
    """
    decided, exclusive = decide(probability, threshold), not len(threshold)
    parts = (probability, truth, decided, classes, exclusive)
    found = summarise_labels(probability, truth, classes, threshold)
    blocks = [weighed_labels(*parts, weights) for weights in bootstrap.weights()]
    left = weighed_labels(*parts, bootstrap.without_one(np.concatenate([truth, ~truth, decided], 1)))
    alone = {name for name in found if np.isnan(left[name]).any()}
    alone |= {name.split("/")[0] for name in alone}
    alone |= {"balanced_accuracy"} if exclusive and "sensitivity" in alone else set()
    nothing = float("nan"), float("nan")
    result = {}
    for name in found:
        low, high = nothing if name in alone else interval(np.concatenate([block[name] for block in blocks]))
        result[name] = float(low), float(high)
    return result


def undefined_labels(
    probability: Floats, truth: Bools, classes: Sequence[str], threshold: Sequence[float]
) -> dict[str, str]:
    """Why `summarise_labels` leaves out metrics: the reason for each name.

    Args:
        probability: (N, K), in 0 to 1.
        truth: bool (N, K).
        classes: The K names.
        threshold: As for `decide`.
    """
    decided, reasons = decide(probability, threshold), []
    found = summarise_labels(probability, truth, classes, threshold)
    for name, there, said in zip(classes, truth.T, decided.T, strict=True):
        kind = "" if there.any() and not there.all() else f"{'every' if there.any() else 'no'} image shows {name}"
        reasons.append((kind, "" if said.any() else f"{name} is decided for in no image"))
    result = {}
    for name in _names(classes, threshold):
        if name not in found:
            metric, _, of = name.partition("/")
            those = [reason for c, reason in zip(classes, reasons, strict=True) if of in ("", c)]
            result[name] = "; ".join(dict.fromkeys(filter(None, (r[metric == "precision"] or r[0] for r in those))))
    return result


def delong(probability: Floats, truth: Bools) -> tuple[float, float] | None:
    """95 % interval of the AUROC by DeLong et al. (1988, Biometrics 44:837-845), for images that are independent.

    It is that of a normal distribution, cut at 0 and 1; around an AUROC of 1 or 0 it has no width, and says too much.

    Args:
        probability: (N,) of one class.
        truth: bool (N,).

    Returns:
        Lower and upper bound; None with less than two positives or negatives.
    """
    sides = probability[truth], probability[~truth]
    if min(map(len, sides)) < 2:
        return None
    means, variance = [], 0.0
    for own, other in (sides, sides[::-1]):
        ranked = np.sort(other)  # how many others are below each; of equal ones half
        below = (np.searchsorted(ranked, own, "left") + np.searchsorted(ranked, own, "right")) / (2 * len(other))
        means.append(float(below.mean()))
        variance += float(below.var(ddof=1)) / len(own)
    reach = statistics.NormalDist().inv_cdf(0.975) * variance**0.5
    return max(0.0, means[0] - reach), min(1.0, means[0] + reach)


def check_operating_point(point: str | Mapping[str, float]) -> None:
    """Refuses what `best_decision` does not know.

    Raises:
        MedvisionError: If it is neither `youden` nor a wanted sensitivity or specificity.
    """
    wanted = [*point.items()] if isinstance(point, Mapping) else []
    known = len(wanted) == 1 and wanted[0][0] in ("sensitivity", "specificity") and 0 < wanted[0][1] <= 1
    if point != YOUDEN and not known:
        raise MedvisionError(
            f"task.operating_point={point}: expected {YOUDEN}, {{sensitivity: 0.95}} or {{specificity: 0.95}}, a share "
            "above 0 and up to 1"
        )


def best_decision(probability: Floats, truth: Bools, point: str | Mapping[str, float] = YOUDEN) -> float | None:
    """The threshold of an operating point.

    Args:
        probability: (N,) of one class.
        truth: bool (N,).
        point: `youden`: the highest sensitivity plus specificity (Youden 1950, Cancer 3:32-35); `{"sensitivity":
            0.95}`: the highest specificity with a sensitivity of at least that, or the reverse. Where probabilities of
            0 or 1 stand in the way, since a threshold lies between, the highest that there is.

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
    between = (values[:-1] + values[1:]) / 2
    between = np.where(between.astype(probability.dtype) > values[:-1], between, values[1:])  # neighbouring numbers
    middle = np.concatenate([[values[0] / 2], between, [(values[-1] + 1) / 2]])
    possible = np.concatenate([[values[0] > 0], values[1:] > values[:-1], [values[-1] < 1]])
    if isinstance(point, Mapping):
        (name, least), *_ = point.items()
        own, other = (sensitivity, specificity) if name == "sensitivity" else (specificity, sensitivity)
        possible &= own >= min(least, own[possible].max()) - 1e-12
        possible &= other >= other[possible].max() - 1e-12  # the sum below decides between these
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
        return _names(self.classes, self.threshold)

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


def _names(classes: Sequence[str], threshold: Sequence[float]) -> list[str]:
    truth = np.eye(len(classes) + 1, len(classes), dtype=bool)  # has a value of every metric
    return [*summarise_labels(truth.astype(float), truth, classes, threshold)]


def one_hot(target: Tensor, classes: int) -> Bools:
    """Class numbers (N,) or 0 and 1 (N, K) as bool (N, K)."""
    if target.ndim == 1:
        target = target[:, None] == torch.arange(classes)
    return np.asarray(target.numpy() > 0)
