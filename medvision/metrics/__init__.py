"""Metrics: overlap of masks from counted pixels, distances of boundaries, labels from probabilities."""

from medvision.metrics.boundary import BOUNDARY, boundary_scores, surface_distances
from medvision.metrics.labels import NAMES, Ranking, best_decision, decide, one_hot, summarise_labels
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
    "Overlap",
    "Ranking",
    "best_decision",
    "best_threshold",
    "boundary_scores",
    "count",
    "decide",
    "histogram",
    "one_hot",
    "scores",
    "summarise",
    "summarise_labels",
    "surface_distances",
]
