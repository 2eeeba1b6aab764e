"""Scores as the organisers of a challenge compute them, to stand beside published ones.

The formulas of the ISIC challenges are those of the organisers' code (github.com/ImageMarkup/isic-challenge-scoring).
It counts every 0/0 as 1: the Jaccard index of an image with neither truth nor prediction as everywhere here, but also,
unlike `summarise`, the sensitivity of an image without truth and the specificity of one that the lesion fills. (While
the challenge of 2017 ran, such an image had no value of that metric.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision.errors import MedvisionError
from medvision.metrics.labels import summarise_labels
from medvision.metrics.overlap import image_scores, scores

Counts = NDArray[Any]


def isic2017_part1(counts: Counts) -> dict[str, float]:
    """Lesion segmentation of ISIC 2017 (Codella et al. 2018, arXiv:1710.05006), ranked by `jaccard`.

    Args:
        counts: int (N, 1, 4) as `count` gives them, at each mask's original size.

    Returns:
        Means over images of `jaccard`, `dice`, `accuracy`, `sensitivity` and `specificity`, in 0 to 1.

    Raises:
        MedvisionError: If there is no image, or another number of classes than one.
    """
    _require(counts, 1)
    images = _scores(counts)
    return {name: float(images[name].mean()) for name in ("jaccard", "dice", "accuracy", "sensitivity", "specificity")}


def isic2018_task1(counts: Counts) -> dict[str, float]:
    """Lesion segmentation of ISIC 2018 (Codella et al. 2019, arXiv:1902.03368), ranked by `threshold_jaccard`.

    Args:
        counts: As for `isic2017_part1`.

    Returns:
        `threshold_jaccard`, the mean of per-image Jaccard indices of which those below 0.65 count 0; and
        the means of `isic2017_part1`.

    Raises:
        MedvisionError: As for `isic2017_part1`.
    """
    means = isic2017_part1(counts)
    return {"threshold_jaccard": float(image_scores(counts)["threshold_jaccard"].mean())} | means


def isic2018_task2(counts: Counts, classes: Sequence[str]) -> dict[str, float]:
    """Attribute detection of ISIC 2018 (Codella et al. 2019), ranked by `jaccard_normalised_micro`.

    An attribute is absent from most images, so that nothing here is a mean over images.

    Args:
        counts: int (N, K, 4) as `count` gives them, at each mask's original size.
        classes: The K names.

    Returns:
        For `jaccard` and likewise `dice`:

        - `jaccard`: the pixels of all images pooled for each attribute, then the mean over attributes, as in
          `summarise`; a large image weighs more than a small one.
        - `jaccard_normalised`: the same of counts that are shares of their image, as in the organisers' code; each
          image weighs the same.
        - `jaccard_normalised_micro`: those shares summed over attributes too, which is what the organisers' code
          answers as the overall score; a common attribute weighs more than a rare one.

        The first two also for each attribute, as `<name>/<class>`.

    Raises:
        MedvisionError: If there is no image, or another number of classes than names.
    """
    _require(counts, len(classes))
    shares = counts / counts.sum(-1, keepdims=True)
    pooled, normalised, micro = (_scores(c) for c in (counts.sum(0), shares.sum(0), shares.sum((0, 1))))
    result: dict[str, float] = {}
    for name in ("jaccard", "dice"):
        for key, values in ((name, pooled[name]), (f"{name}_normalised", normalised[name])):
            result[key] = float(values.mean())
            result |= {f"{key}/{c}": float(value) for c, value in zip(classes, values, strict=True)}
        result[f"{name}_normalised_micro"] = float(micro[name])
    return result


def isic2016_task3(probability: NDArray[np.floating[Any]], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Melanoma or not of ISIC 2016 (Gutman et al. 2016, arXiv:1605.01397), ranked by `average_precision`.

    The average precision is today's; scikit-learn before 0.19, and so the scores published in 2016, interpolated
    linearly between the points of the curve.

    Args:
        probability: (N,) of melanoma.
        truth: bool (N,).

    Returns:
        `average_precision`, `auroc`, and `accuracy`, `sensitivity` and `specificity` at a probability of one half.

    Raises:
        MedvisionError: If all images show melanoma or none does: there is nothing to rank.
    """
    if truth.all() or not truth.any():
        raise MedvisionError(
            f"{int(truth.sum())} of {len(truth)} images show melanoma; expected some and not all: "
            "average precision needs both"
        )
    found = summarise_labels(probability[:, None], truth[:, None], ["melanoma"], [0.5])
    return {name: found[name] for name in ("average_precision", "auroc", "accuracy", "sensitivity", "specificity")}


def unetpp_iou(counts: Counts, batch_size: int, smooth: float = 1e-5) -> float:
    """The IoU with which the U-Net++ of github.com/4uiiurz1/pytorch-nested-unet is published.

    Pixels are pooled over each batch, and batches averaged, each weighed by its images: the number depends on the
    size of the batches and on the order of the images. Published for DSB2018 at 96x96 in batches of 16: U-Net 0.839,
    U-Net++ 0.842, with deep supervision 0.843.

    Args:
        counts: int (N, K, 4) as `count` gives them, at network size and a probability of one half, in the order of
            evaluation.
        batch_size: Images of a batch; the last may have fewer.
        smooth: What is added above and below.

    Raises:
        MedvisionError: If there is no image or `batch_size` is not positive.
    """
    _require(counts)
    if batch_size < 1:
        raise MedvisionError(f"batch_size is {batch_size}; expected a positive number of images")
    ious, sizes = [], []
    for start in range(0, len(counts), batch_size):
        batch = counts[start : start + batch_size]
        tp, fp, fn, _ = batch.sum((0, 1)).tolist()
        ious.append((tp + smooth) / (tp + fp + fn + smooth))
        sizes.append(len(batch))
    return float(np.average(ious, weights=sizes))


OF_MASKS: Mapping[str, Callable[[Counts, Sequence[str]], dict[str, float]]] = {
    "isic2017_part1": lambda counts, _: isic2017_part1(counts),
    "isic2018_task1": lambda counts, _: isic2018_task1(counts),
    "isic2018_task2": isic2018_task2,
}
"""Scores by the name in `DataSpec.challenge`: of counts (N, K, 4) and the names of the classes."""
OF_LABELS: Mapping[str, Callable[[NDArray[np.floating[Any]], NDArray[np.bool_]], dict[str, float]]] = {
    "isic2016_task3": lambda probability, truth: isic2016_task3(probability[:, 0], truth[:, 0]),
}
"""The same of probabilities and truth (N, K)."""


def _scores(counts: Counts) -> dict[str, NDArray[np.float64]]:
    return {name: np.where(np.isnan(values), 1.0, values) for name, values in scores(counts).items()}


def _require(counts: Counts, classes: int | None = None) -> None:
    if counts.ndim != 3 or 0 in counts.shape or counts.shape[1:] != (classes or counts.shape[1], 4):
        raise MedvisionError(
            f"counts have the shape {counts.shape}; expected (images, {classes or 'classes'}, 4) of at least one image"
        )
