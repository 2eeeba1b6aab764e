import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvision.errors import MedvisionError

STEM = "ISBI2016_ISIC_Part3_Training"


def ids(data: Any) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def problems(data: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(p.grade, p.kind, p.items) for p in data.problems if p.kind != "not the official number"]


def repack(archive: Path, change: Callable[[str], str | None]) -> None:
    """Renames the members of an archive; None leaves one out."""
    with zipfile.ZipFile(archive) as handle:
        files = {name: handle.read(name) for name in handle.namelist()}
    with zipfile.ZipFile(archive, "w") as handle:
        for name, content in files.items():
            if new := change(name):
                handle.writestr(new, content)


@pytest.fixture
def root(tmp_path: Path, fake_isic2016: Callable[..., Path]) -> Path:
    """The folder of 16 training and 6 test images."""
    return fake_isic2016(tmp_path / "isic2016", {"train": 16, "test": 6})


def test_words_in_one_table_and_numbers_in_the_other_are_labels(dataset: Callable[..., Any], root: Path) -> None:
    data = dataset("isic2016", root)
    assert (root / f"{STEM}_GroundTruth.csv").read_text().splitlines()[:2] == [
        "ISIC_0000000,benign",
        "ISIC_0000001,malignant",
    ]
    assert (root / "ISBI2016_ISIC_Part3_Test_GroundTruth.csv").read_text().splitlines()[1] == "ISIC_0002001,1.0"
    labels = {s.id: s.labels for s in data.samples}
    first = {"ISIC_0000": 0, "ISIC_0002": 2000}
    assert labels == {i: (0,) * ((int(i[5:]) - first[i[:9]]) % 3 == 1) for i in labels} and len(labels) == 22
    assert ids(data)["test"] == [f"ISIC_{n:07d}" for n in range(2000, 2006)]
    assert len(data.splits["val"]) in (3, 4) and len(data.splits["train"]) + len(data.splits["val"]) == 16
    assert all(sample.image.name.endswith(f"{sample.id}.jpg") and sample.masks == () for sample in data.samples)


def test_batches_hold_labels(dataset: Callable[..., Any], root: Path) -> None:
    data = dataset("isic2016", root, batch_size=4)
    labels = {s.id: float(bool(s.labels)) for s in data.samples}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.evaluation_dataloader("test")):
        for batch in loader:
            assert [*batch] == ["image", "target", "id"]
            assert batch["image"].shape == (len(batch["id"]), 3, 16, 16)
            assert batch["target"].shape == (len(batch["id"]), 1) and batch["target"].dtype == torch.float32
            assert batch["target"][:, 0].tolist() == [labels[i] for i in batch["id"]]


def test_without_a_test_table_all_splits_are_dealt(
    dataset: Callable[..., Any], fake_isic2016: Callable[..., Path], tmp_path: Path
) -> None:
    found = ids(dataset("isic2016", fake_isic2016(tmp_path / "isic2016")))
    assert [*found] == ["train", "val", "test"]
    assert sorted(i for members in found.values() for i in members) == [f"ISIC_{n:07d}" for n in range(16)]


def test_archive_and_folder_upper_case_and_a_folder_deeper_are_read_alike(
    dataset: Callable[..., Any], fake_isic2016: Callable[..., Path], root: Path, tmp_path: Path
) -> None:
    data = dataset("isic2016", root)
    expected, digest = ids(data), data.cache.digest
    folder = dataset("isic2016", fake_isic2016(tmp_path / "f/isic2016", {"train": 16, "test": 6}, as_folder=True))
    assert ids(folder) == expected and folder.cache.digest == digest
    for change in (lambda n: n.replace(".jpg", ".JPG"), lambda n: n.replace("ISIC_0", "isic_0"), lambda n: f"a/b/{n}"):
        repack(root / f"{STEM}_Data.zip", change)
        other = dataset("isic2016", root)
        assert ids(other) == expected and other.cache.digest == digest
    (root / "inner").mkdir()
    for path in [*root.iterdir()]:
        if path.is_file():
            path.rename(root / "inner" / path.name.upper())
    assert ids(dataset("isic2016", root)) == expected


def test_official_numbers_are_compared(dataset: Callable[..., Any], root: Path) -> None:
    found = [p for p in dataset("isic2016", root).problems if p.kind == "not the official number"]
    assert [(p.grade, p.text) for p in found] == [
        ("warning", "16 train images, officially 900"),
        ("warning", "6 test images, officially 379"),
    ]


def test_rows_without_images_are_left_out(dataset: Callable[..., Any], root: Path) -> None:
    repack(root / f"{STEM}_Data.zip", lambda name: None if name.endswith(("03.jpg", "07.jpg")) else name)
    data = dataset("isic2016", root)
    assert problems(data) == [("warning", "train: rows without images", ("ISIC_0000003", "ISIC_0000007"))]
    assert len(data.samples) == 20 and len(data.cache.images) == 20
    data.prepare_data()


def test_a_table_of_other_names_is_told_where_nothing_is_left(dataset: Callable[..., Any], root: Path) -> None:
    table = root / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv"
    table.write_text(table.read_text().replace(",", ".jpg,"))
    with pytest.raises(MedvisionError, match=r"(?s)no images for the split 'train'.*train: images without rows \("):
        _ = dataset("isic2016", root).splits


