"""What makes masks and labels of probabilities: chosen on validation, stored with a run, applied elsewhere."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvision.metrics.calibration import CERTAIN
from medvision.postprocess import Cleaning, clean


@dataclass(frozen=True)
class Decision:
    """From probabilities to a decision: calibrated, compared with a threshold, cleaned.

    Attributes:
        threshold: Of each class, on the scale of calibrated probabilities; none where classes exclude each other and
            the most probable is decided for.
        temperature: What the logits of each class are divided by (Guo et al. 2017, arXiv:1706.04599), one where classes
            exclude each other; none: probabilities stay as they are.
        cleaning: Post-processing of each class's mask; none: masks stay as they are.
    """

    threshold: tuple[float, ...]
    temperature: tuple[float, ...] = ()
    cleaning: tuple[Cleaning, ...] = ()

    def __post_init__(self) -> None:
        """What changes nothing is none."""
        if all(value == 1 for value in self.temperature):
            object.__setattr__(self, "temperature", ())
        if all(cleaning == Cleaning() for cleaning in self.cleaning):
            object.__setattr__(self, "cleaning", ())

    @classmethod
    def read(cls, results: Mapping[str, Any]) -> "Decision":
        """Of the entries of `metrics.json`; older runs have a threshold alone."""
        return cls(
            _each(results, "threshold"),
            _each(results, "temperature"),
            tuple(Cleaning(**of_class) for of_class in results.get("cleaning", [])),
        )

    def entries(self) -> dict[str, Any]:
        """Those of `metrics.json`: a number, or a list of several classes; what there is none of is absent."""
        found = {
            name: values[0] if len(values) == 1 else list(values)
            for name, values in (("threshold", self.threshold), ("temperature", self.temperature))
            if values
        }
        return found | ({"cleaning": [dataclasses.asdict(c) for c in self.cleaning]} if self.cleaning else {})

    def __str__(self) -> str:
        """For titles: `threshold 0.4, temperature 1.2, cleaned`."""
        shown = [
            f"{name} {', '.join(f'{value:g}' for value in values)}"
            for name, values in (("threshold", self.threshold), ("temperature", self.temperature))
            if values
        ]
        return ", ".join([*shown, *(["cleaned"] if self.cleaning else [])])

    def at(self, temperature: Sequence[float]) -> "Decision":
        """With another temperature and the threshold moved with it, so that the same is decided."""
        ones = (1.0,) * len(self.threshold)
        moved = tuple(
            value if before == after else _sigmoid(_logit(value) * before / after)
            for value, before, after in zip(
                self.threshold, self.temperature or ones, [*temperature] or ones, strict=False
            )
        )
        return dataclasses.replace(self, threshold=moved, temperature=tuple(temperature))

    def calibrated(self, probability: Tensor, dim: int = 0) -> Tensor:
        """Probabilities at the temperature.

        It is applied last, to the mean over views and at the final size, since it is that whose calibration counts.

        Args:
            probability: Of K classes along `dim`, after the sigmoid or softmax.
            dim: Where the classes are.
        """
        if not self.temperature:
            return probability
        if not self.threshold:
            return (probability.clamp_min(CERTAIN).log() / self.temperature[0]).softmax(dim)
        shape = [-1 if n == dim % probability.ndim else 1 for n in range(probability.ndim)]
        divisor = torch.tensor(self.temperature, dtype=probability.dtype, device=probability.device).view(shape)
        return (probability.logit(CERTAIN) / divisor).sigmoid()

    def masks(self, probability: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Masks, bool (K, H, W), of calibrated probabilities (K, H, W)."""
        masks = probability >= np.asarray(self.threshold, np.float32)[:, None, None]
        return clean(masks, self.cleaning) if self.cleaning else masks


def _each(results: Mapping[str, Any], name: str) -> tuple[float, ...]:
    stored = results.get(name, [])
    return tuple(stored) if isinstance(stored, list) else (stored,)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _sigmoid(logit: float) -> float:
    """Above 0 and below 1, in float32 as well, of any logit: a low temperature makes large ones."""
    value = math.exp(min(logit, 0)) / (1 + math.exp(-abs(logit)))
    return min(max(value, 2**-126), 1 - 2**-24)
