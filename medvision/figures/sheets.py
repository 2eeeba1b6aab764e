"""Sheets of images with truth and prediction, galleries, and what is painted over an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medvision.files import replacing

Pixels = NDArray[np.uint8]

TILE = 224  # height of a picture in a sheet, pixels
PAGE = 60_000_000  # pixels of a sheet that viewers still open
TRUTH, MISSED, FALSE = (60, 220, 90), (70, 140, 255), (255, 70, 60)
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


def named(classes: Sequence[str], there: NDArray[np.bool_]) -> str:
    """The names of the classes that are there, for a caption."""
    return " + ".join(name for name, flag in zip(classes, there, strict=True) if flag) or "none"


def verdict(classes: Sequence[str], there: NDArray[np.bool_], said: NDArray[np.bool_]) -> str:
    """The names of the classes that are there, and where others are decided for, on a second line theirs."""
    of_truth, of_decision = named(classes, there), named(classes, said)
    return of_truth if of_truth == of_decision else f"{of_truth}\nsaid: {of_decision}"


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
