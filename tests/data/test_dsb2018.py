import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import train_test_split

from medvision.data import DSB2018
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

Make = Callable[..., DSB2018]


@pytest.fixture
def make(tmp_path: Path, spec: Callable[..., DataSpec]) -> Make:
    def dsb2018(root: Path, **options: Any) -> DSB2018:
        options = {"cache": tmp_path / "cache", "num_workers": 0, **options}
        return DSB2018(spec(name="dsb2018", classes=["nucleus"]), root, **options)

    return dsb2018


def ids(data: DSB2018) -> dict[str, list[str]]:
    return {split: [sample.id for sample in samples] for split, samples in data.splits.items()}


def everything(data: DSB2018) -> list[str]:
    return [i for split in ids(data).values() for i in split]


def contents(root: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(root / "stage1_train.zip") as handle:
        return {name: handle.read(name) for name in handle.namelist()}


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_masks_are_merged_and_images_lose_their_alpha(
    fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path
) -> None:
    data = make(fake_dsb2018(tmp_path / "dsb2018", 20))
    files, seen = contents(data.root), 0
    for samples in data.splits.values():
        for sample in samples:
            image, masks = sample.read(3)
            rgba = pixels(files[f"{sample.id}/images/{sample.id}.png"])
            parts = [pixels(files[name]) for name in files if name.startswith(f"{sample.id}/masks/")]
            assert rgba.shape[2] == 4 and np.array_equal(image, rgba[..., :3])
            assert len(parts) == 3 and np.array_equal(masks[..., 0], np.max(parts, 0) // 255)
            seen += 1
    assert seen == 20


def test_batches_hold_nuclei(fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    data = make(fake_dsb2018(tmp_path / "dsb2018", 20), batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16) and batch["target"].shape == (4, 1, 16, 16)
    nucleus = batch["target"].bool().expand_as(batch["image"])
    assert batch["image"][nucleus].mean() > batch["image"][~nucleus].mean() + 1
    full = next(iter(data.evaluation_dataloader("test")))
    sizes = {sample.id: sample.read(3)[1].shape[:2] for sample in data.splits["test"]}
    assert {i: tuple(mask.shape[1:]) for i, mask in zip(full["id"], full["mask"], strict=True)} == sizes


@pytest.mark.parametrize("images", [13, 20, 25])
def test_splits_hold_every_image_once_and_the_test_split_is_the_published_one(
    fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path, images: int
) -> None:
    data = make(fake_dsb2018(tmp_path / "dsb2018", images))
    found = ids(data)
    everything = sorted({name.split("/")[0] for name in contents(data.root)})
    assert sorted(i for split in found.values() for i in split) == everything and len(everything) == images
    _, test = train_test_split(everything, test_size=0.2, random_state=41)
    assert found["test"] == sorted(test) and data.reported_split == "test"
    rest = images - len(test)
    assert rest // 10 <= len(found["val"]) <= -(-rest // 10)


def test_splits_depend_on_the_ids_only(fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", 20)
    expected = ids(make(root, seed=0))
    assert ids(make(root, seed=1)) == expected
    np.random.seed(5)
    files = contents(root)
    with zipfile.ZipFile(root / "stage1_train.zip", "w") as handle:
        for name in reversed(files):
            handle.writestr(name, files[name])
    assert ids(make(root)) == expected
    assert ids(make(fake_dsb2018(tmp_path / "folder/dsb2018", 20, as_folder=True))) == expected


@pytest.mark.parametrize(
    "change",
    [lambda name: f"stage1_train/{name}", lambda name: f"a/b/{name}", lambda name: name.replace(".png", ".PNG")],
    ids=["deeper", "two deeper", "upper case"],
)
def test_other_packings_are_read_alike(
    fake_dsb2018: Callable[..., Path],
    make: Make,
    pack: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[str], str],
) -> None:
    before = make(fake_dsb2018(tmp_path / "a/dsb2018", 20))
    files = {change(name): content for name, content in contents(before.root).items()}
    for as_folder in (False, True):
        root = tmp_path / f"b{as_folder}/dsb2018"
        pack(root / "stage1_train", files, as_folder)
        after = make(root)
        assert ids(after) == ids(before) and after.cache.digest == before.cache.digest


def test_junk_of_other_systems_is_ignored(fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", 20)
    expected, name = ids(make(root)), next(iter(contents(root))).split("/")[0]
    with zipfile.ZipFile(root / "stage1_train.zip", "a") as handle:
        for junk in (f"__MACOSX/{name}/images/._{name}.png", f"{name}/masks/.DS_Store", f"{name}/masks/._0.png"):
            handle.writestr(junk, b"junk")
    data = make(root)
    assert ids(data) == expected and len(data.cache.images) == 20
    assert [problem.kind for problem in data.problems] == ["not the official number"]


def test_stray_files_are_named_and_left_out(fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", 20)
    expected = ids(make(root))
    with zipfile.ZipFile(root / "stage1_train.zip", "a") as handle:
        handle.writestr("stage1_train_labels.csv", b"ImageId,EncodedPixels\n")
    data = make(root)
    assert ids(data) == expected
    assert [str(problem) for problem in data.problems if problem.kind == "stray files"] == [
        f"stray files (1): They are left out: {root}/stage1_train.zip: stage1_train_labels.csv"
    ]


def test_a_folder_without_image_is_left_out(
    fake_dsb2018: Callable[..., Path], make: Make, pack: Callable[..., Path], tmp_path: Path
) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", 20)
    files = contents(root)
    name = sorted(files)[0].split("/")[0]
    pack(root / "stage1_train", {n: c for n, c in files.items() if not n.startswith(f"{name}/images/")})
    data = make(root)
    assert name not in everything(data) and len(data.samples) == 19
    assert [(p.grade, p.kind, p.items) for p in data.problems] == [
        ("warning", "masks without images", (name,)),
        ("warning", "not the official number", ()),
    ]


def test_a_folder_without_masks_is_named_and_can_be_excluded(
    fake_dsb2018: Callable[..., Path], make: Make, pack: Callable[..., Path], tmp_path: Path
) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", 20)
    files = contents(root)
    name = sorted(files)[0].split("/")[0]
    pack(root / "stage1_train", {n: c for n, c in files.items() if not n.startswith(f"{name}/masks/")})
    with pytest.raises(MedvisionError, match=rf"images without masks \(1\): Fetch .*: {name}\n.*data\.exclude"):
        _ = make(root).splits
    assert len(everything(make(root, exclude=[name]))) == 19


def test_two_images_in_a_folder_are_named(fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", 20)
    name = sorted(contents(root))[0].split("/")[0]
    with zipfile.ZipFile(root / "stage1_train.zip", "a") as handle:
        handle.writestr(f"{name}/images/another.png", b"1")
    words = rf"two images in one folder \(1\): .*{name}/images/{name}\.png and .*"
    words += rf"{name}/images/another\.png: .*: {name}\n"
    with pytest.raises(MedvisionError, match=words):
        _ = make(root).splits
    assert len(everything(make(root, exclude=[name]))) == 19


@pytest.mark.parametrize("images", [0, 1, 9])
def test_too_few_images_are_named(fake_dsb2018: Callable[..., Path], make: Make, tmp_path: Path, images: int) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018", images)
    with pytest.raises(MedvisionError, match=f"dsb2018: {images} images in {root}; expected 670: fetch it again"):
        _ = make(root).splits


def test_a_mask_of_another_size_is_named(
    fake_dsb2018: Callable[..., Path], make: Make, pack: Callable[..., Path], tmp_path: Path, encode: Any
) -> None:
    root = fake_dsb2018(tmp_path / "dsb2018")
    files = contents(root)
    name = next(n for n in files if "/masks/" in n)
    pack(root / "stage1_train", files | {name: encode(np.zeros((3, 5), np.uint8))})
    with pytest.raises(MedvisionError, match=f"{name} is 3x5, its image .* is 24x32"):
        _ = make(root).cache


def test_a_missing_archive_names_page_folder_and_cure(make: Make, tmp_path: Path) -> None:
    with pytest.raises(MedvisionError) as caught:
        _ = make(tmp_path / "dsb2018").splits
    words = ["stage1_train.zip", str(tmp_path / "dsb2018"), "https://www.kaggle.com/c/data-science-bowl-2018/data"]
    words += ["MEDVISION_DATA", "data=phantom"]
    assert [word for word in words if word not in str(caught.value)] == []


def reference(name: str) -> list[str]:
    beside = Path(__file__).resolve().parents[3] / "shared/reference"
    path = Path(os.environ.get("MEDVISION_REFERENCE", beside)) / name
    if not path.is_file():
        pytest.skip(f"no {name}: MEDVISION_REFERENCE is not set")
    return path.read_text().split()


def test_the_real_archive_is_split_as_published(real_data: Callable[[str], Path], make: Make) -> None:
    data = make(real_data("dsb2018"))
    found = ids(data)
    assert {split: len(samples) for split, samples in found.items()} == {"train": 478, "val": 53, "test": 133}
    assert found["test"] == sorted(reference("dsb2018_val.txt"))
    assert sorted(found["train"] + found["val"]) == sorted(reference("dsb2018_train.txt"))


def test_the_real_images_and_masks_are_those_of_the_files(real_data: Callable[[str], Path], make: Make) -> None:
    data = make(real_data("dsb2018"))
    with zipfile.ZipFile(real_data("dsb2018") / "stage1_train.zip") as handle:
        names = handle.namelist()
        modes = Counter()
        for sample in data.splits["val"][::6]:
            image, masks = sample.read(3)
            content = Image.open(io.BytesIO(handle.read(f"{sample.id}/images/{sample.id}.png")))
            modes[content.mode] += 1
            parts = [pixels(handle.read(n)) for n in names if n.startswith(f"{sample.id}/masks/")]
            assert np.array_equal(image, np.asarray(content)[..., :3])
            assert np.array_equal(masks[..., 0], np.max(parts, 0) > 127)
    assert modes["RGBA"] == 9
