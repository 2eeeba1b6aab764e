"""Grounds on which small animals are drawn: leaves, sand, bark, blossoms and walls, sharp or out of focus."""

import math

import numpy as np
from numpy.random import Generator

from medvision.data.drawing.brushes import Floats, Shape, noise, paint, plane, smooth, step, waves

#: Colours, RGB from 0 to 1.
GREENS = ((0.30, 0.48, 0.16), (0.18, 0.34, 0.14), (0.52, 0.62, 0.26), (0.40, 0.52, 0.34))
EARTHS = ((0.76, 0.68, 0.55), (0.55, 0.43, 0.32), (0.62, 0.60, 0.57), (0.40, 0.30, 0.24), (0.66, 0.50, 0.46))
PETALS = ((0.92, 0.80, 0.22), (0.85, 0.50, 0.70), (0.93, 0.91, 0.88), (0.55, 0.42, 0.75), (0.90, 0.45, 0.25))


def pick(rng: Generator, colours: tuple[tuple[float, ...], ...], spread: float = 0.05) -> Floats:
    """One of the colours, or between two of them, and a little off."""
    first, second = np.array(colours)[rng.integers(len(colours), size=2)]
    return np.asarray((first + rng.uniform(0, 0.5) * (second - first) + rng.normal(0, spread, 3)).clip(0.02, 1))


def background(rng: Generator, shape: Shape) -> Floats:
    """A leaf, ground, bark, a blossom, or a wall, sharp or out of focus, and at times a stem or a petal across."""
    ground = str(rng.choice(["leaf", "sand", "bark", "blossom", "plain"], p=[0.28, 0.2, 0.14, 0.26, 0.12]))
    y, x = plane(shape)
    turn = rng.uniform(0, 2 * math.pi)
    along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    shade = 1 + 0.12 * noise(rng, shape, 60) + rng.uniform(0, 0.3) * along
    if ground == "leaf":
        colour = pick(rng, GREENS)
        bent = across + 0.05 * noise(rng, shape, 70)
        veins = np.exp(-((bent / 0.012) ** 2))
        side = np.abs((along - 1.2 * np.abs(bent)) * rng.uniform(4, 9) % 1 - 0.5)
        shade = shade + rng.uniform(0.1, 0.4) * (veins + np.exp(-((side / 0.06) ** 2))) + 0.04 * noise(rng, shape, 3)
    elif ground == "sand":
        colour = pick(rng, EARTHS)
        shade = shade + rng.uniform(0.05, 0.16) * noise(rng, shape, 2.2) + 0.1 * noise(rng, shape, rng.uniform(5, 12))
    elif ground == "bark":
        colour = pick(rng, EARTHS)
        ridges = np.sin(across * rng.uniform(30, 70) + 1.6 * noise(rng, shape, 22)) + noise(rng, shape, 4)
        shade = shade + rng.uniform(0.05, 0.2) * ridges
    elif ground == "plain":
        colour = pick(rng, (*EARTHS, *GREENS, (0.35, 0.55, 0.85), (0.05, 0.05, 0.05)))
        shade = shade + 0.03 * noise(rng, shape, 8)
    else:
        return _soft(rng, _blossom(rng, shape))
    image = np.asarray(colour * shade[..., None], np.float32)
    for _ in range(int(rng.integers(0, 3))):  # stems, blades and petals across
        offset, width, bow = rng.uniform(-0.8, 0.8), rng.uniform(0.02, 0.14), rng.uniform(-0.4, 0.4)
        lean = rng.normal(0, 0.6)
        band = across * math.cos(lean) + along * math.sin(lean) - offset - bow * along**2
        blade = step(60 * (width - np.abs(band)))
        image = paint(image, pick(rng, (*GREENS, *EARTHS, *PETALS)), blade * (0.8 + 0.2 * np.cos(band / width)))
    return _soft(rng, image)


def _soft(rng: Generator, image: Floats) -> Floats:
    """The background out of focus, in some images wholly, in some a little."""
    blur = rng.choice([0.4, rng.uniform(1, 3), rng.uniform(4, 12)])
    return smooth(image.clip(0, 1), float(blur))


def _blossom(rng: Generator, shape: Shape) -> Floats:
    """Petals around a heart, before leaves."""
    y, x = np.indices(shape, np.float32)
    x0, y0 = rng.uniform(0.2, 0.8, 2) * shape[::-1]
    angle, radius = np.arctan2(y - y0, x - x0), np.hypot(y - y0, x - x0) / min(shape)
    image = np.asarray(pick(rng, GREENS) * (1 + 0.3 * noise(rng, shape, 25))[..., None], np.float32)
    count, size, turn = int(rng.integers(5, 18)), rng.uniform(0.4, 0.95), rng.uniform(0, 2 * math.pi)
    colour, ring = pick(rng, PETALS), waves(rng, 0.2, 9)
    for layer in (1.0, 0.72):
        part = np.abs(np.cos((angle + turn) * count / 2)) ** 0.5
        reach = size * layer * ring(angle) * (0.35 + 0.65 * part)
        petals = step(40 * (reach - radius))
        streaks = 1 + 0.1 * np.sin(angle * count * 7) - 0.25 * (1 - part) + 0.05 * noise(rng, shape, 6)
        image = paint(image, (0, 0, 0), 0.25 * smooth(petals, 3))
        image = image + petals[..., None] * (colour * (streaks * (0.75 + 0.25 * layer))[..., None] - image)
        turn += math.pi / count
    heart = step(60 * (size * rng.uniform(0.12, 0.35) - radius)) * (0.85 + 0.15 * noise(rng, shape, 2.5)).clip(0, 1)
    return paint(image, pick(rng, (*PETALS[:1], *EARTHS)), heart)
