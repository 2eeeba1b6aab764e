"""Phantom dermoscopy images with lesion masks, drawn from a seed and stored as the ISIC 2017 archives are.

Skin is a colour, and whatever is pigmented is an optical density on top of it (Beer-Lambert), so that on any
skin tone a lesion is recognised by hue, texture and border, and not by brightness: dark corners, hairs and
rulers are darker than most lesions, and some lesions are no darker than the skin around them.

Lengths are in units of 1/224 of the image's mean side (the geometric mean), unless said to be in pixels.
"""

import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import tqdm

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Shape = tuple[int, ...]

#: Height and width in pixels of the images of a data set.
VERSION = 1  # raised when the same seed draws other pictures
SIZES = ((192, 256), (256, 256), (240, 320), (320, 240), (180, 320), (216, 288))
#: For each split, its official name and the number of its first image; the gaps keep numbers distinct.
SPLITS = {"train": ("Training", 0), "val": ("Validation", 1_000_000), "test": ("Test_v2", 2_000_000)}

#: Colours, RGB from 0 to 1; of skin, from the fairest to the darkest.
SKIN = ((0.88, 0.72, 0.66), (0.86, 0.66, 0.56), (0.80, 0.60, 0.46), (0.66, 0.46, 0.34), (0.50, 0.34, 0.25))
HAIRS = ((0.10, 0.07, 0.06), (0.16, 0.10, 0.08), (0.30, 0.20, 0.14), (0.75, 0.68, 0.58))
STICKERS = ((0.05, 0.45, 0.75), (0.90, 0.50, 0.15), (0.90, 0.82, 0.20), (0.35, 0.70, 0.60))
#: Share of red, green and blue light that comes back through a density of 1.
TINTS = {
    "tan": (0.80, 0.58, 0.38),
    "brown": (0.58, 0.38, 0.26),
    "dark": (0.34, 0.22, 0.18),
    "red": (0.78, 0.44, 0.36),
    "pink": (0.98, 0.64, 0.62),
    "pale": (1.16, 1.06, 0.80),
    "blue": (0.46, 0.54, 0.70),
}
#: For each kind of lesion, its chance and the tints that it is made of.
KINDS = {
    "nevus": (0.50, ("tan", "brown", "brown", "red", "pink")),
    "melanoma": (0.28, ("brown", "dark", "red", "pink", "blue", "tan")),
    "keratosis": (0.22, ("tan", "pale", "pale", "brown", "blue")),
}


@dataclass(frozen=True)
class Lesion:
    """A drawn image with its truth.

    Attributes:
        image: RGB, (H, W, 3), 0 to 255.
        mask: True on the lesion, (H, W); hairs, ink and rulers that lie over the lesion do not cut it.
        malignant: Whether it stands for a melanoma.
        keratosis: Whether it stands for a seborrheic keratosis; never together with `malignant`.
    """

    image: NDArray[np.uint8]
    mask: Bools
    malignant: bool
    keratosis: bool


def draw_lesion(rng: Generator, height: int, width: int) -> Lesion:
    """Draws one dermoscopy image.

    Args:
        rng: Source of every choice; its state alone decides the pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        The image and its truth; the mask is neither empty nor full.
    """
    shape = height, width
    kind = str(rng.choice(list(KINDS), p=[chance for chance, _ in KINDS.values()]))
    aperture, outline = _aperture(rng, shape), _outline(rng, shape, kind)
    area = math.exp(rng.uniform(math.log(0.07), math.log(0.45)))
    outline = outline / np.quantile(outline, area)
    mask = (outline < 1) & (aperture > 0.5)  # nobody outlines what the tube hides
    image = _lesion(rng, _skin(rng, shape), mask, kind)
    if rng.random() < 0.15:
        image = _ink(rng, image, outline)
    if rng.random() < 0.10:
        image = _sticker(rng, image, mask)
    over = ((0.55, _hairs), (0.25, _bubbles), (0.35, _ruler), (0.85, _lighting), (0.5, _blur), (0.4, _fade))
    for chance, artefact in over:
        if rng.random() < chance:
            image = artefact(rng, image)
    image = image * aperture[..., None] + rng.normal(0, rng.uniform(0.005, 0.025), image.shape)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Lesion(pixels, mask, kind == "melanoma", kind == "keratosis")


