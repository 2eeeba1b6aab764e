import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from medvision.data import sampling
from medvision.data.augment import Augment
from medvision.data.base import ImageDataModule, Splits, collate
from medvision.data.cache import Sample
from medvision.data.sampling import Draw
from medvision.data.source import Member
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

SPLITS = {"train": 9, "val": 4, "test": 3}
MEAN, STD = [0.7, 0.6, 0.5], [0.15, 0.2, 0.25]


class Tiny(ImageDataModule):
    """Files `<split>/<id>.png` and, for two classes, `<split>/<id>_0.png` and `_1.png`."""

    page = "https://example.org/tiny"

    def index(self) -> Splits:
        found: dict[str, list[Sample]] = {}
        members = {member.name: member for member in self.source("tiny").members()}
        for name, member in members.items():
            if "_" not in name:
                stem = name.removesuffix(".png")
                split, i = stem.split("/")
                masks = tuple((members[f"{stem}_{k}.png"],) for k in range(len(self.spec.classes)))
                found.setdefault(split, []).append(Sample(i, member, masks))
        return {split: found.get(split, [])[::-1] for split in ("train", "val", "test")}


def draw(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(number)
    height, width = 16 * (1 + number % 2), 16 * (1 + number % 3)
    return rng.integers(0, 256, (height, width, 3), np.uint8), np.uint8(255) * (rng.random((2, height, width)) < 0.4)


@pytest.fixture
def files(encode: Callable[..., bytes]) -> dict[str, bytes]:
    names = [f"{split}/{split}{number}" for split, count in SPLITS.items() for number in range(count)]
    made = {}
    for number, name in enumerate(names):
        image, masks = draw(number)
        made |= {f"{name}.png": encode(image), f"{name}_0.png": encode(masks[0]), f"{name}_1.png": encode(masks[1])}
    return made


@pytest.fixture
def data(
    tmp_path: Path, files: dict[str, bytes], pack: Callable[..., Path], spec: Callable[..., DataSpec]
) -> Callable[..., Tiny]:
    """`data(batch_size=..., ...)`: the module of the files as they are now."""

    def make(kind: str = "multilabel", facts: Mapping[str, Any] | None = None, **options: Any) -> Tiny:
        pack(tmp_path / "root/tiny", files)
        options = {"root": tmp_path / "root", "cache": tmp_path / "cache", "num_workers": 0, **options}
        return Tiny(spec(kind, **(facts or {})), **options)

    return make


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize(("kind", "classes"), [("binary", 1), ("multilabel", 2)])
def test_batches_keep_the_contract(data: Callable[..., Tiny], kind: str, classes: int) -> None:
    module = data(kind, batch_size=4, augment=Augment(rotate=20, noise=0.1))
    for loader, sizes in ((module.train_dataloader(), [4, 4]), (module.val_dataloader(), [4])):
        batches = list(loader)
        assert [len(batch["id"]) for batch in batches] == sizes
        for batch in batches:
            assert [*batch] == ["image", "target", "id"]
            n = len(batch["id"])
            assert batch["image"].shape == (n, 3, 16, 16) and batch["image"].dtype == torch.float32
            assert batch["target"].shape == (n, classes, 16, 16) and batch["target"].dtype == torch.float32
            assert set(batch["target"].unique().tolist()) == {0, 1}
            assert isinstance(batch["id"], list) and all(type(i) is str for i in batch["id"])
            assert batch["image"].is_contiguous() and batch["target"].is_contiguous()


def test_numbers_are_those_of_the_files(data: Callable[..., Tiny]) -> None:
    """Images of the network's size are not resized: every number is known."""
    dataset = data().dataset("train")
    assert len(dataset) == 9
    for position in (0, 6):
        image, masks = draw(position)
        item = dataset[position]
        assert item["id"] == f"train{position}"
        assert image.shape == (16, 16, 3)
        expected = (image / 255 - MEAN) / STD
        assert np.abs(item["image"].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5
        assert np.array_equal(item["target"].numpy(), masks / 255)


def test_resized_images_are_normalised_after_averaging(data: Callable[..., Tiny]) -> None:
    item = data().dataset("train")[3]
    image, _ = draw(3)
    assert image.shape == (32, 16, 3)
    expected = (image.reshape(16, 2, 16, 3).mean(1) / 255 - MEAN) / STD
    assert np.abs(item["image"].numpy().transpose(1, 2, 0) - expected).max() < 1.01 / 255 / min(STD)


def test_without_numbers_images_are_normalised_by_the_training_split(data: Callable[..., Tiny]) -> None:
    module = data(facts={"mean": None, "std": None})
    pixels = module.cache.images[module.rows("train")].astype(np.float64) / 255
    mean, std = module.normalisation
    assert np.abs(mean - pixels.mean((0, 1, 2))).max() < 1e-12 and np.abs(std - pixels.std((0, 1, 2))).max() < 1e-9
    images = torch.stack([item["image"] for item in module.dataset("train")]).double()
    assert images.mean((0, 2, 3)).abs().max() < 1e-4 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    image = module.dataset("val")[0]["image"].numpy().transpose(1, 2, 0)
    expected = (module.cache.images[module.rows("val")[0]] / 255 - mean) / std
    assert np.abs(image - expected).max() < 1e-4


def test_weights_of_pixels_and_of_draws(data: Callable[..., Tiny], files: dict[str, bytes], encode: Any) -> None:
    white, black = (encode(np.full((16, 16), value, np.uint8)) for value in (255, 0))
    for number in range(9):
        files[f"train/train{number}.png"] = encode(draw(0)[0] // (number + 1))
        files[f"train/train{number}_0.png"] = white if number < 6 else black
        files[f"train/train{number}_1.png"] = white if number in (0, 7) else black
    module = data(balanced=True)
    assert module.positive_weights() == [pytest.approx(3 / 6), pytest.approx(7 / 2)]
    weights = module.sample_weights("train")
    assert weights.shape == (9,)
    strata = [[0, 7], [1, 2, 3, 4, 5], [6, 8]]
    assert [weights[rows].sum() for rows in strata] == [pytest.approx(1 / 3)] * 3
    with pytest.raises(MedvisionError, match=r"class_weights=auto is of exclusive classes, those of tiny are each"):
        module.class_weights()
    files.update({name: black for name in files if name.startswith("train") and name.endswith("_1.png")})
    with pytest.raises(MedvisionError, match="tiny: square does not occur in train: no weight for it"):
        data().positive_weights()


def test_what_is_excluded_is_in_no_split(data: Callable[..., Tiny], tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("train3\r\n\n test1 \n")
    for exclude in (["train3", "test1"], str(tmp_path / "out.txt")):
        module = data(exclude=exclude)
        assert {split: len(samples) for split, samples in module.splits.items()} == {"train": 8, "val": 4, "test": 2}
        assert {"train3", "test1"}.isdisjoint(s.id for s in module.samples) and len(module.cache.images) == 14
    with pytest.raises(MedvisionError, match=r"data\.exclude names train99, which tiny does not have"):
        _ = data(exclude=["train99"]).splits
    with pytest.raises(MedvisionError, match="no images for the split 'test'"):
        _ = data(exclude=["test0", "test1", "test2"]).splits


def test_grey_images_have_one_channel(data: Callable[..., Tiny]) -> None:
    module = data(facts={"in_channels": 1})
    item = module.dataset("train")[0]
    grey = np.asarray(Image.fromarray(draw(0)[0]).convert("L"))
    assert item["image"].shape == (1, 16, 16)
    assert np.abs(item["image"][0].numpy() - (grey / 255 - 0.7) / 0.15).max() < 1e-5


@pytest.mark.parametrize(("size", "expected"), [(None, (16, 16)), (8, (8, 8)), ([8, 24], (8, 24))])
def test_image_size_is_height_and_width(data: Callable[..., Tiny], size: Any, expected: tuple[int, int]) -> None:
    module = data(image_size=size, batch_size=2, augment=Augment(rotate=20, elastic=5))
    assert module.spec.image_size == expected
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 3, *expected) and batch["target"].shape == (2, 2, *expected)


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_has_masks_at_the_size_of_the_files(data: Callable[..., Tiny], split: str) -> None:
    module = data(batch_size=2)
    items = {i: (mask, target) for batch in module.evaluation_dataloader(split) for i, mask, target in rows(batch)}
    assert [*items] == [f"{split}{number}" for number in range(SPLITS[split])]
    first = list(SPLITS.values())[: list(SPLITS).index(split)]
    for number, (mask, target) in enumerate(items.values()):
        _, expected = draw(sum(first) + number)
        assert mask.dtype == torch.uint8 and np.array_equal(mask.numpy(), expected // 255)
        assert target.shape == (2, 16, 16)


def rows(batch: dict[str, Any]) -> Any:
    assert [*batch] == ["image", "target", "id", "mask"]
    return zip(batch["id"], batch["mask"], batch["target"], strict=True)


def test_validation_and_evaluation_are_neither_augmented_nor_cut(data: Callable[..., Tiny]) -> None:
    plain, augmented = data(batch_size=3), data(batch_size=3, augment=Augment(rotate=90, noise=0.3))
    assert equal(list(plain.val_dataloader()), list(augmented.val_dataloader()))
    assert equal(list(plain.evaluation_dataloader("train")), list(augmented.evaluation_dataloader("train")))
    assert not equal(list(plain.train_dataloader()), list(augmented.train_dataloader()))
    assert [i for batch in plain.val_dataloader() for i in batch["id"]] == [f"val{number}" for number in range(4)]


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4]), (9, [9]), (16, [9]), (8, [8]), (3, [3, 3, 3])])
def test_a_smaller_last_batch_is_left_out_unless_it_is_the_only_one(
    data: Callable[..., Tiny], batch_size: int, sizes: list[int]
) -> None:
    assert [len(batch["id"]) for batch in data(batch_size=batch_size).train_dataloader()] == sizes


