"""Phantom dermoscopic structures: lesions with five attributes outlined, stored as ISIC 2018 tasks 1 and 2 are."""

import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from medvision.data.drawing.brushes import (
    Bools,
    Floats,
    Shape,
    bytes_of,
    depth,
    drawn,
    jpg,
    noise,
    paint,
    png,
    smooth,
    step,
    store,
    strokes,
    tint,
    unit,
    whole,
)
from medvision.data.drawing.lesions import KINDS, SIZES, TINTS, Lesion, Scene, draw_scene, photograph

VERSION = 1  # raised when the same seed draws other pictures
SALT = 20182  # keeps the streams apart from those of other phantoms
FIRST = 3_000_000  # number of the first image
DATA, LESIONS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
STRUCTURES = "ISIC2018_Task2_Training_GroundTruth_v3"
#: For each attribute, the share of the images of ISIC 2018 that have it.
ATTRIBUTES = {
    "pigment_network": 0.59,
    "negative_network": 0.07,
    "streaks": 0.04,
    "milia_like_cyst": 0.27,
    "globules": 0.23,
}


@dataclass(frozen=True)
class Attributes:
    """A drawn image with its truth.

    Attributes:
        lesion: The image, and the lesion's mask.
        masks: For each of `ATTRIBUTES`, True on the superpixels that show it, (H, W); nowhere where it is absent.
    """

    lesion: Lesion
    masks: dict[str, Bools]


def draw_attributes(rng: Generator, height: int, width: int) -> Attributes:
    """Draws one dermoscopy image with dermoscopic structures.

    Args:
        rng: Source of every choice; its state alone decides the pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        The image, and the masks of the lesion and of the structures, which are outlined by superpixels.
    """
    present = {name for name, chance in ATTRIBUTES.items() if rng.random() < chance}
    scene = draw_scene(rng, (height, width), str(rng.choice(list(KINDS))), textured=False)
    tiles = _superpixels(rng, scene.mask.shape)
    masks = {name: np.zeros(scene.mask.shape, np.bool_) for name in ATTRIBUTES}
    taken = masks["pigment_network"]
    for name, structure in (
        ("pigment_network", _pigment_network),
        ("negative_network", _negative_network),
        ("globules", _globules),
        ("milia_like_cyst", _milia),
        ("streaks", _streaks),
    ):
        if name in present:
            image, cover = structure(rng, scene, taken)
            scene = replace(scene, image=image)
            masks[name] = _outlined(tiles, cover)
            taken = taken | masks[name]
    return Attributes(photograph(rng, scene), masks)


def _superpixels(rng: Generator, shape: Shape) -> NDArray[np.int64]:
    """Number of the tile of each pixel, (H, W): squares of 7 units with wavy borders."""
    side = 7 * unit(shape)
    rows, columns = (
        ((grid + 0.3 * side * noise(rng, shape, 5)) / side).astype(np.int64).clip(0) for grid in np.indices(shape)
    )
    return np.asarray(rows * (columns.max() + 1) + columns, np.int64)


def _outlined(tiles: NDArray[np.int64], cover: Floats) -> Bools:
    """The tiles of which a structure covers at least an eighth, or the one that it covers most."""
    flat = tiles.ravel()
    share = np.bincount(flat, cover.ravel()) / np.bincount(flat).clip(1)
    return np.asarray((share >= min(0.125, share.max()))[tiles], np.bool_)


def _part(rng: Generator, scene: Scene, taken: Bools, low: float, high: float) -> Floats:
    """Some of the lesion, off what is taken if there is room, (H, W), 0 to 1 with soft edges."""
    shape = scene.mask.shape
    free = scene.mask & ~taken
    free = free if free.sum() > 0.2 * scene.mask.sum() else scene.mask
    field = noise(rng, shape, rng.uniform(20, 40))
    part = step(14 * (field - np.quantile(field[free], 1 - rng.uniform(low, high))))
    return part * smooth(free.astype(np.float32), 1)


