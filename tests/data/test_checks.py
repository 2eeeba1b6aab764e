import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medvision.data import ImageDataModule, Problem, Sample
from medvision.data.base import Splits
from medvision.data.problems import settle
from medvision.errors import MedvisionError
from medvision.spec import DataSpec


def picture(number: int, size: tuple[int, int] = (48, 64)) -> NDArray[np.uint8]:
    rng = np.random.default_rng(number)
    octaves = [rng.normal(0, 60 / 2**n, (3 * 2**n, 4 * 2**n, 3)) for n in range(5)]
    mixed = sum(cv2.resize(octave, size[::-1], interpolation=cv2.INTER_CUBIC) for octave in octaves)
    return np.asarray(mixed + 120).clip(0, 255).astype(np.uint8)


class Written(ImageDataModule):
    """Samples that a test writes down."""

    page = "https://example.org/written"
    rows: tuple[tuple[str, str, tuple[int, ...], str | None], ...]

    def index(self) -> Splits:
        members = {m.name: m for m in self.source("written").members()}
        found: dict[str, list[Sample]] = {}
        for i, split, labels, group in self.rows:
            masks = tuple((members[f"{i}_{k}.png"],) for k in range(len(self.spec.classes)))
            masks = masks if self.spec.target == "mask" else ()
            found.setdefault(split, []).append(Sample(i, members[f"{i}.png"], masks, labels, group))
        return found


class Desk:
    """Writes images, masks and rows; `module()` reads them."""

    def __init__(self, root: Path, pack: Any, encode: Any, spec: Any) -> None:
        self.root, self.pack, self.encode, self.spec = root, pack, encode, spec
        self.files: dict[str, bytes] = {}
        self.rows: list[tuple[str, str, tuple[int, ...], str | None]] = []

    def add(
        self,
        i: str,
        image: NDArray[np.uint8],
        split: str = "train",
        *masks: NDArray[np.uint8],
        labels: tuple[int, ...] = (0,),
        group: str | None = None,
    ) -> None:
        self.files[f"{i}.png"] = self.encode(image)
        for k in range(2):
            mask = masks[k] if k < len(masks) else np.full(image.shape[:2], 255, np.uint8)
            self.files[f"{i}_{k}.png"] = self.encode(mask)
        self.rows.append((i, split, labels if self.spec.target == "label" else (), group))

    def module(self, **options: Any) -> Written:
        self.pack(self.root / "root/written", self.files)
        options = {"cache": self.root / "cache", "image_size": 16, "num_workers": 0, **options}
        made = Written(self.spec, self.root / "root", **options)
        made.rows = tuple(self.rows)
        return made

    def found(self, **options: Any) -> list[tuple[str, str, tuple[str, ...]]]:
        return [(p.grade, p.kind, p.items) for p in self.module(**options).findings]


