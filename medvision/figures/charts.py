"""Charts: courses of trainings, distributions, differences, thresholds and calibration."""

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from medvision.figures.sheets import FALSE, TRUTH, Pixels
from medvision.files import replacing
from medvision.logger import Row
from medvision.metrics.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 10  # lines that charts tell apart: more have no legend
OVERLAP = ["val/dice_image", "val/jaccard_image", "val/dice", "val/jaccard", "paper/dice"]
LABELS = ["train/accuracy", "val/accuracy", "val/auroc", "val/average_precision"]


def watched(logged: Collection[str]) -> list[str]:
    """Of the metrics that are logged those to watch a training by: of masks, or else of labels."""
    return [name for name in OVERLAP if name in logged] or [name for name in LABELS if name in logged]


def plain(text: str, width: int = 1000, most: int = 1) -> str:
    """A name as charts are to show it: letter by letter, in lines of a width, of which the last may be cut.

    Matplotlib takes what stands between two $ for a formula, and leaves out of a legend what begins with _.
    """
    lines = textwrap.fill(text.replace("_", "_ "), width, max_lines=most, placeholder=" …")  # _ may end a line too
    return re.sub("^_", " _", lines.replace("_ ", "_")).replace("$", r"\$")


def bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, str]]]]) -> None:
    """Draws bar charts: for each panel, of each split, a bar for each class with its length and what stands beside."""
    classes = [[*dict.fromkeys(name for values in splits.values() for name in values)] for splits in panels.values()]
    rows = max(len(names) * (len(splits) + 1) for names, splits in zip(classes, panels.values(), strict=True))
    with charted(path, 1, len(panels), (7 * len(panels), 1.2 + 0.2 * rows)) as charts:
        for axes, names, (label, splits) in zip(charts, classes, panels.items(), strict=True):
            thick = 0.84 / len(splits)
            for n, (split, values) in enumerate(splits.items()):
                there = [name for name in names if name in values]
                places = [names.index(name) + (n - (len(splits) - 1) / 2) * thick for name in there]
                drawn = axes.barh(places, [values[name][0] for name in there], thick, label=split)
                axes.bar_label(drawn, [values[name][1] for name in there], fontsize=8, padding=3)
            axes.set_yticks(range(len(names)), [plain(name, 40, 2) for name in names])
            axes.set_title(label)
            axes.invert_yaxis()  # the first on top
            axes.margins(x=0.2)  # for what stands beside
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars


def forest(path: Path, panels: Mapping[str, Mapping[str, tuple[float, float | None, float | None, bool]]]) -> None:
    """Draws differences with their intervals around zero: for each panel, for each name value, bounds, whether shown.

    What is shown to be a difference is dark, the rest grey; without bounds there is only the value.
    """
    rows = max(len(values) for values in panels.values())
    with charted(path, len(panels), 1, (9, (1.1 + _row_height(panels) * rows) * len(panels))) as charts:
        for axes, (title, values) in zip(charts, panels.items(), strict=True):
            for n, (value, low, high, clear) in enumerate(values.values()):
                colour = "black" if clear else "grey"
                if low is not None and high is not None:
                    axes.plot([low, high], [n, n], color=colour, lw=2, solid_capstyle="butt")
                axes.plot([value], [n], "D", color=colour, markersize=6)
            axes.axvline(0, color="C3", lw=1)
            axes.set_ylim(len(values) - 0.5, -0.5)  # the first on top
            _name_rows(axes, title, [*values])
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right", "left"]].set_visible(False)


