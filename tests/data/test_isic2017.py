import io
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvision.data import ISIC2017
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

Make = Callable[..., ISIC2017]


@pytest.fixture
def make(tmp_path: Path, spec: Callable[..., DataSpec]) -> Make:
    def isic2017(root: Path, **options: Any) -> ISIC2017:
        options = {"cache": tmp_path / "cache", "num_workers": 0, **options}
        return ISIC2017(spec(name="isic2017"), root, **options)

    return isic2017


def ids(data: ISIC2017) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def rewrite(archive: Path, change: Callable[[str], str | None]) -> None:
    """Renames the members of an archive; None leaves one out."""
    with zipfile.ZipFile(archive) as handle:
        files = {name: handle.read(name) for name in handle.namelist()}
    with zipfile.ZipFile(archive, "w") as handle:
        for name, content in files.items():
            if new := change(name):
                handle.writestr(new, content)


@pytest.mark.parametrize("as_folder", [False, True], ids=["zip", "folder"])
def test_splits_are_those_of_the_archives(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path, as_folder: bool
) -> None:
    data = make(fake_isic2017(tmp_path / "isic2017", {"train": 6, "val": 3, "test": 4}, as_folder))
    assert ids(data) == {
        "train": [f"ISIC_{number:07d}" for number in range(6)],
        "val": [f"ISIC_{number:07d}" for number in range(1000, 1003)],
        "test": [f"ISIC_{number:07d}" for number in range(2000, 2004)],
    }
    assert data.reported_split == "test"
    for samples in data.splits.values():
        for sample in samples:
            assert sample.image.name.endswith(f"{sample.id}.jpg")
            assert [[m.name.split("/")[-1] for m in ms] for ms in sample.masks] == [[f"{sample.id}_segmentation.png"]]


def test_batches_hold_lesions(fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    data = make(fake_isic2017(tmp_path / "isic2017"), batch_size=6)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (6, 3, 16, 16) and batch["target"].shape == (6, 1, 16, 16)
    lesion = batch["target"].bool().expand_as(batch["image"])
    assert batch["image"][lesion].mean() < batch["image"][~lesion].mean() - 1, "lesions are darker than skin"
    for item in data.evaluation_dataloader("test").dataset:  # type: ignore[attr-defined]
        with zipfile.ZipFile(tmp_path / "isic2017/ISIC-2017_Test_v2_Part1_GroundTruth.zip") as handle:
            name = f"ISIC-2017_Test_v2_Part1_GroundTruth/{item['id']}_segmentation.png"
            expected = np.asarray(Image.open(io.BytesIO(handle.read(name)))) > 0
        assert np.array_equal(item["mask"][0].numpy(), expected)


def test_archive_and_folder_give_the_same_data(fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    zipped = make(fake_isic2017(tmp_path / "a/isic2017"))
    folder = make(fake_isic2017(tmp_path / "b/isic2017", as_folder=True))
    assert zipped.cache.digest == folder.cache.digest
    other = make(fake_isic2017(tmp_path / "c/isic2017", seed=1))
    assert other.cache.digest != zipped.cache.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"one/folder/deeper/{name}",
        lambda name: name.split("/")[-1],
        lambda name: name.replace(".jpg", ".JPG").replace(".png", ".PNG"),
        lambda name: name.replace(".jpg", ".JpEg"),
    ],
    ids=["deeper", "flat", "upper case", "jpeg"],
)
def test_other_packings_are_read_alike(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path, change: Callable[[str], str]
) -> None:
    root = fake_isic2017(tmp_path / "isic2017")
    before = make(root)
    expected, digest = ids(before), before.cache.digest
    for archive in root.iterdir():
        rewrite(archive, change)
    after = make(root)
    assert ids(after) == expected and after.cache.digest == digest


