"""Phantoms of the other layouts: official names, reproducible, and beyond the simplest baselines."""

import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvision.data.alike import CLOSE, perceptual_hash
from medvision.data.drawing import attributes, insects, melanoma, nuclei, polyps
from medvision.data.drawing.attributes import ATTRIBUTES, draw_attributes, write_isic2018_attributes
from medvision.data.drawing.insects import draw_photograph, write_hymenoptera
from medvision.data.drawing.melanoma import write_isic2016
from medvision.data.drawing.nuclei import TYPES, draw_field, write_dsb2018
from medvision.data.drawing.polyps import draw_sequence, write_cvc_clinicdb

Write = Callable[[Path, int, int], None]
#: For each layout, a writer of a few images, by their number, and what it draws each with.
WRITERS: dict[str, tuple[Write, Any, str]] = {
    "dsb2018": (write_dsb2018, nuclei, "draw_field"),
    "cvc": (lambda folder, seed, count: write_cvc_clinicdb(folder, seed, count, 2), polyps, "draw_sequence"),
    "isic2018": (write_isic2018_attributes, attributes, "draw_attributes"),
    "isic2016": (lambda folder, seed, count: write_isic2016(folder, seed, count, 2), melanoma, "draw_lesion"),
    "insects": (lambda folder, seed, count: write_hymenoptera(folder, seed, count, 2), insects, "_draw"),
}


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def decoded(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)))


def photographs(files: dict[str, bytes]) -> set[bytes]:
    """What is no mask; masks may be equal by chance."""
    masks = re.compile("/masks/|/Ground Truth/|GroundTruth")
    return {content for name, content in files.items() if not masks.search(name)}


