"""Metrics: overlap of masks from counted pixels, distances of boundaries, labels from probabilities, intervals."""

from medvision.metrics.boundary import BOUNDARY, boundary_scores, surface_distances
from medvision.metrics.challenge import OF_LABELS, OF_MASKS
from medvision.metrics.intervals import Bootstrap, interval, summarise_intervals
from medvision.metrics.labels import (
    NAMES,
    YOUDEN,
    Ranking,
    best_decision,
    check_operating_point,
    cumulate,
    decide,
    delong,
    one_hot,
    summarise_label_intervals,
    summarise_labels,
    undefined_labels,
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

__all__ = [
    "BOUNDARY",
    "COUNTS",
    "EMPTY",
    "GRID",
    "NAMES",
    "OF_LABELS",
    "OF_MASKS",
    "YOUDEN",
    "Bootstrap",
    "Overlap",
    "Ranking",
    "best_decision",
    "best_threshold",
    "boundary_scores",
    "check_operating_point",
    "count",
    "cumulate",
    "decide",
    "delong",
    "histogram",
    "interval",
    "one_hot",
    "scores",
    "summarise",
    "summarise_intervals",
    "summarise_label_intervals",
    "summarise_labels",
    "surface_distances",
    "undefined_labels",
]
