"""Phantom microscopy: nuclei of four imaging types, drawn from a seed and stored as stage 1 of the DSB 2018 is."""

import hashlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from medvision.data.drawing.brushes import (
    Floats,
    Shape,
    bytes_of,
    depth,
    drawn,
    noise,
    paint,
    png,
    smooth,
    step,
    store,
    tint,
    waves,
    whole,
)

VERSION = 1  # raised when the same seed draws other pictures
SALT = 2018  # keeps the streams apart from those of other phantoms
#: For each imaging type, its share and the sizes of its images (height, width) in pixels.
TYPES = {
    "fluorescence": (0.75, ((256, 256), (256, 256), (256, 320), (360, 360), (192, 192))),
    "histology": (0.10, ((256, 320), (256, 256))),
    "brightfield": (0.10, ((260, 348), (256, 256))),
    "purple": (0.05, ((256, 320), (192, 256))),
}
#: Share of red, green and blue light that comes back through a density of 1 of the two stains.
HAEMATOXYLIN, EOSIN = (0.42, 0.24, 0.62), (0.90, 0.55, 0.75)


@dataclass(frozen=True)
class Field:
    """A drawn field of view with its truth.

    Attributes:
        image: RGB, (H, W, 3), 0 to 255.
        nuclei: Number of the nucleus on each pixel, (H, W), from 1; 0 between them.
        kind: A key of `TYPES`.
    """

    image: NDArray[np.uint8]
    nuclei: NDArray[np.int32]
    kind: str


def draw_field(rng: Generator) -> Field:
    """Draws one field of view; its type and size are drawn too, and at least one nucleus is in it."""
    kind = str(rng.choice(list(TYPES), p=[share for share, _ in TYPES.values()]))
    height, width = (int(size) for size in rng.choice(TYPES[kind][1]))
    painter = {
        "fluorescence": _fluorescence,
        "histology": _histology,
        "brightfield": _brightfield,
        "purple": _purple,
    }[kind]
    image, nuclei = painter(rng, (height, width))
    numbers = np.unique(nuclei, return_inverse=True)[1].reshape(nuclei.shape)  # closes the gaps of those left out
    return Field(bytes_of(image), numbers.astype(np.int32), kind)


