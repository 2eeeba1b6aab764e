"""Distances between the boundaries of two masks, in pixels: all metrics from one pass.

A surface pixel belongs to the mask and has a neighbour above, below, left or right that does not; what lies outside
the image does not, so that a mask that touches the border has a surface there. MONAI and MedPy say the same.

Two metrics of each kind go by one name elsewhere, and differ without bound: for a lesion of 100x100 pixels found to the
pixel and a false speck of 8x8, 80 pixels off in each direction, `hd95` is 117 and `hd95_pooled` 0. With A the distances
from each surface pixel of the prediction to the nearest of the truth, and B those from the truth to the prediction:

- `hd95`: the larger of the 95th percentiles of A and of B, as MONAI, DeepMind's surface-distance and Metrics Reloaded
  (arXiv:2206.01653) have it; this is the one to report.
- `hd95_pooled`: the 95th percentile of A and B together, MedPy's `hd95`.
- `assd`: the mean of A and B together, as in MONAI and Metrics Reloaded.
- `masd`: the mean of the means of A and of B, as in Metrics Reloaded, and the `assd` of MedPy 0.4.
- `nsd`: the share of A and B together that is at most the tolerance (normalised surface Dice: Nikolov et al. 2018,
  arXiv:1809.04430), with surfaces measured by their pixels as MONAI's `compute_surface_dice` does by default.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from medvision.errors import MedvisionError

BOUNDARY = ("hd95", "hd95_pooled", "assd", "masd", "nsd")

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Empty = Literal["nan", "diagonal"]


def boundary_scores(
    predicted: Bools, truth: Bools, tolerance: float = 2.0, empty: Empty = "nan", both_empty: float = 1.0
) -> dict[str, NDArray[Any]]:
    """Every boundary metric of each pair of masks.

    Args:
        predicted: bool (..., H, W).
        truth: bool (..., H, W).
        tolerance: Of `nsd`, in pixels.
        empty: Distances where one mask of a pair is empty and the other is not, `nsd` being 0: `nan`, no value; or
            `diagonal`, that of the image, sqrt(H² + W²), as in BraTS. Without a value, a mean over images does not
            see the worst of them.
        both_empty: `nsd` where both masks are empty. If it is 1, distances are 0 there, as in the BraTS challenges;
            else they have no value.

    Returns:
        `BOUNDARY`, float64 arrays of shape (...).

    Raises:
        MedvisionError: If the masks are not boolean or not of one shape, or an option has no meaning.
    """
    if predicted.dtype != bool or truth.dtype != bool or predicted.shape != truth.shape or predicted.ndim < 2:
        found = ", ".join(f"{mask.dtype} {mask.shape}" for mask in (predicted, truth))
        raise MedvisionError(f"masks are {found}; expected bool (..., H, W) twice: compare with a threshold, resize")
    if not tolerance >= 0:
        raise MedvisionError(f"tolerance is {tolerance}; expected a number of pixels, 0 or more")
    if empty not in get_args(Empty):
        raise MedvisionError(f"empty is {empty!r}; expected one of {', '.join(get_args(Empty))}")
    missing = float(np.hypot(*truth.shape[-2:])) if empty == "diagonal" else np.nan
    result = np.empty((len(BOUNDARY), *truth.shape[:-2]))
    for pair in np.ndindex(*truth.shape[:-2]):
        there, back = surface_distances(predicted[pair], truth[pair])
        if np.isinf(there).any() or np.isinf(back).any():
            values = [missing] * 4 + [0.0]
        elif not there.size:
            values = [0.0 if both_empty == 1 else np.nan] * 4 + [both_empty]
        else:
            both = np.concatenate([there, back])
            values = [
                max(np.percentile(there, 95), np.percentile(back, 95)),
                np.percentile(both, 95),
                both.mean(),
                (there.mean() + back.mean()) / 2,
                (both <= tolerance).mean(),
            ]
        result[:, *pair] = values
    return dict(zip(BOUNDARY, result, strict=True))


def surface_distances(predicted: Bools, truth: Bools) -> tuple[Floats, Floats]:
    """Distances between the surfaces of two masks.

    Args:
        predicted: bool (H, W).
        truth: bool (H, W).

    Returns:
        From each surface pixel of the prediction to the nearest of the truth, and from each of the truth to the
        nearest of the prediction, in pixels: one entry for each surface pixel, infinite where the other has none.
    """
    ours, theirs = _surface(predicted), _surface(truth)
    return _nearest(ours, theirs), _nearest(theirs, ours)


def _surface(mask: Bools) -> NDArray[np.intp]:
    """Surface pixels (n, 2): row and column."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not rows.size:
        return np.empty((0, 2), np.intp)
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    padded = np.pad(part, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    row, column = np.divmod(np.flatnonzero(part & ~inner), part.shape[1])
    return np.stack([row + rows[0], column + columns[0]], 1)


def _nearest(points: NDArray[np.intp], others: NDArray[np.intp]) -> Floats:
    if not len(others):
        return np.full(len(points), np.inf)
    # faster than a distance transform of all pixels; built for one query, thus not balanced
    tree = KDTree(others, leafsize=32, balanced_tree=False, compact_nodes=False)
    distance: Floats = tree.query(points)[0]
    return distance
