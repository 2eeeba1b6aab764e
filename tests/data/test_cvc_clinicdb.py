import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvision.data.cvc_clinicdb import LAST_FRAMES
from medvision.errors import MedvisionError

Fake = Callable[..., Path]


def ids(data: Any) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def problems(data: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(p.grade, p.kind, p.items) for p in data.problems if p.kind != "not the official number"]


def repack(root: Path, change: Callable[[str], str | None]) -> None:
    """Renames the members of the archive; None leaves one out."""
    archive = root / "CVC-ClinicDB.zip"
    with zipfile.ZipFile(archive) as handle:
        files = {name: handle.read(name) for name in handle.namelist()}
    with zipfile.ZipFile(archive, "w") as handle:
        for name, content in files.items():
            if new := change(name):
                handle.writestr(new, content)


def test_frames_have_their_masks_and_sequences(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path
) -> None:
    root = fake_cvc_clinicdb(tmp_path / "cvc_clinicdb")
    data = dataset("cvc_clinicdb", root, batch_size=2)
    frames = [1, 2, 26, 27, 51, 52, 68, 69, 79, 80, 104, 105, 127, 128]
    assert {s.id: s.group for s in data.samples} == {str(n): f"sequence {1 + k // 2}" for k, n in enumerate(frames)}
    with zipfile.ZipFile(root / "CVC-ClinicDB.zip") as handle:
        for sample in data.samples:
            image, masks = sample.read(3)
            assert sample.image.name == f"CVC-ClinicDB/Original/{sample.id}.png"
            expected = np.asarray(Image.open(io.BytesIO(handle.read(f"CVC-ClinicDB/Ground Truth/{sample.id}.png"))))
            assert expected.shape == (24, 32, 3) and np.array_equal(masks[..., 0], expected[..., 0] > 127)
            assert image.shape == (24, 32, 3)
    assert (data.cache.facts["between"] > 0).all(), "grey edges are counted"
    assert next(iter(data.train_dataloader()))["target"].shape == (2, 1, 16, 16)
    assert [(p.grade, p.kind, p.text) for p in data.problems] == [
        ("warning", "not the official number", "14 train images, officially 612")
    ]


@pytest.mark.parametrize("fold", range(5))
def test_no_sequence_is_in_two_splits(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path, fold: int
) -> None:
    data = dataset("cvc_clinicdb", fake_cvc_clinicdb(tmp_path / "cvc_clinicdb"), folds=5, fold=fold)
    groups = {split: {s.group for s in samples} for split, samples in data.splits.items()}
    assert [*groups] == ["train", "val", "test"] and sum(map(len, groups.values())) == 7
    assert len(set.union(*groups.values())) == 7


def test_the_ends_of_all_sequences(dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path) -> None:
    frames = sorted({1, *LAST_FRAMES, *(n + 1 for n in LAST_FRAMES[:-1])})
    data = dataset("cvc_clinicdb", fake_cvc_clinicdb(tmp_path / "cvc_clinicdb", frames))
    starts = [1, *(n + 1 for n in LAST_FRAMES[:-1])]
    expected = {
        str(n): f"sequence {k}" for k, ends in enumerate(zip(starts, LAST_FRAMES, strict=True), 1) for n in ends
    }
    assert {s.id: s.group for s in data.samples} == expected and len(LAST_FRAMES) == 29


@pytest.mark.parametrize("as_folder", [False, True], ids=["zip", "folder"])
def test_tif_and_png_are_read_alike(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path, as_folder: bool
) -> None:
    png = dataset("cvc_clinicdb", fake_cvc_clinicdb(tmp_path / "a/cvc_clinicdb"))
    tif = dataset("cvc_clinicdb", fake_cvc_clinicdb(tmp_path / "b/cvc_clinicdb", kind="tif", as_folder=as_folder))
    assert ids(tif) == ids(png) and tif.cache.digest == png.cache.digest


