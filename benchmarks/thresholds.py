"""Time of comparing with 99 thresholds one after the other in NumPy over that of `metrics.histogram`.

Both count the true and false positives and the false negatives of the same 100 images of 256x256; the counts are
compared. Passes over all images alternate, one thread, in CPU time. `sum` is how such a loop is mostly written,
`count_nonzero` the fastest way that NumPy has.
"""

import argparse
import statistics
import time

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from medvision.metrics import GRID, histogram


def draw(rng: np.random.Generator, size: int = 256) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Probabilities of a blob, sure inside and outside and unsure at its border, and its mask."""
    noise, texture = (
        cv2.GaussianBlur(rng.standard_normal((size, size), np.float32), (0, 0), sigma) * sigma
        for sigma in (size / 12, 2)
    )
    truth = noise > np.quantile(noise, 0.8)
    logit = 12 * cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 4) - 6 + texture
    return 1 / (1 + np.exp(-logit)), truth


def loop(probability: NDArray[np.float32], truth: NDArray[np.bool_], count) -> NDArray[np.int64]:
    rows = []
    for threshold in GRID:
        predicted = probability >= threshold
        rows.append([count(predicted & truth), count(predicted & ~truth), count(~predicted & truth)])
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = [draw(rng) for _ in range(arguments.images)]
    ways = {
        "histogram": lambda p, t: histogram(torch.from_numpy(p)[None], torch.from_numpy(t)[None], GRID)[:, 0, :3],
        "sum": lambda p, t: loop(p, t, np.sum),
        "count_nonzero": lambda p, t: loop(p, t, np.count_nonzero),
    }
    rounds = []
    for _ in range(arguments.rounds):
        seconds, counts = {}, []
        for name, way in ways.items():
            started = time.process_time()
            counts.append([way(*image) for image in images])
            seconds[name] = time.process_time() - started
        assert all(np.array_equal(counts[0], other) for other in counts[1:])
        rounds.append(seconds)
    for name in ("sum", "count_nonzero"):
        ratios = [seconds[name] / seconds["histogram"] for seconds in rounds]
        slow, fast = (1e3 * statistics.median(s[key] for s in rounds) / len(images) for key in (name, "histogram"))
        print(
            f"{name:13} {slow:.2f} ms, histogram {fast:.2f} ms an image: median {statistics.median(ratios):.1f} times, "
            f"from {min(ratios):.1f} to {max(ratios):.1f}"
        )


if __name__ == "__main__":
    main()
