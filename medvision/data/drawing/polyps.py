"""Phantom colonoscopy: video sequences of a polyp each, drawn from a seed and stored as CVC-ClinicDB is.

A sequence is one scene, a relief with a colour, larger than the view; its frames are views of it by a camera that
drifts, turns and comes closer while the lamp and the wet wall change. Only the relief tells most polyps from folds.
"""

import math
import zipfile
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
    drawn,
    noise,
    plane,
    png,
    smooth,
    step,
    store,
    strokes,
    tint,
    unit,
    waves,
    whole,
)
from medvision.errors import MedvisionError

VERSION = 1  # raised when the same seed draws other pictures
SALT = 2015  # keeps the streams apart from those of other phantoms
#: Number of the last frame of each of the 29 video sequences of the official data set.
LAST_FRAMES = (
    *(25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317),
    *(342, 363, 383, 408, 428, 447, 466, 478, 503, 528, 546, 571, 591, 612),
)
VIEW = (144, 192)  # height and width of a frame in pixels
SCENE = (216, 288)  # of a scene
#: Colours of the mucosa, RGB from 0 to 1.
MUCOSA = ((0.86, 0.55, 0.42), (0.82, 0.50, 0.45), (0.88, 0.66, 0.45), (0.72, 0.48, 0.40), (0.70, 0.60, 0.46))
#: Share of red, green and blue light that comes back through a density of 1.
BLOOD, PALE, YELLOW = (0.86, 0.52, 0.50), (1.05, 1.14, 1.16), (0.98, 0.86, 0.42)


@dataclass(frozen=True)
class Scene:
    """What the frames of a sequence are views of.

    Attributes:
        colour: RGB, (H, W, 3), 0 to 1, in even light.
        height: Relief towards the camera, (H, W), in pixels.
        far: Distance down the bowel, (H, W), from 0.
        wet: Where the wall shines, (H, W), of zero mean.
        polyp: 1 on the polyp, 0 elsewhere, (H, W).
        centre: The polyp's x and y.
        size: Radius of the polyp in pixels.
    """

    colour: Floats
    height: Floats
    far: Floats
    wet: Floats
    polyp: Floats
    centre: Floats
    size: float


