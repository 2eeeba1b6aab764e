"""Phantom images: reproducible, laid out as the official archives, and no toy."""

import csv
import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medvision.data.drawing import lesions
from medvision.data.drawing.lesions import Lesion, draw_lesion, write_isic2017

COUNTS = {"train": 6, "val": 3, "test": 4}
NAMES = {"train": "Training", "val": "Validation", "test": "Test_v2"}


def draw(seed: int, size: tuple[int, int] = (120, 160)) -> Lesion:
    return draw_lesion(np.random.default_rng(seed), *size)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def images_and_masks(folder: Path, split: str) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    data = members(folder / f"ISIC-2017_{NAMES[split]}_Data.zip")
    truth = members(folder / f"ISIC-2017_{NAMES[split]}_Part1_GroundTruth.zip")
    photographs = [content for name, content in data.items() if name.endswith(".jpg")]
    return [
        (np.asarray(Image.open(io.BytesIO(photograph))), np.asarray(Image.open(io.BytesIO(mask))))
        for photograph, mask in zip(photographs, truth.values(), strict=True)
    ]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isic2017")
    write_isic2017(folder, 3, COUNTS)
    return folder


def test_the_seed_decides_every_pixel() -> None:
    first, again, other = draw(1), draw(1), draw(2)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image) and not np.array_equal(first.mask, other.mask)


@pytest.mark.parametrize("size", [(24, 32), (97, 61), (192, 256)])
def test_image_and_mask_have_the_size_asked_for(size: tuple[int, int]) -> None:
    for seed in range(10):
        lesion = draw(seed, size)
        assert lesion.image.shape == (*size, 3) and lesion.image.dtype == np.uint8
        assert lesion.mask.shape == size and lesion.mask.dtype == np.bool_


def test_lesions_are_of_all_kinds_and_of_reasonable_area() -> None:
    lesions = [draw(seed, (72, 96)) for seed in range(60)]
    assert {(lesion.malignant, lesion.keratosis) for lesion in lesions} == {(0, 0), (1, 0), (0, 1)}
    areas = [lesion.mask.mean() for lesion in lesions]
    assert min(areas) > 0.03 and max(areas) < 0.5 and 0.1 < np.mean(areas) < 0.35
    borders = [lesion.mask[[0, -1]].any() or lesion.mask[:, [0, -1]].any() for lesion in lesions]
    assert 0 < np.mean(borders) < 0.5


def test_melanomas_are_less_compact_than_nevi() -> None:
    def roughness(lesion: Lesion) -> float:
        outlines, _ = cv2.findContours(lesion.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outline = max(outlines, key=cv2.contourArea)
        return cv2.arcLength(outline, True) ** 2 / cv2.contourArea(outline)

    lesions = [draw(seed) for seed in range(60)]
    melanomas = [roughness(lesion) for lesion in lesions if lesion.malignant]
    others = [roughness(lesion) for lesion in lesions if not lesion.malignant]
    assert np.median(melanomas) > 1.15 * np.median(others)


def test_the_colour_is_half_way_at_the_border_of_the_mask() -> None:
    """Rings of pixels turn from skin to lesion where the mask does, on both sides of it."""
    distances = np.array([-8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8])
    crossings: tuple[list[int], list[int]] = [], []
    for seed in range(60):
        lesion = draw(seed, (192, 256))
        inside, outside = (
            cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5) for part in (lesion.mask, ~lesion.mask)
        )
        nearest = np.round(inside - outside)
        diagonal = np.indices(lesion.mask.shape).sum(0)
        upper = diagonal < diagonal[lesion.mask].mean()
        for found, half in zip(crossings, (upper, ~upper), strict=True):
            pixels = [lesion.image[half & (nearest == distance)] for distance in distances]
            if min(map(len, pixels)) < 50:  # the lesion leaves the image on this side
                continue
            rings = np.array([ring.mean(0) for ring in pixels])
            skin, pigment = rings[:3].mean(0), rings[-3:].mean(0)
            share = (rings - skin) @ (pigment - skin) / np.sum((pigment - skin) ** 2)
            found.append(int(distances[np.argmax(share > 0.5)]))
    for found in crossings:
        assert len(found) > 40
        assert np.abs(np.median(found)) <= 1 and np.mean(np.abs(found) <= 2) > 0.8


