"""The results of images, of which any metric can be computed anew with images weighed: drawn, left out, exchanged.

The names of metrics are those of `summarise` and `summarise_labels`, and with equal weights so are the values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medvision.metrics.boundary import BOUNDARY
from medvision.metrics.labels import weighed_labels
from medvision.metrics.overlap import EMPTY, image_scores, scores, summarise

Floats = NDArray[np.float64]
DISTANCES = tuple(name for name in BOUNDARY if name != "nsd")
LOWER_IS_BETTER = ("loss", "brier", "ece", *DISTANCES)


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return _plain(metric) in LOWER_IS_BETTER


def limits(metric: str) -> tuple[float, float]:
    """The least and the largest value that a metric can have."""
    return -1 if _plain(metric) == "mcc" else 0, np.inf if _plain(metric) in DISTANCES else 1


def _plain(metric: str) -> str:
    return metric.partition("/")[0].removesuffix("_image")


@dataclass(frozen=True)
class Rows(ABC):
    """The results of images.

    Attributes:
        ids: The N images.
        classes: The K names.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...]

    @abstractmethod
    def take(self, places: Sequence[int]) -> Self:
        """The images at some places, in that order."""

    def of(self, ids: Sequence[str]) -> Self:
        """The images of some names, in that order."""
        places = {name: n for n, name in enumerate(self.ids)}
        return self.take([places[name] for name in ids])

    @abstractmethod
    def and_of(self, *others: Self) -> Self:
        """These images and those of others, one after the other."""

    @property
    @abstractmethod
    def truth(self) -> NDArray[Any]:
        """What is said of each image that no prediction changes, (N, ...)."""

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """Every metric that these images have."""

    @abstractmethod
    def weighed(self, metric: str, weights: Floats) -> Floats:
        """A metric, (R,), for each of R ways (R, N) to weigh the images; NaN where it has no value."""

    @abstractmethod
    def each(self, metric: str) -> Floats | None:
        """The value of each image (N,), NaN where it has none; None for a metric that only many images have."""

    def has_value(self, metric: str) -> NDArray[np.bool_]:
        """Whether each image (N,) has a share in the metric."""
        return np.ones(len(self.ids), bool)

    def lacking(self, metric: str) -> NDArray[np.bool_]:
        """Whether an error leaves an image without a value in a class that the metric is of, (N, C)."""
        return np.zeros((len(self.ids), 1), bool)

    def without(self, metric: str, lacking: NDArray[np.bool_]) -> Self:
        """Without the values of a mean over images where they are lacking, (N, C) as `lacking`."""
        return self


@dataclass(frozen=True)
class MaskRows(Rows):
    """Counted pixels.

    Attributes:
        counts: int (N, K, 4) as `count` gives them.
        also: Other metrics of each image, (N, K), NaN where one has no value.
        empty: What an image counts that has neither truth nor prediction; NaN leaves it out.
    """

    counts: NDArray[np.int64]
    also: Mapping[str, Floats] = field(default_factory=dict)
    empty: float = EMPTY

    def take(self, places: Sequence[int]) -> Self:
        """The images at some places, in that order."""
        also = {name: values[places] for name, values in self.also.items()}
        return replace(self, ids=tuple(self.ids[n] for n in places), counts=self.counts[places], also=also)

    def and_of(self, *others: Self) -> Self:
        """These images and those of others, with the metrics that all have."""
        every = (self, *others)
        shared = [name for name in self.also if all(name in rows.also for rows in others)]
        return replace(
            self,
            ids=tuple(i for rows in every for i in rows.ids),
            counts=np.concatenate([rows.counts for rows in every]),
            also={name: np.concatenate([rows.also[name] for rows in every]) for name in shared},
        )

    @property
    def truth(self) -> NDArray[np.int64]:
        """Pixels of each class and of the image, (N, K, 2)."""
        return np.stack([self.counts[..., 0] + self.counts[..., 2], self.counts.sum(-1)], -1)

    def summary(self) -> dict[str, float]:
        """As `summarise`."""
        return summarise(self.counts, self.classes, self.empty, self.also)

    def weighed(self, metric: str, weights: Floats) -> Floats:
        """Of the pooled pixels, or the mean over images; of several classes the mean of those that have a value."""
        name, of_images, classes = self._parts(metric)
        if of_images:
            values = self._scores[name][:, classes]
            known = ~np.isnan(values)
            total, number = weights @ np.where(known, values, 0), weights @ known
            by_class = np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
        else:
            counts = self.counts[:, classes].reshape(len(self.ids), -1)
            by_class = scores((weights @ counts).reshape(len(weights), -1, 4), self.empty)[name]
        return _mean(by_class)

    def each(self, metric: str) -> Floats | None:
        """The mean over classes, of a metric that is a mean over images."""
        name, of_images, classes = self._parts(metric)
        return _mean(self._scores[name][:, classes]) if of_images else None

    def has_value(self, metric: str) -> NDArray[np.bool_]:
        """Whether an image has a value in any class."""
        name, _, classes = self._parts(metric)
        return np.asarray(~np.isnan(self._scores[name][:, classes]).all(1))

    def lacking(self, metric: str) -> NDArray[np.bool_]:
        """Of a mean over images, where there is none though truth and prediction are not both empty."""
        name, of_images, classes = self._parts(metric)
        none = np.isnan(self._scores[name]) & (self.counts[..., :3].sum(-1) > 0)
        return np.asarray(none[:, classes] & of_images)

    def without(self, metric: str, lacking: NDArray[np.bool_]) -> Self:
        """Without the values of a mean over images where they are lacking, (N, C) as `lacking`."""
        name, _, classes = self._parts(metric)
        values = self._scores[name].copy()
        values[:, classes] = np.where(lacking, np.nan, values[:, classes])
        return replace(self, also={**self.also, name: values})

    def _parts(self, metric: str) -> tuple[str, bool, list[int]]:
        name, _, of = metric.partition("/")
        classes = [self.classes.index(of)] if of else [*range(len(self.classes))]
        return name.removesuffix("_image"), name.endswith("_image"), classes

    @cached_property
    def _scores(self) -> dict[str, Floats]:
        return image_scores(self.counts, self.empty) | dict(self.also)