def _mesh(rng: Generator, shape: Shape, period: float) -> Floats:
    """Lines of a honeycomb, irregular, (H, W), 0 to 1; thicker where they meet."""
    side = max(4.5, period * unit(shape))
    rows, columns = np.mgrid[0 : shape[0] + side : side, 0 : shape[1] + side : side * 1.15]
    rows[:, ::2] += side / 2
    dots = np.ones(shape, np.uint8)
    y, x = (grid + rng.normal(0, 0.18 * side, grid.shape) for grid in (rows, columns))
    dots[y.round().astype(int).clip(0, shape[0] - 1), x.round().astype(int).clip(0, shape[1] - 1)] = 0
    away = smooth(np.asarray(cv2.distanceTransform(dots, cv2.DIST_L2, 5), np.float32), 0.5) / side
    return np.asarray(step(16 * (away - 0.44)) * (0.8 + 0.25 * noise(rng, shape, 12)).clip(0.3, 1.2), np.float32)


def _pigment_network(rng: Generator, scene: Scene, taken: Bools) -> tuple[Floats, Floats]:
    """Dark lines between light holes."""
    part = _part(rng, scene, taken, 0.05, 0.7)
    lines = _mesh(rng, taken.shape, rng.uniform(5, 8))
    image = tint(scene.image, TINTS["tan"], -0.25 * part * (1 - lines))
    return tint(image, TINTS[str(rng.choice(["brown", "dark"]))], rng.uniform(0.3, 0.8) * part * lines), part


def _negative_network(rng: Generator, scene: Scene, taken: Bools) -> tuple[Floats, Floats]:
    """Light lines, wide apart, between dark elongated patches."""
    part = _part(rng, scene, taken, 0.08, 0.4)
    lines = _mesh(rng, taken.shape, rng.uniform(8, 11))
    image = tint(scene.image, TINTS["brown"], rng.uniform(0.3, 0.6) * part * (1 - lines))
    return paint(
        image, rng.uniform((0.86, 0.72, 0.62), (0.95, 0.82, 0.74)), rng.uniform(0.5, 0.75) * part * lines
    ), part


def _dots(
    rng: Generator, scene: Scene, taken: Bools, count: int, size: tuple[float, float]
) -> tuple[Floats, list[tuple[int, int]]]:
    """Discs apart from each other inside a part of the lesion: share covered, (H, W), and their centres y and x."""
    shape = scene.mask.shape
    inside = depth(scene.mask) > 3 * unit(shape)
    inside = inside if inside.any() else scene.mask
    part = inside & (_part(rng, scene, taken, 0.3, 1) > 0.5)
    places = np.argwhere(part if part.any() else inside)
    layer, kept = np.zeros(shape, np.uint8), list[tuple[int, int]]()
    for y, x in rng.choice(places, count).tolist():
        radius = rng.uniform(*size) * unit(shape)
        if all(math.hypot(y - v, x - u) > 2.6 * radius for v, u in kept):
            cv2.ellipse(layer, ((x, y), (2 * radius, 2 * radius * rng.uniform(0.75, 1)), rng.uniform(0, 180)), 255, -1)
            kept.append((y, x))
    return smooth(layer.astype(np.float32) / 255, 0.6), kept


def _around(shape: Shape, places: list[tuple[int, int]]) -> Floats:
    """The superpixels' share of a dot: a disc of 3 units around each centre, (H, W)."""
    layer = np.zeros(shape, np.uint8)
    for y, x in places:
        cv2.circle(layer, (x, y), max(2, round(3 * unit(shape))), 1, -1)
    return layer.astype(np.float32)


def _globules(rng: Generator, scene: Scene, taken: Bools) -> tuple[Floats, Floats]:
    """Round dark brown dots, in a group."""
    cover, places = _dots(rng, scene, taken, int(rng.integers(12, 70)), (1.8, 3.2))
    image = tint(scene.image, (0.36, 0.24, 0.20), rng.uniform(0.7, 1.2) * cover)
    return image, _around(taken.shape, places)


