"""Intervals of metrics by the percentile bootstrap over images, or over groups of images (Efron 1979).

Images, or groups with all of their images, are drawn with replacement, as many as there are, and the metric is computed
of what was drawn; the interval holds the middle 95 % of its values. It says how much the number depends on which
images were tested, and nothing of how it depends on the seed of the training.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvision.errors import MedvisionError
from medvision.metrics.overlap import EMPTY, Counts, image_scores, scores

Floats = NDArray[np.float64]


class Bootstrap:
    """Resamples of a split: the same for every metric and every model, so that differences are of paired draws.

    A metric that less than two images, or groups, have a value of is NaN in all resamples: nothing is known of how
    others would differ.

    Args:
        images: Number of images, N.
        groups: For each image what it belongs to, as a patient or a sequence; without it each is drawn by itself.
        resamples: Number of resamples, R.
        seed: Of the draws.

    Raises:
        MedvisionError: If there is no image or no resample, or not one group for each image.
    """

    def __init__(
        self, images: int, groups: Sequence[Hashable] | None = None, resamples: int = 2000, seed: int = 0
    ) -> None:
        if images < 1 or resamples < 1:
            raise MedvisionError(f"{resamples} resamples of {images} images; expected at least one of each")
        if groups is not None and len(groups) != images:
            raise MedvisionError(f"{len(groups)} groups for {images} images; expected the group of each image")
        members = range(images) if groups is None else groups
        numbers = {group: number for number, group in enumerate(dict.fromkeys(members))}
        self._unit: NDArray[np.intp] = np.array([numbers[group] for group in members])
        self._units, self.resamples, self.seed = len(numbers), resamples, seed

    def means(self, values: ArrayLike) -> Floats:
        """Means over the images drawn.

        Args:
            values: (N, ...), NaN where an image has none, else finite.

        Returns:
            (R, ...); NaN where no image drawn has a value.
        """
        array = np.asarray(values, np.float64)
        self._check(array)
        known = ~np.isnan(array)
        # summed is what exceeds the lowest, so that the mean of equal values is that value to the last bit
        lowest = np.where(known, array, np.inf).min(0)
        total, number = self._sums(np.stack([np.where(known, array - lowest, 0), known], 1)).swapaxes(0, 1)
        mean = lowest + np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
        return self._where_two(known, mean)

    def pooled(self, counts: Counts, empty: float = EMPTY) -> dict[str, Floats]:
        """Metrics of the pixels of all images drawn.

        Args:
            counts: int (N, K, 4) as `count` gives them.
            empty: As for `scores`.

        Returns:
            The metrics of `scores`, (R, K).
        """
        self._check(counts)
        images, drawn = scores(counts, empty), scores(self._sums(counts), empty)
        return {name: self._where_two(~np.isnan(images[name]), drawn[name]) for name in drawn}

    def apply(self, metric: Callable[[NDArray[np.intp]], ArrayLike]) -> Floats:
        """Any metric of the images drawn.

        Args:
            metric: Given the numbers of the images drawn, ascending, each as often as it was; answers a number or an
                array (...), NaN where there is no value.

        Returns:
            (R, ...); NaN if there are less than two images or groups.
        """
        images = np.arange(len(self._unit))
        if self._units < 2:
            return np.full((self.resamples, *np.shape(metric(images))), np.nan)
        drawn = [metric(images.repeat(row[self._unit])) for times in self._times() for row in times]
        return np.array(drawn, np.float64)

    def weights(self) -> Iterator[Floats]:
        """How often each image is drawn, (rows, N), in blocks of the R resamples; NaN if there is but one unit."""
        for times in self._times():
            yield np.where(self._units < 2, np.nan, times[:, self._unit].astype(np.float64))

    def without_one(self, shown: NDArray[np.bool_]) -> Floats:
        """Which images are left, (C, N), without the image or group that is the first to show what (N, C) says.

        A metric that has no value of these is one of a single image or group.
        """
        return np.asarray(self._unit != self._unit[shown.argmax(0)][:, None], np.float64)

    def _times(self) -> Iterator[NDArray[np.intp]]:
        """How often each unit is drawn, a row for each resample, in blocks that fit into memory."""
        generator = np.random.default_rng(self.seed)
        rows = max(1, 2**22 // self._units)
        for start in range(0, self.resamples, rows):
            shape = (min(rows, self.resamples - start), self._units)
            drawn = generator.integers(0, self._units, shape) + np.arange(shape[0])[:, None] * self._units
            yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape)

    def _sums(self, values: NDArray[Any]) -> Floats:
        """Sums (R, ...) over the images drawn."""
        by_unit = np.zeros((self._units, *values.shape[1:]))
        np.add.at(by_unit, self._unit, values)
        flat = by_unit.reshape(self._units, -1)
        sums = np.concatenate([times.astype(np.float64) @ flat for times in self._times()])
        return sums.reshape(self.resamples, *values.shape[1:])

    def _where_two(self, known: NDArray[np.bool_], drawn: Floats) -> Floats:
        """NaN where less than two units have a value; known is (N, ...), drawn (R, ...)."""
        units = np.zeros((self._units, *known.shape[1:]), bool)
        np.logical_or.at(units, self._unit, known)
        return np.where(units.sum(0) < 2, np.nan, drawn)

    def _check(self, values: NDArray[Any]) -> None:
        if len(values) != len(self._unit):
            raise MedvisionError(f"values of {len(values)} images; expected those of the {len(self._unit)} drawn from")


def interval(drawn: ArrayLike, level: float = 0.95) -> Floats:
    """The percentile interval.

    Args:
        drawn: (R, ...), a metric of each resample; those without a value are left out.
        level: The share of resamples inside, above 0 and below 1.

    Returns:
        (2, ...), lower and upper bound; NaN where no resample has a value.

    Raises:
        MedvisionError: If the level is not such a share.
    """
    if not 0 < level < 1:
        raise MedvisionError(f"level is {level}; expected a share above 0 and below 1, as 0.95")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no resample has a value
        return np.asarray(np.nanquantile(np.asarray(drawn, np.float64), [(1 - level) / 2, (1 + level) / 2], axis=0))


def summarise_intervals(
    counts: Counts,
    classes: Sequence[str],
    bootstrap: Bootstrap,
    empty: float = EMPTY,
    level: float = 0.95,
    also: Mapping[str, Floats] | None = None,
) -> dict[str, tuple[float, float]]:
    """Intervals of what `summarise` answers, under the same names.

    Args:
        counts: int (N, K, 4).
        classes: The K names.
        bootstrap: Of the N images.
        empty: As for `scores`.
        level: As for `interval`.
        also: As for `summarise`.

    Returns:
        Lower and upper bound; NaN where a class has a value that less than two images or groups have.
    """
    split, pooled = scores(counts.sum(0), empty), bootstrap.pooled(counts, empty)
    by_class = {name: (pooled[name], ~np.isnan(split[name])) for name in pooled}
    for name, images in (image_scores(counts, empty) | dict(also or {})).items():
        by_class[f"{name}_image"] = bootstrap.means(images), np.asarray(~np.isnan(images).all(0))
    result: dict[str, tuple[float, float]] = {}
    for key, (drawn, valued) in by_class.items():
        if not valued.any():
            continue
        columns = {key: _mean(drawn[:, valued])}
        if len(classes) > 1:
            columns |= {f"{key}/{c}": drawn[:, k] for k, c in enumerate(classes) if valued[k]}
        for column, values in columns.items():
            low, high = interval(values, level)
            result[column] = float(low), float(high)
    return result


def _mean(drawn: Floats) -> Floats:
    """Means (R,) over the classes that a resample has a value of; NaN if one has none in all."""
    known = ~np.isnan(drawn)
    total = np.where(known, drawn, 0).sum(1)
    enough = known.any(1) & known.any(0).all()
    mean: Floats = np.divide(total, known.sum(1), out=np.full(len(drawn), np.nan), where=enough)
    return mean
