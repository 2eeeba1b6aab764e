"""Pictures: sheets of images, and charts of trainings, comparisons, labels and searches."""

from medvision.figures.charts import bars, curves, forest, probabilities, ranks, reliability, sweep, watched
from medvision.figures.sheets import (
    CLASSES,
    FALSE,
    MISSED,
    TRUTH,
    Example,
    Tile,
    gallery,
    heated,
    named,
    overlay,
    sheet,
    to_pixels,
    verdict,
)

__all__ = [
    "CLASSES",
    "FALSE",
    "MISSED",
    "TRUTH",
    "Example",
    "Tile",
    "bars",
    "curves",
    "forest",
    "gallery",
    "heated",
    "named",
    "overlay",
    "probabilities",
    "ranks",
    "reliability",
    "sheet",
    "sweep",
    "to_pixels",
    "verdict",
    "watched",
]