def _unit(shape: Shape) -> float:
    """One unit of length in pixels."""
    return math.sqrt(shape[0] * shape[1]) / 224


def _step(value: Floats) -> Floats:
    """Soft step from 0 to 1 around 0."""
    return np.asarray(1 / (1 + np.exp(-value.clip(-30, 30))), np.float32)


def _smooth(image: Floats, pixels: float) -> Floats:
    """Gaussian blur of the given standard deviation in pixels."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), pixels), np.float32)


def _noise(rng: Generator, shape: Shape, cell: float) -> Floats:
    """Smooth isotropic noise of zero mean and unit variance, (H, W), with blobs some `cell` across."""
    cell = cell * _unit(shape)
    grid = rng.standard_normal([int(size / cell) + 6 for size in shape], np.float32)
    grid = 2 * math.sqrt(math.pi) * _smooth(grid, 1)
    x, y = -cell * rng.uniform(1.5, 2.5, 2)  # leaves the grid's border outside the image
    matrix = np.array([[cell, 0, x], [0, cell, y]])
    return np.asarray(cv2.warpAffine(grid, matrix, shape[::-1], flags=cv2.INTER_CUBIC), np.float32)


def _tint(image: Floats, tint: Floats | tuple[float, ...], density: Floats) -> Floats:
    """Lets light through a density, (H, W), of one tint or of one per pixel, (H, W, 3)."""
    return image * np.power(tint, density[..., None], dtype=np.float32)


def _paint(image: Floats, colour: Iterable[float], cover: Floats) -> Floats:
    """Covers the image with a colour by a share, (H, W), of 0 to 1."""
    return image + cover[..., None] * (np.array([*colour], np.float32) - image)


def _strokes(shape: Shape, lines: Iterable[Floats], thickness: float) -> Floats:
    """Share covered, (H, W), by anti-aliased polylines; each is (N, 2), x and y in pixels."""
    layer = np.zeros(shape, np.uint8)
    fixed = [np.round(line * 16).astype(np.int32) for line in lines]  # OpenCV's points with 4 fractional bits
    cv2.polylines(layer, fixed, False, 255, max(1, round(thickness * _unit(shape))), cv2.LINE_AA, 4)
    return layer.astype(np.float32) / 255


def _skin(rng: Generator, shape: Shape) -> Floats:
    """Skin of any tone, with blotches, furrows, vague red patches and freckles."""
    tone = rng.uniform(0, len(SKIN) - 1)
    colour = [np.interp(tone, range(len(SKIN)), channel) for channel in zip(*SKIN, strict=True)]
    furrows = np.exp(-((_noise(rng, shape, 7) / 0.15) ** 2))
    shade = 1 + 0.03 * _noise(rng, shape, 30) + 0.015 * _noise(rng, shape, 2) - rng.uniform(0, 0.08) * furrows
    image = (colour + rng.normal(0, 0.02, 3)).astype(np.float32) * shade[..., None]
    patches = _noise(rng, shape, rng.uniform(20, 50)).clip(-1, 2)
    image = _tint(image, TINTS["red"], rng.uniform(0, 0.2) * patches)
    if rng.random() < 0.4:
        freckles = _step(8 * (_noise(rng, shape, rng.uniform(3, 6)) - rng.uniform(1.8, 2.4)))
        image = _tint(image, TINTS["tan"], rng.uniform(0.3, 0.9) * freckles)
    return image


def _outline(rng: Generator, shape: Shape, kind: str) -> Floats:
    """Warped distance from the lesion's centre, (H, W), in arbitrary units: its level sets are outlines."""
    warp, low, high = (0.06, 0.18, 0.32) if kind == "melanoma" else (0.03, 0.03, 0.14)
    side = min(shape)
    y, x = (
        grid - rng.uniform(0.32, 0.68) * size + warp * side * _noise(rng, shape, 0.22 * side / _unit(shape))
        for grid, size in zip(np.indices(shape, np.float32), shape, strict=True)
    )
    turn, stretch = rng.uniform(0, math.pi), math.exp(rng.uniform(0, 0.3))
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    x, y = x / stretch, y * stretch
    angles, waves = np.linspace(-math.pi, math.pi, 721), np.arange(2, 14)[:, None]
    heights = rng.uniform(low, high) * rng.normal(size=waves.shape) / waves
    radius = np.exp((heights * np.cos(waves * angles + rng.uniform(0, 2 * math.pi, waves.shape))).sum(0))
    return np.asarray(np.hypot(x, y) / np.interp(np.arctan2(y, x), angles, radius), np.float32)


