"""What a comparison finds, as plain objects for tables and pages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric of a variant.

    Attributes:
        value: The mean over seeds.
        std: The standard deviation over seeds; None with one.
        low: Lower bound of the 95 % interval over seeds and images; None where there is none.
        high: The upper bound.
        seeds: The value of each seed.
    """

    value: float
    std: float | None
    low: float | None
    high: float | None
    seeds: Mapping[str, float]


@dataclass(frozen=True)
class Variant:
    """Runs that differ by seed and fold alone.

    Attributes:
        name: What differs from the other variants.
        levels: The same by factor.
        config: All that differs in the configs.
        runs: Folder, command, seed, fold and metrics of each.
        estimates: By metric.
    """

    name: str
    levels: Mapping[str, str]
    config: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """A variant less the baseline.

    Attributes:
        metric: The metric.
        variant: Name of the variant.
        baseline: Name of the baseline.
        changed: The factors in which they differ: with one, an ablation of one factor at a time.
        value: The difference of the means over seeds.
        low: Lower bound of its 95 % interval over seeds and images; None where there is none.
        high: The upper bound.
        bootstrap: p of the resamples over seeds and images; below 0.05 where the interval leaves zero out.
        bootstrap_holm: The same, adjusted for all differences and metrics of the comparison.
        images: How many images both have a value of.
        permutation: p of the paired permutation test on images; None where there is no value.
        permutation_holm: The same, adjusted.
        wilcoxon: p of the signed-rank test; None for a metric of many images together.
        wilcoxon_holm: The same, adjusted.
        rank_biserial: Matched-pairs rank-biserial correlation, the effect size; None likewise.
        verdict: `better` or `worse` where both adjusted p, of bootstrap and permutation, are below 0.05, else `not
            shown`.
    """

    metric: str
    variant: str
    baseline: str
    changed: Sequence[str]
    value: float
    low: float | None
    high: float | None
    bootstrap: float | None
    bootstrap_holm: float | None
    images: int
    permutation: float | None
    permutation_holm: float | None
    wilcoxon: float | None
    wilcoxon_holm: float | None
    rank_biserial: float | None
    verdict: str


@dataclass(frozen=True)
class Effect:
    """An effect in a full factorial design, of levels against the baseline's.

    Attributes:
        metric: The metric.
        factors: One for a main effect, two for an interaction.
        levels: The level of each.
        reference: The baseline's level of each.
        value: Of a main effect the mean difference over all settings of the other factors; of an interaction how much
            more the first changes the metric at the second's level than at its reference.
        low: Lower bound of its 95 % interval; None where there is none.
        high: The upper bound.
    """

    metric: str
    factors: Sequence[str]
    levels: Sequence[str]
    reference: Sequence[str]
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """All that a comparison found; but for `ids`, `each` and `each_is` what `comparison.json` holds.

    Attributes:
        data: Name of the data set.
        split: The split.
        images: Number of images.
        groups: Number of groups of images that were kept together; None where images stand for themselves.
        resamples: Of bootstrap and tests.
        baseline: Name of the variant with which the others are compared.
        metrics: The metrics, the first of which decides ranks.
        variants: In the order of the runs.
        differences: To the baseline, by metric.
        ranks: By metric: for each variant the probability of each rank under the bootstrap.
        effects: Main effects and interactions; none where the variants form no grid.
        warnings: What a reader has to know.
        ids: The images.
        each: For each metric and variant the values of the images, means over seeds; of a metric of many images
            together those of another, of each image.
        each_is: For each metric the name of that other one, or its own.
    """

    data: str
    split: str
    images: int
    groups: int | None
    resamples: int
    baseline: str
    metrics: Sequence[str]
    variants: Sequence[Variant]
    differences: Sequence[Difference]
    ranks: Mapping[str, Mapping[str, Sequence[float]]]
    effects: Sequence[Effect]
    warnings: Sequence[str]
    ids: Sequence[str] = field(repr=False)
    each: Mapping[str, Mapping[str, Floats]] = field(repr=False)
    each_is: Mapping[str, str] = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """All but `ids`, `each` and `each_is` as JSON takes it."""
        return {key: value for key, value in asdict(self).items() if key not in ("ids", "each", "each_is")}
