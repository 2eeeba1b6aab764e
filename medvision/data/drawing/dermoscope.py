"""What a dermoscope's picture shows besides the skin: ink, stickers, hairs, bubbles, rulers, light and blur.

Lengths are in units of 1/224 of the image's mean side (the geometric mean), unless said to be in pixels.
"""

import math

import cv2
import numpy as np
from numpy.random import Generator

from medvision.data.drawing.brushes import Bools, Floats, Shape, noise, paint, plane, smooth, strokes, unit

#: Colours, RGB from 0 to 1.
HAIRS = ((0.10, 0.07, 0.06), (0.16, 0.10, 0.08), (0.30, 0.20, 0.14), (0.75, 0.68, 0.58))
STICKERS = ((0.05, 0.45, 0.75), (0.90, 0.50, 0.15), (0.90, 0.82, 0.20), (0.35, 0.70, 0.60))


def ink(rng: Generator, image: Floats, outline: Floats) -> Floats:
    """Surgical marker: a broken ring around the lesion, whose outline is at 1, or strokes anywhere."""
    shape = outline.shape
    if rng.random() < 0.5:
        ring = np.abs(outline - rng.uniform(1.25, 1.5) - 0.04 * noise(rng, shape, 15)) < 0.05
        cover = (ring & (noise(rng, shape, 25) > -0.8)).astype(np.float32)
    else:
        steps = rng.normal(0, 14 * unit(shape), (rng.integers(1, 4), 3, 2))
        cover = strokes(shape, steps.cumsum(1) + rng.uniform(0, shape[::-1], (len(steps), 1, 2)), 4)
    cover = smooth(cover, unit(shape)) * (0.7 + 0.15 * noise(rng, shape, 2)).clip(0, 1)
    return paint(image, rng.uniform((0.2, 0.1, 0.35), (0.4, 0.2, 0.6)), cover)


def sticker(rng: Generator, image: Floats, mask: Bools) -> Floats:
    """Paper disc at the edge of the view, left out where it would hide some of the lesion."""
    height, width = mask.shape
    x, y = rng.choice([(0, 0.5), (1, 0.5), (0.5, 1), (0.5, 0), (0, 1), (1, 0)]) + rng.uniform(-0.2, 0.2, 2)
    centre, radius = (int(x * width), int(y * height)), int(rng.uniform(0.2, 0.3) * min(mask.shape))
    disc = np.zeros(mask.shape, np.uint8)
    cv2.circle(disc, centre, radius, 255, -1, cv2.LINE_AA)
    colour = rng.choice(STICKERS)
    return image if disc[mask].any() else paint(image, colour, disc / 255)


def hairs(rng: Generator, image: Floats) -> Floats:
    """Curved hairs, dark or fair, running roughly one way."""
    shape = image.shape[:2]
    lean, length, along = rng.uniform(0, 2 * math.pi), rng.uniform(60, 220), np.linspace(-1, 1, 24)
    lines = []
    for _ in range(rng.integers(3, 40)):
        turn = lean + rng.normal(0, 0.5) + rng.normal(0, 0.3) * along + rng.normal(0, 0.3) * along**2
        steps = np.stack([np.cos(turn), np.sin(turn)], 1) * rng.uniform(0.4, 1.2) * length / len(turn)
        middle = rng.uniform(0, shape[::-1])
        lines.append(middle + unit(shape) * (steps.cumsum(0) - steps.sum(0) / 2))
    cover = smooth(strokes(shape, lines, rng.uniform(0.7, 1.7)), 0.5 * unit(shape))
    return paint(image, rng.choice(HAIRS), rng.uniform(0.6, 1) * cover)


def bubbles(rng: Generator, image: Floats) -> Floats:
    """Air bubbles in the immersion gel: a bright rim, and a highlight on the lamp's side."""
    shape = image.shape[:2]
    layer = np.zeros(shape, np.uint8)
    cluster, lamp = rng.uniform(0, shape[::-1]), rng.normal(0, 0.3, 2)
    for _ in range(rng.integers(3, 25)):
        middle = cluster + rng.normal(0, 50, 2) * unit(shape)
        radius = rng.exponential(4) * unit(shape) + 1.5
        for centre, size, light, fill in ((middle, 1, 130, 1), (middle + lamp * radius, 0.25, 255, -1)):
            x, y = (centre * 16).astype(int).tolist()
            cv2.circle(layer, (x, y), int(size * radius * 16), light, fill, cv2.LINE_AA, 4)
    return paint(image, (1, 1, 1), layer / 255)


def ruler(rng: Generator, image: Floats) -> Floats:
    """Scale etched on the contact plate, near the upper or the lower edge."""
    shape = image.shape[:2]
    start = rng.uniform(-0.1, 0.4) * shape[1], rng.choice([0.1, 0.88]) * shape[0]
    turn, step = rng.normal(0, 0.15), rng.uniform(5, 9) * unit(shape)
    along = np.array([math.cos(turn), math.sin(turn)])
    across = np.array([along[1], -along[0]]) * unit(shape)
    feet = start + along * step * np.arange(rng.uniform(0.4, 0.9) * shape[1] / step)[:, None]
    ticks = [np.stack([foot, foot + across * (7 if tick % 5 else 12)]) for tick, foot in enumerate(feet)]
    return paint(image, (0.08, 0.08, 0.08), rng.uniform(0.6, 0.9) * strokes(shape, [feet, *ticks], 1.2))


def lighting(rng: Generator, image: Floats) -> Floats:
    """Lamp to one side, and a vignette."""
    y, x = plane(image.shape[:2])
    turn = rng.uniform(0, 2 * math.pi)
    slope = 1 + rng.uniform(0, 0.4) * (x * math.cos(turn) + y * math.sin(turn))
    vignette = 1 - rng.uniform(0.1, 0.65) * (x**2 + y**2) ** rng.uniform(1, 2)
    return image * np.asarray(slope * vignette, np.float32)[..., None]


def tube(rng: Generator, shape: Shape) -> Floats:
    """Light let in by the dermoscope, (H, W), 0 to 1: in some images its tube cuts off the corners."""
    if rng.random() < 0.7:
        return np.ones(shape, np.float32)
    y, x = plane(shape) + rng.uniform(-0.05, 0.05, (2, 1, 1))
    light = (rng.uniform(0.72, 0.9) - np.hypot(x, y)) / 0.03 + 0.5
    return np.asarray(0.06 + 0.94 * light.clip(0, 1), np.float32)


def blur(rng: Generator, image: Floats) -> Floats:
    """Lens out of focus."""
    return smooth(image, rng.uniform(0.5, 1.6) * unit(image.shape))


def fade(rng: Generator, image: Floats) -> Floats:
    """Low contrast and a colour cast."""
    mean = image.mean((0, 1))
    return np.asarray(mean + rng.uniform(0.55, 0.95) * (image - mean) + rng.normal(0, 0.025, 3), np.float32)
