import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from medvision import cli
from medvision.errors import MedvisionError

Fake = Callable[..., Path]
TWO = {"classes": ["left", "right"], "num_outputs": 2, "kind": "multilabel"}


def ids(data: Any) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def everything(data: Any) -> list[str]:
    return sorted(i for members in ids(data).values() for i in members)


def zipped(root: Path, below: str = "") -> Path:
    """The folder as a zip file beside it, `below` one folder deeper."""
    if below:
        inner = root.parent / "inner"
        shutil.copytree(root, inner / below)
        root = inner
    return Path(shutil.make_archive(str(root.parent / "mine"), "zip", root))


def rename(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


def test_images_and_masks_are_paired_and_dealt(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    data = dataset("folder", fake_folder(tmp_path / "mine"))
    assert [*data.splits] == ["train", "val", "test"] and data.problems == []
    assert everything(data) == [f"case{n:02d}" for n in range(12)]
    for sample in data.samples:
        assert (sample.image.name, sample.masks[0][0].name) == (f"images/{sample.id}.png", f"masks/{sample.id}.png")
    data.prepare_data()


def test_masks_of_several_classes_are_channels(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine", classes=["right", "left"])
    data = dataset("folder", root, TWO)
    for sample in data.samples:
        assert [m.name for (m,) in sample.masks] == [f"masks/{name}/{sample.id}.png" for name in ("left", "right")]
    masks = data.samples[0].read(3)[1]
    assert np.array_equal(masks[..., 0], np.roll(masks[..., 1], 3, 0)) and masks.any()


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "TEST")], ids=["short", "long"])
@pytest.mark.parametrize("classes", [(), ("left", "right")], ids=["one class", "two classes"])
def test_splits_of_the_folders_are_kept(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    root = fake_folder(tmp_path / "mine", classes=classes, splits=names)
    expected = {name: [f"case{n:02d}" for n in range(k, 12, 3)] for k, name in enumerate(("train", "val", "test"))}
    assert ids(dataset("folder", root, TWO if classes else None)) == expected
    assert ids(dataset("folder", zipped(root, "top"), TWO if classes else None)) == expected


def test_files_that_are_numbered_anew_in_each_split_are_told_apart(
    dataset: Callable[..., Any], fake_folder: Fake, fake_folder_labels: Fake, tmp_path: Path
) -> None:
    root = fake_folder(tmp_path / "mine", splits=["train", "val"])
    for kind in ("images", "masks"):
        rename(root, f"val/{kind}/case01.png", f"val/{kind}/case00.png")
    found = ids(dataset("folder", root))
    assert found["train"][-1] == "train/case00" and found["val"][-1] == "val/case00"
    assert {split: len(members) for split, members in found.items()} == {"train": 6, "val": 6}
    root = fake_folder_labels(tmp_path / "labels", splits=["train", "val"])
    rename(root, "val/a/02.jpg", "val/a/00.jpg")
    assert ids(dataset("folder_labels", root))["val"][-1] == "val/a/00"


@pytest.mark.parametrize("ending", ["_mask", "_segmentation", "-gt", "_Label", ""])
def test_endings_of_mask_names_and_upper_case(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, ending: str
) -> None:
    root = fake_folder(tmp_path / "mine")
    before = dataset("folder", root)
    expected, digest = ids(before), before.cache.digest
    for n in range(12):
        rename(root, f"masks/case{n:02d}.png", f"masks/CASE{n:02d}{ending}.PNG")
    rename(root, "images", "Images")
    rename(root, "masks", "MASKS")
    after = dataset("folder", root)
    assert ids(after) == expected and after.cache.digest == digest


@pytest.mark.parametrize("below", ["", "top", "top/deeper"])
def test_zip_and_folder_are_read_alike(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, below: str
) -> None:
    root = fake_folder(tmp_path / "mine")
    folder, archive = dataset("folder", root), dataset("folder", zipped(root, below))
    assert ids(folder) == ids(archive) and folder.cache.digest == archive.cache.digest


def test_litter_is_no_class_and_no_image(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine", classes=["left", "right"])
    for name in (
        "masks/.DS_Store",
        "images/._case00.png",
        "__MACOSX/masks/._x.png",
        "images/Thumbs.db",
        "masks/notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    data = dataset("folder", root, TWO)
    assert everything(data) == [f"case{n:02d}" for n in range(12)]
    assert [(p.grade, p.kind, p.items) for p in data.problems] == [
        ("warning", "stray files", (f"{root}: masks/notes.txt",))
    ]


def test_an_image_without_mask_is_an_error_until_excluded(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path
) -> None:
    root = fake_folder(tmp_path / "mine")
    (root / "masks/case04.png").unlink()
    (root / "images/case05.png").unlink()
    with pytest.raises(MedvisionError, match=r"train: images without masks \(1\).*: case04\n.*data\.exclude="):
        _ = dataset("folder", root).splits
    data = dataset("folder", root, exclude=["case04"])
    assert len(everything(data)) == 10
    assert [(p.kind, p.items) for p in data.problems] == [("train: masks without images", ("case05",))]


@pytest.mark.parametrize(
    ("classes", "facts", "words"),
    [
        (
            ("left", "right"),
            None,
            [
                "masks of ['left', 'right']",
                "['foreground']",
                "data.spec.classes=[left,right] data.spec.num_outputs=2 data.spec.kind=multilabel",
            ],
        ),
        (("tumour",), None, ["masks of ['tumour']", "data.spec.classes=[tumour] data.spec.num_outputs=1"]),
        ((), TWO, ["no masks/<class>/ folders", "['left', 'right']"]),
        (("left", "top"), TWO, ["['left', 'top']", "['left', 'right']", "data.spec.classes=[left,top]"]),
    ],
)
def test_other_classes_are_named_with_the_overrides(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, classes: Any, facts: Any, words: list[str]
) -> None:
    with pytest.raises(MedvisionError) as caught:
        _ = dataset("folder", fake_folder(tmp_path / "mine", classes=classes), facts).splits
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_mask_folder_for_the_only_class(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine", classes=["tumour"])
    assert len(everything(dataset("folder", root, {"classes": ["tumour"]}))) == 12


def test_nothing_there_is_named(dataset: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(MedvisionError, match=r"nowhere is not there; .*data\.root=<path>"):
        _ = dataset("folder", tmp_path / "nowhere").splits
    (tmp_path / "empty").mkdir()
    with pytest.raises(MedvisionError, match="has no masks/ folder"):
        _ = dataset("folder", tmp_path / "empty").splits
    with pytest.raises(MedvisionError, match=r"folders with images are \[\], data\.spec\.classes is \['a', 'b'\]"):
        _ = dataset("folder_labels", tmp_path / "empty").splits


@pytest.mark.parametrize("splits", [("",), ("train", "val"), ("train", "val", "test")], ids=str)
@pytest.mark.parametrize(
    "pack", [lambda root: root, zipped, lambda root: zipped(root, "top")], ids=["folder", "zip", "deeper"]
)
def test_class_folders_are_labels(
    dataset: Callable[..., Any], fake_folder_labels: Fake, tmp_path: Path, splits: tuple[str, ...], pack: Any
) -> None:
    data = dataset("folder_labels", pack(fake_folder_labels(tmp_path / "mine", 24, splits=splits)))
    assert everything(data) == sorted(f"{'ab'[n % 2]}/{n:02d}" for n in range(24))
    assert [*data.splits] == (["train", "val"] if len(splits) == 2 else ["train", "val", "test"])
    assert all(s.labels == ("ab".index(s.id[0]),) for s in data.samples)
    if len(splits) > 1:
        assert ids(data)["val"] == sorted(f"{'ab'[n % 2]}/{n:02d}" for n in range(24) if n // 2 % len(splits) == 1)
    data.prepare_data()


def test_other_class_folders_are_named_with_the_overrides(
    dataset: Callable[..., Any], fake_folder_labels: Fake, tmp_path: Path
) -> None:
    root = fake_folder_labels(tmp_path / "mine", classes=["cat", "dog", "hen"])
    with pytest.raises(MedvisionError, match=r"data\.spec\.classes=\[cat,dog,hen\] data\.spec\.num_outputs=3"):
        _ = dataset("folder_labels", root).splits
    data = dataset("folder_labels", root, {"classes": ["cat", "dog", "hen"], "num_outputs": 3})
    assert len(everything(data)) == 12 and data.presence.sum(0).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "names", [["0", "1", "2"], ["a, b; c", "ant's [x]", "größer"], ["1e3", "null", "true"]], ids=str
)
def test_overrides_for_any_class_folders_can_be_typed(
    dataset: Callable[..., Any], fake_folder_labels: Fake, tmp_path: Path, names: list[str]
) -> None:
    root = fake_folder_labels(tmp_path / "mine", classes=names)
    with pytest.raises(MedvisionError) as caught:
        _ = dataset("folder_labels", root).splits
    typed = shlex.split(str(caught.value).partition("if the folders are the classes: ")[2])
    spec = cli.compose("train", ["data=folder_labels", *typed]).data.spec
    data = dataset("folder_labels", root, {"classes": [*spec.classes], "num_outputs": spec.num_outputs})
    assert data.spec.classes == tuple(names) and data.presence.sum(0).tolist() == [4, 4, 4]


def test_two_folders_are_a_class_and_its_absence(
    dataset: Callable[..., Any], fake_folder_labels: Fake, tmp_path: Path
) -> None:
    root = fake_folder_labels(tmp_path / "mine", classes=["benign", "malignant"])
    with pytest.raises(MedvisionError, match="folders with images") as caught:
        _ = dataset("folder_labels", root).splits
    typed = shlex.split(str(caught.value).partition("if one is the absence of the other: ")[2])
    facts = OmegaConf.to_container(cli.compose("train", ["data=folder_labels", *typed]).data.spec)
    known = {name: facts[name] for name in ("classes", "num_outputs", "kind")}
    assert known == {"classes": ["malignant"], "num_outputs": 1, "kind": "binary"}
    data = dataset("folder_labels", root, known)
    assert {s.id[0]: s.labels for s in data.samples} == {"b": (), "m": (0,)} and len(data.samples) == 12
    (root / "benign").rename(root / "elsewhere")
    assert dataset("folder_labels", root, known).positive_weights() == pytest.approx([1])
    fake_folder_labels(root, classes=["benign"])
    with pytest.raises(
        MedvisionError, match=r"classes=\[benign,elsewhere,malignant\] .*=3 data\.spec\.kind=multiclass$"
    ):
        _ = dataset("folder_labels", root, known).splits


def test_weights_of_exclusive_classes(dataset: Callable[..., Any], fake_folder_labels: Fake, tmp_path: Path) -> None:
    """Six, four and two images of three classes in training: 12 / (3 * 6) and so on."""
    facts = {"classes": ["cat", "dog", "hen"], "num_outputs": 3}
    root = fake_folder_labels(tmp_path / "mine", 36, classes=facts["classes"], splits=["train", "val"])
    train = ids(dataset("folder_labels", root, facts))["train"]
    of = {name: [i for i in train if f"{name}/" in i] for name in ("cat", "dog", "hen")}
    assert [len(members) for members in of.values()] == [6, 6, 6]
    data = dataset("folder_labels", root, facts, exclude=[*of["dog"][:2], *of["hen"][:4]])
    assert data.class_weights() == pytest.approx([12 / 18, 1, 2])
    assert data.class_weights("val") == pytest.approx([1, 1, 1])
    data = dataset("folder_labels", root, facts, exclude=of["hen"])
    with pytest.raises(MedvisionError, match="folder_labels: hen does not occur in train: no weight for it"):
        data.class_weights()


def table(root: Path, header: str, row: Callable[[int], str], name: str = "table.csv") -> str:
    (root / name).write_text("\n".join([header, *map(row, range(12))]) + "\n")
    return name


def test_a_table_with_splits_and_groups(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine")
    split = ["train", "Train", "", "validation"]
    name = table(
        root,
        "Image;MASK;split;group",
        lambda n: f"images/case{n:02d}.png;masks/case{n:02d}.png;{split[n % 4]};patient {n // 4}",
    )
    data = dataset("folder", root, table=name)
    assert ids(data) == {
        "train": [f"images/case{n:02d}" for n in range(12) if n % 4 < 3],
        "val": [f"images/case{n:02d}" for n in range(12) if n % 4 == 3],
    }
    assert [s.group for s in data.samples] == [f"patient {n // 4}" for n in range(12)]
    torn = [p for p in data.findings if p.kind == "groups in more than one split"]
    assert [p.items for p in torn] == [("patient 0", "patient 1", "patient 2")]


def test_groups_of_a_table_are_kept_together(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine")
    name = table(root, "image,mask,group", lambda n: f"images/case{n:02d}.png,masks/case{n:02d}.png,p{n // 2}")
    for fold in range(3):
        data = dataset("folder", root, table=name, folds=3, fold=fold)
        groups = [group for samples in data.splits.values() for group in {s.group for s in samples}]
        assert len(groups) == len(set(groups)) == 6


@pytest.mark.parametrize("header", ["image,mask_left,mask_right", "image,MASK_Right,mask_left"])
def test_a_table_with_a_mask_column_for_each_class(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, header: str
) -> None:
    root = fake_folder(tmp_path / "mine", classes=["left", "right"])
    order = [name.removeprefix("mask_") for name in header.lower().split(",")[1:]]
    cells = [lambda n, c=c: "" if n == 3 and c == "left" else f"masks/{c}/case{n:02d}.png" for c in order]
    name = table(root, header, lambda n: ",".join([f"images/case{n:02d}.png", *(cell(n) for cell in cells)]))
    data = dataset("folder", root, TWO, table=name)
    assert data.presence[:, 0].tolist() == [n != 3 for n in range(12)] and data.presence[:, 1].all()
    assert data.samples[3].masks[0] == () and data.samples[2].masks[1][0].name == "masks/right/case02.png"


LABELS: list[tuple[str, dict[str, Any], list[str], list[tuple[int, ...]]]] = [
    ("multiclass", {}, ["a", "b", "a"], [(0,), (1,), (0,)]),
    ("binary", {"classes": ["ill"], "num_outputs": 1}, ["0", "1", "0.0"], [(), (0,), ()]),
    ("binary", {"classes": ["ill"], "num_outputs": 1}, ["ill", "", "1.0"], [(0,), (), (0,)]),
    ("multilabel", {}, ["a|b", "", "b"], [(0, 1), (), (1,)]),
    ("multilabel", {}, ["b a", "a", "b | a"], [(0, 1), (0,), (0, 1)]),
    ("multilabel", {"classes": ["a b", "c"]}, ["a b", "a b|c", "c | a b"], [(0,), (0, 1), (0, 1)]),
    ("multiclass", {"classes": ["no finding", "mass"]}, ["no finding", "mass", "mass"], [(0,), (1,), (1,)]),
]


@pytest.mark.parametrize(("kind", "facts", "words", "expected"), LABELS)
def test_a_table_of_labels(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, kind: str, facts: Any, words: Any, expected: Any
) -> None:
    root = fake_folder(tmp_path / "mine")
    name = table(root, "image,label", lambda n: f"images/case{n:02d}.png,{words[n % 3]}")
    data = dataset("folder_labels", root, {"kind": kind, **facts}, table=name)
    assert [s.labels for s in data.samples] == expected * 4 and [s.masks for s in data.samples] == [()] * 12
    assert len(everything(data)) == 12


@pytest.mark.parametrize(
    ("kind", "classes", "header", "cells"),
    [
        ("multilabel", ["left", "right lobe"], "image,Right Lobe,age,LEFT", ["0,61,1", "1.0,7,0.0", "1,,1"]),
        ("multiclass", ["left", "right lobe"], "image,right lobe,left", ["0,1", "1,0", "0,1"]),
        ("binary", ["ill"], "image,ill", ["no", "1", "0.0"]),
        ("multilabel", ["left", "label"], "image,label,left", ["left", "label", "left|label"]),
    ],
    ids=str,
)
def test_a_table_with_a_column_for_each_label(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, kind: str, classes: Any, header: str, cells: Any
) -> None:
    root = fake_folder(tmp_path / "mine")
    name = table(root, header, lambda n: f"images/case{n:02d}.png,{cells[n % 3]}")
    facts = {"kind": kind, "classes": classes, "num_outputs": len(classes)}
    found = dataset("folder_labels", root, facts, table=name).samples
    expected = {"multilabel": [(0,), (1,), (0, 1)], "multiclass": [(0,), (1,), (0,)], "binary": [(), (0,), ()]}[kind]
    assert [s.labels for s in found] == expected * 4 and [s.masks for s in found] == [()] * 12


@pytest.mark.parametrize(
    ("data", "header", "row", "words"),
    [
        ("folder", "image,label", "images/case{n}.png,a", r"columns \['image', 'label'\]; mask is missing"),
        ("folder_labels", "image,mask", "images/case{n}.png,x", r"label is missing\. Expected image, mask"),
        ("folder_labels", "file,label", "images/case{n}.png,a", "image is missing"),
        ("folder_labels", "image,label", "images/case{n}.png,c", r"row 2: label 'c'; expected one of \['a', 'b'\]"),
        ("folder_labels", "image,label", "images/case{n}.png,", r"row 2: label ''; expected one of"),
        ("folder_labels", "image,label", "images/case{n}.png,a b", r"row 2: label 'a b'; expected one of"),
        (
            "folder_labels",
            "image,label,split",
            "images/case{n}.png,a,dev",
            "row 2: split 'dev'; expected train, val or",
        ),
        ("folder_labels", "image,a", "images/case{n}.png,1", r"b is missing\. .* is \['a', 'b'\]"),
        ("folder_labels", "image,a,b", "images/case{n}.png,1,-1", "row 2: b '-1'; expected 0 or 1"),
        ("folder_labels", "image,a,b", "images/case{n}.png,1", "row 2: b ''; expected 0 or 1"),
        (
            "folder_labels",
            "image,a,b",
            "images/case{n}.png,1,1",
            r"row 2: a '1', b '1'; expected one of .*kind=multilabel",
        ),
        ("folder_labels", "image,a,B,b", "images/case{n}.png,1,0,1", r"table\.csv: b names two columns"),
        ("folder_labels", "image,label", "images/case00.png,a", "in two places: images/case00"),
        ("folder_labels", "image,label", "nothing{n}.png,a", "no images for the split 'train'"),
        ("folder_labels", "image,label,split", "images/case{n}.png,a,test", "no images for the split 'train'"),
    ],
)
def test_tables_that_cannot_be_used_are_named(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, data: str, header: str, row: str, words: str
) -> None:
    root = fake_folder(tmp_path / "mine")
    name = table(root, header, lambda n: row.replace("{n}", f"{n:02d}"))
    with pytest.raises(MedvisionError, match=words):
        _ = dataset(data, root, table=name).splits


def test_one_mask_column_is_not_enough_for_two_classes(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path
) -> None:
    root = fake_folder(tmp_path / "mine")
    name = table(root, "image,mask", lambda n: f"images/case{n:02d}.png,masks/case{n:02d}.png")
    with pytest.raises(MedvisionError, match="mask_left, mask_right is missing"):
        _ = dataset("folder", root, TWO, table=name).splits


def test_names_in_a_table_may_have_no_ending(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine")
    rename(root, "images/case01.png", "images/case.1.PNG")
    shutil.copy(root / "images/case02.png", root / "images/case02.jpg")  # which of them is meant?
    shutil.copy(root / "images/case03.png", root / "images/case03.jpg")
    names = {1: "case.1", 3: "case03.png"}
    name = table(root, "image,label", lambda n: f"images/{names.get(n, f'case{n:02d}')},{'ab'[n % 2]}")
    data = dataset("folder_labels", root, table=name)
    assert everything(data) == sorted(f"images/case{'.1' if n == 1 else f'{n:02d}'}" for n in range(12) if n != 2)
    assert data.problems[0].items == ("images/case02",)


def test_an_empty_and_a_missing_table_are_named(dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path) -> None:
    root = fake_folder(tmp_path / "mine")
    (root / "table.csv").write_text("")
    with pytest.raises(MedvisionError, match=r"table\.csv has the columns \[\]; image, mask is missing"):
        _ = dataset("folder", root, table="table.csv").splits
    with pytest.raises(MedvisionError, match=r"other\.csv cannot be read as a table"):
        _ = dataset("folder", root, table="other.csv").splits


def test_rows_without_files_are_left_out(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fake_folder(tmp_path / "mine")
    name = table(root, "image,mask", lambda n: f"images/case{n:02d}.png,masks/case{n:02d}.png")
    (root / "images/case03.png").unlink()
    (root / "masks/case07.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(everything(dataset("folder", root, table=name))) == 10
    assert caplog.messages == [
        "folder: rows without files (2): table.csv names them; they are left out: images/case03.png, masks/case07.png"
    ]


def test_an_image_whose_own_name_ends_as_masks_do(
    dataset: Callable[..., Any], fake_folder: Fake, tmp_path: Path
) -> None:
    root = fake_folder(tmp_path / "mine")
    for kind in ("images", "masks"):
        rename(root, f"{kind}/case03.png", f"{kind}/case03_mask.png")
    rename(root, "masks/case04.png", "masks/case04_mask.png")
    data = dataset("folder", root)
    paired = {s.id: s.masks[0][0].name for s in data.samples}
    assert data.problems == [] and len(paired) == 12
    assert (paired["case03_mask"], paired["case04"]) == ("masks/case03_mask.png", "masks/case04_mask.png")
