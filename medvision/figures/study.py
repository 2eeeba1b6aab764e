"""Figures of a search: which values matter, and which values the good trials had."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from medvision.figures.charts import charted
from medvision.study import Dimension, Trial


def importance(path: Path, shares: Mapping[str, float], title: str) -> None:
    """Draws a bar for the share, 0 to 1, of each value that was searched for."""
    with charted(path, 1, 1, (8, 1.2 + 0.4 * len(shares))) as (axes,):
        bars = axes.barh(range(len(shares)), [*shares.values()])
        axes.bar_label(bars, [f"{share:.2f}" for share in shares.values()], padding=3, fontsize=9)
        axes.set_yticks(range(len(shares)), [*shares], fontsize=9)
        axes.set(xlim=(0, 1.08), ylim=(len(shares) - 0.4, -0.6))
        axes.set_title(title, fontsize=10, loc="right")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def parallel(
    path: Path, space: Sequence[Dimension], trials: Sequence[Trial], metric: str, maximise: bool, title: str
) -> None:
    """Draws a line for each trial through its values to its metric: the better the darker, the best red, pruned grey.

    Args:
        path: The PNG.
        space: The axes, each over its whole range.
        trials: At least one is complete; those without a metric are left out, pruned ones end before it.
        metric: Its name.
        maximise: Whether it is the better the larger.
        title: What is written above.
    """
    from matplotlib import colormaps

    found = {trial.number: trial.value for trial in trials if trial.state == "complete" and trial.value is not None}
    low, high = min(found.values()), max(found.values())
    metric_axis = Dimension(metric, low=float(low), high=float(high))
    best = min(found, key=lambda number: (-1 if maximise else 1) * found[number])
    with charted(path, 1, 1, (2.4 + 2.2 * len(space), 5)) as (axes,):
        for trial in trials:
            heights = [_height(dimension, trial.params[dimension.name]) for dimension in space if trial.params]
            if trial.state == "pruned":
                axes.plot(heights, color="0.8", lw=1, linestyle="--", zorder=1)
            elif trial.number in found:
                share = _height(metric_axis, found[trial.number])
                colour = colormaps["Blues"](0.25 + 0.65 * (share if maximise else 1 - share))
                of_best = trial.number == best
                axes.plot([*heights, share], color="C3" if of_best else colour, lw=3 if of_best else 1.3, zorder=2)
        for n, dimension in enumerate([*space, metric_axis]):
            axes.axvline(n, color="black", lw=0.8, zorder=5)
            for value, text in _ticks(dimension):
                box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
                axes.text(n + 0.04, _height(dimension, value), text, fontsize=8, va="center", bbox=box, zorder=6)
        axes.set_xticks(range(len(space) + 1), [d.name for d in [*space, metric_axis]], fontsize=9)
        axes.set(xlim=(-0.1, len(space) + 0.5), ylim=(-0.06, 1.06), yticks=[])
        axes.set_title(title, fontsize=10)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)


def _height(dimension: Dimension, value: str | float) -> float:
    """Where a value lies on its axis, 0 to 1."""
    if dimension.choices:
        low, high, at = 0.0, len(dimension.choices) - 1.0, float(dimension.choices.index(str(value)))
    else:
        low, high, at = float(dimension.low), float(dimension.high), float(value)
        if dimension.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.5


def _ticks(dimension: Dimension) -> list[tuple[str | float, str]]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if dimension.choices:
        return [(choice, choice) for choice in dimension.choices]
    low, high = float(dimension.low), float(dimension.high)
    if dimension.step and (high - low) / dimension.step < 9:
        values = [low + n * dimension.step for n in range(round((high - low) / dimension.step) + 1)]
        return [(value, f"{value:g}") for value in values]
    whole = isinstance(dimension.low, int)
    locator = LogLocator(subs=(1, 2, 5)) if dimension.log else MaxNLocator(5, integer=whole)
    return [(float(v), f"{v:g}") for v in locator.tick_values(low, high) if low <= v <= high] or [(low, f"{low:g}")]