def _depth(mask: Bools) -> Floats:
    """Distance from the mask's border, (H, W), in pixels, positive inside."""
    inside, outside = (cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5) for part in (mask, ~mask))
    return np.asarray(inside - outside, np.float32)


def _lesion(rng: Generator, image: Floats, mask: Bools, kind: str) -> Floats:
    """Pigment on the mask: patches of the kind's tints with a network or globules, and a soft edge."""
    shape, depth = mask.shape, _depth(mask) / _unit(mask.shape)
    names = rng.choice(KINDS[kind][1], rng.integers(3, 5) if kind == "melanoma" else rng.integers(1, 3))
    cell = rng.uniform(15, 40)
    shares = np.exp(3 * np.stack([_noise(rng, shape, cell) for _ in names]))
    tint = np.tensordot(shares / shares.sum(0), np.array([TINTS[name] for name in names]), (0, 0))
    grain = _noise(rng, shape, rng.uniform(1.8, 3.5))
    texture = np.exp(-((grain / 0.4) ** 2)) if rng.random() < 0.6 else _step(3 * (grain - 0.9))
    density = rng.uniform(0.55, 1.15) * (1 + 0.12 * _noise(rng, shape, 20))
    density = density * (1 + rng.uniform(0.3, 0.8) * (texture - 0.4))
    edge = _step(depth / rng.uniform(0.6, 1.2 if kind == "keratosis" else 2.2))
    image = _tint(image, tint, edge * density.clip(0.2, 2))
    if kind == "keratosis":
        for colour in ((0.95, 0.9, 0.8), (0.2, 0.12, 0.08)):  # milia-like cysts, comedo-like openings
            dots = _step(6 * (_noise(rng, shape, 3.5) - 1.9))
            image = _paint(image, colour, 0.7 * dots * (depth > 3))
    return image


def _ink(rng: Generator, image: Floats, outline: Floats) -> Floats:
    """Surgical marker: a broken ring around the lesion, whose outline is at 1, or strokes anywhere."""
    shape = outline.shape
    if rng.random() < 0.5:
        ring = np.abs(outline - rng.uniform(1.25, 1.5) - 0.04 * _noise(rng, shape, 15)) < 0.05
        cover = (ring & (_noise(rng, shape, 25) > -0.8)).astype(np.float32)
    else:
        steps = rng.normal(0, 14 * _unit(shape), (rng.integers(1, 4), 3, 2))
        cover = _strokes(shape, steps.cumsum(1) + rng.uniform(0, shape[::-1], (len(steps), 1, 2)), 4)
    cover = _smooth(cover, _unit(shape)) * (0.7 + 0.15 * _noise(rng, shape, 2)).clip(0, 1)
    return _paint(image, rng.uniform((0.2, 0.1, 0.35), (0.4, 0.2, 0.6)), cover)


def _sticker(rng: Generator, image: Floats, mask: Bools) -> Floats:
    """Paper disc at the edge of the view, left out where it would hide some of the lesion."""
    height, width = mask.shape
    x, y = rng.choice([(0, 0.5), (1, 0.5), (0.5, 1), (0.5, 0), (0, 1), (1, 0)]) + rng.uniform(-0.2, 0.2, 2)
    centre, radius = (int(x * width), int(y * height)), int(rng.uniform(0.2, 0.3) * min(mask.shape))
    disc = np.zeros(mask.shape, np.uint8)
    cv2.circle(disc, centre, radius, 255, -1, cv2.LINE_AA)
    colour = rng.choice(STICKERS)
    return image if disc[mask].any() else _paint(image, colour, disc / 255)