class Clock:
    current_epoch = 0


def test_epochs_and_seeds_draw_differently_and_repeatably(data: Callable[..., Tiny]) -> None:
    def epoch(number: int, **options: Any) -> list[Any]:
        module, clock = data(batch_size=4, augment=Augment(brightness=0.3), **options), Clock()
        clock.current_epoch = number
        module.trainer = clock  # type: ignore[assignment]
        return list(module.train_dataloader())

    assert equal(epoch(0), epoch(0)) and equal(epoch(5), epoch(5))
    assert not equal(epoch(0), epoch(1)) and not equal(epoch(0), epoch(0, seed=1))


@pytest.mark.parametrize("split", ["train", "val", "evaluation"])
def test_workers_change_nothing(data: Callable[..., Tiny], split: str) -> None:
    def batches(workers: int) -> list[Any]:
        module = data(batch_size=2, num_workers=workers, augment=Augment(rotate=30, elastic=5, noise=0.2))
        clock, found = Clock(), []
        module.trainer = clock  # type: ignore[assignment]
        loader = {"train": module.train_dataloader, "val": module.val_dataloader}.get(
            split, lambda: module.evaluation_dataloader("test")
        )()
        for clock.current_epoch in range(2):
            found += list(loader)
        return found

    alone = batches(0)
    assert len(alone) >= 2 and equal(alone, batches(2))


