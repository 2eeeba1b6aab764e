"""Do explanations deserve trust? Whether an answer hangs on what is hot, and the heat on what was learned."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

STEPS = 20
"""Points of a curve but for the first one."""
BATCH = 7  # images at once


def deletion_and_insertion(
    probability: Callable[[Tensor], Tensor], image: Tensor, heat: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability of what is explained as pixels are changed, the hottest first (RISE, arXiv:1806.07421).

    Args:
        probability: (M,) of images (M, C, H, W).
        image: (C, H, W), normalised.
        heat: (H, W).

    Returns:
        The curve as pixels become the mean of the training images, which falls soon where the heat is right; and the
        curve as pixels come into a blurred image, which rises soon. Each has `STEPS` + 1 points, evenly from none of
        the pixels to all. NaN where heat is flat: no pixels are the hottest.
    """
    if heat.std() == 0:
        return np.full(STEPS + 1, np.nan), np.full(STEPS + 1, np.nan)
    rank = torch.empty(heat.numel(), dtype=torch.int64, device=image.device)
    rank[heat.flatten().argsort(descending=True, stable=True)] = torch.arange(heat.numel(), device=image.device)
    shares = torch.linspace(0, 1, STEPS + 1, device=image.device)
    changed = rank.view(1, 1, *heat.shape) < (shares * heat.numel()).round().view(-1, 1, 1, 1)
    sigma = max(image.shape[-2:]) * 5 / 224  # that of the paper, for its size
    blurred = gaussian_blur(image[None], 2 * min(round(2 * sigma), min(image.shape[-2:]) // 2 - 1) + 1, sigma)
    curves = []
    for start, end in ((image[None], torch.zeros_like(image)[None]), (blurred, image[None])):
        steps = [probability(torch.where(part, end, start)) for part in torch.split(changed, BATCH)]
        curves.append(torch.cat(steps).double().cpu().numpy())
    return curves[0], curves[1]


def area(curve: NDArray[np.float64]) -> float:
    """Area under a curve of evenly spaced points from 0 to 1."""
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose weights are shuffled within each tensor: it has learned nothing (see arXiv:1810.03292)."""
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=draw).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model


def likeness(heat: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two maps: 1 where they order the pixels alike; NaN where one is flat."""
    if min(heat.std(), other.std()) == 0:
        return float("nan")
    return float(spearmanr(heat.cpu().flatten(), other.cpu().flatten()).statistic)


def inside(heat: Tensor, mask: NDArray[np.bool_]) -> float:
    """Share of the heat (H, W) that lies inside a mask (H, W); NaN where there is no heat."""
    total = float(heat.sum())
    return float(heat.cpu().numpy()[mask].sum()) / total if total else float("nan")