def test_an_archive_with_all_frames_in_both_kinds_is_read_once(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path
) -> None:
    root = fake_cvc_clinicdb(tmp_path / "cvc_clinicdb")
    before = dataset("cvc_clinicdb", root)
    expected, digest = ids(before), before.cache.digest
    tif = fake_cvc_clinicdb(tmp_path / "tif/cvc_clinicdb", kind="tif")
    repack(root, lambda name: name.replace("CVC-ClinicDB/", "CVC-ClinicDB/PNG/"))
    with zipfile.ZipFile(tif / "CVC-ClinicDB.zip") as source, zipfile.ZipFile(root / "CVC-ClinicDB.zip", "a") as target:
        for name in source.namelist():
            target.writestr(name.replace("CVC-ClinicDB/", "CVC-ClinicDB/TIF/"), source.read(name))
        target.writestr("CVC-ClinicDB/metadata.csv", "frame_id,sequence_id\n")
    data = dataset("cvc_clinicdb", root)
    assert ids(data) == expected and data.cache.digest == digest and problems(data) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".png", ".PNG"),
        lambda name: name.replace("Original", "ORIGINAL").replace("Ground Truth", "ground truth"),
        lambda name: f"one/deeper/{name}",
        lambda name: name.removeprefix("CVC-ClinicDB/"),
        lambda name: re.sub(r"/(\d+)\.png", lambda m: f"/{int(m[1]):03d}.png", name),
    ],
    ids=["endings", "folders", "deeper", "flat", "zeros"],
)
def test_other_packings_are_read_alike(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path, change: Callable[[str], str]
) -> None:
    root = fake_cvc_clinicdb(tmp_path / "cvc_clinicdb")
    before = dataset("cvc_clinicdb", root)
    expected, digest = ids(before), before.cache.digest
    repack(root, change)
    after = dataset("cvc_clinicdb", root)
    assert ids(after) == expected and after.cache.digest == digest


def test_a_frame_without_mask_and_a_mask_without_frame(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path
) -> None:
    root = fake_cvc_clinicdb(tmp_path / "cvc_clinicdb")
    repack(root, lambda name: None if name.endswith(("Original/27.png", "Truth/52.png")) else name)
    with pytest.raises(MedvisionError, match=r"train: images without masks \(1\).*: 52\n.*data\.exclude="):
        _ = dataset("cvc_clinicdb", root).splits
    data = dataset("cvc_clinicdb", root, exclude=["52"])
    assert problems(data) == [("warning", "train: masks without images", ("27",))]
    assert sorted(i for members in ids(data).values() for i in members) == sorted(
        map(str, (1, 2, 26, 51, 68, 69, 79, 80, 104, 105, 127, 128))
    )


def test_frames_of_no_sequence_are_an_error_until_excluded(
    dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path
) -> None:
    root = fake_cvc_clinicdb(tmp_path / "cvc_clinicdb", [1, 26, 51, 68, 79, 104, 612, 613])
    with pytest.raises(MedvisionError, match=r"frames beyond 612 \(1\).*: 613\n"):
        _ = dataset("cvc_clinicdb", root).splits
    assert len(dataset("cvc_clinicdb", root, exclude=["613"]).samples) == 7


def test_stray_files_are_named(dataset: Callable[..., Any], fake_cvc_clinicdb: Fake, tmp_path: Path) -> None:
    root = fake_cvc_clinicdb(tmp_path / "cvc_clinicdb")
    with zipfile.ZipFile(root / "CVC-ClinicDB.zip", "a") as handle:
        for name in ("Original/._1.png", "Original/Thumbs.db", "README.txt", "metadata.csv", "Original/cover.png"):
            handle.writestr(f"CVC-ClinicDB/{name}", b"x")
    data = dataset("cvc_clinicdb", root)
    assert problems(data) == [
        ("warning", "stray files", (f"{root}/CVC-ClinicDB.zip: CVC-ClinicDB/Original/cover.png",))
    ]


def test_the_real_frames(real_data: Callable[[str], Path], dataset: Callable[..., Any]) -> None:
    data = dataset("cvc_clinicdb", real_data("cvc_clinicdb"), image_size=32)
    assert len(data.samples) == 504 and {len(samples) > 50 for samples in data.splits.values()} == {True}
    groups = {split: {s.group for s in samples} for split, samples in data.splits.items()}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 25
    neighbours = {(int(data.samples[a].id), int(data.samples[b].id)) for a, b, _ in data.cache.pairs.tolist()}
    assert sum(abs(a - b) == 1 for a, b in neighbours) > 50
    assert [p.kind for p in data.findings if "groups" in p.kind] == []
