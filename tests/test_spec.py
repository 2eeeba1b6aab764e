import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision.errors import MedvisionError
from medvision.spec import DataSpec, as_size

FACTS: dict[str, Any] = {
    "name": "tiny",
    "classes": ["lesion"],
    "kind": "binary",
    "in_channels": 3,
    "num_outputs": 1,
    "mean": [0.7, 0.6, 0.5],
    "std": [0.1, 0.2, 0.3],
}
TWO = {"kind": "multilabel", "classes": ["a", "b"], "num_outputs": 2}


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_size_is_height_then_width(height: int, width: int) -> None:
    assert as_size([height, width]) == as_size((height, width)) == (height, width)
    assert as_size(height) == (height, height)


@pytest.mark.parametrize("size", [0, -3, [8], [8, 8, 8], [], [8, 0], [8, -1], [8, 8.5], "88", "8", 96.5, None])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(MedvisionError, match=re.escape(repr(size)) + r".*data\.image_size=\[192,256\]"):
        as_size(size)


def test_lists_of_configs_become_tuples_and_the_spec_is_frozen_and_hashable() -> None:
    spec = DataSpec(**FACTS, image_size=[192, 256])  # type: ignore[arg-type]
    assert (spec.classes, spec.mean, spec.std) == (("lesion",), (0.7, 0.6, 0.5), (0.1, 0.2, 0.3))
    assert spec.image_size == (192, 256)
    assert DataSpec(**FACTS).image_size == (256, 256)
    assert hash(spec) == hash(dataclasses.replace(spec))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [TWO, {"in_channels": 1, "mean": [0.5], "std": [0.2]}, {**TWO, "classes": ("a",), "num_outputs": 1}],
)
def test_facts_that_agree_are_accepted(changes: dict[str, Any]) -> None:
    spec = DataSpec(**{**FACTS, **changes})
    assert spec.num_outputs == len(spec.classes) and len(spec.mean) == spec.in_channels


@pytest.mark.parametrize(
    ("kind", "target", "classes"),
    [
        *(("binary", "mask", ["a"]), ("binary", "label", ["a"]), ("multilabel", "mask", ["a", "b"])),
        *(("multilabel", "label", ["a", "b", "c"]), ("multiclass", "label", ["a", "b"])),
    ],
)
def test_classes_are_masks_or_labels_and_the_normalisation_may_be_measured(
    kind: Any, target: Any, classes: list[str]
) -> None:
    spec = DataSpec("tiny", classes, kind, 3, len(classes), target=target)  # type: ignore[arg-type]
    assert (spec.classes, spec.target, spec.mean, spec.std) == (tuple(classes), target, None, None)


def test_masks_are_the_usual_target() -> None:
    assert DataSpec(**FACTS).target == "mask"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "multi"}, ["data.spec.kind is 'multi'", "expected one of binary, multilabel, multiclass"]),
        ({"target": "box"}, ["data.spec.target is 'box'", "'mask' or 'label'"]),
        ({**TWO, "kind": "multiclass"}, ["multiclass", "data.spec.target is 'mask'", "['a', 'b']"]),
        ({"kind": "multiclass", "target": "label"}, ["multiclass", "two classes or more", "['lesion']"]),
        ({**TWO, "classes": ["a", "a"]}, ["['a', 'a']", "names that differ"]),
        ({**TWO, "classes": [], "num_outputs": 0}, ["[]", "names that differ"]),
        ({"mean": None}, ["data.spec.mean and data.spec.std", "both or neither"]),
        ({"std": None}, ["data.spec.mean and data.spec.std", "both or neither"]),
        ({"classes": ["a", "b"], "num_outputs": 2}, ["binary", "['a', 'b']"]),
        ({"classes": []}, ["binary", "[]"]),
        ({"num_outputs": 2}, ["data.spec.num_outputs is 2", "names 1", "['lesion']"]),
        ({**TWO, "num_outputs": 3}, ["data.spec.num_outputs is 3", "names 2"]),
        ({"in_channels": 2, "mean": [0, 0], "std": [1, 1]}, ["data.spec.in_channels is 2", "1 (grey) or 3 (RGB)"]),
        ({"in_channels": 1}, ["data.spec.mean", "1 numbers"]),
        ({"mean": [0.5]}, ["data.spec.mean (0.5,)", "3 numbers"]),
        ({"std": [0.5]}, ["data.spec.std (0.5,)", "3 numbers"]),
        ({"std": [0.1, 0, 0.3]}, ["std above 0"]),
        ({"std": [0.1, 0.2, -0.3]}, ["std above 0"]),
        ({"image_size": [0, 8]}, ["[0, 8]", "data.image_size"]),
    ],
)
def test_facts_that_disagree_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(MedvisionError) as caught:
        DataSpec(**{**FACTS, **changes})
    assert [word for word in words if word not in str(caught.value)] == []