@dataclass(frozen=True)
class LabelRows(Rows):
    """Probabilities of labels.

    Attributes:
        probability: (N, K), in 0 to 1.
        there: bool (N, K), the truth.
        decided: bool (N, K).
        exclusive: Whether each image has exactly one class, and the most probable was decided for.
    """

    probability: Floats
    there: NDArray[np.bool_]
    decided: NDArray[np.bool_]
    exclusive: bool

    def take(self, places: Sequence[int]) -> Self:
        """The images at some places, in that order."""
        parts = (self.probability, self.there, self.decided)
        return replace(self, ids=tuple(self.ids[n] for n in places), **_named(part[places] for part in parts))

    def and_of(self, *others: Self) -> Self:
        """These images and those of others, one after the other."""
        every = (self, *others)
        parts = zip(*((rows.probability, rows.there, rows.decided) for rows in every), strict=True)
        return replace(self, ids=tuple(i for rows in every for i in rows.ids), **_named(map(np.concatenate, parts)))

    @property
    def truth(self) -> NDArray[np.bool_]:
        """The classes that are there, (N, K)."""
        return self.there

    def summary(self) -> dict[str, float]:
        """As `summarise_labels`."""
        found = self._every(np.ones((1, len(self.ids))))
        return {name: float(value[0]) for name, value in found.items() if not np.isnan(value[0])}

    def weighed(self, metric: str, weights: Floats) -> Floats:
        """As `weighed_labels`."""
        return self._every(weights)[metric]

    def each(self, metric: str) -> Floats | None:
        """Of `accuracy` whether the decision is right, of `brier` the squared error, else none."""
        name, _, of = metric.partition("/")
        right = self.decided == self.there
        if name == "accuracy" and self.exclusive:
            return np.asarray(right.all(1), np.float64)
        by_class = {"accuracy": right.astype(float), "brier": (self.probability - self.there) ** 2}.get(name)
        if by_class is None:
            return None
        return np.asarray(by_class[:, self.classes.index(of)] if of else by_class.mean(1))

    def _every(self, weights: Floats) -> dict[str, Floats]:
        parts = (self.probability, self.there, self.decided, self.classes, self.exclusive)
        return weighed_labels(*parts, weights)


def _named(parts: Iterable[NDArray[Any]]) -> dict[str, Any]:
    return dict(zip(("probability", "there", "decided"), parts, strict=True))


def _mean(values: Floats) -> Floats:
    """Means (N,) over the classes (N, K) that have a value; NaN where none has."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(1)
    return np.asarray(np.divide(total, known.sum(1), out=np.full(len(values), np.nan), where=known.any(1)))
