"""Metrics: overlap of masks from counted pixels, and of labels from probabilities."""

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
    "COUNTS",
    "EMPTY",
    "GRID",
    "NAMES",
    "Overlap",
    "Ranking",
    "best_decision",
    "best_threshold",
    "count",
    "decide",
    "histogram",
    "one_hot",
    "scores",
    "summarise",
    "summarise_labels",
]
