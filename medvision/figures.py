"""Pictures: sheets of images with truth and prediction, curves of trainings, distributions."""

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medvision.files import replacing
from medvision.logger import Row
from medvision.metrics.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]

TILE = 224  # height of a picture in a sheet, pixels
PAGE = 60_000_000  # pixels of a sheet that viewers still open
COLOURS = 10  # lines that charts tell apart: more have no legend
TRUTH, MISSED, FALSE = (60, 220, 90), (70, 140, 255), (255, 70, 60)
OVERLAP = ["val/dice_image", "val/jaccard_image", "val/dice", "val/jaccard", "paper/dice"]
LABELS = ["train/accuracy", "val/accuracy", "val/auroc", "val/average_precision"]
CLASSES = [(255, 200, 40), (60, 200, 255), (255, 90, 200), (120, 255, 120), (255, 140, 60), (170, 130, 255)]


@dataclass(frozen=True)
class Example:
    """An image as a sheet shows it.

    Attributes:
        caption: What is written beside it.
        image: uint8 (H, W, C).
        truth: bool (K, H, W).
        prediction: bool (K, H, W).
    """

    caption: str
    image: Pixels
    truth: NDArray[np.bool_]
    prediction: NDArray[np.bool_]


def to_pixels(image: NDArray[np.float32], mean: NDArray[np.float64], std: NDArray[np.float64]) -> Pixels:
    """A normalised image (C, H, W) as it was before: uint8 (H, W, C)."""
    values = image.transpose(1, 2, 0) * std + mean
    result: Pixels = (values * 255).round().clip(0, 255).astype(np.uint8)
    return result