def test_splits_are_sorted_and_indexed_once(data: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    module = data()
    for name, samples in module.splits.items():
        assert [sample.id for sample in samples] == [f"{name}{number}" for number in range(SPLITS[name])]
    monkeypatch.setattr(Tiny, "index", lambda _: pytest.fail("indexed again"))
    assert [*module.splits] == ["train", "val", "test"]
    assert module.reported_split == "test"


def test_the_fingerprint_depends_on_neither_file_order_nor_packing(
    data: Callable[..., Tiny], files: dict[str, bytes], tmp_path: Path, pack: Callable[..., Path]
) -> None:
    before = data().cache.digest
    turned = dict(reversed(files.items()))
    files.clear()
    files.update(turned)
    assert data(cache=tmp_path / "other").cache.digest == before
    pack(tmp_path / "folder/tiny", files, as_folder=True)
    assert data(root=tmp_path / "folder").cache.digest == before
    files["val/val0_0.png"] = files["val/val0_1.png"]
    assert data().cache.digest != before


def test_preparing_builds_the_cache_below_the_name_of_the_data(data: Callable[..., Tiny], tmp_path: Path) -> None:
    module = data()
    assert not (tmp_path / "cache").exists()
    module.prepare_data()
    assert len(list((tmp_path / "cache/tiny").glob("16x16-*"))) == 1
    assert module.cache is module.cache


def test_a_read_only_root_is_enough(
    data: Callable[..., Tiny], tmp_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    module, root = data(batch_size=4), tmp_path / "root"
    root.chmod(0o555)
    with unprivileged():
        with pytest.raises(PermissionError):
            (root / "proof").touch()
        batches = [*module.train_dataloader(), *module.evaluation_dataloader("test")]
    assert len(batches) == 3
    assert [path.name for path in root.iterdir()] == ["tiny.zip"]


def test_positions_stay_within_the_split(data: Callable[..., Tiny]) -> None:
    dataset = data().dataset("val")
    assert equal(dataset[-1], dataset[3]) and dataset[-1]["id"] == "val3"
    assert [item["id"] for item in dataset] == [f"val{number}" for number in range(4)]
    for position in (4, -5):
        with pytest.raises(IndexError):
            dataset[position]


def test_the_draw_decides_the_augmentation(data: Callable[..., Tiny]) -> None:
    dataset = data(augment=Augment(rotate=90, noise=0.2)).dataset("train", train=True)
    first, again, other = dataset[Draw(2, 5)], dataset[Draw(2, 5)], dataset[Draw(2, 6)]
    assert equal(first, again) and not torch.equal(first["image"], other["image"]) and first["id"] == other["id"]


def test_several_processes_evaluate_every_image_once(
    data: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = data(batch_size=2), []
    for rank in range(3):
        monkeypatch.setattr(sampling, "_rank_and_world", lambda rank=rank: (rank, 3))
        seen += [i for batch in module.val_dataloader() for i in batch["id"]]
    assert sorted(seen) == [f"val{number}" for number in range(4)]


def test_an_unknown_split_is_named(data: Callable[..., Tiny]) -> None:
    module = data()
    for ask in (module.dataset, module.evaluation_dataloader):
        with pytest.raises(MedvisionError, match="tiny has no split 'tests' here; it has train, val, test"):
            ask("tests")


def test_an_empty_split_is_named(data: Callable[..., Tiny], files: dict[str, bytes], tmp_path: Path) -> None:
    for name in [*files]:
        if name.startswith("val"):
            del files[name]
    with pytest.raises(MedvisionError, match=f"tiny: no images for the split 'val' in {tmp_path / 'root'}"):
        _ = data().splits


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_in_two_places_is_named(data: Callable[..., Tiny], files: dict[str, bytes], split: str) -> None:
    files |= {name.replace("test/test1", f"{split}/test1"): files[name] for name in files if "test/test1" in name}
    with pytest.raises(MedvisionError, match="tiny: in two places: test1; remove one of each"):
        _ = data().splits


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_that_is_none_is_named(data: Callable[..., Tiny], size: int) -> None:
    with pytest.raises(MedvisionError, match=rf"data\.batch_size is {size}; expected 1 or more"):
        data(batch_size=size)


def test_missing_data_names_page_folder_and_cure(data: Callable[..., Tiny], tmp_path: Path) -> None:
    for root in (tmp_path / "empty/tiny", tmp_path / "root"):
        root.mkdir(parents=True, exist_ok=True)
    module = data(root=tmp_path / "empty/tiny")
    with pytest.raises(MedvisionError) as caught:
        _ = module.splits
    words = ["neither tiny.zip nor a folder tiny", str(tmp_path / "empty/tiny"), "https://example.org/tiny"]
    words += ["MEDVISION_DATA", "holds tiny/", "data=phantom"]
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_file_that_breaks_after_caching_is_named(data: Callable[..., Tiny], files: dict[str, bytes]) -> None:
    module = data(batch_size=2)
    module.prepare_data()
    content = io.BytesIO(files["val/val0_0.png"]).getvalue()
    files["val/val0_0.png"] = content[: len(content) // 2]
    data()
    with pytest.raises(MedvisionError, match=r"tiny\.zip: val/val0_0\.png cannot be"):
        list(module.evaluation_dataloader("val"))


def test_collate_stacks_tensors_and_keeps_lists() -> None:
    items = [
        {"image": torch.full((1, 2, 2), n), "target": torch.zeros(1, 2, 2), "id": str(n), "mask": torch.ones(1, n, 2)}
        for n in (1, 2)
    ]
    batch = collate(items)
    assert batch["image"].shape == (2, 1, 2, 2) and batch["target"].shape == (2, 1, 2, 2)
    assert batch["id"] == ["1", "2"] and [mask.shape for mask in batch["mask"]] == [(1, 1, 2), (1, 2, 2)]


def test_a_sample_names_its_file(data: Callable[..., Tiny], tmp_path: Path) -> None:
    member = data().splits["val"][0].image
    assert isinstance(member, Member) and str(member) == f"{tmp_path / 'root/tiny.zip'}: val/val0.png"
