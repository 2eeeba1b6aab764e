"""What the phantom data sets are drawn with, and how their archives are written.

Lengths are in units of 1/224 of the image's mean side (the geometric mean), unless said to be in pixels.
"""

import math
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import tqdm

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Shape = tuple[int, ...]
Item = TypeVar("Item")
Drawn = TypeVar("Drawn")


def unit(shape: Shape) -> float:
    """One unit of length in pixels."""
    return math.sqrt(shape[0] * shape[1]) / 224


def step(value: Floats) -> Floats:
    """Soft step from 0 to 1 around 0."""
    return np.asarray(1 / (1 + np.exp(-value.clip(-30, 30))), np.float32)


def smooth(image: Floats, pixels: float) -> Floats:
    """Gaussian blur of the given standard deviation in pixels."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), pixels), np.float32)


def noise(rng: Generator, shape: Shape, cell: float) -> Floats:
    """Smooth isotropic noise of zero mean and unit variance, (H, W), with blobs some `cell` across."""
    cell = cell * unit(shape)
    grid = rng.standard_normal([int(size / cell) + 6 for size in shape], np.float32)
    grid = 2 * math.sqrt(math.pi) * smooth(grid, 1)
    x, y = -cell * rng.uniform(1.5, 2.5, 2)  # leaves the grid's border outside the image
    matrix = np.array([[cell, 0, x], [0, cell, y]])
    return np.asarray(cv2.warpAffine(grid, matrix, shape[::-1], flags=cv2.INTER_CUBIC), np.float32)


def tint(image: Floats, colour: Floats | tuple[float, ...], density: Floats) -> Floats:
    """Lets light through a density, (H, W), of one tint or of one per pixel, (H, W, 3)."""
    return image * np.power(colour, density[..., None], dtype=np.float32)


def paint(image: Floats, colour: Iterable[float], cover: Floats) -> Floats:
    """Covers the image with a colour by a share, (H, W), of 0 to 1."""
    return image + cover[..., None] * (np.array([*colour], np.float32) - image)


def strokes(shape: Shape, lines: Iterable[Floats], thickness: float) -> Floats:
    """Share covered, (H, W), by anti-aliased polylines; each is (N, 2), x and y in pixels."""
    layer = np.zeros(shape, np.uint8)
    fixed = [np.round(line * 16).astype(np.int32) for line in lines]  # OpenCV's points with 4 fractional bits
    cv2.polylines(layer, fixed, False, 255, max(1, round(thickness * unit(shape))), cv2.LINE_AA, 4)
    return layer.astype(np.float32) / 255


def depth(mask: Bools) -> Floats:
    """Distance from the mask's border, (H, W), in pixels, positive inside."""
    inside, outside = (cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5) for part in (mask, ~mask))
    return np.asarray(inside - outside, np.float32)


def plane(shape: Shape) -> Floats:
    """Coordinates y and x, (2, H, W), from the image's centre, in half diagonals."""
    middle = np.array(shape, np.float32).reshape(2, 1, 1) / 2
    return (np.indices(shape, np.float32) - middle) / (math.hypot(*shape) / 2)


def waves(rng: Generator, height: float, orders: int = 14) -> Callable[[Floats], Floats]:
    """A wavy closed outline: its radius by the angle, around 1; the waves from the second order on get lower."""
    angles, order = np.linspace(-math.pi, math.pi, 721), np.arange(2, orders)[:, None]
    heights = height * rng.normal(size=order.shape) / order
    radius = np.exp((heights * np.cos(order * angles + rng.uniform(0, 2 * math.pi, order.shape))).sum(0))
    return lambda angle: np.interp(angle, angles, radius)


def bytes_of(image: Floats) -> NDArray[np.uint8]:
    """An image from 0 to 1 in 8 bits."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of a grey, RGB or RGBA image."""
    if image.ndim == 3:
        image = np.ascontiguousarray(image[..., [2, 1, 0, 3][: image.shape[-1]]])
    return cv2.imencode(".png", image)[1].tobytes()


def jpg(image: NDArray[np.uint8]) -> bytes:
    """A JPEG file of an RGB image."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Yields a scratch folder whose files are moved into `folder`, made if absent, if the block ends without error."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".drawing-") as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            os.replace(path, folder / path.name)


def drawn(draw: Callable[[Item], Drawn], items: Collection[Item], title: str) -> Iterator[tuple[Item, Drawn]]:
    """Each item with what is drawn for it, in order; draws on all cores, under a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(draw, items)
        yield from zip(items, tqdm(results, title, len(items), disable=None), strict=True)


def store(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a member whose bytes depend on neither the clock, nor the system, nor a compressor."""
    member = zipfile.ZipInfo(name, (2017, 1, 1, 0, 0, 0))
    member.create_system, member.external_attr = 3, 0o644 << 16
    archive.writestr(member, content)
