"""Pictures: sheets of images with truth and prediction, and the curves of a training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medvision.files import replacing
from medvision.logger import Row
from medvision.metrics.calibration import Reliability

Pixels = NDArray[np.uint8]

TILE = 224  # height of a picture in a sheet, pixels
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


def sheet(path: Path, examples: Sequence[Example], classes: Sequence[str], title: str) -> None:
    """Draws a row for each example: image, truth, prediction, errors (green right, blue missed, red false)."""
    rows = [_row(example) for example in examples]
    width, font = max(row.shape[1] for row in rows), ImageFont.load_default(14)
    line = 22
    page = Image.new("RGB", (width, 2 * line + sum(row.shape[0] + line for row in rows)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 3), title, "black", font)
    legend = "image  |  truth  |  prediction  |  errors: green right, blue missed, red false"
    draw.text((4, line), legend, "dimgrey", font)
    if len(classes) > 1:
        x = draw.textlength(legend, font) + 24
        for k, name in enumerate(classes):
            draw.text((x, line), name, tuple(c * 2 // 3 for c in CLASSES[k % len(CLASSES)]), font)
            x += draw.textlength(name, font) + 12
    y = 2 * line
    for row, example in zip(rows, examples, strict=True):
        draw.text((4, y + 3), example.caption, "black", font)
        page.paste(Image.fromarray(row), (0, y + line))
        y += row.shape[0] + line
    with replacing(path) as temporary:
        page.save(temporary, "PNG")


@dataclass(frozen=True)
class Tile:
    """A picture of a gallery.

    Attributes:
        caption: What is written above it.
        image: uint8 (H, W, C).
        masks: bool (K, H, W), painted over it; K may be 0.
    """

    caption: str
    image: Pixels
    masks: NDArray[np.bool_]


def gallery(path: Path, tiles: Sequence[Tile], classes: Sequence[str], title: str, columns: int = 6) -> None:
    """Draws pictures in rows, each with its masks over it, a colour for each class."""
    font, line = ImageFont.load_default(13), 20
    cell = (TILE + 6, TILE + line + 4)
    size = (columns * cell[0], 2 * line + -(-len(tiles) // columns) * cell[1])
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    draw.text((4, 2), title, "black", font)
    x = 4.0
    for k, name in enumerate(classes):
        draw.text((x, line), name, tuple(c * 2 // 3 for c in CLASSES[k % len(CLASSES)]), font)
        x += draw.textlength(name, font) + 14
    for n, tile in enumerate(tiles):
        corner = (n % columns * cell[0], 2 * line + n // columns * cell[1])
        draw.text((corner[0] + 2, corner[1]), tile.caption, "black", font)
        shown = cv2.resize(np.asarray(tile.image), (TILE, TILE), interpolation=cv2.INTER_AREA).reshape(TILE, TILE, -1)
        view: Pixels = np.broadcast_to(shown, (TILE, TILE, 3)).astype(np.uint8)
        for k, mask in enumerate(_enlarge(tile.masks, (TILE, TILE)) if len(tile.masks) else []):
            view = _paint(view, mask, CLASSES[k % len(CLASSES)])
        page.paste(Image.fromarray(view), (corner[0], corner[1] + line))
    with replacing(path) as temporary:
        page.save(temporary, "PNG")


def overlay(image: Pixels, masks: NDArray[np.bool_]) -> Pixels:
    """An image (H, W, C) with masks (K, H, W) over it, a veil and an outline for each class: RGB (H, W, 3)."""
    result: Pixels = np.broadcast_to(image, (*image.shape[:2], 3)).copy()
    for k, mask in enumerate(masks):
        result = _paint(result, mask, CLASSES[k % len(CLASSES)], 1 + min(mask.shape) // 500)
    return result


def watched(logged: Collection[str]) -> list[str]:
    """Of the metrics that are logged those to watch a training by: of masks, or else of labels."""
    return [name for name in OVERLAP if name in logged] or [name for name in LABELS if name in logged]


def named(classes: Sequence[str], there: NDArray[np.bool_]) -> str:
    """The names of the classes that are there, for a caption."""
    return " + ".join(name for name, flag in zip(classes, there, strict=True) if flag) or "none"


def bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Draws bar charts: for each panel a group of bars for each split, one bar for each class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display this way
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, splits) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        classes = [*dict.fromkeys(name for values in splits.values() for name in values)]
        for n, (split, values) in enumerate(splits.items()):
            places = np.arange(len(classes)) + (n - (len(splits) - 1) / 2) * 0.8 / len(splits)
            drawn = axes.bar(places, [values.get(name, 0) for name in classes], 0.8 / len(splits), label=split)
            axes.bar_label(drawn, fmt="%.3g", fontsize=7)
        axes.set_xticks(np.arange(len(classes)), classes, rotation=20 if len(classes) > 2 else 0)
        axes.set_title(label)
        axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display this way
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, (values, low, high)), at in zip(curves.items(), chosen, strict=True):
        (line,) = axes.plot(thresholds, values, label=f"{name}: {at:g}")
        axes.fill_between(thresholds, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.plot([at], [np.interp(at, thresholds, values)], "o", color=line.get_color())
    axes.set(xlabel="threshold", ylabel=metric, xlim=(0, 1))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def reliability(path: Path, panels: Mapping[str, Mapping[str, Reliability]], title: str) -> None:
    """Draws reliability diagrams, and below each how many probabilities lie where.

    Args:
        path: The picture.
        panels: For each class what is drawn into one diagram, by name.
        title: What is written above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display this way
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(panels), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    rows = figure.subplots(2, len(panels), squeeze=False, sharex=True, height_ratios=(3, 1))
    for axes, shares, (name, drawn) in zip(*rows, panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for label, found in drawn.items():
            there = found.count > 0
            shown = f"{label}: ECE {found.expected_error:.4f}, Brier {found.brier:.4f}"
            axes.plot(found.confidence[there], found.frequency[there], marker=".", label=shown)
            shares.stairs(found.count / found.count.sum(), np.linspace(0, 1, len(found.count) + 1))
        axes.set(ylabel="share that is there", title=name, ylim=(0, 1))
        shares.set(xlabel="probability", ylabel="share of all", xlim=(0, 1), yscale="log", ylim=(1e-5, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _row(example: Example) -> Pixels:
    height, width = example.image.shape[:2]
    size = (max(1, round(width * TILE / height)), TILE)
    shrunk = cv2.resize(example.image, size, interpolation=cv2.INTER_AREA)
    image: Pixels = np.broadcast_to(shrunk.reshape(*size[::-1], -1), (*size[::-1], 3)).astype(np.uint8)
    truth, prediction = (_enlarge(masks, size) for masks in (example.truth, example.prediction))
    several = len(truth) > 1
    views = [image]
    for masks, colour in ((truth, TRUTH), (prediction, CLASSES[0])):
        view = image
        for k, mask in enumerate(masks):
            view = _paint(view, mask, CLASSES[k % len(CLASSES)] if several else colour)
        views.append(view)
    either, right = truth.any(0) | prediction.any(0), (truth == prediction).all(0)
    false = (prediction & ~truth).any(0)
    errors = (0.35 * image).astype(np.uint8)
    for mask, colour in ((either & right, TRUTH), (either & ~right & ~false, MISSED), (false, FALSE)):
        errors[mask] = colour
    gap = np.full((TILE, 4, 3), 255, np.uint8)
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


def curves(path: Path, history: Sequence[Row]) -> None:
    """Draws loss, metrics of the validation split and learning rate by epoch from the rows of `metrics.csv`."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # slow to import, and needs no display this way
    from matplotlib.figure import Figure

    panels = [
        ("loss", ["train/loss", "val/loss"]),
        ("metrics", watched({metric for _, _, metric, _ in history})),
        ("learning rate", ["lr"]),
    ]
    steps = max((row[1] for row in history), default=0) + 1
    epochs = max((row[0] for row in history), default=1)
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            points = [((step + 1) / steps * epochs, value) for _, step, metric, value in history if metric == name]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=name)
        axes.set(xlabel="epoch", title=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