def _hairs(rng: Generator, image: Floats) -> Floats:
    """Curved hairs, dark or fair, running roughly one way."""
    shape = image.shape[:2]
    lean, length, along = rng.uniform(0, 2 * math.pi), rng.uniform(60, 220), np.linspace(-1, 1, 24)
    lines = []
    for _ in range(rng.integers(3, 40)):
        turn = lean + rng.normal(0, 0.5) + rng.normal(0, 0.3) * along + rng.normal(0, 0.3) * along**2
        steps = np.stack([np.cos(turn), np.sin(turn)], 1) * rng.uniform(0.4, 1.2) * length / len(turn)
        middle = rng.uniform(0, shape[::-1])
        lines.append(middle + _unit(shape) * (steps.cumsum(0) - steps.sum(0) / 2))
    cover = _smooth(_strokes(shape, lines, rng.uniform(0.7, 1.7)), 0.5 * _unit(shape))
    return _paint(image, rng.choice(HAIRS), rng.uniform(0.6, 1) * cover)


def _bubbles(rng: Generator, image: Floats) -> Floats:
    """Air bubbles in the immersion gel: a bright rim, and a highlight on the lamp's side."""
    shape = image.shape[:2]
    layer = np.zeros(shape, np.uint8)
    cluster, lamp = rng.uniform(0, shape[::-1]), rng.normal(0, 0.3, 2)
    for _ in range(rng.integers(3, 25)):
        middle = cluster + rng.normal(0, 50, 2) * _unit(shape)
        radius = rng.exponential(4) * _unit(shape) + 1.5
        for centre, size, light, fill in ((middle, 1, 130, 1), (middle + lamp * radius, 0.25, 255, -1)):
            x, y = (centre * 16).astype(int).tolist()
            cv2.circle(layer, (x, y), int(size * radius * 16), light, fill, cv2.LINE_AA, 4)
    return _paint(image, (1, 1, 1), layer / 255)


def _ruler(rng: Generator, image: Floats) -> Floats:
    """Scale etched on the contact plate, near the upper or the lower edge."""
    shape = image.shape[:2]
    start = rng.uniform(-0.1, 0.4) * shape[1], rng.choice([0.1, 0.88]) * shape[0]
    turn, step = rng.normal(0, 0.15), rng.uniform(5, 9) * _unit(shape)
    along = np.array([math.cos(turn), math.sin(turn)])
    across = np.array([along[1], -along[0]]) * _unit(shape)
    feet = start + along * step * np.arange(rng.uniform(0.4, 0.9) * shape[1] / step)[:, None]
    ticks = [np.stack([foot, foot + across * (7 if tick % 5 else 12)]) for tick, foot in enumerate(feet)]
    return _paint(image, (0.08, 0.08, 0.08), rng.uniform(0.6, 0.9) * _strokes(shape, [feet, *ticks], 1.2))


def _plane(shape: Shape) -> Floats:
    """Coordinates y and x, (2, H, W), from the image's centre, in half diagonals."""
    middle = np.array(shape, np.float32).reshape(2, 1, 1) / 2
    return (np.indices(shape, np.float32) - middle) / (math.hypot(*shape) / 2)


def _lighting(rng: Generator, image: Floats) -> Floats:
    """Lamp to one side, and a vignette."""
    y, x = _plane(image.shape[:2])
    turn = rng.uniform(0, 2 * math.pi)
    slope = 1 + rng.uniform(0, 0.4) * (x * math.cos(turn) + y * math.sin(turn))
    vignette = 1 - rng.uniform(0.1, 0.65) * (x**2 + y**2) ** rng.uniform(1, 2)
    return image * np.asarray(slope * vignette, np.float32)[..., None]


