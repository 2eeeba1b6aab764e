"""Whether probabilities are what they say, and the temperature that makes them so.

Pixels go into histograms, image by image, so that none need be kept. The probability of each class is set against its
presence (Murphy and Winkler 1977, Appl Stat 26:41-47); where exactly one class is there, give the probability of the
most probable one and whether it is right for the top-label diagram of Guo et al. 2017 (arXiv:1706.04599).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medvision.errors import MedvisionError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram of one class.

    Attributes:
        count: int64 (B,), how many probabilities lie in each bin of equal width; 1 lies in the last.
        confidence: float64 (B,), their mean; NaN in an empty bin.
        frequency: float64 (B,), how often the class was there; NaN in an empty bin.
        brier: Brier score: the mean squared difference of probability and presence, 0 to 1 (Brier 1950).
    """

    count: Ints
    confidence: Floats
    frequency: Floats
    brier: float

    @property
    def expected_error(self) -> float:
        """Expected calibration error, 0 to 1: the mean over all of how far a bin is off (Naeini et al. 2015)."""
        off = np.abs(np.nan_to_num(self.frequency) - np.nan_to_num(self.confidence))
        return float(off @ self.count / self.count.sum())


class _Histogram:
    """Values of each class by bin and presence: how many, and their sum, so that the mean of a bin is not its middle.

    Attributes:
        count: int64 (K, 2, B), absent and present.
        sum: float64 (K, 2, B).
    """

    def __init__(self, classes: int, low: float, high: float, bins: int) -> None:
        self.low, self.high, self.bins = low, high, bins
        self.count: Ints = np.zeros((classes, 2, bins), np.int64)
        self.sum: Floats = np.zeros((classes, 2, bins))

    def _add(self, values: Tensor, truth: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
        """Adds (N, K, ...) of both; returns them as (K, M)."""
        classes = len(self.count)
        if values.shape != truth.shape or values.ndim < 2 or values.shape[1] != classes:
            raise MedvisionError(
                f"values are {tuple(values.shape)}, truth is {tuple(truth.shape)}; expected (N, {classes}, ...) of both"
            )
        flat = values.detach().double().cpu().numpy().swapaxes(0, 1).reshape(classes, -1)
        there = truth.cpu().numpy().swapaxes(0, 1).reshape(classes, -1) > 0
        along = (self._coordinate(flat) - self.low) * (self.bins / (self.high - self.low))
        place = np.clip(along, 0, self.bins - 1).astype(np.int64)
        for k, cell in enumerate(place + self.bins * there):
            self.count[k] += np.bincount(cell, minlength=2 * self.bins).reshape(2, -1)
            self.sum[k] += np.bincount(cell, flat[k], 2 * self.bins).reshape(2, -1)
        return flat, there

    def _coordinate(self, values: Floats) -> Floats:
        """What has bins of equal width."""
        return values


class Calibration(_Histogram):
    """Reliability of each class, from probabilities added batch by batch.

    Args:
        classes: K.
        bins: Bins of equal width.
    """

    def __init__(self, classes: int, bins: int = 15) -> None:
        super().__init__(classes, 0, 1, bins)
        self.squares: Floats = np.zeros(classes)

    def update(self, probability: Tensor, truth: Tensor) -> None:
        """Adds probabilities (N, K, ...) and truth of that shape, above 0 where the class is.

        Raises:
            MedvisionError: If the shapes do not fit, or a probability is not within 0 and 1.
        """
        if not bool(((probability >= 0) & (probability <= 1)).all()):
            raise MedvisionError("probabilities lie outside of 0 to 1 or are NaN; expected those after the sigmoid")
        flat, there = self._add(probability, truth)
        self.squares += ((flat - there) ** 2).sum(1)

    def compute(self) -> list[Reliability]:
        """What was added, of each class.

        Raises:
            MedvisionError: If nothing was.
        """
        result = []
        for count, total, squares in zip(self.count, self.sum, self.squares, strict=True):
            number = count.sum(0)
            if not number.any():
                raise MedvisionError("no probability was added; expected those of a split")
            confidence, frequency = (
                np.divide(of, number, out=np.full(self.bins, np.nan), where=number > 0)
                for of in (total.sum(0), count[1])
            )
            result.append(Reliability(number, confidence, frequency, float(squares / number.sum())))
        return result


class LogitHistogram(_Histogram):
    """Logits of each class, added batch by batch, fine enough to fit a temperature to.

    Args:
        classes: K.
        bins: Of equal width in asinh(logit): 0.002 around 0 and 0.2 % of a large logit, up to 80,000.
    """

    def __init__(self, classes: int, bins: int = 12_000) -> None:
        super().__init__(classes, -12, 12, bins)

    def _coordinate(self, values: Floats) -> Floats:
        return np.arcsinh(values)

    def update(self, logits: Tensor, truth: Tensor) -> None:
        """Adds logits (N, K, ...) and truth of that shape, above 0 where the class is.

        Raises:
            MedvisionError: If the shapes do not fit or a logit is not finite.
        """
        _require_finite(bool(logits.isfinite().all()))
        self._add(logits, truth)

    def temperatures(self) -> list[float]:
        """The temperature of each class, as `fit_temperature` of all logits to within the width of a bin.

        Raises:
            MedvisionError: As `fit_temperature`.
        """
        result = []
        for count, total in zip(self.count, self.sum, strict=True):
            there, cell = count.nonzero()
            number = count[there, cell]
            result.append(fit_temperature(total[there, cell] / number, there, number))
        return result


def fit_temperature(
    logits: NDArray[np.floating[Any]], target: NDArray[Any], weight: NDArray[Any] | None = None
) -> float:
    """The temperature T for which logits / T have the least negative log-likelihood (Guo et al. 2017).

    It keeps the order of probabilities, and so the class decided for and any metric of the ranking. Fit it on
    validation.

    Args:
        logits: (N,) of one class with a sigmoid, or (N, C) with a softmax; logarithms of softmax probabilities serve
            as well, log(p / (1 - p)) of those of a sigmoid.
        target: (N,), above 0 where the class is; or the class numbers.
        weight: (N,), how often each was seen; None is once.

    Raises:
        MedvisionError: If there is none or one is not finite; or no temperature is best: the colder the better where
            every decision is right, the hotter where the logits are no better than chance.
    """
    _require_finite(bool(np.isfinite(logits).all()))
    scores = np.asarray(logits, np.float64)
    if scores.ndim == 1:
        scores, target = np.stack([np.zeros_like(scores), scores], 1), np.asarray(target) > 0
    number = np.ones(len(scores)) if weight is None else np.asarray(weight, np.float64)
    if not number.sum() > 0:
        raise MedvisionError("there is no logit to fit a temperature to; expected those of a validation split")
    number = number / number.sum()
    # only differences matter: against the true class, whose own is then 0
    scores = scores - np.take_along_axis(scores, np.asarray(target, np.int64)[:, None], 1)

    def slopes(cold: float) -> tuple[float, float]:
        """First and second derivative of the likelihood, convex in `cold` = 1 / T."""
        odds = np.exp(cold * (scores - scores.max(1, keepdims=True)))
        odds /= odds.sum(1, keepdims=True)
        mean = (odds * scores).sum(1)
        variance = (odds * (scores - mean[:, None]) ** 2).sum(1)
        return float(number @ mean), float(number @ variance)

    if not slopes(0)[0] < 0:
        raise MedvisionError(
            "the logits are no better than chance: the likelihood rises as the temperature grows without end; "
            "expected those of a model that has learnt"
        )
    if not (number @ scores.max(1)) > 0:
        raise MedvisionError(
            "every decision is right: the likelihood rises without end as the temperature falls to 0; "
            "fit it to more images"
        )
    low, high = 0.0, 1.0
    while slopes(high)[0] < 0:
        low, high = high, 2 * high
    cold = high
    for _ in range(200):  # Newton, and halving where it would leave the bracket; ten steps are usual
        first, second = slopes(cold)
        low, high = (cold, high) if first < 0 else (low, cold)
        step = cold - first / second if second > 0 else low
        following = step if low < step < high else (low + high) / 2
        if abs(following - cold) <= 1e-12 * cold:
            break
        cold = following
    return 1 / cold


def _require_finite(finite: bool) -> None:
    if not finite:
        raise MedvisionError(
            "a logit is infinite or NaN; expected finite ones: clip probabilities before the logarithm"
        )