def _milia(rng: Generator, scene: Scene, taken: Bools) -> tuple[Floats, Floats]:
    """Few small white or yellowish dots that glow."""
    cover, places = _dots(rng, scene, taken, int(rng.integers(2, 16)), (1.8, 3.4))
    glow = (cover + 0.35 * smooth(cover, 1.6 * unit(taken.shape))).clip(0, 1)
    image = paint(scene.image, rng.uniform((0.92, 0.84, 0.62), (1, 0.97, 0.88)), rng.uniform(0.65, 0.9) * glow)
    return image, _around(taken.shape, places)


def _streaks(rng: Generator, scene: Scene, taken: Bools) -> tuple[Floats, Floats]:
    """Dark radial lines with thick tips that leave the border on one side or all around."""
    shape = taken.shape
    inward, scale = smooth(depth(scene.mask), 2), unit(shape)
    slope = np.stack([cv2.Sobel(inward, cv2.CV_32F, *way) for way in ((1, 0), (0, 1))], -1)
    border = np.argwhere(np.abs(inward) < 1.2)
    middle, turn = border.mean(0), rng.uniform(0, 2 * math.pi)
    angles = np.arctan2(*(border - middle).T)
    border = border[np.abs((angles - turn + math.pi) % (2 * math.pi) - math.pi) < rng.uniform(0.5, math.pi)]
    lines, tips = [], []
    for y, x in rng.permutation(border)[: int(rng.integers(15, 45))]:
        way = slope[y, x] / max(1e-3, float(np.hypot(*slope[y, x])))
        way = way + rng.normal(0, 0.12, 2)
        tip, root = (np.array([x, y]) + way * scale * reach for reach in (-rng.uniform(2, 6), rng.uniform(5, 12)))
        lines.append(np.stack([tip, root]))
        tips.append(np.stack([tip, tip + way * scale]))
    cover = np.maximum(strokes(shape, lines, 1.6), strokes(shape, tips, 3)) if lines else np.zeros(shape, np.float32)
    image = tint(scene.image, TINTS["dark"], rng.uniform(0.7, 1.1) * smooth(cover, 0.5 * scale))
    near = cv2.dilate(cover, np.ones((3, 3), np.uint8), iterations=max(1, round(scale)))
    return image, np.asarray(near, np.float32)


def write_isic2018_attributes(folder: Path, seed: int, count: int) -> None:
    """Draws a data set and stores it under the names and in the layout of the official ISIC 2018 archives.

    Images go with a mask of the lesion (task 1) and one of each attribute (task 2), most of which are empty. Knowing
    the lesion is not enough: on the images that have the attribute, its whole lesion has a mean Dice of 0.60 with the
    pigment network, 0.47 with the negative network, 0.32 with globules, 0.30 with streaks and 0.14 with milia-like
    cysts; a small U-Net at 128 x 128 reaches 0.79 on the pigment network and 0.61 on globules.

    Args:
        folder: Where the archives go; made if absent. They are moved into place after the last image is drawn.
        seed: Any number that is not negative.
        count: Number of images; each depends on the seed and its index only.
    """
    with (
        whole(folder) as scratch,
        zipfile.ZipFile(scratch / f"{DATA}.zip", "w") as images,
        zipfile.ZipFile(scratch / f"{LESIONS}.zip", "w") as lesions,
        zipfile.ZipFile(scratch / f"{STRUCTURES}.zip", "w") as structures,
    ):
        for number, (image, lesion, masks) in drawn(
            lambda number: _files(np.random.default_rng([seed, number, SALT])),
            range(FIRST, FIRST + count),
            "attributes",
        ):
            member = f"ISIC_{number:07d}"
            store(images, f"{DATA}/{member}.jpg", image)
            store(lesions, f"{LESIONS}/{member}_segmentation.png", lesion)
            for name, mask in masks.items():
                store(structures, f"{STRUCTURES}/{member}_attribute_{name}.png", mask)


def _files(rng: Generator) -> tuple[bytes, bytes, dict[str, bytes]]:
    """An image, its lesion's mask and its attributes' masks by name, as files."""
    height, width = rng.choice(SIZES)
    found = draw_attributes(rng, height, width)
    masks = {name: png(bytes_of(mask.astype(np.float32))) for name, mask in sorted(found.masks.items())}
    return jpg(found.lesion.image), png(bytes_of(found.lesion.mask.astype(np.float32))), masks
