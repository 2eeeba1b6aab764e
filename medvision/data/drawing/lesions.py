"""Phantom dermoscopy images with lesion masks, drawn from a seed and stored as the ISIC 2017 archives are.

Skin is a colour, and whatever is pigmented is an optical density on top of it (Beer-Lambert), so that on any
skin tone a lesion is recognised by hue, texture and border, and not by brightness: dark corners, hairs and
rulers are darker than most lesions, and some lesions are no darker than the skin around them.

Lengths are in units of 1/224 of the image's mean side (the geometric mean), unless said to be in pixels.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
    step,
    store,
    tint,
    unit,
    waves,
    whole,
)
from medvision.data.drawing.dermoscope import blur, bubbles, fade, hairs, ink, lighting, ruler, sticker, tube

VERSION = 1  # raised when the same seed draws other pictures
#: Height and width in pixels of the images of a data set.
SIZES = ((192, 256), (256, 256), (240, 320), (320, 240), (180, 320), (216, 288))
#: For each split, its official name and the number of its first image; the gaps keep numbers distinct.
SPLITS = {"train": ("Training", 0), "val": ("Validation", 1_000_000), "test": ("Test_v2", 2_000_000)}

#: Colours of skin, RGB from 0 to 1, from the fairest to the darkest.
SKIN = ((0.88, 0.72, 0.66), (0.86, 0.66, 0.56), (0.80, 0.60, 0.46), (0.66, 0.46, 0.34), (0.50, 0.34, 0.25))
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


@dataclass(frozen=True)
class Scene:
    """A lesion on skin before anything lies over it.

    Attributes:
        image: RGB, (H, W, 3), 0 to 1.
        mask: True on the lesion, (H, W).
        outline: Distance from the lesion's centre, (H, W), in units of the lesion's outline.
        aperture: Share of light that the dermoscope lets in, (H, W).
        kind: A key of `KINDS`.
    """

    image: Floats
    mask: Bools
    outline: Floats
    aperture: Floats
    kind: str


def draw_lesion(rng: Generator, height: int, width: int, kind: str | None = None) -> Lesion:
    """Draws one dermoscopy image.

    Args:
        rng: Source of every choice; its state alone decides the pixels.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        kind: A key of `KINDS`; drawn by their chances when left out.

    Returns:
        The image and its truth; the mask is neither empty nor full.
    """
    return photograph(rng, draw_scene(rng, (height, width), kind))


def draw_scene(rng: Generator, shape: Shape, kind: str | None = None, textured: bool = True) -> Scene:
    """Draws a lesion on skin; one that is not `textured` has no network, no globules and no dots of its own."""
    kind = kind or str(rng.choice(list(KINDS), p=[chance for chance, _ in KINDS.values()]))
    aperture, outline = tube(rng, shape), _outline(rng, shape, kind)
    area = math.exp(rng.uniform(math.log(0.07), math.log(0.45)))
    outline = outline / np.quantile(outline, area)
    mask = (outline < 1) & (aperture > 0.5)  # nobody outlines what the tube hides
    return Scene(_lesion(rng, _skin(rng, shape), mask, kind, textured), mask, outline, aperture, kind)


def photograph(rng: Generator, scene: Scene) -> Lesion:
    """Lays ink, hairs, bubbles and rulers over the scene and takes the picture."""
    image, mask = scene.image, scene.mask
    if rng.random() < 0.15:
        image = ink(rng, image, scene.outline)
    if rng.random() < 0.10:
        image = sticker(rng, image, mask)
    over = ((0.55, hairs), (0.25, bubbles), (0.35, ruler), (0.85, lighting), (0.5, blur), (0.4, fade))
    for chance, artefact in over:
        if rng.random() < chance:
            image = artefact(rng, image)
    image = image * scene.aperture[..., None] + rng.normal(0, rng.uniform(0.005, 0.025), image.shape)
    return Lesion(bytes_of(image), mask, scene.kind == "melanoma", scene.kind == "keratosis")


def _skin(rng: Generator, shape: Shape) -> Floats:
    """Skin of any tone, with blotches, furrows, vague red patches and freckles."""
    tone = rng.uniform(0, len(SKIN) - 1)
    colour = [np.interp(tone, range(len(SKIN)), channel) for channel in zip(*SKIN, strict=True)]
    furrows = np.exp(-((noise(rng, shape, 7) / 0.15) ** 2))
    shade = 1 + 0.03 * noise(rng, shape, 30) + 0.015 * noise(rng, shape, 2) - rng.uniform(0, 0.08) * furrows
    image = (colour + rng.normal(0, 0.02, 3)).astype(np.float32) * shade[..., None]
    patches = noise(rng, shape, rng.uniform(20, 50)).clip(-1, 2)
    image = tint(image, TINTS["red"], rng.uniform(0, 0.2) * patches)
    if rng.random() < 0.4:
        freckles = step(8 * (noise(rng, shape, rng.uniform(3, 6)) - rng.uniform(1.8, 2.4)))
        image = tint(image, TINTS["tan"], rng.uniform(0.3, 0.9) * freckles)
    return image


def _outline(rng: Generator, shape: Shape, kind: str) -> Floats:
    """Warped distance from the lesion's centre, (H, W), in arbitrary units: its level sets are outlines."""
    warp, low, high = (0.06, 0.18, 0.32) if kind == "melanoma" else (0.03, 0.03, 0.14)
    side = min(shape)
    y, x = (
        grid - rng.uniform(0.32, 0.68) * size + warp * side * noise(rng, shape, 0.22 * side / unit(shape))
        for grid, size in zip(np.indices(shape, np.float32), shape, strict=True)
    )
    turn, stretch = rng.uniform(0, math.pi), math.exp(rng.uniform(0, 0.3))
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    x, y = x / stretch, y * stretch
    radius = waves(rng, rng.uniform(low, high))
    return np.asarray(np.hypot(x, y) / radius(np.arctan2(y, x)), np.float32)


