"""What decoded files tell about a data set: masks, labels, look-alikes, groups and splits."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.data.cache import Cache, Sample
from medvision.data.problems import Problem
from medvision.spec import DataSpec

GREY = 0.1  # share of a mask's pixels between black and white above which the edge does not explain it


def check(
    spec: DataSpec, samples: Sequence[Sample], cache: Cache, presence: NDArray[np.bool_], split: Sequence[str]
) -> list[Problem]:
    """What is wrong with samples that can all be decoded.

    Args:
        spec: The facts of the data set.
        samples: All samples, in the order of the cache's rows.
        cache: Their arrays and facts.
        presence: Whether each shows each class, bool (N, K).
        split: The split of each.
    """
    ids = [sample.id for sample in samples]
    found = _masks(spec, ids, cache, presence) if spec.target == "mask" else []
    found += _identical(spec, samples, cache, presence, split)
    found += _alike(ids, cache, split)
    found += _torn(samples, split)
    for name in dict.fromkeys(split):
        shown = presence[np.array(split) == name].any(0)
        if absent := [c for c, there in zip(spec.classes, shown, strict=True) if not there]:
            text = f"No image of {name} shows {', '.join(absent)}: nothing can be learned or measured of it there"
            found.append(Problem("warning", "class without images", (), text))
    return found


def _masks(spec: DataSpec, ids: Sequence[str], cache: Cache, presence: NDArray[np.bool_]) -> list[Problem]:
    found = []
    between, set_pixels = cache.facts["between"], cache.facts["pixels"].sum(1)
    if (grey := between > 0).any():
        worst = float((between / np.maximum(set_pixels, 1)).max())
        found.append(
            Problem(
                "warning" if worst > GREY else "note",
                "masks with more than two values",
                tuple(np.array(ids)[grey].tolist()),
                f"Up to {worst:.1%} of a mask's area is neither black nor white; what is brighter than 127 counts",
            )
        )
    for k, name in enumerate(spec.classes):
        if empty := np.array(ids)[~presence[:, k]].tolist():
            found.append(
                Problem("warning" if spec.kind == "binary" else "note", f"empty masks of {name}", tuple(empty))
            )
    return found


def _identical(
    spec: DataSpec, samples: Sequence[Sample], cache: Cache, presence: NDArray[np.bool_], split: Sequence[str]
) -> list[Problem]:
    """Images whose pixels are all equal."""
    by_content = _grouped(cache.facts["content"].tolist())
    found: dict[str, list[str]] = defaultdict(list)
    for rows in by_content:
        label = "=".join(samples[row].id for row in rows)
        kind = "across splits" if len({split[row] for row in rows}) > 1 else "inside a split"
        found[kind].append(label)
        if spec.target == "mask":
            if any(not np.array_equal(cache.masks[rows[0]], cache.masks[row]) for row in rows[1:]):
                found["masks"].append(label)
        elif len({presence[row].tobytes() for row in rows}) > 1:
            found["labels"] += [samples[row].id for row in rows]
    texts = {
        "labels": ("error", "identical images with different labels", "One of the labels is wrong"),
        "masks": ("warning", "identical images with different masks", ""),
        "across splits": ("warning", "identical images across splits", "Results on these images flatter"),
        "inside a split": ("warning", "identical images inside a split", "They count twice"),
    }
    return [Problem(grade, kind, tuple(found[key]), text) for key, (grade, kind, text) in texts.items() if key in found]  # type: ignore[arg-type]


def _alike(ids: Sequence[str], cache: Cache, split: Sequence[str]) -> list[Problem]:
    """Images that look alike and are not identical."""
    content = cache.facts["content"]
    pairs: dict[bool, list[str]] = defaultdict(list)
    for first, second, _ in cache.pairs:
        if content[first] != content[second]:
            pairs[split[first] != split[second]].append(f"{ids[first]}~{ids[second]}")
    found = []
    if pairs[True]:
        text = "Look at them: if they are the same scene, results on them flatter"
        found.append(Problem("warning", "near-duplicates across splits", tuple(pairs[True]), text))
    if pairs[False]:
        found.append(Problem("note", "near-duplicates inside a split", tuple(pairs[False])))
    return found


def _torn(samples: Sequence[Sample], split: Sequence[str]) -> list[Problem]:
    """Groups that are in more than one split."""
    splits: dict[str, set[str]] = defaultdict(set)
    for sample, name in zip(samples, split, strict=True):
        if sample.group is not None:
            splits[sample.group].add(name)
    torn = tuple(sorted(group for group, names in splits.items() if len(names) > 1))
    return [Problem("warning", "groups in more than one split", torn, "Results flatter")] if torn else []


def _grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal keys, where there are two or more."""
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return [group for group in rows.values() if len(group) > 1]