def sheet(
    path: Path, examples: Sequence[Example], classes: Sequence[str], title: str, height: int | None = TILE
) -> None:
    """Draws a row for each example: image, truth, prediction, errors (green right, blue missed, red false).

    Args:
        path: The PNG.
        examples: The rows.
        classes: Names of what the masks show, each with a colour where there are several.
        title: The first line.
        height: Of each picture, in pixels; None: its own, or less where the sheet would pass `PAGE`, which the title
            then says.
    """
    heights = [height or len(example.image) for example in examples]
    if height is None:
        pixels = 4 * sum(example.image.shape[0] * example.image.shape[1] for example in examples)
        scale = min(1.0, (PAGE / pixels) ** 0.5)
        heights = [max(1, round(scale * own)) for own in heights]
        title += f", shown at {scale:.0%} of its size" if scale < 1 else ""
    rows = [_row(example, tall) for example, tall in zip(examples, heights, strict=True)]
    size = max(14, max(heights) // 40)
    font, line, gap = _font(size), round(size * 11 / 7), size
    names = list(classes) if len(classes) > 1 else []
    legend = "image  |  truth  |  prediction  |  errors: green right, blue missed, red false"
    key = font.getlength(legend) + 2 * gap + sum(font.getlength(name) + gap for name in names)
    texts = [key, *(font.getlength(text) for text in (title, *(example.caption for example in examples)))]
    width = max(*(row.shape[1] for row in rows), 8 + int(max(texts)))
    page = Image.new("RGB", (width, 2 * line + sum(row.shape[0] + line for row in rows)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 3), title, "black", font)
    draw.text((4, line), legend, "dimgrey", font)
    x = font.getlength(legend) + 2 * gap
    for k, name in enumerate(names):
        draw.text((x, line), name, tuple(c * 2 // 3 for c in CLASSES[k % len(CLASSES)]), font)
        x += font.getlength(name) + gap
    y = 2 * line
    for row, example in zip(rows, examples, strict=True):
        draw.text((4, y + line // 7), example.caption, "black", font)
        page.paste(Image.fromarray(row), (0, y + line))
        y += row.shape[0] + line
    with replacing(path) as temporary:
        page.save(temporary, "PNG")


@dataclass(frozen=True)
class Tile:
    """A picture of a gallery.

    Attributes:
        caption: What is written above it, perhaps in several lines.
        image: uint8 (H, W, C).
        masks: bool (K, H, W), painted over it; K may be 0.
    """

    caption: str
    image: Pixels
    masks: NDArray[np.bool_]


def gallery(path: Path, tiles: Sequence[Tile], classes: Sequence[str], title: str, columns: int = 6) -> None:
    """Draws pictures in rows, each with its masks over it, a colour for each class; no side is above `TILE`."""
    font, line = _font(12), 20
    above = line * max((tile.caption.count("\n") + 1 for tile in tiles), default=0)
    sizes = [_fitted(tile.image.shape[1], tile.image.shape[0]) for tile in tiles]
    cell = (TILE + 6, max((tall for _, tall in sizes), default=0) + above + 4)
    head = line * (2 if classes else 1) + 4
    texts = (font.getlength(title), sum(font.getlength(name) + 14 for name in classes))
    size = (max(columns * cell[0], 8 + int(max(texts))), head + -(-len(tiles) // columns) * cell[1])
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 2), title, "black", font)
    x = 4.0
    for k, name in enumerate(classes):
        draw.text((x, line), name, tuple(c * 2 // 3 for c in CLASSES[k % len(CLASSES)]), font)
        x += draw.textlength(name, font) + 14
    for n, (tile, wanted) in enumerate(zip(tiles, sizes, strict=True)):
        corner = (n % columns * cell[0], head + n // columns * cell[1])
        caption = "\n".join(_fitting(text, font) for text in tile.caption.split("\n"))
        draw.text((corner[0] + 2, corner[1]), caption, "black", font)
        shown = cv2.resize(np.asarray(tile.image), wanted, interpolation=cv2.INTER_AREA).reshape(*wanted[::-1], -1)
        view: Pixels = np.broadcast_to(shown, (*wanted[::-1], 3)).astype(np.uint8)
        for k, mask in enumerate(_enlarge(tile.masks, wanted) if len(tile.masks) else []):
            view = _paint(view, mask, CLASSES[k % len(CLASSES)])
        page.paste(Image.fromarray(view), (corner[0], corner[1] + above))
    with replacing(path) as temporary:
        page.save(temporary, "PNG")


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the charts: that of Pillow has no letter beyond those of English."""
    import matplotlib  # slow to import

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitted(width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture in a gallery, whose longer side is `TILE`."""
    scale = TILE / max(width, height)
    return max(TILE // 16, round(width * scale)), max(TILE // 16, round(height * scale))  # a row of numbers is seen


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    """A line, without its middle where it is longer than a picture of a gallery is wide: names differ at the end."""
    cut = (f"{text[:n]}…{text[len(text) - n :]}" for n in range(len(text) // 2, -1, -1))
    return text if font.getlength(text) <= TILE else next(line for line in cut if font.getlength(line) <= TILE)


def overlay(image: Pixels, masks: NDArray[np.bool_]) -> Pixels:
    """An image (H, W, C) with masks (K, H, W) over it, a veil and an outline for each class: RGB (H, W, 3)."""
    result: Pixels = np.broadcast_to(image, (*image.shape[:2], 3)).copy()
    for k, mask in enumerate(masks):
        result = _paint(result, mask, CLASSES[k % len(CLASSES)], 1 + min(mask.shape) // 500)
    return result


def heated(image: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """An image (H, W, C) under a map of heat (h, w) in [0, 1], from blue to red: RGB (H, W, 3)."""
    height, width = image.shape[:2]
    full = cv2.resize(np.asarray(heat, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    shade = (20 + 210 * full.clip(0, 1)).round().astype(np.uint8)  # without the dark ends
    colours = cv2.applyColorMap(shade, cv2.COLORMAP_TURBO)[..., ::-1]
    result: Pixels = (0.55 * np.broadcast_to(image, colours.shape) + 0.45 * colours).astype(np.uint8)
    return result


def watched(logged: Collection[str]) -> list[str]:
    """Of the metrics that are logged those to watch a training by: of masks, or else of labels."""
    return [name for name in OVERLAP if name in logged] or [name for name in LABELS if name in logged]


def named(classes: Sequence[str], there: NDArray[np.bool_]) -> str:
    """The names of the classes that are there, for a caption."""
    return " + ".join(name for name, flag in zip(classes, there, strict=True) if flag) or "none"


def plain(text: str, width: int = 1000, most: int = 1) -> str:
    """A name as charts are to show it: letter by letter, in lines of a width, of which the last may be cut.

    Matplotlib takes what stands between two $ for a formula, and leaves out of a legend what begins with _.
    """
    lines = textwrap.fill(text.replace("_", "_ "), width, max_lines=most, placeholder=" …")  # _ may end a line too
    return re.sub("^_", " _", lines.replace("_ ", "_")).replace("$", r"\$")


def verdict(classes: Sequence[str], there: NDArray[np.bool_], said: NDArray[np.bool_]) -> str:
    """The names of the classes that are there, and where others are decided for, on a second line theirs."""
    of_truth, of_decision = named(classes, there), named(classes, said)
    return of_truth if of_truth == of_decision else f"{of_truth}\nsaid: {of_decision}"


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


def _row(example: Example, tall: int) -> Pixels:
    height, width = example.image.shape[:2]
    size = (max(1, round(width * tall / height)), tall)
    shrunk = cv2.resize(example.image, size, interpolation=cv2.INTER_AREA)
    image: Pixels = np.broadcast_to(shrunk.reshape(*size[::-1], -1), (*size[::-1], 3)).astype(np.uint8)
    truth, prediction = (_enlarge(masks, size) for masks in (example.truth, example.prediction))
    several, line = len(truth) > 1, 1 + tall // 500
    views = [image]
    for masks, colour in ((truth, TRUTH), (prediction, CLASSES[0])):
        view = image
        for k, mask in enumerate(masks):
            view = _paint(view, mask, CLASSES[k % len(CLASSES)] if several else colour, line)
        views.append(view)
    either, right = truth.any(0) | prediction.any(0), (truth == prediction).all(0)
    false = (prediction & ~truth).any(0)
    errors = (0.35 * image).astype(np.uint8)
    for mask, colour in ((either & right, TRUTH), (either & ~right & ~false, MISSED), (false, FALSE)):
        errors[mask] = colour
    gap = np.full((tall, 4, 3), 255, np.uint8)
    result: Pixels = np.concatenate([part for view in [*views, errors] for part in (view, gap)], axis=1)
    return result


def _enlarge(masks: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    return np.stack([cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0 for m in masks])


def _paint(image: Pixels, mask: NDArray[np.bool_], colour: tuple[int, int, int], line: int = 1) -> Pixels:
    """A thin veil of colour with a clear outline, so that what lies under it stays to be judged."""
    result = image.copy()
    result[mask] = (0.75 * result[mask] + 0.25 * np.array(colour)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(result, contours, -1, colour, line, cv2.LINE_AA)
    return result


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