def _places(rng: Generator, shape: Shape, count: int, spread: float) -> Floats:
    """Positions x and y, (count, 2), in clumps with the given standard deviation in pixels; the first is central."""
    clumps = rng.uniform(0, shape[::-1], (max(1, count // int(rng.integers(2, 7))), 2))
    places = clumps[rng.integers(len(clumps), size=count)] + rng.normal(0, spread, (count, 2))
    alone = rng.random(count) < 0.4
    places[alone] = rng.uniform(0, shape[::-1], (int(alone.sum()), 2))
    places[0] = rng.uniform(0.3, 0.7, 2) * shape[::-1]
    return np.asarray(places, np.float32)


def _blob(
    rng: Generator, shape: Shape, place: Floats, radius: float, stretch: float = 1.3, wave: float = 0.08
) -> tuple[tuple[slice, slice], Floats]:
    """A roundish body: the window of the image that holds it, and there the distance from its centre, 1 at its edge."""
    reach = int(radius * stretch * 1.5) + 3
    x0, y0 = (int(value) for value in place)
    rows, columns = (
        slice(min(max(middle - reach, 0), size), min(max(middle + reach, 0), size))
        for middle, size in zip((y0, x0), shape, strict=True)
    )
    y, x = np.mgrid[rows, columns].astype(np.float32)
    turn, stretch = rng.uniform(0, math.pi), math.sqrt(rng.uniform(1, stretch))
    outline = waves(rng, wave, 7)
    x, y = x - place[0], y - place[1]
    x, y = (x * math.cos(turn) + y * math.sin(turn)) / stretch, (y * math.cos(turn) - x * math.sin(turn)) * stretch
    return (rows, columns), np.asarray(np.hypot(x, y) / (radius * outline(np.arctan2(y, x))), np.float32)


def _nuclei(
    rng: Generator, shape: Shape, places: Floats, radius: float, stretch: float, wave: float
) -> tuple[NDArray[np.int32], Floats, Floats]:
    """Nuclei that touch and do not overlap: their numbers, their distances from the centre, and a gain of each."""
    numbers, distance = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    gains = np.exp(rng.normal(0, rng.uniform(0.15, 0.55), len(places) + 1))
    for number, place in enumerate(places, 1):
        window, inner = _blob(rng, shape, place, radius * math.exp(rng.normal(0, 0.18)), stretch, wave)
        free = (inner < 1) & (numbers[window] == 0)
        if free.sum() >= max(12, 0.6 * (inner < 1).sum()):
            part = cv2.connectedComponentsWithStats(free.astype(np.uint8), connectivity=4)
            largest = part[1] == 1 + part[2][1:, cv2.CC_STAT_AREA].argmax()  # what another cuts off is left out
            numbers[window][largest], distance[window][largest] = number, inner[largest]
    return numbers, distance, np.asarray(gains[numbers] * (numbers > 0), np.float32)


def _fluorescence(rng: Generator, shape: Shape) -> tuple[Floats, NDArray[np.int32]]:
    """Stained nuclei that shine on black: few or many, of very different gain, with glare, blur and debris."""
    radius = math.exp(rng.uniform(math.log(5), math.log(17)))
    count = int(rng.uniform(0.03, 0.32) * shape[0] * shape[1] / (math.pi * radius**2)) + 2
    places = _places(rng, shape, count, rng.uniform(1.3, 3) * radius)
    nuclei, distance, gains = _nuclei(rng, shape, places, radius, rng.uniform(1.1, 2.2), rng.uniform(0.02, 0.14))
    texture = 1 + rng.uniform(0.05, 0.22) * noise(rng, shape, rng.uniform(1.5, 4)) - 0.25 * distance**2
    light = gains * texture.clip(0.2, 2)
    if rng.random() < 0.5:  # dividing or dead cells: nuclei some times brighter than the others
        hot = rng.choice(count, max(1, count // 14)) + 1
        light = light * np.where(np.isin(nuclei, hot), rng.uniform(2, 4.5), 1)
    light = smooth(np.asarray(light, np.float32), rng.uniform(0.5, 1.3))
    light = light + _haze(rng, shape, radius) + _debris(rng, shape) * rng.uniform(1.2, 5)
    light = light + rng.uniform(0.2, 0.8) * smooth(light, rng.uniform(1, 3) * radius)  # glare
    floor = 0.1 + 0.25 * step(1.5 * noise(rng, shape, 90)) * rng.uniform(0, 2.5)
    gain = math.exp(rng.uniform(math.log(0.05), math.log(0.45)))
    grey = gain * (light + floor) + rng.normal(0, rng.uniform(0.03, 0.2) * gain + 0.003, shape)
    return np.repeat(np.asarray(grey, np.float32)[..., None], 3, 2), nuclei


def _haze(rng: Generator, shape: Shape, radius: float) -> Floats:
    """Light of nuclei far out of focus, which nobody outlines."""
    light = np.zeros(shape, np.float32)
    for place in rng.uniform(0, shape[::-1], (int(rng.integers(0, 9)), 2)):
        window, inner = _blob(rng, shape, place, radius * rng.uniform(1, 2))
        light[window] += rng.uniform(0.3, 0.9) * (inner < 1)
    return smooth(light, radius * rng.uniform(0.5, 0.9))


def _debris(rng: Generator, shape: Shape) -> Floats:
    """Specks far smaller than a nucleus, (H, W), 0 to 1."""
    specks = np.zeros(shape, np.float32)
    if rng.random() < 0.6:
        for place in _places(rng, shape, int(rng.integers(3, 25)), 12):
            window, inner = _blob(rng, shape, place, rng.uniform(0.8, 2.6), 1.8, 0.2)
            specks[window] = np.maximum(specks[window], inner < 1)
    return smooth(specks, 0.7)


def _fibres(rng: Generator, shape: Shape) -> Floats:
    """Streaks of tissue that run one way and bend, (H, W), of zero mean and unit variance."""
    height, width = shape
    flat = cv2.resize(noise(rng, (height, max(8, width // 8)), rng.uniform(3, 6)), (width, height))
    y, x = np.indices(shape, np.float32)
    turn, bend = rng.uniform(0, math.pi), 14 * noise(rng, shape, 60)
    along = (x - width / 2) * math.cos(turn) + (y - height / 2) * math.sin(turn) + width / 2
    across = (y - height / 2) * math.cos(turn) - (x - width / 2) * math.sin(turn) + height / 2 + bend
    return np.asarray(cv2.remap(flat, along, across, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.float32)


def _chromatin(rng: Generator, distance: Floats, gains: Floats) -> Floats:
    """Density of stained nuclei, (H, W): clumps, and a rim."""
    grain = noise(rng, distance.shape, rng.uniform(1.5, 3))
    body = (1 + 0.22 * grain + rng.uniform(0, 0.6) * (distance**4 - 0.4)) * (gains > 0)
    return smooth(np.asarray(body * gains.clip(0.45, 1.5), np.float32), rng.uniform(0.5, 1))


def _histology(rng: Generator, shape: Shape) -> tuple[Floats, NDArray[np.int32]]:
    """Purple nuclei in pink cytoplasm on white or on pink stroma, with dark red cells that are no nuclei."""
    radius = rng.uniform(7, 12)
    count = int(rng.uniform(0.12, 0.4) * shape[0] * shape[1] / (math.pi * radius**2))
    places = _places(rng, shape, count, 2.5 * radius)
    nuclei, distance, gains = _nuclei(rng, shape, places, radius, 1.7, 0.1)
    image = np.full((*shape, 3), rng.uniform(0.84, 0.96), np.float32)
    gaps = step(5 * (noise(rng, shape, 40) - rng.uniform(-2, 1)))  # where the slide has no tissue
    image = tint(image, EOSIN, gaps * (0.5 + 0.22 * _fibres(rng, shape)).clip(0.05, 2))
    near = np.exp(-(depth(nuclei == 0).clip(0) / radius))
    image = tint(image, EOSIN, rng.uniform(0.4, 1.2) * near * (1 + 0.4 * noise(rng, shape, 5)).clip(0, 2))
    cells = np.zeros(shape, np.float32)
    for place in rng.uniform(0, shape[::-1], (int(rng.integers(4, 30)), 2)):
        window, inner = _blob(rng, shape, place, radius * rng.uniform(0.5, 1.1), 1.4)
        cells[window] = np.maximum(cells[window], step(8 * (1 - inner)))
    image = tint(image, (0.86, 0.30, 0.42), rng.uniform(0.6, 1.3) * cells * (nuclei == 0))
    image = tint(image, HAEMATOXYLIN, rng.uniform(0.5, 1.1) * _chromatin(rng, distance, gains))
    return image * (1 + 0.05 * noise(rng, shape, 100))[..., None] + rng.normal(0, 0.015, image.shape), nuclei


def _purple(rng: Generator, shape: Shape) -> tuple[Floats, NDArray[np.int32]]:
    """Violet nuclei on violet fibres of all densities."""
    radius = rng.uniform(5, 8)
    count = int(rng.uniform(0.06, 0.22) * shape[0] * shape[1] / (math.pi * radius**2))
    nuclei, distance, gains = _nuclei(rng, shape, _places(rng, shape, count, 3 * radius), radius, 2.4, 0.06)
    colour = np.array([0.70, 0.62, 0.84]) + rng.normal(0, 0.03, 3)
    image = np.ones((*shape, 3), np.float32) * colour.astype(np.float32)
    bands = step(4 * (_fibres(rng, shape) - 0.9)) + 0.6 * step(4 * (noise(rng, shape, 45) - 0.5))
    image = tint(image, (0.62, 0.48, 0.80), (0.25 * _fibres(rng, shape) + rng.uniform(0.4, 1.2) * bands).clip(-0.3, 3))
    image = tint(image, (0.48, 0.30, 0.80), rng.uniform(0.6, 1.2) * _chromatin(rng, distance, gains))
    return image * (1 + 0.05 * noise(rng, shape, 90))[..., None] + rng.normal(0, 0.015, image.shape), nuclei


def _brightfield(rng: Generator, shape: Shape) -> tuple[Floats, NDArray[np.int32]]:
    """Grey flakes of cells, which overlap, on white; in each a small dark nucleus; and dark specks beside them."""
    radius = rng.uniform(4, 7)
    count = int(rng.integers(10, 45))
    places = _places(rng, shape, count, rng.uniform(5, 9) * radius)
    nuclei, distance, gains = _nuclei(rng, shape, places, radius, 1.5, 0.08)
    density = np.zeros(shape, np.float32)
    for place in places:
        window, inner = _blob(rng, shape, place + rng.normal(0, radius, 2), radius * rng.uniform(2.5, 5), 1.6, 0.22)
        body = rng.uniform(0.25, 0.6) * (1 + 0.5 * step(6 * (inner - 0.85)))  # a rim of folded membrane
        density[window] += body * (inner < 1)
    grain = 1 + 0.25 * noise(rng, shape, 3) + 0.2 * noise(rng, shape, 12)
    density = smooth(density, 0.8) * grain.clip(0.3, 2) + rng.uniform(0.3, 1) * _debris(rng, shape)
    density = density + rng.uniform(0.45, 1) * _chromatin(rng, distance, gains)
    light = 0.93 * np.exp(-density) * (1 + 0.05 * noise(rng, shape, 120))
    grey = paint(np.repeat(light[..., None], 3, 2), (0.5, 0.5, 0.5), np.full(shape, rng.uniform(0, 0.25), np.float32))
    return grey + rng.normal(0, 0.012, shape)[..., None], nuclei


def write_dsb2018(folder: Path, seed: int, count: int) -> None:
    """Draws a data set and stores it under the name and in the layout of the official `stage1_train.zip`.

    Bright specks, glare, uneven light and four imaging types of both polarities leave a threshold behind: over 150
    images, Otsu's on grey has a mean Dice of 0.53 to 0.66 by seed if nuclei are the bright side (0.12 to 0.21 if
    the dark one), and 0.70 to 0.73 if somebody picks the better side of each image; a small U-Net reaches 0.86.

    Args:
        folder: Where the archive goes; made if absent. It is moved into place after the last image is drawn.
        seed: Any number that is not negative.
        count: Number of images; each depends on the seed and its index only.
    """
    ids = sorted((_hex(f"{seed} {index}"), index) for index in range(count))
    with whole(folder) as scratch, zipfile.ZipFile(scratch / "stage1_train.zip", "w") as archive:
        for _, files in drawn(lambda item: [*_files(seed, *item)], ids, "nuclei"):
            for name, content in files:
                store(archive, name, content)


def _hex(text: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _files(seed: int, name: str, index: int) -> Iterator[tuple[str, bytes]]:
    """The members of one image: itself, and a mask of each nucleus."""
    field = draw_field(np.random.default_rng([seed, index, SALT]))
    opaque = np.full((*field.nuclei.shape, 1), 255, np.uint8)
    yield f"{name}/images/{name}.png", png(np.concatenate([field.image, opaque], -1))
    masks = {_hex(f"{name} {number}"): number for number in range(1, int(field.nuclei.max()) + 1)}
    for mask, number in sorted(masks.items()):
        yield f"{name}/masks/{mask}.png", png(np.where(field.nuclei == number, 255, 0).astype(np.uint8))