def otsu_dice(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> list[float]:
    """Dice of the bright and of the dark side of the threshold."""
    bright = cv2.threshold(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1] > 0
    return [2 * (side & mask).sum() / (side.sum() + mask.sum()) for side in (bright, ~bright)]


def colours(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.concatenate([image.mean((0, 1)), image.std((0, 1))])


@pytest.mark.parametrize("name", WRITERS)
def test_the_seed_decides_every_byte_and_a_smaller_set_is_the_beginning_of_a_larger(name: str, tmp_path: Path) -> None:
    write, _, _ = WRITERS[name]
    for folder, seed, count in (("first", 3, 4), ("again", 3, 4), ("fewer", 3, 2), ("other", 4, 4)):
        write(tmp_path / folder, seed, count)
    for path in (tmp_path / "first").iterdir():
        first, again = (hashlib.sha256((tmp_path / f / path.name).read_bytes()) for f in ("first", "again"))
        assert first.digest() == again.digest(), path.name
        if path.suffix == ".zip":
            whole, fewer, other = (members(tmp_path / folder / path.name) for folder in ("first", "fewer", "other"))
            assert fewer.items() <= whole.items()
            assert not photographs(whole) & photographs(other)


@pytest.mark.parametrize("name", WRITERS)
def test_a_failure_leaves_the_folder_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, module, function = WRITERS[name]
    write(tmp_path, 0, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    draw, calls = getattr(module, function), []

    def fail_on_the_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) >= 3:
            raise OSError("disk full")
        return draw(*args)

    monkeypatch.setattr(module, function, fail_on_the_third)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 1, 4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nuclei_are_laid_out_as_stage_1(tmp_path: Path) -> None:
    write_dsb2018(tmp_path, 0, 5)
    files = members(tmp_path / "stage1_train.zip")
    ids = {name.split("/")[0] for name in files}
    assert len(ids) == 5 and all(re.fullmatch("[0-9a-f]{64}", i) for i in ids)
    for i in ids:
        image = decoded(files[f"{i}/images/{i}.png"])
        assert image.shape[2] == 4 and (image[..., 3] == 255).all()
        masks = [decoded(content) for name, content in files.items() if name.startswith(f"{i}/masks/")]
        assert all(mask.shape == image.shape[:2] and {*np.unique(mask)} == {0, 255} for mask in masks)
        assert np.sum([mask > 0 for mask in masks], axis=0).max() == 1, "nuclei do not overlap"
    assert len(files) == 5 + sum(
        re.fullmatch("[0-9a-f]{64}/masks/[0-9a-f]{64}[.]png", name) is not None for name in files
    )


def test_a_threshold_does_not_find_the_nuclei() -> None:
    fields = [draw_field(np.random.default_rng([1, index])) for index in range(80)]
    kinds = Counter(field.kind for field in fields)
    assert {*kinds} == {*TYPES} and 0.6 < kinds["fluorescence"] / len(fields) < 0.9
    scores = np.array([otsu_dice(field.image, field.nuclei > 0) for field in fields])
    assert scores.mean(0).max() < 0.70 and scores.max(1).mean() < 0.8
    assert len({field.nuclei.shape for field in fields}) >= 4
    touching = [(cv2.connectedComponents((f.nuclei > 0).astype(np.uint8))[0] - 1) / f.nuclei.max() for f in fields]
    assert np.mean(touching) < 0.95, "some nuclei touch"


def test_frames_bear_the_official_numbers(tmp_path: Path) -> None:
    write_cvc_clinicdb(tmp_path, 0, 5, 12)
    files = members(tmp_path / "CVC-ClinicDB.zip")
    numbers = [*range(1, 13), *range(26, 38), *range(51, 63), *range(68, 79), *range(79, 91)]
    assert [*files] == [f"CVC-ClinicDB/{kind}/{n}.png" for n in numbers for kind in ("Original", "Ground Truth")]
    for number in numbers:
        image, mask = (decoded(files[f"CVC-ClinicDB/{kind}/{number}.png"]) for kind in ("Original", "Ground Truth"))
        assert image.shape == mask.shape == (144, 192, 3)
        assert (mask == mask[..., :1]).all() and 2 < len(np.unique(mask)) <= 9 and mask.min() == 0
        assert 0.005 < (mask > 127).mean() < 0.4
    with pytest.raises(ValueError, match="30 sequences"):
        write_cvc_clinicdb(tmp_path, 0, 30, 1)


def test_neighbouring_frames_are_alike_and_sequences_are_not() -> None:
    sequences = [[frame.image for frame in draw_sequence(0, number, 4)] for number in range(12)]
    hashes = [[perceptual_hash(image) for image in sequence] for sequence in sequences]

    def bits(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> int:
        return int(np.bitwise_count(first ^ second).sum())

    neighbours = [bits(*pair) for sequence in hashes for pair in pairwise(sequence)]
    others = [bits(a[0], b[0]) for index, a in enumerate(hashes) for b in hashes[:index]]
    assert np.quantile(neighbours, 0.9) <= CLOSE < min(others)
    assert len({image.tobytes() for sequence in sequences for image in sequence}) == 48


def test_a_threshold_does_not_find_the_polyps() -> None:
    frames = [frame for number in range(29) for frame in draw_sequence(1, number, 1)]
    scores = np.array([otsu_dice(frame.image, frame.mask > 127) for frame in frames])
    assert scores.max(1).mean() < 0.4


def test_attributes_are_laid_out_as_isic2018(tmp_path: Path) -> None:
    write_isic2018_attributes(tmp_path, 0, 6)
    images = members(tmp_path / "ISIC2018_Task1-2_Training_Input.zip")
    lesions = members(tmp_path / "ISIC2018_Task1_Training_GroundTruth.zip")
    structures = members(tmp_path / "ISIC2018_Task2_Training_GroundTruth_v3.zip")
    ids = [f"ISIC_{number}" for number in range(3_000_000, 3_000_006)]
    assert [*images] == [f"ISIC2018_Task1-2_Training_Input/{i}.jpg" for i in ids]
    assert [*lesions] == [f"ISIC2018_Task1_Training_GroundTruth/{i}_segmentation.png" for i in ids]
    folder = "ISIC2018_Task2_Training_GroundTruth_v3"
    assert [*structures] == [f"{folder}/{i}_attribute_{name}.png" for i in ids for name in sorted(ATTRIBUTES)]
    for i in ids:
        image = decoded(images[f"ISIC2018_Task1-2_Training_Input/{i}.jpg"])
        masks = [decoded(content) for name, content in (lesions | structures).items() if i in name]
        assert len(masks) == 6 and all(mask.shape == image.shape[:2] for mask in masks)
        assert all({*np.unique(mask)} <= {0, 255} for mask in masks) and masks[0].any()


def test_attributes_are_as_rare_as_they_are_and_not_the_whole_lesion() -> None:
    drawn = [draw_attributes(np.random.default_rng([5, index]), 96, 128) for index in range(150)]
    for name, chance in ATTRIBUTES.items():
        found = [d for d in drawn if d.masks[name].any()]
        assert abs(len(found) / len(drawn) - chance) < 4 * np.sqrt(chance * (1 - chance) / len(drawn))
        whole = [2 * (d.masks[name] & d.lesion.mask).sum() / (d.masks[name].sum() + d.lesion.mask.sum()) for d in found]
        assert found and 0 < np.mean(whole) < 0.8
    assert any(not any(mask.any() for mask in d.masks.values()) for d in drawn)


def test_diagnoses_are_laid_out_as_isbi2016(tmp_path: Path) -> None:
    write_isic2016(tmp_path / "both", 0, 5, 3)
    write_isic2016(tmp_path / "one", 0, 5, 0)
    stem = "ISBI2016_ISIC_Part3"
    names = {f"{stem}_{split}_{kind}" for split in ("Training", "Test") for kind in ("Data.zip", "GroundTruth.csv")}
    assert {path.name for path in (tmp_path / "both").iterdir()} == names
    assert {path.name for path in (tmp_path / "one").iterdir()} == {name for name in names if "Training" in name}
    for split, count, words in (("Training", 5, {"benign", "malignant"}), ("Test", 3, {"0.0", "1.0"})):
        table = (tmp_path / "both" / f"{stem}_{split}_GroundTruth.csv").read_text().splitlines()
        rows = [line.split(",") for line in table]
        assert len(rows) == count and {label for _, label in rows} <= words
        files = members(tmp_path / "both" / f"{stem}_{split}_Data.zip")
        assert [*files] == [f"{stem}_{split}_Data/{i}.jpg" for i, _ in rows]


def test_a_fifth_is_malignant_and_colour_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(melanoma, "SIZES", ((72, 96), (96, 96)))
    write_isic2016(tmp_path, 0, 240, 0)
    labels = (tmp_path / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv").read_text().split()
    malignant = np.array([label.endswith("malignant") for label in labels])
    assert 0.12 < malignant.mean() < 0.27
    files = members(tmp_path / "ISBI2016_ISIC_Part3_Training_Data.zip")
    features = np.stack([colours(decoded(content)) for content in files.values()])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    assert cross_val_score(model, features, malignant, scoring="roc_auc", cv=5).mean() < 0.7


def test_insects_are_laid_out_by_class(tmp_path: Path) -> None:
    write_hymenoptera(tmp_path, 0, 6, 3)
    files = members(tmp_path / "hymenoptera_data.zip")
    counts = Counter(name.rsplit("/", 1)[0] for name in files)
    root = "hymenoptera_data"
    assert counts == {f"{root}/train/ants": 3, f"{root}/train/bees": 3, f"{root}/val/ants": 2, f"{root}/val/bees": 1}
    assert all(re.search(r"/\d+\.jpg$", name) for name in files)
    assert len({name.rsplit("/", 1)[1] for name in files}) == 9
    assert {decoded(content).shape[2] for content in files.values()} == {3}


def test_mean_colour_does_not_tell_ants_from_bees() -> None:
    images = [draw_photograph(np.random.default_rng([2, index]), index % 2, 84, 112) for index in range(240)]
    model = make_pipeline(StandardScaler(), LogisticRegression())
    features, labels = np.stack([colours(image) for image in images]), np.arange(240) % 2
    assert cross_val_score(model, features, labels, cv=10).mean() < 0.70