def _lesion(rng: Generator, image: Floats, mask: Bools, kind: str, textured: bool) -> Floats:
    """Pigment on the mask: patches of the kind's tints with a network or globules, and a soft edge."""
    shape, inward = mask.shape, depth(mask) / unit(mask.shape)
    names = rng.choice(KINDS[kind][1], rng.integers(3, 5) if kind == "melanoma" else rng.integers(1, 3))
    cell = rng.uniform(15, 40)
    shares = np.exp(3 * np.stack([noise(rng, shape, cell) for _ in names]))
    colours = np.tensordot(shares / shares.sum(0), np.array([TINTS[name] for name in names]), (0, 0))
    grain = noise(rng, shape, rng.uniform(1.8, 3.5))
    texture = np.exp(-((grain / 0.4) ** 2)) if rng.random() < 0.6 else step(3 * (grain - 0.9))
    density = rng.uniform(0.55, 1.15) * (1 + 0.12 * noise(rng, shape, 20))
    if textured:
        density = density * (1 + rng.uniform(0.3, 0.8) * (texture - 0.4))
    edge = step(inward / rng.uniform(0.6, 1.2 if kind == "keratosis" else 2.2))
    image = tint(image, colours, edge * density.clip(0.2, 2))
    if kind == "keratosis" and textured:
        for colour in ((0.95, 0.9, 0.8), (0.2, 0.12, 0.08)):  # milia-like cysts, comedo-like openings
            dots = step(6 * (noise(rng, shape, 3.5) - 1.9))
            image = paint(image, colour, 0.7 * dots * (inward > 3))
    return image


def write_isic2017(folder: Path, seed: int, counts: Mapping[str, int]) -> None:
    """Draws a data set and stores it under the names and in the layout of the official ISIC 2017 archives.

    The files are moved into place after the last image is drawn: an error before that leaves the folder as it
    was. An image depends on the seed, its split and its index in the split only.

    Args:
        folder: Where the archives go; made if absent.
        seed: Any number that is not negative.
        counts: Number of images for "train", "val" and "test"; a split left out is not written.
    """
    with whole(folder) as scratch:
        for split, count in counts.items():
            _write_split(scratch, seed, split, count)


def _write_split(folder: Path, seed: int, split: str, count: int) -> None:
    """Writes the two archives and the table of one split."""
    name, first = SPLITS[split]
    data, truth = f"ISIC-2017_{name}_Data", f"ISIC-2017_{name}_Part1_GroundTruth"
    people, labels = ["image_id,age_approximate,sex"], ["image_id,melanoma,seborrheic_keratosis"]
    with (
        zipfile.ZipFile(folder / f"{data}.zip", "w") as images,
        zipfile.ZipFile(folder / f"{truth}.zip", "w") as masks,
    ):
        for number, files in drawn(
            lambda number: _draw_files(np.random.default_rng([seed, number])), range(first, first + count), split
        ):
            image, superpixels, mask, person, label = files
            member = f"ISIC_{number:07d}"
            store(images, f"{data}/{member}.jpg", image)
            if number % 4 == 0:  # the official archives keep such files among the photographs
                store(images, f"{data}/{member}_superpixels.png", superpixels)
            store(masks, f"{truth}/{member}_segmentation.png", mask)
            people.append(f"{member},{person}")
            labels.append(f"{member},{label}")
        store(images, f"{data}/{data}_metadata.csv", "\n".join([*people, ""]).encode())
    (folder / f"ISIC-2017_{name}_Part3_GroundTruth.csv").write_text("\n".join([*labels, ""]), newline="")


def _draw_files(rng: Generator) -> tuple[bytes, bytes, bytes, str, str]:
    """An image, its superpixels and its mask as files, the patient's age and sex, and the two diagnoses."""
    height, width = rng.choice(SIZES)
    lesion = draw_lesion(rng, height, width)
    rows, columns = np.indices((height, width)) // 16  # squares, numbered over the channels
    superpixels = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    mask = lesion.mask.astype(np.uint8) * 255
    person = f"{5 * rng.integers(2, 18)},{rng.choice(['male', 'female'])}"
    files = jpg(lesion.image), png(superpixels), png(mask)
    return *files, person, f"{float(lesion.malignant)},{float(lesion.keratosis)}"
