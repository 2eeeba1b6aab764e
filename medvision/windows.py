"""Large images in overlapping windows, whose answers are blended into one."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from medvision.errors import MedvisionError


class SlidingWindow:
    """Answers an image of any size window by window, at its own resolution.

    Windows lie evenly and reach each edge; an image smaller than one is padded by repeating its last row and column.
    Where windows overlap, each counts by a Hann weight: most at its centre, where a network sees most around a pixel,
    and nearly nothing at its edge, so that there are no seams.

    Args:
        size: Height and width of a window, pixels.
        overlap: The least share of its side that a window has in common with the next, from 0 to below 1.
        batch: Windows that a model is given at once.

    Raises:
        MedvisionError: If `overlap` is out of its range.
    """

    def __init__(self, size: tuple[int, int], overlap: float = 0.5, batch: int = 8) -> None:
        if not isinstance(overlap, int | float) or not 0 <= overlap < 1:
            raise MedvisionError(f"overlap={overlap}: expected a share of the window's side, from 0 to below 1")
        self.size, self.overlap, self.batch = size, overlap, batch

    def __call__(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """What a model answers to images (1, C, H, W), as (1, K, H, W).

        Args:
            model: (N, K, h, w) for the (N, C, h, w) of windows.
            image: (1, C, H, W).
        """
        height, width = image.shape[-2:]
        h, w = self.size
        padded = F.pad(image, (0, max(0, w - width), 0, max(0, h - height)), mode="replicate")
        corners = [*product(*map(partial(starts, overlap=self.overlap), padded.shape[-2:], self.size))]
        weight = (hann(h)[:, None] * hann(w)).to(image.device)
        total = weights = torch.zeros(padded.shape[-2:], device=image.device)
        for first in range(0, len(corners), self.batch):
            some = corners[first : first + self.batch]
            answers = model(torch.cat([padded[..., y : y + h, x : x + w] for y, x in some]))
            if not first:
                total = answers.new_zeros(answers.shape[1], *padded.shape[-2:])
            for (y, x), answer in zip(some, answers, strict=True):
                total[:, y : y + h, x : x + w] += answer * weight
                weights[y : y + h, x : x + w] += weight
        return (total / weights)[None, :, :height, :width]


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Where windows begin along a side of an image, evenly from its first pixel so that the last ends with it.

    Args:
        length: Of the image, `side` or more.
        side: Of a window.
        overlap: The least share of it that neighbours have in common.
    """
    step = max(1, math.floor(side * (1 - overlap)))
    number = math.ceil((length - side) / step)
    return [round(n * (length - side) / number) for n in range(number + 1)] if number else [0]


def hann(side: int) -> Tensor:
    """The Hann window sampled between its zeros, float32 (side,): above 0 everywhere, symmetric, at most 1."""
    return torch.hann_window(2 * side + 1, periodic=False)[1::2]
