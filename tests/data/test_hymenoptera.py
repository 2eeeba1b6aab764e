import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvision.errors import MedvisionError

Fake = Callable[..., Path]


def ids(data: Any) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def add(root: Path, **files: bytes) -> None:
    with zipfile.ZipFile(root / "hymenoptera_data.zip", "a") as handle:
        for name, content in files.items():
            handle.writestr(f"hymenoptera_data/{name}", content)


def repack(root: Path, change: Callable[[str], str]) -> None:
    archive = root / "hymenoptera_data.zip"
    with zipfile.ZipFile(archive) as handle:
        files = {name: handle.read(name) for name in handle.namelist()}
    with zipfile.ZipFile(archive, "w") as handle:
        for name, content in files.items():
            handle.writestr(change(name), content)


def test_images_are_labelled_by_their_folder(
    dataset: Callable[..., Any], fake_hymenoptera: Fake, tmp_path: Path
) -> None:
    data = dataset("hymenoptera", fake_hymenoptera(tmp_path / "hymenoptera"), batch_size=4)
    assert ids(data) == {
        "train": [*(f"ants/{n:05d}_a" for n in range(6)), *(f"bees/{n:05d}_b" for n in range(6))],
        "val": [*(f"ants/{n:05d}_a" for n in range(100, 104)), *(f"bees/{n:05d}_b" for n in range(100, 104))],
    }
    assert all(s.labels == ((0,) if s.id.startswith("ants") else (1,)) for s in data.samples)
    assert data.reported_split == "val" and data.spec.kind == "multiclass"
    for batch in (*data.train_dataloader(), *data.evaluation_dataloader("val")):
        assert batch["target"].dtype == torch.int64 and batch["target"].shape == (4,)
        assert batch["target"].tolist() == [int(i.startswith("bees")) for i in batch["id"]]
    assert [p.text for p in data.problems] == ["12 train images, officially 244", "8 val images, officially 153"]
    assert dataset("hymenoptera", data.root, folds=5).reported_split == "test"


def test_other_packings_are_read_alike(dataset: Callable[..., Any], fake_hymenoptera: Fake, tmp_path: Path) -> None:
    root = fake_hymenoptera(tmp_path / "hymenoptera")
    data = dataset("hymenoptera", root)
    expected, digest = ids(data), data.cache.digest
    folder = dataset("hymenoptera", fake_hymenoptera(tmp_path / "f/hymenoptera", as_folder=True))
    assert ids(folder) == expected and folder.cache.digest == digest
    for change in (lambda n: n.replace(".jpg", ".JPEG"), lambda n: f"deeper/{n}", lambda n: n.split("/", 2)[-1]):
        repack(root, change)
        other = dataset("hymenoptera", root)
        assert ids(other) == expected and other.cache.digest == digest


def test_stray_and_hidden_files_are_no_images(
    dataset: Callable[..., Any], fake_hymenoptera: Fake, tmp_path: Path
) -> None:
    root = fake_hymenoptera(tmp_path / "hymenoptera")
    expected = ids(dataset("hymenoptera", root))
    add(root, **{"train/ants/imageNotFound.gif": b"x", "train/ants/._00001_a.jpg": b"x", "train/.DS_Store": b"x"})
    repack(root, lambda name: f"__MACOSX/{name}" if "/._" in name else name)
    data = dataset("hymenoptera", root)
    assert ids(data) == expected
    stray = f"{root}/hymenoptera_data.zip: hymenoptera_data/train/ants/imageNotFound.gif"
    assert [p.items for p in data.problems if p.kind == "stray files"] == [(stray,)]
    data.prepare_data()


def test_images_beside_the_folders_of_classes_are_stray(
    dataset: Callable[..., Any], fake_hymenoptera: Fake, tmp_path: Path
) -> None:
    root = fake_hymenoptera(tmp_path / "hymenoptera")
    expected = ids(dataset("hymenoptera", root))
    add(root, **{"train/preview.jpg": b"x", "preview.jpg": b"x"})
    data = dataset("hymenoptera", root)
    assert ids(data) == expected
    assert [len(p.items) for p in data.problems if p.kind == "stray files"] == [2]


def test_other_classes_are_named_with_the_overrides(
    dataset: Callable[..., Any], fake_hymenoptera: Fake, tmp_path: Path
) -> None:
    root = fake_hymenoptera(tmp_path / "hymenoptera")
    add(root, **{"train/wasps/1.jpg": b"x"})
    with pytest.raises(MedvisionError) as caught:
        _ = dataset("hymenoptera", root).splits
    words = [
        "['ants', 'bees', 'wasps']",
        "['ants', 'bees']",
        "data.spec.classes=[ants,bees,wasps] data.spec.num_outputs=3",
    ]
    assert [word for word in words if word not in str(caught.value)] == []


def test_an_image_in_both_splits_is_named(dataset: Callable[..., Any], fake_hymenoptera: Fake, tmp_path: Path) -> None:
    root = fake_hymenoptera(tmp_path / "hymenoptera")
    add(root, **{"val/ants/00003_a.jpg": b"x"})
    with pytest.raises(MedvisionError, match="in two places: ants/00003_a"):
        _ = dataset("hymenoptera", root).splits


def test_the_real_archive(real_data: Callable[[str], Path], dataset: Callable[..., Any]) -> None:
    data = dataset("hymenoptera", real_data("hymenoptera"), image_size=32)
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 244, "val": 153}
    assert [item.rpartition("/")[2] for p in data.problems for item in p.items] == ["imageNotFound.gif"]
    assert "ants/formica" in ids(data)["train"]
    assert data.cache.images.shape == (397, 32, 32, 3)
    assert data.presence.sum(0).tolist() == [193, 204]