@dataclass(frozen=True)
class Frame:
    """A drawn frame with its truth.

    Attributes:
        image: RGB, (H, W, 3), 0 to 255.
        mask: Polyp, (H, W), 0 to 255, with greys at its edge.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def draw_sequence(seed: int, number: int, frames: int) -> list[Frame]:
    """Draws the first frames of one sequence; each depends on the seed, the sequence and its place in it only."""
    rng = np.random.default_rng([seed, number, SALT])
    scene, window = _scene(rng), _window(rng)
    style = rng.uniform(size=8)  # gain, lamp, wetness, blur, interlacing, grain and cast of the camera
    path = rng.uniform((0.04, 0), (0.2, 2 * math.pi), (8, 2))  # speed in radians a frame and phase of each motion
    return [
        _frame(np.random.default_rng([seed, number, SALT, 1 + frame]), scene, window, style, np.sin(path @ (frame, 1)))
        for frame in range(frames)
    ]


def _scene(rng: Generator) -> Scene:
    """A stretch of bowel wall with one polyp."""
    shape = SCENE
    y, x = np.indices(shape, np.float32)
    colour = np.array(MUCOSA)[rng.choice(len(MUCOSA), 2, replace=False)]
    colour = (colour * rng.dirichlet((1, 1))[:, None]).sum(0) + rng.normal(0, 0.025, 3)
    image = np.ones((*shape, 3), np.float32) * colour.astype(np.float32)

    # the lumen, in the view or beside it, with folds around it
    turn, away = rng.uniform(0, 2 * math.pi), rng.uniform(0.15, 1.1) * shape[0]
    centre = np.array(shape[::-1]) * rng.uniform(0.42, 0.58, 2)
    hole = centre + away * np.array([math.cos(turn), math.sin(turn)])
    ring = waves(rng, 0.25, 6)
    radius = np.hypot(x - hole[0], y - hole[1]) / ring(np.arctan2(y - hole[1], x - hole[0]))
    radius = np.asarray(radius + 9 * noise(rng, shape, 45), np.float32).clip(1)
    mouth = rng.uniform(18, 40)
    far = np.asarray(np.exp(-((radius / mouth / 1.6) ** 2)) * 3.2 + rng.uniform(0.2, 0.9) * np.exp(-radius / 90))
    phase = rng.uniform(0.7, 1.6) * np.log(radius / 12) + rng.uniform(0, 1) + 0.12 * noise(rng, shape, 40)
    behind = 1 - phase % 1  # falls from the crest of a fold to the foot of the next, which hides what lies behind it
    broken = rng.uniform(0.2, 1) * step(3 * (noise(rng, shape, 50) + 0.6))
    crest = smooth(np.asarray(np.exp(-((1 - behind) / 0.16)) + np.exp(-behind / 0.02), np.float32), 1.2)
    height = 5 * broken * crest + rng.uniform(2, 6) * noise(rng, shape, 26) + 0.5 * noise(rng, shape, 8)
    far = far + smooth(np.asarray(rng.uniform(0.2, 1) * broken * (1 - behind) ** 2, np.float32), 0.8)

    image = tint(image, BLOOD, 0.25 * noise(rng, shape, 35).clip(-1, 2) + 0.12 * noise(rng, shape, 6))
    image = tint(image, BLOOD, rng.uniform(0.1, 0.9) * _vessels(rng, shape))
    if rng.random() < 0.3:  # residue
        pools = step(5 * (noise(rng, shape, 22) - rng.uniform(1, 1.8)))
        image = tint(image, YELLOW, rng.uniform(0.4, 1) * pools)

    dome, edge, size = _polyp(rng, x - centre[0], y - centre[1])
    kind = rng.choice(["flat", "dome", "bulb"], p=[0.45, 0.35, 0.20])
    rise = {"flat": rng.uniform(0.2, 0.4), "dome": rng.uniform(0.4, 0.65), "bulb": rng.uniform(0.65, 0.9)}[str(kind)]
    pits = noise(rng, shape, rng.uniform(2, 5))
    height = height * (1 - 0.7 * edge) + rise * size * dome + rng.uniform(0, 0.5) * edge * pits
    soft = smooth(edge, rng.uniform(0.8, 3))
    image = tint(image, (BLOOD, PALE)[int(rng.random() < 0.35)], rng.uniform(0, 0.65) * soft * (1 + 0.25 * pits))
    turn = rng.uniform(0, 2 * math.pi)  # the foot lies in shadow on one side
    side = step((x - centre[0]) * math.cos(turn) / size + (y - centre[1]) * math.sin(turn) / size - 0.2)
    foot = smooth(edge, 0.12 * size) * (1 - edge) * (0.15 + side)
    image = tint(image, (0.62, 0.45, 0.42), rng.uniform(0.2, 2) * foot)
    far = far * (1 - 0.8 * edge)
    wet = noise(rng, shape, 3) + 0.7 * noise(rng, shape, 10)
    return Scene(image, np.asarray(height, np.float32), np.asarray(far, np.float32), wet, edge, centre, size)


def _polyp(rng: Generator, x: Floats, y: Floats) -> tuple[Floats, Floats, float]:
    """A rounded body at the origin: its dome, 0 to 1, the share of it on each pixel, and its radius in pixels."""
    size, turn = math.exp(rng.uniform(math.log(12), math.log(36))), rng.uniform(0, 2 * math.pi)
    stretch, ring = math.sqrt(rng.uniform(1, 1.7)), waves(rng, 0.12, 7)
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    u, v = x / stretch, y * stretch
    distance = np.hypot(u, v) / (size * ring(np.arctan2(v, u)))
    if rng.random() < 0.25:  # a second lobe, or a stalk
        shift, thin = rng.uniform(0.8, 1.2) * size * stretch, rng.uniform(0.5, 0.75)
        second = np.hypot((x - shift) / rng.uniform(0.6, 1), y / thin) / size
        distance = -np.log(np.exp(-8 * distance) + np.exp(-8 * second)) / 8
    dome = (1 - distance.clip(0, 1) ** 2).clip(0) ** rng.uniform(0.5, 1.1)
    edge = np.asarray((0.5 + (1 - distance) * size).clip(0, 1), np.float32)
    return smooth(np.asarray(dome, np.float32), 0.06 * size), edge, size


def _vessels(rng: Generator, shape: Shape) -> Floats:
    """Branching vessels, (H, W), 0 to 1, fainter in some places."""
    layers = np.zeros(shape, np.float32)
    for _ in range(rng.integers(4, 16)):
        place, lean = rng.uniform(0, shape[::-1]), rng.uniform(0, 2 * math.pi)
        lines = []
        for branch in range(rng.integers(1, 5)):
            turn = lean + rng.normal(0, 0.25, 30).cumsum() + (0.6 * rng.normal() if branch else 0)
            steps = np.stack([np.cos(turn), np.sin(turn)], 1) * rng.uniform(1.5, 4)
            lines.append(place + steps.cumsum(0))
            place = lines[0][rng.integers(5, 29)]
        layers = np.maximum(layers, strokes(shape, lines, rng.choice([1, 1, 2])) * rng.uniform(0.4, 1))
    return smooth(layers, 0.7) * step(2 * noise(rng, shape, 40))


def _window(rng: Generator) -> Floats:
    """Share of light that the processor's frame lets in: a rectangle without its corners."""
    y, x = np.abs(np.indices(VIEW, np.float32) - np.array(VIEW, np.float32).reshape(2, 1, 1) / 2)
    wide, high = rng.uniform(0.40, 0.43) * VIEW[1], rng.uniform(0.46, 0.48) * VIEW[0]
    cut = wide + high - rng.uniform(0.1, 0.2) * VIEW[1]
    inside = np.minimum(np.minimum(wide - x, high - y), (cut - x - y) / math.sqrt(2))
    return np.asarray((inside + 0.5).clip(0, 1), np.float32)