def test_an_image_without_row_is_an_error_until_excluded(
    dataset: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    table = root / f"{STEM}_GroundTruth.csv"
    table.write_text(table.read_text().replace("ISIC_0000003,benign\n", ""))
    with pytest.raises(MedvisionError) as caught:
        _ = dataset("isic2016", root).splits
    words = ["train: images without rows (1)", "ISIC_0000003", "data.exclude=[id,...]", "data.exclude=<text file>"]
    assert [word for word in words if word not in str(caught.value)] == []
    (tmp_path / "out.txt").write_text("\nISIC_0000003\n\n")
    for exclude in (["ISIC_0000003"], str(tmp_path / "out.txt")):
        data = dataset("isic2016", root, exclude=exclude)
        assert problems(data) == [] and len(data.samples) == 21
        data.prepare_data()


@pytest.mark.parametrize("row", ["ISIC_0000003,malignant", "isic_0000003,1.0"])
def test_rows_that_disagree_are_an_error_until_excluded(dataset: Callable[..., Any], root: Path, row: str) -> None:
    table = root / f"{STEM}_GroundTruth.csv"
    text = table.read_text()
    table.write_text(f"{text}ISIC_0000002,benign\n")
    assert problems(dataset("isic2016", root)) == [], "said twice is no conflict"
    table.write_text(f"{text}{row}\n")
    words = rf"conflicting labels \(1\).*{STEM}_GroundTruth\.csv.*: ISIC_0000003\n"
    with pytest.raises(MedvisionError, match=words):
        _ = dataset("isic2016", root).splits
    data = dataset("isic2016", root, exclude=["ISIC_0000003"])
    assert len([i for members in ids(data).values() for i in members]) == 21


def test_two_files_for_one_image_are_an_error_until_excluded(dataset: Callable[..., Any], root: Path) -> None:
    with zipfile.ZipFile(root / f"{STEM}_Data.zip", "a") as handle:
        handle.writestr(f"{STEM}_Data/ISIC_0000004.jpeg", b"x")
    with pytest.raises(MedvisionError, match=r"two files for one image \(1\).*0004\.jpe?g and .*: ISIC_0000004\n"):
        _ = dataset("isic2016", root).splits
    assert len(dataset("isic2016", root, exclude=["ISIC_0000004"]).splits["test"]) == 6


def test_stray_files_are_named_and_litter_is_not(dataset: Callable[..., Any], root: Path) -> None:
    archive = root / f"{STEM}_Data.zip"
    with zipfile.ZipFile(archive, "a") as handle:
        for name in ("ISIC_0000001.gif", "._ISIC_0000001.jpg", ".DS_Store", "Thumbs.db", "LICENSE.txt"):
            handle.writestr(f"{STEM}_Data/{name}", b"x")
        handle.writestr(f"__MACOSX/{STEM}_Data/._ISIC_0000001.jpg", b"x")
    data = dataset("isic2016", root)
    assert problems(data) == [("warning", "stray files", (f"{archive}: {STEM}_Data/ISIC_0000001.gif",))]
    assert len(data.samples) == 22


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{STEM}_Data.zip", f"neither {STEM}_Data.zip nor a folder"),
        (f"{STEM}_GroundTruth.csv", f"no {STEM}_GroundTruth.csv"),
        ("ISBI2016_ISIC_Part3_Test_Data.zip", "neither ISBI2016_ISIC_Part3_Test_Data.zip nor a folder"),
    ],
)
def test_what_is_missing_is_named_with_its_page(dataset: Callable[..., Any], root: Path, name: str, words: str) -> None:
    (root / name).unlink()
    with pytest.raises(MedvisionError) as caught:
        _ = dataset("isic2016", root).splits
    assert words in str(caught.value) and "https://challenge.isic-archive.com/data/#2016" in str(caught.value)


def test_unknown_ids_cannot_be_excluded(dataset: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    with pytest.raises(MedvisionError, match=r"data\.exclude names ISIC_9, which isic2016 does not have"):
        _ = dataset("isic2016", root, exclude=["ISIC_9", "ISIC_0000001"]).splits
    with pytest.raises(MedvisionError, match=r"data\.exclude=.*nothing\.txt cannot be read \(No such file"):
        dataset("isic2016", root, exclude=str(tmp_path / "nothing.txt"))


def test_weights_are_those_of_the_labels(dataset: Callable[..., Any], root: Path) -> None:
    data = dataset("isic2016", root, balanced=True)
    malignant = [bool(s.labels) for s in data.splits["train"]]
    n, positive = len(malignant), sum(malignant)
    assert data.positive_weights() == [pytest.approx((n - positive) / positive)]
    weights = data.sample_weights("train")
    assert weights.sum() == pytest.approx(1) and weights[malignant].sum() == pytest.approx(0.5)
    assert len(data.train_dataloader().sampler) == n


def test_the_real_archive(real_data: Callable[[str], Path], dataset: Callable[..., Any]) -> None:
    data = dataset("isic2016", real_data("isic2016"), image_size=32)
    lone = next(p for p in data.problems if p.kind == "train: rows without images")
    assert len(lone.items) == 49 and lone.grade == "warning"
    assert len(data.samples) == 851
    assert [p.kind for p in data.problems] == ["train: rows without images", "not the official number"]
