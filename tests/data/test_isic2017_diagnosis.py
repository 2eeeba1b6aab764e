from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvision.errors import MedvisionError


@pytest.fixture
def root(tmp_path: Path, fake_isic2017_diagnosis: Callable[..., Path]) -> Path:
    """The folder of 12, 6 and 6 images."""
    return fake_isic2017_diagnosis(tmp_path / "isic2017")


def test_labels_are_those_of_the_tables(dataset: Callable[..., Any], root: Path) -> None:
    data = dataset("isic2017_diagnosis", root, batch_size=6)
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 12, "val": 6, "test": 6}
    assert data.spec.classes == ("melanoma", "seborrheic_keratosis")
    for samples in data.splits.values():
        assert [s.labels for s in samples] == [((), (0,), (1,))[int(s.id[-4:]) % 1000 % 3] for s in samples]
    batch = next(iter(data.val_dataloader()))
    assert [*batch] == ["image", "target", "id"] and batch["target"].dtype == torch.float32
    assert batch["target"].tolist() == [[0, 0], [1, 0], [0, 1]] * 2
    assert data.positive_weights() == pytest.approx([2, 2])


def test_lesion_masks_and_diagnoses_are_of_the_same_images(dataset: Callable[..., Any], root: Path) -> None:
    labels, masks = dataset("isic2017_diagnosis", root), dataset("isic2017", root)
    assert [s.id for s in labels.samples] == [s.id for s in masks.samples]
    assert (labels.cache.images == masks.cache.images).all() and labels.cache.digest != masks.cache.digest


def test_a_header_alone_and_a_missing_table_are_named(dataset: Callable[..., Any], root: Path) -> None:
    table = root / "ISIC-2017_Training_Part3_GroundTruth.csv"
    table.write_text("image_id,melanoma,seborrheic_keratosis\n")
    with pytest.raises(MedvisionError, match=r"Training_Part3_GroundTruth\.csv has no rows of an id and 2 of"):
        _ = dataset("isic2017_diagnosis", root).splits
    table.unlink()
    with pytest.raises(MedvisionError, match=r"no ISIC-2017_Training_Part3_GroundTruth\.csv in .*#2017"):
        _ = dataset("isic2017_diagnosis", root).splits


def test_a_short_row_is_named(dataset: Callable[..., Any], root: Path) -> None:
    table = root / "ISIC-2017_Validation_Part3_GroundTruth.csv"
    table.write_text(table.read_text().replace("ISIC_0001003,0.0,0.0", "ISIC_0001003,0.0"))
    with pytest.raises(MedvisionError, match=r"Validation_Part3_GroundTruth\.csv, row 5: \['ISIC_0001003', '0\.0'\]"):
        _ = dataset("isic2017_diagnosis", root).splits


def test_without_the_test_table_results_are_of_the_validation_split(dataset: Callable[..., Any], root: Path) -> None:
    (root / "ISIC-2017_Test_v2_Part3_GroundTruth.csv").unlink()
    data = dataset("isic2017_diagnosis", root)
    assert [*data.splits] == ["train", "val"] and data.reported_split == "val"
    warning = next(p for p in data.problems if p.kind == "no test split")
    assert warning.grade == "warning" and "ISIC-2017_Test_v2_Part3_GroundTruth" in warning.text
    assert [*dataset("isic2017_diagnosis", root, folds=3).splits] == ["train", "val", "test"]


def test_the_real_tables(real_data: Callable[[str], Path], dataset: Callable[..., Any]) -> None:
    data = dataset("isic2017_diagnosis", real_data("isic2017"), image_size=32)
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 2000, "val": 150}
    shown = {split: data.presence[data.rows(split)].sum(0).tolist() for split in ("train", "val")}
    assert shown == {"train": [374, 254], "val": [30, 42]}
    assert not data.presence.all(1).any(), "never both"
    assert {p.kind for p in data.problems} == {"no test split"}