def _frame(rng: Generator, scene: Scene, window: Floats, style: Floats, motion: Floats) -> Frame:
    """One view; `motion` is where the camera is on its path, 8 numbers from -1 to 1."""
    y, x = np.indices(VIEW, np.float32) - np.array(VIEW, np.float32).reshape(2, 1, 1) / 2
    zoom, turn = math.exp(0.16 * motion[0]), 0.16 * motion[1]
    zoom /= 1 + 0.5 * max(0, 12 - scene.size) / 12
    drift = np.array([style[0] - 0.5, style[1] - 0.5]) * (70, 45) + motion[2:4] * (12, 9) + rng.normal(0, 0.4, 2)
    bend = 2.5 * np.sin(y / 23 + 3 * motion[4]) * motion[5], 2.5 * np.sin(x / 29 + 3 * motion[5]) * motion[4]
    across = ((x * math.cos(turn) + y * math.sin(turn)) / zoom + scene.centre[0] + drift[0] + bend[0]).astype(
        np.float32
    )
    down = ((y * math.cos(turn) - x * math.sin(turn)) / zoom + scene.centre[1] + drift[1] + bend[1]).astype(np.float32)

    def view(layer: Floats) -> Floats:
        return np.asarray(cv2.remap(layer, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.float32)

    image, height, far, polyp = view(scene.colour), view(scene.height), view(scene.far), view(scene.polyp)
    relief = smooth(height + 0.12 * noise(rng, VIEW, 3), 0.8)
    slope_x, slope_y = (cv2.Sobel(relief, cv2.CV_32F, *way, scale=1 / 8) for way in ((1, 0), (0, 1)))
    upright = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    steep = 1 / np.sqrt(1 + (slope_x**2 + slope_y**2) / 1.2)
    slope_x, slope_y = slope_x * steep, slope_y * steep
    lamp = (style[2:4] - 0.5) * 1.6 + 0.12 * motion[6:8]
    light = (upright * (1 - slope_x * lamp[0] - slope_y * lamp[1])).clip(0.3, 1.5)
    v, u = plane(VIEW) - 0.25 * lamp[::-1].reshape(2, 1, 1)
    light = light * np.exp(-far) * (1.25 - (0.5 + 0.7 * style[4]) * (u**2 + v**2)) * (0.75 + 0.4 * style[5])
    image = image ** (1.15 + 0.1 * motion[4]) * (light * (1 + 0.07 * motion[5])).clip(0, 1.6)[..., None]
    # wet spots shine where the wall faces the lamp, and flicker
    facing = np.exp(-((slope_x - 0.5 * lamp[0] + 0.25 * u) ** 2 + (slope_y - 0.5 * lamp[1] + 0.25 * v) ** 2) / 0.012)
    wet = step(9 * (view(scene.wet) + 0.3 * noise(rng, VIEW, 3.5) - 1.9 + 1.0 * style[6]))
    shine = smooth(facing * wet * (far < 0.8), 0.6)[..., None]
    image = image + shine * (1.05 - image)
    image = _camera(rng, image, style[7], rng.random() < 0.2)
    black = np.array([0.035, 0.035, 0.04], np.float32)
    image = image * window[..., None] + black * (1 - window[..., None]) + rng.normal(0, 0.008, image.shape)
    mask = np.round((polyp * window).clip(0, 1) * 8) / 8
    return Frame(bytes_of(image), bytes_of(mask))


def _camera(rng: Generator, image: Floats, softness: float, torn: bool) -> Floats:
    """Blur of the lens and, where the camera moved between the two fields of an interlaced frame, combed edges."""
    image = smooth(image, 0.35 + 0.9 * softness * unit(VIEW))
    if torn:
        matrix = np.array([[1, 0, rng.normal(0, 1.5)], [0, 1, 0]])
        later = cv2.warpAffine(image, matrix, VIEW[::-1], borderMode=cv2.BORDER_REPLICATE)
        image = image.copy()
        image[1::2] = later[1::2]
    return image


def write_cvc_clinicdb(folder: Path, seed: int, sequences: int, frames: int) -> None:
    """Draws a data set and stores it under the name and in the layout of the official `CVC-ClinicDB.zip`.

    Frames bear the numbers that the frames of the same sequence have in the official archive, so that the official
    ends of the sequences (`LAST_FRAMES`) hold for a smaller data set too. Polyps are hardly brighter or redder than the
    wall: the better side of Otsu's threshold on grey has a mean Dice of 0.15 to 0.18 by seed; a small U-Net reaches
    0.80 on sequences that it has not seen.

    Args:
        folder: Where the archive goes; made if absent. It is moved into place after the last frame is drawn.
        seed: Any number that is not negative.
        sequences: Number of sequences, at most 29.
        frames: Number of frames of each, cut to the length of the official sequence; a frame depends on the seed, its
            sequence and its place in it only.

    Raises:
        ValueError: If more sequences are asked for than there are.
    """
    if sequences > len(LAST_FRAMES):
        raise MedvisionError(f"{sequences} sequences asked for; CVC-ClinicDB has {len(LAST_FRAMES)}")
    with whole(folder) as scratch, zipfile.ZipFile(scratch / "CVC-ClinicDB.zip", "w") as archive:
        for number, files in drawn(lambda number: _files(seed, number, frames), range(sequences), "sequences"):
            first = 1 + (0, *LAST_FRAMES)[number]
            for frame, (image, mask) in enumerate(files, first):
                store(archive, f"CVC-ClinicDB/Original/{frame}.png", image)
                store(archive, f"CVC-ClinicDB/Ground Truth/{frame}.png", mask)


def _files(seed: int, number: int, frames: int) -> list[tuple[bytes, bytes]]:
    """Image and mask of each frame of a sequence."""
    length = LAST_FRAMES[number] - (0, *LAST_FRAMES)[number]
    sequence = draw_sequence(seed, number, min(frames, length))
    return [(png(frame.image), png(np.repeat(frame.mask[..., None], 3, 2))) for frame in sequence]
