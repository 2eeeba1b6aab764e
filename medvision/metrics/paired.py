"""Variants compared on the same images: intervals that know of seeds and images, paired tests, effect size.

Two sources of chance are kept apart. *Images*: others might have been tested. *Seeds*: the training might have gone
otherwise. The intervals contain both, where there are several seeds: a hierarchical bootstrap in which images are drawn
with replacement, but of the seeds, which are few, the error of their mean from Student's t. The plain one draws seeds
with replacement as well: its means of S seeds have but (S - 1) / S of the variance that seeds give, and no longer tails
for not knowing it, so that of three a 95 % interval of a difference holds it in some 83 % of studies
(`benchmarks/comparison.py`, `naive`). The tests are of the images alone, that is of the trained networks at hand, and
so say less: of two variants that differ by nothing but luck in training, they find that luck (measured there too). A
difference counts as shown only where both agree.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from medvision.errors import MedvisionError
from medvision.metrics.intervals import Bootstrap
from medvision.metrics.rows import Rows

Floats = NDArray[np.float64]
Units = NDArray[np.intp]

BLOCK = 2**22
"""Numbers of a matrix of weights held at once."""


@dataclass(frozen=True)
class Resampled:
    """What variants might have scored, of a metric, with other images and other seeds.

    Attributes:
        means: Means over seeds with other images, (R, G), the same images for all variants.
        errors: The standard error of each mean that the seeds give it, (R, G); 0 with one seed.
        seeds: Number of seeds of each variant, (G,).
    """

    means: Floats
    errors: Floats
    seeds: NDArray[np.intp]

    def contrast(self, weights: ArrayLike) -> Floats:
        """A sum of variants, as a difference, (R,): with other images, and with the error of few seeds.

        There are too few seeds to draw from (three hold the true mean between them in 75 % of cases): what is drawn is
        the error of their mean, from Student's t with the degrees of freedom of Welch (1947, doi:10.2307/2332510), so
        that variants need not be equally lucky. Without two seeds of a variant nothing is known of its luck.

        Args:
            weights: Of each variant, (G,).
        """
        weights = np.asarray(weights, np.float64)
        several = self.seeds > 1
        known = self.errors[~np.isnan(self.errors).any(1)]
        variances = (weights**2 * (known**2).sum(0))[several]  # but for a factor
        total = self.means @ weights
        if not variances.any():
            return np.asarray(total)
        freedom = variances.sum() ** 2 / (variances**2 / (self.seeds[several] - 1)).sum()
        return np.asarray(total + self._luck(freedom, 1) * np.sqrt(self.errors**2 @ weights**2))

    def each(self) -> Floats:
        """Every variant at once, (R, G), each with an error of its own."""
        luck = [self._luck(max(seeds - 1, 1), 2 + g) for g, seeds in enumerate(self.seeds.tolist())]
        return self.means + np.stack(luck, 1) * self.errors

    def _luck(self, freedom: float, seed: int) -> Floats:
        """Quantiles (R,) of Student's t, evenly spaced and shuffled: as draws, with less noise of their own."""
        shares = (np.arange(len(self.means)) + 0.5) / len(self.means)
        return np.asarray(stats.t(freedom).ppf(np.random.default_rng(seed).permutation(shares)))