def _aperture(rng: Generator, shape: Shape) -> Floats:
    """Light let in by the dermoscope, (H, W), 0 to 1: in some images its tube cuts off the corners."""
    if rng.random() < 0.7:
        return np.ones(shape, np.float32)
    y, x = _plane(shape) + rng.uniform(-0.05, 0.05, (2, 1, 1))
    light = (rng.uniform(0.72, 0.9) - np.hypot(x, y)) / 0.03 + 0.5
    return np.asarray(0.06 + 0.94 * light.clip(0, 1), np.float32)


def _blur(rng: Generator, image: Floats) -> Floats:
    """Lens out of focus."""
    return _smooth(image, rng.uniform(0.5, 1.6) * _unit(image.shape))


def _fade(rng: Generator, image: Floats) -> Floats:
    """Low contrast and a colour cast."""
    mean = image.mean((0, 1))
    return np.asarray(mean + rng.uniform(0.55, 0.95) * (image - mean) + rng.normal(0, 0.025, 3), np.float32)


def write_isic2017(folder: Path, seed: int, counts: Mapping[str, int]) -> None:
    """Draws a data set and stores it under the names and in the layout of the official ISIC 2017 archives.

    The files are moved into place after the last image is drawn: an error before that leaves the folder as it
    was. An image depends on the seed, its split and its index in the split only.

    Args:
        folder: Where the archives go; made if absent.
        seed: Any number that is not negative.
        counts: Number of images for "train", "val" and "test"; a split left out is not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".drawing-") as scratch:
        for split, count in counts.items():
            _write_split(Path(scratch), seed, split, count)
        for path in sorted(Path(scratch).iterdir()):
            os.replace(path, folder / path.name)


def _write_split(folder: Path, seed: int, split: str, count: int) -> None:
    """Writes the two archives and the table of one split."""
    name, first = SPLITS[split]
    data, truth = f"ISIC-2017_{name}_Data", f"ISIC-2017_{name}_Part1_GroundTruth"
    people, labels = ["image_id,age_approximate,sex"], ["image_id,melanoma,seborrheic_keratosis"]
    numbers = range(first, first + count)
    with (
        zipfile.ZipFile(folder / f"{data}.zip", "w") as images,
        zipfile.ZipFile(folder / f"{truth}.zip", "w") as masks,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        drawn = pool.map(lambda number: _draw_files(np.random.default_rng([seed, number])), numbers)
        for number, files in zip(numbers, tqdm(drawn, split, count, disable=None), strict=True):
            image, superpixels, mask, person, label = files
            member = f"ISIC_{number:07d}"
            _store(images, f"{data}/{member}.jpg", image)
            if number % 4 == 0:  # the official archives keep such files among the photographs
                _store(images, f"{data}/{member}_superpixels.png", superpixels)
            _store(masks, f"{truth}/{member}_segmentation.png", mask)
            people.append(f"{member},{person}")
            labels.append(f"{member},{label}")
        _store(images, f"{data}/{data}_metadata.csv", "\n".join([*people, ""]).encode())
    (folder / f"ISIC-2017_{name}_Part3_GroundTruth.csv").write_text("\n".join([*labels, ""]), newline="")


def _draw_files(rng: Generator) -> tuple[bytes, bytes, bytes, str, str]:
    """An image, its superpixels and its mask as files, the patient's age and sex, and the two diagnoses."""
    height, width = rng.choice(SIZES)
    lesion = draw_lesion(rng, height, width)
    image = cv2.imencode(".jpg", lesion.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    rows, columns = np.indices((height, width)) // 16  # squares, numbered over the channels
    superpixels = cv2.imencode(".png", np.stack([0 * rows, rows, columns], -1).astype(np.uint8))[1].tobytes()
    mask = cv2.imencode(".png", lesion.mask.astype(np.uint8) * 255)[1].tobytes()
    person = f"{5 * rng.integers(2, 18)},{rng.choice(['male', 'female'])}"
    return image, superpixels, mask, person, f"{float(lesion.malignant)},{float(lesion.keratosis)}"


def _store(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Adds a member whose bytes depend on neither the clock, nor the system, nor a compressor."""
    member = zipfile.ZipInfo(name, (2017, 1, 1, 0, 0, 0))
    member.create_system, member.external_attr = 3, 0o644 << 16
    archive.writestr(member, content)
