"""What is known of any split that was measured."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.files import as_csv

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
    def choose(self, by: str, temperature: Sequence[float] = ()) -> Decision:
        """The best threshold of each class at a temperature, in the sense of the task's `chosen_by`."""

    @abstractmethod
    def summary(self, decision: Decision) -> dict[str, float]:
        """Metrics of the whole split with a decision."""

    @abstractmethod
    def temperatures(self) -> tuple[float, ...]:
        """The best temperature of each class, or of all that exclude each other; 1, with a warning, where none is."""

    @abstractmethod
    def calibrated(self, temperature: Sequence[float]) -> dict[str, float]:
        """Expected calibration error and Brier score at a temperature, the entries of `summary`."""

    @abstractmethod
    def intervals(self, decision: Decision) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals over images of the entries of `summary`, over groups of them where there are any.

        What less than two images or groups have a value of has no interval.
        """

    @abstractmethod
    def challenge(self, name: str, decision: Decision) -> dict[str, float]:
        """The scores of a challenge, as its organisers compute them (see `metrics.challenge`)."""

    def details(self, decision: Decision) -> dict[str, Any]:
        """What else is known, for `metrics.json`; of masks nothing."""
        return {}

    @abstractmethod
    def rows(self, decision: Decision) -> Iterator[list[object]]:
        """A header, then a row for each image and class, from which summaries and intervals can be recomputed."""

    def beside(self, decision: Decision) -> dict[str, dict[str, float]]:
        """What to compare the summary with: that without the cleaning, calibration without the temperature."""
        uncleaned = {"without cleaning": self.summary(replace(decision, cleaning=()))} if decision.cleaning else {}
        return uncleaned | ({"without temperature": self.calibrated(())} if decision.temperature else {})

    def table(self, decision: Decision) -> str:
        """`rows` as CSV."""
        return as_csv(self.rows(decision))


def known(intervals: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Those that are there."""
    return {name: bounds for name, bounds in intervals.items() if not np.isnan(bounds).any()}


def or_half(best: float | None, name: str, split: str) -> float:
    """The best threshold of a class, or 0.5, with a warning, where none is."""
    if best is None:
        shown = "is shown by all images of %s or by none: no threshold can be chosen there, it is 0.5"
        log.warning("%s " + shown, name, split)
    return 0.5 if best is None else best


def or_one(name: str, fit: Callable[..., float], *arguments: Any) -> float:
    """The temperature that fits a class, or 1, with a warning, where none does."""
    try:
        return fit(*arguments)
    except MedvisionError as error:
        log.warning("the temperature of %s stays 1: %s", name, error)
        return 1.0


def spaced(order: NDArray[np.intp], number: int) -> list[int]:
    """Entries from the first to the last, evenly spaced."""
    places = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))
    return [int(n) for n in order[places]]