@pytest.mark.parametrize("split", COUNTS)
def test_layout_is_the_official_one(archives: Path, split: str) -> None:
    stem = f"ISIC-2017_{NAMES[split]}"
    data, truth = members(archives / f"{stem}_Data.zip"), members(archives / f"{stem}_Part1_GroundTruth.zip")
    labels = rows(archives / f"{stem}_Part3_GroundTruth.csv")
    ids = [row["image_id"] for row in labels]
    assert len(set(ids)) == COUNTS[split]
    assert [name for name in data if name.endswith(".jpg")] == [f"{stem}_Data/{name}.jpg" for name in ids]
    assert list(truth) == [f"{stem}_Part1_GroundTruth/{name}_segmentation.png" for name in ids]
    assert any(name.endswith("_superpixels.png") for name in data)
    people = csv.DictReader(io.StringIO(data[f"{stem}_Data/{stem}_Data_metadata.csv"].decode()))
    assert [row["image_id"] for row in people] == ids
    assert people.fieldnames == ["image_id", "age_approximate", "sex"]
    assert list(labels[0]) == ["image_id", "melanoma", "seborrheic_keratosis"]
    assert {value for row in labels for value in list(row.values())[1:]} <= {"0.0", "1.0"}


@pytest.mark.parametrize("split", COUNTS)
def test_masks_are_grey_and_fit_their_images(archives: Path, split: str) -> None:
    for image, mask in images_and_masks(archives, split):
        assert image.shape == (*mask.shape, 3)
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}


def test_nothing_but_the_nine_files_is_left_and_ids_are_distinct(archives: Path) -> None:
    assert len(list(archives.iterdir())) == 9
    ids = [row["image_id"] for path in archives.glob("*.csv") for row in rows(path)]
    assert len(set(ids)) == sum(COUNTS.values())


def test_writing_again_gives_the_same_bytes(archives: Path, tmp_path: Path) -> None:
    write_isic2017(tmp_path, 3, COUNTS)
    for path in archives.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_an_image_depends_on_neither_the_counts_nor_the_other_splits(archives: Path, tmp_path: Path) -> None:
    write_isic2017(tmp_path, 3, {"val": 2})
    assert len(list(tmp_path.iterdir())) == 3
    pairs = images_and_masks(archives, "val")[:2]
    for before, after in zip(pairs, images_and_masks(tmp_path, "val"), strict=True):
        assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_splits_and_seeds_share_no_image(archives: Path, tmp_path: Path) -> None:
    write_isic2017(tmp_path, 4, COUNTS)
    seen = {
        image.tobytes()
        for folder in (archives, tmp_path)
        for split in COUNTS
        for image, _ in images_and_masks(folder, split)
    }
    assert len(seen) == 2 * sum(COUNTS.values())


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "ISIC-2017_Training_Data.zip"
    kept.write_bytes(b"older")
    calls = []

    def fail_on_the_last(rng: np.random.Generator, height: int, width: int) -> Lesion:
        calls.append(height)
        if len(calls) == sum(COUNTS.values()):
            raise OSError("disk full")
        return draw_lesion(rng, height, width)

    monkeypatch.setattr(lesions, "draw_lesion", fail_on_the_last)
    with pytest.raises(OSError, match="disk full"):
        write_isic2017(tmp_path, 3, COUNTS)
    assert list(tmp_path.iterdir()) == [kept] and kept.read_bytes() == b"older"


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="validation"):
        write_isic2017(tmp_path, 3, {"validation": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [0, 1])
def test_an_otsu_threshold_does_not_solve_the_test_split(tmp_path: Path, seed: int) -> None:
    write_isic2017(tmp_path, seed, {"test": 48})
    pairs = images_and_masks(tmp_path, "test")
    scores = []
    for image, mask in pairs:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        dark = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY_INV | cv2.THRESH_OTSU)[1] > 0
        scores.append([2 * (side & (mask > 0)).sum() / (side.sum() + (mask > 0).sum()) for side in (dark, ~dark)])
    assert 0.2 < np.mean(scores, 0)[0] < 0.75
    assert np.mean(np.max(scores, 1)) < 0.75, "nor does the better side of the threshold"
    assert len({mask.shape for _, mask in pairs}) >= 4
