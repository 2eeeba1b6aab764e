"""Whether probabilities are what they say, and the temperature that makes them so.

Pixels go into histograms, image by image, so that none need be kept. The probability of each class is set against its
presence (Murphy and Winkler 1977, Appl Stat 26:41-47); where exactly one class is there, give the probability of the
most probable one and whether it is right for the top-label diagram of Guo et al. 2017 (arXiv:1706.04599).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvision.errors import MedvisionError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CERTAIN = 1e-7  # distance from 0 and 1 within which a float32 probability no longer tells logits apart
FINE = 1024  # logits that are told apart between 0 and 1


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


class Calibration:
    """Reliability of each class and the temperature that mends it, from probabilities added batch by batch.

    Only whole numbers are kept: how many probabilities had which logit, to 1/1024, which is 0.00025 of a probability
    at most. So it is exact in the order of additions, on any device, and knows every temperature at once.

    Args:
        classes: K.
        bins: Bins of equal width of a reliability diagram.

    Attributes:
        count: int64 (K, 2, L), absent and present, by logit.
        logits: float64 (L,).
    """

    def __init__(self, classes: int, bins: int = 15) -> None:
        self.bins = bins
        reach = math.ceil(FINE * math.log(1 / CERTAIN - 1))
        self.logits: Floats = np.arange(-reach, reach + 1) / FINE
        self.count: Ints = np.zeros((classes, 2, len(self.logits)), np.int64)

    def update(self, probability: Tensor, truth: Tensor) -> None:
        """Adds probabilities (N, K, ...) and truth of that shape, above 0 where the class is.

        Raises:
            MedvisionError: If the shapes do not fit, or a probability is not within 0 and 1.
        """
        classes, _, cells = self.count.shape
        if probability.shape != truth.shape or probability.ndim < 2 or probability.shape[1] != classes:
            raise MedvisionError(
                f"values are {tuple(probability.shape)}, truth is {tuple(truth.shape)}; "
                f"expected (N, {classes}, ...) of both"
            )
        low, high = probability.detach().aminmax()
        if not (low >= 0 and high <= 1 + CERTAIN * 10):  # of bilinear resizing, rounding
            raise MedvisionError("probabilities lie outside of 0 to 1 or are NaN; expected those after the sigmoid")
        for k in range(classes):
            # from 0 upwards, where the whole part is what lies below
            cell = probability[:, k].logit(CERTAIN).mul_(FINE).add_(cells // 2 + 0.5).int().clamp_(0, cells - 1)
            cell.mul_(2).add_(truth[:, k] > 0)
            self.count[k] += torch.bincount(cell.flatten(), minlength=2 * cells).view(cells, 2).T.cpu().numpy()

    def compute(self, temperature: Sequence[float] = ()) -> list[Reliability]:
        """What was added, of each class, its logits divided by its temperature if there is one.

        Raises:
            MedvisionError: If nothing was.
        """
        result = []
        for n, count in enumerate(self.count):
            if not count.any():
                raise MedvisionError("no probability was added; expected those of a split")
            probability = 1 / (1 + np.exp(-self.logits / (temperature[n] if temperature else 1)))
            place = np.minimum(probability * self.bins, self.bins - 1).astype(np.int64)
            number = np.bincount(place, count.sum(0), self.bins)
            confidence, frequency = (
                np.divide(np.bincount(place, of, self.bins), number, out=np.full(self.bins, np.nan), where=number > 0)
                for of in (count.sum(0) * probability, count[1])
            )
            brier = (count[0] @ probability**2 + count[1] @ (1 - probability) ** 2) / count.sum()
            result.append(Reliability(number.astype(np.int64), confidence, frequency, float(brier)))
        return result

    def temperature(self, k: int) -> float:
        """The temperature of a class.

        Raises:
            MedvisionError: As `fit_temperature`.
        """
        there, cell = self.count[k].nonzero()
        return fit_temperature(self.logits[cell], there, self.count[k][there, cell])


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