def test_an_extracted_folder_inside_its_own_folder_is_found(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    root = fake_isic2017(tmp_path / "isic2017", as_folder=True)
    expected = ids(make(root))
    for folder in [*root.iterdir()]:
        folder.rename(tmp_path / folder.name)
        folder.mkdir()
        (tmp_path / folder.name).rename(folder / folder.name)
    assert ids(make(root)) == expected


def test_junk_of_other_systems_is_ignored(fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    root = fake_isic2017(tmp_path / "isic2017")
    expected = ids(make(root))
    for part, stem in (("Data", "ISIC_0000000.jpg"), ("Part1_GroundTruth", "ISIC_0000000_segmentation.png")):
        name = f"ISIC-2017_Training_{part}"
        with zipfile.ZipFile(root / f"{name}.zip", "a") as handle:
            for junk in (f"__MACOSX/{name}/._{stem}", f"{name}/.DS_Store", f"{name}/Thumbs.db", f"{name}/._{stem}"):
                handle.writestr(junk, b"junk")
    data = make(root)
    assert ids(data) == expected
    assert len(data.cache.images) == 12


def test_without_test_masks_results_are_of_the_validation_split(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make(fake_isic2017(tmp_path / "isic2017", {"train": 4, "val": 2}))
    with caplog.at_level(logging.WARNING):
        assert [*data.splits] == ["train", "val"] and data.reported_split == "val"
    warning = next(message for message in caplog.messages if "Test_v2" in message)
    assert "results are reported on the validation split" in warning
    assert ISIC2017.page in warning and str(tmp_path / "isic2017") in warning


def test_test_images_without_masks_are_left_alone(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    root = fake_isic2017(tmp_path / "isic2017")
    (root / "ISIC-2017_Test_v2_Part1_GroundTruth.zip").unlink()
    assert [*make(root).splits] == ["train", "val"]


def test_short_counts_are_warnings(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _ = make(fake_isic2017(tmp_path / "isic2017")).splits
    assert caplog.messages == [
        "isic2017: not the official number: 6 train images, officially 2000",
        "isic2017: not the official number: 3 val images, officially 150",
        "isic2017: not the official number: 3 test images, officially 600",
    ]


@pytest.mark.parametrize(
    "stem", ["Training_Data", "Training_Part1_GroundTruth", "Validation_Data", "Validation_Part1_GroundTruth"]
)
@pytest.mark.parametrize("as_folder", [False, True], ids=["zip", "folder"])
def test_a_missing_archive_names_page_folder_and_cure(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path, stem: str, as_folder: bool
) -> None:
    root = fake_isic2017(tmp_path / "isic2017", as_folder=as_folder)
    if as_folder:
        shutil.rmtree(root / f"ISIC-2017_{stem}")
    else:
        (root / f"ISIC-2017_{stem}.zip").unlink()
    with pytest.raises(MedvisionError) as caught:
        _ = make(root).splits
    words = [f"ISIC-2017_{stem}.zip", str(root), "https://challenge.isic-archive.com/data/#2017"]
    words += ["MEDVISION_DATA", "holds isic2017/", "data=phantom"]
    assert [word for word in words if word not in str(caught.value)] == []


def test_no_folder_at_all_is_a_missing_archive(make: Make, tmp_path: Path) -> None:
    with pytest.raises(MedvisionError, match=r"neither ISIC-2017_Training_Data\.zip.*MEDVISION_DATA"):
        _ = make(tmp_path / "nowhere/isic2017").splits


def test_a_mask_without_image_is_left_out(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fake_isic2017(tmp_path / "isic2017")
    rewrite(root / "ISIC-2017_Training_Data.zip", lambda name: None if "ISIC_0000003" in name else name)
    with caplog.at_level(logging.WARNING):
        assert ids(make(root))["train"] == [f"ISIC_000000{number}" for number in (0, 1, 2, 4, 5)]
    assert caplog.messages[:2] == [
        "isic2017: train: masks without images (1): They are left out; fetch the images again: ISIC_0000003",
        "isic2017: not the official number: 5 train images, officially 2000",
    ]


def test_an_image_without_mask_is_named_and_can_be_excluded(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    root = fake_isic2017(tmp_path / "isic2017")
    lone = "ISIC_0001001"
    rewrite(root / "ISIC-2017_Validation_Part1_GroundTruth.zip", lambda name: None if lone in name else name)
    with pytest.raises(MedvisionError) as caught:
        _ = make(root).splits
    assert str(caught.value).splitlines() == [
        "isic2017 has errors:",
        f"  val: images without masks (1): Fetch the masks again, or exclude the images: {lone}",
        "Mend them, or leave out what is listed with data.exclude=[id,...] or data.exclude=<text file>; "
        "python -m medvision.prepare data=isic2017 writes such a file",
    ]
    assert ids(make(root, exclude=[lone]))["val"] == ["ISIC_0001000", "ISIC_0001002"]


def test_an_image_in_two_splits_is_named(fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    root = fake_isic2017(tmp_path / "isic2017")
    for stem in ("Data", "Part1_GroundTruth"):
        rewrite(root / f"ISIC-2017_Validation_{stem}.zip", lambda name: name.replace("ISIC_0001001", "ISIC_0000002"))
    with pytest.raises(MedvisionError, match="in two places: ISIC_0000002"):
        _ = make(root).splits


def test_a_broken_archive_and_a_broken_image_are_named(
    fake_isic2017: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    root = fake_isic2017(tmp_path / "isic2017", as_folder=True)
    image = root / "ISIC-2017_Validation_Data/ISIC_0001000.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(MedvisionError, match=r"ISIC-2017_Validation_Data: ISIC_0001000\.jpg cannot be decoded"):
        _ = make(root).cache
    archive = fake_isic2017(tmp_path / "zip/isic2017") / "ISIC-2017_Training_Data.zip"
    archive.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(MedvisionError, match=f"{archive} is not a whole zip archive"):
        _ = make(archive.parent).splits


def test_the_real_archives(real_data: Callable[[str], Path], make: Make) -> None:
    data = make(real_data("isic2017"))
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 2000, "val": 150}
    for sample in [*data.splits["train"][::100], *data.splits["val"][::50]]:
        image, masks = sample.read(3)
        assert image.shape == (256, 256, 3) and masks.shape == (256, 256, 1)
        assert 0 < masks.mean() < 1
    sizes = {Image.open(io.BytesIO(s.image.read())).size for samples in data.splits.values() for s in samples}
    assert sizes == {(256, 256)}