def resample(
    groups: Sequence[Sequence[Rows]], metrics: Sequence[str], units: Units, resamples: int
) -> dict[str, Resampled]:
    """A hierarchical bootstrap: here images, or groups of them, are drawn; `Resampled` draws the luck of seeds.

    Images are drawn with replacement, the same for all variants and seeds, so that differences are of pairs: seeds and
    images are crossed (Owen 2007, doi:10.1214/07-AOAS122).

    Args:
        groups: For each of G variants the results of its seeds, all of the same N images in the same order.
        metrics: Names, as in `summarise` and `summarise_labels`.
        units: For each image the number of what it belongs to, (N,).
        resamples: Number of resamples, R.

    Returns:
        For each metric; NaN where less than two images or groups have a value.
    """
    blocks: dict[str, list[list[Floats]]] = {metric: [[] for of in groups for _ in of] for metric in metrics}
    every = [rows for of in groups for rows in of]
    for weights in Bootstrap(len(units), units.tolist(), resamples).weights():
        for metric, columns in blocks.items():
            for column, rows in zip(columns, every, strict=True):
                column.append(rows.weighed(metric, weights))
    result = {}
    for metric, columns in blocks.items():
        drawn = np.stack([np.concatenate(column) for column in columns], 1)
        few = [len(np.unique(units[rows.has_value(metric)])) < 2 for rows in every]
        drawn[:, few] = np.nan
        of_groups = np.split(drawn, np.cumsum([len(of) for of in groups])[:-1], axis=1)
        errors = [np.std(of, 1, ddof=1) / of.shape[1] ** 0.5 if of.shape[1] > 1 else 0 * of[:, 0] for of in of_groups]
        means = np.stack([of.mean(1) for of in of_groups], 1)
        result[metric] = Resampled(means, np.stack(errors, 1), np.array([len(of) for of in groups]))
    return result


@dataclass(frozen=True)
class PairedTest:
    """A variant against another on the same images.

    Attributes:
        images: How many both have a value of.
        permutation: p of the exchange of the two on images drawn at random.
        wilcoxon: p of the signed-rank test; None for a metric that only many images have together.
        rank_biserial: The effect size of that test, from -1 (less on every image) to 1; None likewise.
    """

    images: int
    permutation: float | None
    wilcoxon: float | None
    rank_biserial: float | None


def paired_test(
    variant: Sequence[Rows], other: Sequence[Rows], metric: str, units: Units, resamples: int
) -> PairedTest:
    """Tests whether two variants differ on images, of which groups stay together.

    The permutation test exchanges the two on whole images or groups and computes the metric anew; for a mean over
    images that is to flip the signs of their differences. The signed-rank test is of the images' differences of the
    means over seeds, of groups the mean difference of each.

    Args:
        variant: The results of its seeds, all of the same N images in the same order.
        other: Those of the other.
        metric: Its name.
        units: For each image the number of what it belongs to, (N,).
        resamples: Number of exchanges, unless all there are are fewer.
    """
    number = math.lcm(len(variant), len(other))  # of pairs of seeds in which each occurs equally often
    pairs = [(variant[n % len(variant)], other[n % len(other)]) for n in range(number)]
    both = [one.and_of(two) for one, two in pairs]

    def difference(exchanged: Floats) -> Floats:
        weights = np.concatenate([1 - exchanged, exchanged], 1)
        gains = [rows.weighed(metric, weights) - rows.weighed(metric, 1 - weights) for rows in both]
        return np.asarray(np.mean(gains, 0))

    permutation = exchange_test(difference, units, resamples)
    means = [_mean_of_seeds(seeds, metric) for seeds in (variant, other)]
    if means[0] is None or means[1] is None:
        known = np.logical_and.reduce([rows.has_value(metric) for rows in (*variant, *other)])
        return PairedTest(int(known.sum()), permutation, None, None)
    differences = means[0] - means[1]
    known = ~np.isnan(differences)
    of_units = unit_means(differences[known], units[known])
    return PairedTest(int(known.sum()), permutation, wilcoxon(of_units), rank_biserial(of_units))


def exchange_test(difference: Callable[[Floats], Floats], units: Units, resamples: int, seed: int = 0) -> float | None:
    """Two-sided p of a permutation test in which each unit's two results are exchanged or not.

    Args:
        difference: Given which images are exchanged, (F, N) of 0 and 1, answers the F differences.
        units: For each image the number of what it belongs to, (N,).
        resamples: Number F of random exchanges; where all that are possible are no more, these are done instead, and
            the p is exact.
        seed: Of the exchanges.

    Returns:
        The share of exchanges with a difference at least as large, of random ones with the observed one among them
        (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585); None if the observed difference has no value.
    """
    observed = abs(float(difference(np.zeros((1, len(units))))[0]))
    if np.isnan(observed):
        return None
    number = int(units.max()) + 1
    exact = number < 60 and 2**number <= resamples
    total, extreme = 0, 0
    for exchanged in _exchanges(number, exact, resamples, len(units), seed):
        found = np.abs(difference(exchanged[:, units].astype(np.float64)))
        total += int((~np.isnan(found)).sum())
        extreme += int((found >= observed - 1e-12).sum())
    return extreme / total if exact else (1 + extreme) / (1 + total)


