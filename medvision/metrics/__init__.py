"""Metrics: overlap of masks from counted pixels, distances of boundaries, labels from probabilities, intervals."""

from medvision.metrics.boundary import BOUNDARY, boundary_scores, surface_distances
from medvision.metrics.challenge import OF_LABELS, OF_MASKS, unetpp_iou
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
    CHOICES,
    COUNTS,
    EMPTY,
    GRID,
    Overlap,
    best_columns,
    best_threshold,
    count,
    histogram,
    image_scores,
    scores,
    summarise,
)

__all__ = [
    "BOUNDARY",
    "CHOICES",
    "COUNTS",
    "EMPTY",
    "GRID",
    "NAMES",
    "OF_LABELS",
    "OF_MASKS",
    "Bootstrap",
    "Overlap",
    "Ranking",
    "best_columns",
    "best_decision",
    "best_threshold",
    "boundary_scores",
    "count",
    "decide",
    "histogram",
    "image_scores",
    "interval",
    "one_hot",
    "scores",
    "summarise",
    "summarise_intervals",
    "summarise_label_intervals",
    "summarise_labels",
    "surface_distances",
    "unetpp_iou",
]
