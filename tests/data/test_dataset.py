from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvision.data import Augment, CachedDataset, Folder
from medvision.data.cache import Cache
from medvision.data.sampling import Draw
from medvision.spec import DataSpec

RNG = np.random.default_rng(0)


@pytest.fixture
def data(
    tmp_path: Path, pack: Callable[..., Path], encode: Callable[..., bytes], spec: Callable[..., DataSpec]
) -> Callable[[], Folder]:
    """Nine images of a user's folder; called again, the module of another process, which finds what is there."""
    files = {}
    for number in range(9):
        files[f"images/{number}.jpg"] = encode(RNG.integers(0, 256, (20, 24, 3), np.uint8), "JPEG")
        files[f"masks/{number}.png"] = encode(np.uint8(255) * (RNG.random((20, 24)) < 0.4))
    root = pack(tmp_path / "mine", files, as_folder=True)
    facts = spec(mean=None, std=None)
    augment = Augment(rotate=20, scale=0.1, brightness=0.1, hue=4, saturation=0.1, noise=0.1)
    return lambda: Folder(facts, root, tmp_path / "cache", augment=augment, batch_size=2, num_workers=0)


def epoch(module: Folder) -> list[bytes]:
    batches = [*module.train_dataloader(), *module.evaluation_dataloader("val")]
    tensors = [tensor for batch in batches for tensor in (batch["image"], batch["target"], *batch.get("mask", []))]
    return [tensor.numpy().tobytes() for tensor in tensors] + [str(batch["id"]).encode() for batch in batches]


def test_a_cache_that_is_built_and_one_that_is_found_give_the_same_bits(
    data: Callable[[], Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = data()
    first = epoch(built)
    monkeypatch.setattr("medvision.data.cache._write", None)
    found = data()
    assert epoch(found) == first == epoch(built) and len(first) > 10
    assert [a.tobytes() for a in found.normalisation] == [a.tobytes() for a in built.normalisation]


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_values_are_those_of_the_formula_in_float32(spec: Callable[..., DataSpec], channels: int) -> None:
    mean, std = RNG.random(channels), RNG.random(channels) / 3 + 0.1
    cache: Any = None
    dataset = CachedDataset(cache, np.arange(0), [], spec(in_channels=channels), (mean, std))
    image = RNG.integers(0, 256, (30, 40, channels), np.uint8)
    scale, offset = (1 / (255 * std)).astype(np.float32), (mean / std).astype(np.float32)
    expected = np.ascontiguousarray((image * scale - offset).transpose(2, 0, 1))
    result = dataset.normalise(image)
    assert result.dtype == np.float32 and result.flags.c_contiguous and result.tobytes() == expected.tobytes()


def test_an_item_can_be_changed_without_changing_the_data(data: Callable[[], Folder]) -> None:
    dataset = data().dataset("train", full=True)
    first = dataset[0]
    kept = {key: value.clone() for key, value in first.items() if isinstance(value, torch.Tensor)}
    for key in kept:
        first[key].zero_()
    again = dataset[0]
    assert all(torch.equal(again[key], value) for key, value in kept.items())


def test_positions_beyond_the_end_are_refused(data: Callable[[], Folder]) -> None:
    dataset = data().dataset("train", train=True)
    assert torch.equal(dataset[Draw(-1, 5)]["image"], dataset[Draw(len(dataset) - 1, 5)]["image"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_the_cache_travels_as_a_path(data: Callable[[], Folder]) -> None:
    cache = data().cache
    assert cache.__reduce__() == (Cache.open, (cache.folder,))