def _exchanges(units: int, exact: bool, resamples: int, images: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Which units are exchanged, (rows, U), in blocks that fit into memory."""
    generator, total = np.random.default_rng(seed), 2**units if exact else resamples
    rows = max(1, BLOCK // (2 * images))
    for start in range(0, total, rows):
        numbers = np.arange(start, min(start + rows, total))
        if exact:
            yield (numbers[:, None] >> np.arange(units)) % 2 == 1
        else:
            yield generator.random((len(numbers), units)) < 0.5


def _mean_of_seeds(seeds: Sequence[Rows], metric: str) -> Floats | None:
    """The mean value of each image over the seeds, NaN where one has none; None where images have none."""
    values = [each for rows in seeds if (each := rows.each(metric)) is not None]
    return np.mean(values, 0) if values else None


def unit_means(values: Floats, units: Units) -> Floats:
    """The mean of each unit that is there."""
    there, place = np.unique(units, return_inverse=True)
    return np.asarray(np.bincount(place, values, len(there)) / np.bincount(place, minlength=len(there)))


def wilcoxon(differences: ArrayLike) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test by SciPy; zeros are left out, and if all are, p is 1.

    Returns:
        None without any difference.
    """
    values = _without_dust(differences)
    if not len(values):
        return None
    if not values.any():
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few that it cannot become small
        return float(stats.wilcoxon(values, zero_method="wilcox").pvalue)


def rank_biserial(differences: ArrayLike) -> float | None:
    """Matched-pairs rank-biserial correlation (Kerby 2014, doi:10.2466/11.IT.3.1), of the signed-rank test.

    Returns:
        The share of the sum of ranks that favours the first less that which favours the second, zeros left out; 0 if
        all are zero, None without any difference.
    """
    values = _without_dust(differences)
    if not len(values):
        return None
    values = values[values != 0]
    ranks = stats.rankdata(np.abs(values))
    return float((np.sign(values) * ranks).sum() / ranks.sum()) if len(values) else 0.0


def _without_dust(differences: ArrayLike) -> Floats:
    """Differences that are 0 but for rounding as 0: ties are ties."""
    values = np.asarray(differences, np.float64)
    return np.where(np.abs(values) < 1e-12, 0, values)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusts p values of a family of tests, so that the chance of any false finding is kept (Holm 1979).

    Raises:
        MedvisionError: If one is not between 0 and 1.
    """
    if wrong := [value for value in p if not 0 <= value <= 1]:
        raise MedvisionError(f"a p value is {wrong[0]}; expected 0 to 1")
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def two_sided(drawn: Floats) -> float | None:
    """The p that resampled differences, (R,), give to there being none: twice the smaller share beyond zero.

    Returns:
        Below 0.05 where the 95 % interval leaves zero out; None where no resample has a value.
    """
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return None
    return float(min(1, 2 * (1 + min((known <= 0).sum(), (known >= 0).sum())) / (1 + len(known))))


def rank_probabilities(drawn: Floats, lower: bool = False) -> Floats:
    """How often each variant takes each rank.

    Args:
        drawn: (R, G), a metric of each resample; resamples in which a variant has no value are left out.
        lower: Whether less is better.

    Returns:
        (G, G), of variant g the share of resamples in which it is first, second and so on; equal ones share their
        ranks. NaN where no resample is left.
    """
    values = drawn[~np.isnan(drawn).any(1)] * (1 if lower else -1)
    size = drawn.shape[1]
    if not len(values):
        return np.full((size, size), np.nan)
    first, last = (stats.rankdata(values, method, axis=1)[..., None] for method in ("min", "max"))
    ranks = np.arange(1, size + 1)
    shares: Floats = ((first <= ranks) & (ranks <= last)) / (last - first + 1)
    return np.asarray(shares.mean(0))
