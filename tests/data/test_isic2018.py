import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medvision.errors import MedvisionError

CLASSES = ("pigment_network", "negative_network", "streaks", "milia_like_cyst", "globules")


def ids(data: Any) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def repack(archive: Path, change: Callable[[str], str | None]) -> None:
    """Renames the members of an archive; None leaves one out."""
    with zipfile.ZipFile(archive) as handle:
        files = {name: handle.read(name) for name in handle.namelist()}
    with zipfile.ZipFile(archive, "w") as handle:
        for name, content in files.items():
            if new := change(name):
                handle.writestr(new, content)


def test_lesion_masks_are_those_of_the_images(
    dataset: Callable[..., Any], fake_isic2018_lesion: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset("isic2018_lesion", fake_isic2018_lesion(tmp_path / "isic2018"))
    assert [*data.splits] == ["train", "val", "test"] and len(data.samples) == 16
    for sample in data.samples:
        assert sample.image.name.endswith(f"Training_Input/{sample.id}.jpg")
        assert [[m.name.split("/")[-1] for m in ms] for ms in sample.masks] == [[f"{sample.id}_segmentation.png"]]
    assert [(p.kind, p.text) for p in data.problems] == [
        ("not the official number", "16 train images, officially 2594")
    ]


def test_official_validation_and_test_masks_are_used_where_they_are(
    dataset: Callable[..., Any], fake_isic2018_lesion: Callable[..., Path], tmp_path: Path
) -> None:
    root = fake_isic2018_lesion(tmp_path / "isic2018", {"train": 8, "val": 3, "test": 4})
    assert {split: len(members) for split, members in ids(dataset("isic2018_lesion", root)).items()} == {
        "train": 8,
        "val": 3,
        "test": 4,
    }
    (root / "ISIC2018_Task1_Validation_GroundTruth.zip").unlink()
    found = ids(dataset("isic2018_lesion", root))
    assert found["test"] == [f"ISIC_{n:07d}" for n in range(2000, 2004)]
    assert sorted(found["train"] + found["val"]) == [f"ISIC_{n:07d}" for n in range(8)] and found["val"]


def test_attributes_are_channels_in_the_order_of_the_classes(
    dataset: Callable[..., Any], fake_isic2018_attributes: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset("isic2018_attributes", fake_isic2018_attributes(tmp_path / "isic2018"), batch_size=4)
    assert data.spec.classes == CLASSES
    assert data.presence.tolist() == [[(n + k) % (k + 2) == 0 for k in range(5)] for n in range(16)]
    for sample in data.samples[:4]:
        names = [m.name.split("/")[-1] for (m,) in sample.masks]
        assert names == [f"{sample.id}_attribute_{name}.png" for name in CLASSES]
        masks = sample.read(3)[1]
        for k, (member,) in enumerate(sample.masks):
            assert np.array_equal(masks[..., k] > 0, np.asarray(Image.open(io.BytesIO(member.read()))) > 0)
    batch = next(iter(data.train_dataloader()))
    assert batch["target"].shape == (4, 5, 16, 16) and batch["target"].dtype == torch.float32
    shown = {s.id: [bool(v) for v in row] for s, row in zip(data.samples, data.presence, strict=True)}
    assert [batch["target"][n].amax((1, 2)).bool().tolist() for n in range(4)] == [shown[i] for i in batch["id"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".png", ".PNG"),
        lambda name: name.replace("_attribute_", "_Attribute_").replace("globules", "GLOBULES"),
        lambda name: f"one/deeper/{name}",
        lambda name: name.split("/")[-1],
    ],
    ids=["endings", "names", "deeper", "flat"],
)
def test_other_spellings_are_read_alike(
    dataset: Callable[..., Any], fake_isic2018_attributes: Callable[..., Path], tmp_path: Path, change: Any
) -> None:
    root = fake_isic2018_attributes(tmp_path / "isic2018")
    before = dataset("isic2018_attributes", root)
    expected, digest = ids(before), before.cache.digest
    folder = dataset("isic2018_attributes", fake_isic2018_attributes(tmp_path / "f/isic2018", as_folder=True))
    assert ids(folder) == expected and folder.cache.digest == digest
    repack(root / "ISIC2018_Task2_Training_GroundTruth_v3.zip", change)
    after = dataset("isic2018_attributes", root)
    assert ids(after) == expected and after.cache.digest == digest


def test_the_truth_may_lack_its_version(
    dataset: Callable[..., Any], fake_isic2018_attributes: Callable[..., Path], tmp_path: Path
) -> None:
    root = fake_isic2018_attributes(tmp_path / "isic2018")
    truth = root / "ISIC2018_Task2_Training_GroundTruth_v3.zip"
    expected = ids(dataset("isic2018_attributes", root))
    truth.rename(root / "ISIC2018_Task2_Training_GroundTruth.zip")
    assert ids(dataset("isic2018_attributes", root)) == expected
    (root / "ISIC2018_Task2_Training_GroundTruth.zip").unlink()
    with pytest.raises(MedvisionError, match=r"neither ISIC2018_Task2_Training_GroundTruth_v3\.zip nor .*#2018"):
        _ = dataset("isic2018_attributes", root).splits


def test_one_attribute_missing_is_an_error_until_excluded(
    dataset: Callable[..., Any], fake_isic2018_attributes: Callable[..., Path], tmp_path: Path
) -> None:
    root = fake_isic2018_attributes(tmp_path / "isic2018")
    archive = root / "ISIC2018_Task2_Training_GroundTruth_v3.zip"
    repack(archive, lambda name: None if name.endswith("05_attribute_streaks.png") else name)
    with pytest.raises(MedvisionError, match=r"train: images without masks \(1\).*: ISIC_0000005\n.*data\.exclude="):
        _ = dataset("isic2018_attributes", root).splits
    data = dataset("isic2018_attributes", root, exclude=["ISIC_0000005"])
    data.prepare_data()
    assert len(data.samples) == 15


def test_a_word_that_is_no_attribute_is_not_read(
    dataset: Callable[..., Any], fake_isic2018_attributes: Callable[..., Path], tmp_path: Path
) -> None:
    root = fake_isic2018_attributes(tmp_path / "isic2018")
    archive = root / "ISIC2018_Task2_Training_GroundTruth_v3.zip"
    with zipfile.ZipFile(archive, "a") as handle:
        handle.writestr("ISIC2018_Task2_Training_GroundTruth_v3/notes.txt", b"x")
    data = dataset("isic2018_attributes", root)
    stray = [p for p in data.problems if p.kind == "stray files"]
    assert {item for p in stray for item in p.items} == {f"{archive}: ISIC2018_Task2_Training_GroundTruth_v3/notes.txt"}


def test_the_real_attributes(real_data: Callable[[str], Path], dataset: Callable[..., Any]) -> None:
    data = dataset("isic2018_attributes", real_data("isic2018"), image_size=32)
    assert data.presence.shape == (2065, 5)
    assert data.presence.sum(0).tolist() == [1211, 151, 91, 560, 483]
    sizes = {split: len(samples) for split, samples in data.splits.items()}
    assert sum(sizes.values()) == 2065 and abs(sizes["test"] - 413) <= 10 and abs(sizes["val"] - 413) <= 10
    for k in range(5):
        shown = [int(data.presence[data.rows(split), k].sum()) for split in ("val", "test")]
        assert all(abs(n - data.presence[:, k].sum() / 5) <= 0.15 * data.presence[:, k].sum() / 5 + 3 for n in shown)
