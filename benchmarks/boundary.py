"""Time of MONAI's three boundary metrics, each called for itself, over that of `metrics.boundary_scores`.

Hausdorff distance at 95 %, average symmetric surface distance and surface Dice of 20 pairs of masks of 256x256 like
lesions; the values are compared. The two alternate mask by mask, one thread, in CPU time.
"""

import argparse
import statistics
import time
import warnings

import cv2
import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from medvision.metrics import boundary_scores

Bools = NDArray[np.bool_]


def draw(rng: np.random.Generator, size: int = 256) -> tuple[Bools, Bools]:
    """A lumpy blob about the middle, and what a network might make of it."""
    row, column = np.mgrid[:size, :size] / size - 0.5
    noise = [cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), size / part) for part in (10, 25)]
    first, second = (each / each.std() for each in noise)
    height = first - 60 * (row**2 + column**2)
    truth = height > np.quantile(height, rng.uniform(0.6, 0.9))
    height += 0.3 * second
    return height > np.quantile(height, rng.uniform(0.6, 0.9)), truth


def monai(predicted: Bools, truth: Bools) -> list[float]:
    masks = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    distance = compute_hausdorff_distance(*masks, include_background=True, percentile=95)
    average = compute_average_surface_distance(*masks, include_background=True, symmetric=True)
    dice = compute_surface_dice(*masks, class_thresholds=[2.0], include_background=True)
    return [float(value) for value in (distance, average, dice)]


def ours(predicted: Bools, truth: Bools) -> list[float]:
    found = boundary_scores(predicted, truth, tolerance=2.0)
    return [float(found[name]) for name in ("hd95", "assd", "nsd")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pairs = [draw(rng) for _ in range(arguments.masks)]
    rounds = []
    for _ in range(arguments.rounds + 1):
        seconds = [0.0, 0.0]
        for pair in pairs:
            started = time.process_time()
            theirs = monai(*pair)
            between = time.process_time()
            found = ours(*pair)
            seconds[0] += between - started
            seconds[1] += time.process_time() - between
            np.testing.assert_allclose(found, theirs, rtol=1e-5)
        rounds.append(seconds)
    rounds = rounds[1:]  # the first warms up
    ratios = [slow / fast for slow, fast in rounds]
    slow, fast = (1e3 * statistics.median(column) / len(pairs) for column in zip(*rounds, strict=True))
    print(
        f"MONAI {slow:.2f} ms, boundary_scores {fast:.2f} ms a mask: median {statistics.median(ratios):.1f} times, "
        f"from {min(ratios):.1f} to {max(ratios):.1f}"
    )


if __name__ == "__main__":
    main()
