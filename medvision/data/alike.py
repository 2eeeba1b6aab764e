"""Images that look alike: perceptual hashes, and the pairs whose hashes are close."""

import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medvision.data.images import Pixels

CLOSE = 40  # bits of 256 in which the hashes of two versions of one image can differ
CORRELATED = 0.95  # 0.97 and more was seen for processed copies, 0.94 for other scenes in the same endoscope frame
BLOCK = 256  # rows compared at a time


def perceptual_hash(image: Pixels) -> NDArray[np.uint64]:
    """Which low frequencies of the image's grey are above their median: it survives resizing, stretching and JPEG.

    Args:
        image: uint8 (H, W, C).

    Returns:
        256 bits as uint64 (4,).
    """
    grey = image.mean(-1, dtype=np.float32) if image.shape[-1] == 3 else image[..., 0].astype(np.float32)
    frequencies = cv2.dct(cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA))[:16, :16].ravel()
    return np.packbits(frequencies > np.median(frequencies)).view(np.uint64)


def alike(
    first: tuple[NDArray[np.uint64], NDArray[np.uint8]],
    second: tuple[NDArray[np.uint64], NDArray[np.uint8]] | None = None,
) -> NDArray[np.int64]:
    """Pairs of images that are versions of one picture: close hashes, and brightness that correlates.

    Args:
        first: Hashes (N, 4) and images uint8 (N, H, W, C).
        second: Those of another data set; None finds the pairs within the first.

    Returns:
        int64 (P, 3): row of the first, row of the second, number of bits in which their hashes differ; sorted.
    """
    hashes, images = first
    others, other_images = first if second is None else second
    columns_of = np.ascontiguousarray(others.T)

    def compare(start: int) -> list[tuple[int, int, int]]:
        begin = start if second is None else 0  # within one set a pair is found once
        block = hashes[start : start + BLOCK]
        # at most 255, since the mean is the first frequency and its bit is always set
        differing = [np.bitwise_count(block[:, w, None] ^ columns_of[None, w, begin:]) for w in range(4)]
        bits = differing[0] + differing[1] + differing[2] + differing[3]
        return [
            (row + start, column + begin, int(bits[row, column]))
            for row, column in np.argwhere(bits <= CLOSE).tolist()
            if (second is not None or row + start < column + begin)
            and _correlation(images[row + start], other_images[column + begin]) >= CORRELATED
        ]

    starts = range(0, len(hashes), BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy lets go of the interpreter's lock
        quiet = None if len(hashes) > 32 * BLOCK else True
        blocks = tqdm(pool.map(compare, starts), "comparing images", len(starts), disable=quiet, leave=False)
        found = [pair for pairs in blocks for pair in pairs]
    return np.array(found, np.int64).reshape(-1, 3)


def _correlation(first: Pixels, second: Pixels) -> float:
    """Pearson's correlation of brightness over a grid of 32x32."""
    a, b = (
        cv2.resize(np.asarray(image).mean(-1, dtype=np.float32), (32, 32), interpolation=cv2.INTER_AREA)
        for image in (first, second)
    )
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-6))
