"""Post-processing of masks, and its choice on validation: holes are filled, small or all but the largest parts removed.

Pixels of a part touch by sides or corners (8-connectivity), those of the background by sides.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from medvision.errors import MedvisionError
from medvision.metrics import EMPTY, best_columns

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cleaning:
    """What is done with the mask of one class, in this order; by default nothing.

    Attributes:
        fill: Fill holes: background that does not reach the border, with what lies inside.
        min_area: Remove parts that are smaller: below 1 a share of the image, else a number of pixels.
        largest: Keep the largest part only; of equally large ones the first, row by row.

    Raises:
        MedvisionError: If `min_area` is negative or no number.
    """

    fill: bool = False
    min_area: float = 0.0
    largest: bool = False

    def __post_init__(self) -> None:
        """Checks the area."""
        if not 0 <= self.min_area < float("inf"):
            raise MedvisionError(
                f"min_area is {self.min_area}; expected a share of the image, from 0 to below 1, or a number of pixels"
            )

    def __str__(self) -> str:
        """For a line: `holes filled, parts below 0.01 removed`."""
        fill, least = "holes filled" if self.fill else "", f"parts below {self.min_area:g} removed"
        return (
            ", ".join(filter(None, [fill, least if self.min_area else "", "largest part kept" * self.largest]))
            or "none"
        )

    def __call__(self, mask: Bools) -> Bools:
        """A mask, bool (H, W), after it; doing it again changes nothing."""
        if self.fill:
            mask = _filled(mask)
        if not self.min_area and not self.largest:
            return mask
        labels, areas = _parts(mask)
        return np.asarray(self.keeps(areas)[labels])

    def keeps(self, areas: Ints) -> Bools:
        """Which parts stay.

        Args:
            areas: (1 + P,) pixels of the background and of each part.

        Returns:
            bool (1 + P,), without the background.
        """
        least = self.min_area * areas.sum() if self.min_area < 1 else self.min_area
        kept: Bools = areas >= least
        kept[0] = False
        if self.largest and kept.any():
            kept &= np.arange(len(areas)) == 1 + areas[1:].argmax()
        return kept


OPTIONS = tuple(
    sorted(
        itertools.starmap(Cleaning, itertools.product((False, True), (0, 0.0001, 0.001, 0.01), (False, True))),
        key=lambda option: option.fill + (option.min_area > 0) + option.largest,
    )
)
"""Those among which validation chooses, the simplest first."""


def clean(masks: Bools, cleanings: Sequence[Cleaning]) -> Bools:
    """Each class of a mask after its own post-processing.

    Args:
        masks: bool (K, H, W).
        cleanings: K of them.

    Raises:
        MedvisionError: If there are not as many as classes, or the mask is no bool.
    """
    if masks.dtype != np.bool_ or len(masks) != len(cleanings):
        raise MedvisionError(f"a mask is {masks.dtype} {masks.shape}; expected bool ({len(cleanings)}, H, W)")
    return np.stack([cleaning(mask) for cleaning, mask in zip(cleanings, masks, strict=True)])


def option_counts(masks: Bools, truths: Bools, options: Sequence[Cleaning] = OPTIONS) -> Ints:
    """Counts of one image after each of several post-processings, for `best_option`.

    Args:
        masks: bool (K, H, W), as the thresholds give them.
        truths: bool (K, H, W).
        options: O of them.

    Returns:
        int64 (O, K, 4), as `count`.
    """
    result = np.empty((len(options), len(masks), 4), np.int64)
    for (k, mask), fill in itertools.product(enumerate(masks), {option.fill for option in options}):
        labels, areas = _parts(_filled(mask) if fill else mask)
        hits = np.bincount(labels[truths[k]], minlength=len(areas))  # parts stay or go as a whole
        for n, option in enumerate(options):
            if option.fill == fill:
                kept = option.keeps(areas)
                tp, predicted = hits[kept].sum(), areas[kept].sum()
                fp, fn = predicted - tp, hits.sum() - tp
                result[n, k] = tp, fp, fn, areas.sum() - tp - fp - fn
    return result


def best_option(
    counts: Ints, by: str, empty: float = EMPTY, options: Sequence[Cleaning] = OPTIONS
) -> tuple[Cleaning, ...]:
    """For each class the post-processing that is best on validation; of equally good ones the first.

    Args:
        counts: int64 (N, O, K, 4), `option_counts` of each image.
        by: One of `metrics.CHOICES`.
        empty: As for `scores`.
        options: O of them.
    """
    metric, pooled = by.removesuffix("_image"), not by.endswith("_image")
    best = [best_columns(of_class, metric, pooled, empty) for of_class in np.moveaxis(counts, 2, 0)]
    return tuple(options[where[0] if where.size else 0] for where in best)


def _filled(mask: Bools) -> Bools:
    around = np.pad(mask.astype(np.uint8, order="C"), 1)  # so that what reaches the border is one region
    cv2.floodFill(around, None, (0, 0), (2,), flags=4)
    return np.asarray(around[1:-1, 1:-1] != 2)


def _parts(mask: Bools) -> tuple[NDArray[np.int32], Ints]:
    """The part of each pixel, 0 where there is none, numbered row by row by their first pixels; and their areas."""
    pixels = mask.astype(np.uint8, order="C")
    # the one of OpenCV's algorithms that numbers by pixels and not by blocks of them
    _, labels, found, _ = cv2.connectedComponentsWithStatsWithAlgorithm(pixels, 8, cv2.CV_32S, cv2.CCL_SAUF)
    return np.asarray(labels, np.int32), found[:, cv2.CC_STAT_AREA].astype(np.int64)
