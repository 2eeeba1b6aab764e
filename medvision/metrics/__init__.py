"""Metrics: overlap of masks from counted pixels, distances of boundaries, labels from probabilities, intervals."""

from medvision.metrics.boundary import BOUNDARY, boundary_scores, surface_distances
from medvision.metrics.challenge import OF_LABELS, OF_MASKS
from medvision.metrics.intervals import Bootstrap, interval, summarise_intervals
from medvision.metrics.labels import (
    NAMES,
    Ranking,
    best_decision,
    decide,
    one_hot,
    summarise_label_intervals,
    summarise_labels,
)
from medvision.metrics.overlap import (
    COUNTS,
    EMPTY,
    GRID,
    Overlap,
    best_threshold,
    count,
    histogram,
    scores,
    summarise,
)
from medvision.metrics.paired import PairedTest, Resampled, holm, paired_test, rank_probabilities, resample, two_sided
from medvision.metrics.rows import LabelRows, MaskRows, Rows, lower_is_better

__all__ = [
    "BOUNDARY",
    "COUNTS",
    "EMPTY",
    "GRID",
    "NAMES",
    "OF_LABELS",
    "OF_MASKS",
    "Bootstrap",
    "LabelRows",
    "MaskRows",
    "Overlap",
    "PairedTest",
    "Ranking",
    "Resampled",
    "Rows",
    "best_decision",
    "best_threshold",
    "boundary_scores",
    "count",
    "decide",
    "histogram",
    "holm",
    "interval",
    "lower_is_better",
    "one_hot",
    "paired_test",
    "rank_probabilities",
    "resample",
    "scores",
    "summarise",
    "summarise_intervals",
    "summarise_label_intervals",
    "summarise_labels",
    "surface_distances",
    "two_sided",
]