@pytest.fixture
def desk(
    tmp_path: Path, pack: Callable[..., Path], encode: Callable[..., bytes], spec: Callable[..., DataSpec]
) -> Callable[..., Desk]:
    """`desk("binary", "mask")`: three plain images in each split."""

    def make(kind: str = "binary", target: str = "mask") -> Desk:
        classes = ["lesion"] if kind == "binary" else ["round", "square"]
        made = Desk(tmp_path, pack, encode, spec(kind, name="written", classes=classes, target=target))
        for number in range(6):
            labels = (0, 1) if kind == "multilabel" else (number % 2,) if kind == "multiclass" else (0,)
            made.add(f"p{number}", picture(100 + number), ("train", "val")[number // 3], labels=labels)
        return made

    return make


KINDS = [
    ("binary", "mask"),
    ("multilabel", "mask"),
    ("binary", "label"),
    ("multilabel", "label"),
    ("multiclass", "label"),
]


@pytest.mark.parametrize(("kind", "target"), KINDS)
def test_nothing_is_found_where_nothing_is_wrong(desk: Callable[..., Desk], kind: str, target: str) -> None:
    made = desk(kind, target)
    assert made.found() == []
    made.module().prepare_data()


@pytest.mark.parametrize(("share", "grade"), [(0.05, "note"), (0.3, "warning")])
def test_grey_masks(desk: Callable[..., Desk], share: float, grade: str) -> None:
    made = desk()
    mask = np.zeros((48, 64), np.uint8)
    mask[8:28, 10:50] = 255
    grey = round(share * 800)
    mask.reshape(-1)[np.flatnonzero(mask)[:grey]] = 130
    made.add("grey", picture(1), "train", mask)
    assert made.found() == [(grade, "masks with more than two values", ("grey",))]
    text = str(made.module().findings[0])
    assert f"Up to {share:.1%} of a mask's area is neither black nor white; what is brighter than 127 counts" in text


def test_empty_masks_are_a_warning_for_one_class_and_a_note_for_several(desk: Callable[..., Desk]) -> None:
    black, white = np.zeros((48, 64), np.uint8), np.full((48, 64), 255, np.uint8)
    made = desk()
    made.add("empty", picture(1), "train", black)
    assert made.found() == [("warning", "empty masks of lesion", ("empty",))]
    made = desk("multilabel")
    made.add("no round", picture(1), "train", black, white)
    made.add("neither", picture(2), "train", black, black)
    assert made.found() == [
        ("note", "empty masks of round", ("neither", "no round")),
        ("note", "empty masks of square", ("neither",)),
    ]


def test_a_mask_of_one_pixel_is_not_empty(desk: Callable[..., Desk]) -> None:
    """Presence is that of the file, not of what is left at the network's size."""
    made, mask = desk(), np.zeros((48, 64), np.uint8)
    mask[20, 20] = 255
    made.add("dot", picture(1), "train", mask)
    assert made.found() == []
    module = made.module()
    assert module.presence.all() and not module.cache.masks[0].any()


def test_identical_images_inside_a_split_and_across(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.add("x1", picture(1), "train")
    made.add("x2", picture(1), "train")
    made.add("y1", picture(2), "train")
    made.add("y2", picture(2), "val")
    made.add("y3", picture(2), "val")
    assert made.found() == [
        ("warning", "identical images across splits", ("y1=y2=y3",)),
        ("warning", "identical images inside a split", ("x1=x2",)),
    ]


def test_identical_images_with_other_masks(desk: Callable[..., Desk]) -> None:
    made, half = desk(), np.zeros((48, 64), np.uint8)
    half[:, :32] = 255
    made.add("x1", picture(1), "train")
    made.add("x2", picture(1), "train", half)
    assert made.found() == [
        ("warning", "identical images with different masks", ("x1=x2",)),
        ("warning", "identical images inside a split", ("x1=x2",)),
    ]


@pytest.mark.parametrize(
    ("kind", "labels"), [("binary", ((0,), ())), ("multilabel", ((0,), (0, 1))), ("multiclass", ((0,), (1,)))]
)
def test_identical_images_with_other_labels_are_an_error_until_excluded(
    desk: Callable[..., Desk], kind: str, labels: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    made = desk(kind, "label")
    made.add("x1", picture(1), "train", labels=labels[0])
    made.add("x2", picture(1), "train", labels=labels[1])
    made.add("x3", picture(1), "train", labels=labels[0])
    assert made.found() == [
        ("error", "identical images with different labels", ("x1", "x2", "x3")),
        ("warning", "identical images inside a split", ("x1=x2=x3",)),
    ]
    words = r"identical images with different labels \(3\): One of the labels is wrong: x1, x2, x3\n.*data\.exclude="
    with pytest.raises(MedvisionError, match=words):
        made.module().prepare_data()
    assert made.found(exclude=["x2"]) == [("warning", "identical images inside a split", ("x1=x3",))]
    made.module(exclude=["x2"]).prepare_data()


def test_look_alikes_inside_a_split_and_across(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.add("a", picture(1), "train")
    made.add("b", np.asarray(cv2.resize(picture(1), (32, 32), interpolation=cv2.INTER_AREA)), "train")
    made.add("c", (picture(2) * 0.8).astype(np.uint8), "train")
    made.add("d", picture(2), "val")
    assert made.found() == [
        ("warning", "near-duplicates across splits", ("c~d",)),
        ("note", "near-duplicates inside a split", ("a~b",)),
    ]


def test_groups_in_several_splits(desk: Callable[..., Desk]) -> None:
    made = desk()
    for number, (split, group) in enumerate(
        [("train", "g1"), ("train", "g2"), ("val", "g2"), ("val", "g3"), ("train", None)]
    ):
        made.add(f"x{number}", picture(number), split, group=group)
    assert made.found() == [("warning", "groups in more than one split", ("g2",))]


@pytest.mark.parametrize("target", ["mask", "label"])
def test_classes_that_a_split_does_not_show(desk: Callable[..., Desk], target: str) -> None:
    made = desk("multilabel", target)
    masks = np.full((48, 64), 255, np.uint8), np.zeros((48, 64), np.uint8)
    made.add("x", picture(1), "test", *masks, labels=(0,))
    problem = made.module().findings[-1]
    assert (problem.grade, problem.kind, problem.items) == ("warning", "class without images", ())
    assert problem.text == "No image of test shows square: nothing can be learned or measured of it there"


def test_broken_files_are_errors_and_all_are_named(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.files["p1.png"] = made.files["p1.png"][:50]
    made.files["p4_0.png"] = made.encode(np.zeros((5, 5), np.uint8))
    problems = made.module().findings
    assert [(p.grade, p.kind, p.items) for p in problems] == [
        ("error", "broken files", ("p1",)),
        ("error", "broken files", ("p4",)),
    ]
    assert "p1.png cannot be decoded" in problems[0].text and "p4_0.png is 5x5" in problems[1].text
    with pytest.raises(MedvisionError, match=r"data\.exclude=\[p1,p4\]"):
        made.module().prepare_data()
    assert made.found(exclude=["p1", "p4"]) == []


def test_warnings_are_logged_once_and_notes_are_not(
    desk: Callable[..., Desk], caplog: pytest.LogCaptureFixture
) -> None:
    made = desk()
    made.add("x1", picture(1), "train")
    made.add("x2", picture(1), "train")
    made.add("a", picture(2), "train")
    made.add("b", (picture(2) * 0.8).astype(np.uint8), "train")
    with caplog.at_level(logging.INFO, "medvision.data.problems"):
        made.module().prepare_data()
    assert [m for m in caplog.messages if m.startswith("written:")] == [
        "written: identical images inside a split (1): They count twice: x1=x2"
    ]


def test_problems_are_said_in_one_line_and_shrink_with_what_is_excluded() -> None:
    many = Problem("warning", "odd", tuple(f"i{n}" for n in range(13)), "Look at them")
    assert str(many) == "odd (13): Look at them: i0, i1, i2, i3, i4, i5, i6, i7, i8, i9 and 3 more"
    assert str(Problem("note", "odd", ("i",))) == "odd (1): i"
    assert str(Problem("note", "odd", (), "All")) == "odd: All"
    assert many.without(["i0", "x"]) == Problem("warning", "odd", tuple(f"i{n}" for n in range(1, 13)), "Look at them")
    assert many.without(many.items) is None
    assert Problem("note", "odd", ()).without(["i0"]) == Problem("note", "odd", ())


def test_all_errors_are_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    problems = [
        Problem("error", "a", ("1",)),
        Problem("warning", "b", ()),
        Problem("error", "c", (), "Mend"),
        Problem("note", "d", ()),
    ]
    with pytest.raises(MedvisionError) as caught:
        settle("tiny", problems)
    assert str(caught.value).splitlines()[:3] == ["tiny has errors:", "  a (1): 1", "  c: Mend"]
    with caplog.at_level(logging.INFO):
        settle("tiny", [p for p in problems if p.grade != "error"])
    assert caplog.messages == ["tiny: b"]
