"""Splits and folds: seeded, stratified, and no group in two of them."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.errors import MedvisionError


def assign_folds(
    ids: Sequence[str],
    folds: int,
    strata: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Deals images into folds of nearly equal size and composition.

    The result depends on ids, strata, groups and seed alone, not on the order in which images are given.

    Args:
        ids: Names, all different.
        folds: Number of folds.
        strata: What every fold is to hold its share of, one for each image; None is one stratum.
        groups: What must not be torn apart, one for each image; None leaves every image alone.
        seed: Decides who goes where.

    Returns:
        The fold of each image, from 0 to `folds - 1`, in the order of `ids`.

    Raises:
        MedvisionError: If there are fewer groups than folds, or fewer than two folds.
    """
    names = ids if groups is None else groups
    units = len(set(names))
    if not 2 <= folds <= units:
        what = "images"
        if groups is not None:
            what = (
                "groups of images (sequences, patients, identical or similar images: data.alike_together=false lets "
                "the last ones part)"
            )
        raise MedvisionError(f"data.folds is {folds}; expected 2 or more and at most {units}, the number of {what}")
    order = np.argsort(np.asarray(ids), kind="stable")
    stratum = _numbers([(strata or [0] * len(ids))[i] for i in order])
    group = _numbers([names[i] for i in order])
    result = np.empty(len(ids), np.int64)
    result[order] = _deal(stratum, folds, seed) if units == len(ids) else _deal_groups(stratum, group, folds, seed)
    return result


def rarest(presence: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each row of (N, K) the column that is true in the fewest rows among those true in it; K where none is."""
    frequency = presence.sum(0)
    order = np.argsort(frequency, kind="stable")
    first = presence[:, order].argmax(1) if presence.shape[1] else np.zeros(len(presence), np.int64)
    return np.where(presence.any(1), order[first] if len(order) else 0, presence.shape[1])


def _deal(stratum: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Shuffles each stratum and deals one stratum after the other to the folds in turn: sizes differ by one at most."""
    rng = np.random.default_rng(seed)
    shuffled = np.lexsort([rng.random(len(stratum)), stratum])
    result = np.empty(len(stratum), np.int64)
    result[shuffled] = rng.permutation(folds)[np.arange(len(stratum)) % folds]
    return result


def _deal_groups(stratum: NDArray[np.int64], group: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Deals whole groups, large ones first, each to the fold that holds the smallest share of what is in the group.

    An empty fold holds the smallest share of anything, so none stays empty.
    """
    counts = np.zeros((group.max() + 1, stratum.max() + 1))
    np.add.at(counts, (group, stratum), 1)
    shares = counts / counts.sum(0)
    rng = np.random.default_rng(seed)
    shuffled, numbers = rng.permutation(len(counts)), rng.permutation(folds)
    held, fold_of = np.zeros((folds, counts.shape[1])), np.empty(len(counts), np.int64)
    sizes = np.zeros(folds)
    for number in shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]:
        fold_of[number] = fold = np.lexsort([sizes, (held @ shares[number]).round(12)])[0]
        held[fold] += shares[number]
        sizes[fold] += counts[number].sum()
    result: NDArray[np.int64] = numbers[fold_of[group]]
    return result


def _numbers(values: Sequence[Hashable]) -> NDArray[np.int64]:
    """A number for each distinct value, in the order of their first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values], np.int64)