def ranks(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draws for each panel and name the probability of each rank, the darker the likelier."""
    rows = max(len(values) for values in panels.values())
    with charted(path, len(panels), 1, (6 + 0.7 * rows, (1.4 + _row_height(panels) * rows) * len(panels))) as charts:
        for axes, (title, values) in zip(charts, panels.items(), strict=True):
            shares = np.array([*values.values()])
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (row, column), share in np.ndenumerate(shares):
                text = f"{share:.0%}" if share >= 0.005 else "" if share == 0 else "<1%"
                axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.6 else "black")
            axes.set_xticks(range(len(values)), [str(rank) for rank in range(1, len(values) + 1)])
            axes.set_xlabel("rank")
            axes.spines[:].set_visible(False)
            _name_rows(axes, title, [*values])


def _row_height(panels: Mapping[str, Iterable[str]]) -> float:
    """The height of a row that holds all lines of the longest name."""
    return max(0.45, *(0.16 * (1 + _row_name(name).count("\n")) for names in panels.values() for name in names))


def _row_name(name: str) -> str:
    return plain(name, 40, 9)


def _name_rows(axes: "Axes", title: str, names: Sequence[str]) -> None:
    """Names the rows of a chart, in several lines where they are long."""
    axes.set_yticks(range(len(names)), [_row_name(name) for name in names], fontsize=9)
    axes.set_title(plain(title, 110, 9), fontsize=10, loc="right")


def probabilities(
    path: Path,
    image: Pixels,
    classes: Sequence[str],
    values: NDArray[np.float32],
    truth: NDArray[np.bool_],
    threshold: Sequence[float],
    title: str,
) -> None:
    """Draws an image (H, W, C) and the probability (K,) of each class, green where it is there, with its threshold."""
    with charted(path, 1, 2, (10, 4.6)) as (left, right):
        left.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
        left.set_axis_off()
        left.set_title("\n".join(plain(line, 60, 3) for line in title.split("\n")), fontsize=9)
        colours = [tuple(c / 255 for c in (TRUTH if there else FALSE)) for there in truth]
        drawn = right.barh(range(len(classes)), values.tolist(), color=colours)
        right.bar_label(drawn, [f"{value:.3f}" for value in values], padding=3)
        right.set_yticks(range(len(classes)), [plain(name, 30, 2) for name in classes])
        right.set(xlim=(0, 1.12), ylim=(len(classes) - 0.4, -0.6))
        right.set_xticks(np.linspace(0, 1, 6))
        right.set_title("probability: green there, red not" + (", line threshold" if threshold else ""), fontsize=9)
        for k, value in enumerate(threshold):
            right.plot([value, value], [k - 0.45, k + 0.45], "k--")
        right.spines[["top", "right"]].set_visible(False)


def sweep(
    path: Path,
    thresholds: NDArray[np.float32],
    curves: Mapping[str, NDArray[np.float64]],
    chosen: Sequence[float],
    metric: str,
    title: str,
) -> None:
    """Draws a metric over thresholds with the chosen ones.

    Args:
        path: The picture.
        thresholds: T of them.
        curves: For each class value, lower and upper bound, (3, T); NaN where there is none.
        chosen: The threshold of each class.
        metric: Name of the metric.
        title: What is written above.
    """
    with charted(path, 1, 1, (7, 4.4)) as (axes,):
        for (name, (values, low, high)), at in zip(curves.items(), chosen, strict=True):
            (line,) = axes.plot(thresholds, values, label=plain(f"{name}: {at:g}"))
            axes.fill_between(thresholds, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.plot([at], [np.interp(at, thresholds, values)], "o", color=line.get_color())
        axes.set(xlabel="threshold", ylabel=metric, xlim=(0, 1))
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def reliability(path: Path, panels: Mapping[str, Mapping[str, Reliability]], title: str) -> None:
    """Draws reliability diagrams, and below each how many probabilities lie where.

    Args:
        path: The picture.
        panels: For each class what is drawn into one diagram, by name.
        title: What is written above.
    """
    columns = len(panels)
    with charted(path, 2, columns, (4.4 * columns, 5.6), sharex=True, height_ratios=(3, 1)) as charts:
        charts[0].figure.suptitle(title, fontsize=9)
        for axes, shares, (name, drawn) in zip(charts, charts[columns:], panels.items(), strict=False):
            axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
            for label, found in drawn.items():
                there = found.count > 0
                shown = f"{label}: ECE {found.expected_error:.4f}, Brier {found.brier:.4f}"
                axes.plot(found.confidence[there], found.frequency[there], marker=".", label=shown)
                shares.stairs(found.count / found.count.sum(), np.linspace(0, 1, len(found.count) + 1))
            axes.set(ylabel="share that is there", title=plain(name, 40, 2), ylim=(0, 1))
            shares.set(xlabel="probability", ylabel="share of all", xlim=(0, 1), yscale="log", ylim=(1e-5, 1))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)


def curves(
    path: Path, runs: Mapping[str, Sequence[Row]], metric: str | None = None, by: Literal["epoch", "step"] = "epoch"
) -> None:
    """Draws loss, metrics, those of each class and the learning rate from the rows of `metrics.csv`.

    One run has a line for each metric, several have a line for each run.

    Args:
        path: The PNG.
        runs: Rows of each run by its name in the legend.
        metric: To be drawn alone, as logged; None: those that are watched.
        by: What is counted along the axis.
    """
    there = dict.fromkeys(name for rows in runs.values() for _, _, name, _ in rows)
    shown = watched(there) if metric is None else [metric]
    split = next((name for name in reversed(shown) if any(other.startswith(f"{name}/") for other in there)), None)
    of_class = [name for name in there if split is not None and name.startswith(f"{split}/")]
    losses, several = ["train/loss_step", "train/loss", "val/loss"], len(runs) > 1
    if several:
        panels = {"loss (training dotted)": losses[1:]} | {name: [name] for name in [*shown, *of_class]}
    else:
        panels = {"loss": losses, "metrics": shown} | ({f"{split} of each class": of_class} if of_class else {})
    panels["learning rate"] = ["lr"]
    columns = 4 if len(panels) in (4, 7, 8) or len(panels) > 9 else 3
    height = -(-len(panels) // columns)
    with charted(path, height, columns, (13 / 3 * columns, 3.6 * height)) as charts:
        for axes, (title, names) in zip(charts, panels.items(), strict=False):
            for n, (run, rows) in enumerate(runs.items()):
                steps = max((step for _, step, _, _ in rows), default=0) + 1
                scale = max((epoch for epoch, _, _, _ in rows), default=0) / steps if by == "epoch" else 1
                for name in names:
                    points = [((step + 1) * scale, value) for _, step, logged, value in rows if logged == name]
                    if not points:
                        continue
                    each_step = name == "train/loss_step"
                    axes.plot(
                        *zip(*points, strict=True),
                        color=f"C{n}" if several else "lightgrey" if each_step else None,
                        linestyle=":" if several and name.startswith("train/") else "-",
                        marker="." if len(points) < 40 and not each_step else None,
                        label=run if several else plain(name.removeprefix(f"{split}/"), 30),
                    )
            axes.set(xlabel=by, title=plain(title, 50, 3))
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata()) if np.isfinite(value)]
            if title.startswith("loss") and drawn and 0 < 10 * min(drawn) < max(drawn):
                axes.set_yscale("log")  # a first epoch far off leaves the others flat
            if not several and 0 < len(axes.lines) <= COLOURS:
                axes.legend(fontsize=8)
        for axes in charts[len(panels) :]:
            axes.set_axis_off()
        if several:
            lines = {str(line.get_label()): line for axes in charts for line in axes.lines}
            labels = [plain(label, 150, 9) for label in lines]
            figure = cast("Figure", charts[0].get_figure())
            figure.legend(lines.values(), labels, loc="outside lower center", fontsize=9)


@contextmanager
def charted(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> "Iterator[list[Axes]]":
    """Charts in rows, of a size in inches, written to a PNG when they are drawn; options of `Figure.subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display this way
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield [*figure.subplots(rows, columns, squeeze=False, **options).flat]
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
