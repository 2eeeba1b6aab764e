"""Finished runs as variants: what differs between them, whether it can be believed, and how it is shown."""

from medvision.comparison.found import Comparison, Difference, Effect, Estimate, Variant
from medvision.comparison.statistics import compare
from medvision.comparison.variants import Measured, differences, find_runs, grouped, read_run

__all__ = [
    "Comparison",
    "Difference",
    "Effect",
    "Estimate",
    "Measured",
    "Variant",
    "compare",
    "differences",
    "find_runs",
    "grouped",
    "read_run",
]
