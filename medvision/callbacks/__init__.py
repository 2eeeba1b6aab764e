"""Lightning callbacks: checkpoints that resume exactly, averages of weights, early stopping, lines, pictures."""

from medvision.callbacks.average import EMA, SWA, Average
from medvision.callbacks.checkpoint import Checkpoint, PlainCheckpointIO
from medvision.callbacks.course import EarlyStopping, EpochLines, Thaw
from medvision.callbacks.pictures import Explanations, Pictures

__all__ = [
    "EMA",
    "SWA",
    "Average",
    "Checkpoint",
    "EarlyStopping",
    "EpochLines",
    "Explanations",
    "Pictures",
    "PlainCheckpointIO",
    "Thaw",
]
