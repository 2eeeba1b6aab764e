"""What must stay flat as data grows: the work of listing, the memory of a worker process, the shares of processes."""

import gc
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing  # teaches ForkingPickler to share tensors

from medvision.data import Folder
from medvision.data.base import _settle_in
from medvision.data.cache import Sample
from medvision.data.dataset import CachedDataset, Packed
from medvision.data.sampling import Draw, EpochSampler, ShardSampler
from medvision.data.source import Source
from medvision.spec import DataSpec

COUNT = 20_000
WORLD = 2


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]) -> Path:
    """`COUNT` images with masks of 4x4."""
    path = tmp_path_factory.mktemp("scale") / "data.zip"
    pixels = encode(np.eye(4, dtype=np.uint8) * 255)
    with zipfile.ZipFile(path, "w") as handle:
        for number in range(COUNT):
            handle.writestr(f"images/img_{number:07d}.png", pixels)
            handle.writestr(f"masks/img_{number:07d}_mask.png", pixels)
    return path


@pytest.fixture
def samples(archive: Path, spec: Callable[..., DataSpec], tmp_path: Path) -> list[Sample]:
    return Folder(spec(), archive, tmp_path).samples


def evaluation(samples: list[Sample], spec: DataSpec) -> CachedDataset:
    cache: Any = SimpleNamespace(
        images=np.broadcast_to(np.uint8(9), (len(samples), 4, 4, 3)),
        masks=np.broadcast_to(np.uint8(1), (len(samples), 4, 4, 1)),
        facts={"size": np.broadcast_to(np.int32(4), (len(samples), 2))},
    )
    statistics = np.full(3, 0.5), np.full(3, 0.2)
    return CachedDataset(cache, np.arange(len(samples)), samples, spec, statistics, full=True)


def test_a_large_archive_is_indexed(samples: list[Sample]) -> None:
    assert len(samples) == COUNT
    assert [sample.id for sample in samples[:2]] == ["img_0000000", "img_0000001"]
    assert all(sample.masks[0][0].name == f"masks/{sample.id}_mask.png" for sample in samples)


def test_each_file_of_a_folder_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        (tmp_path / f"{number}.png").touch()
    looks, look = [0], os.stat

    def counted(*args: Any, **options: Any) -> os.stat_result:
        looks[0] += 1
        return look(*args, **options)

    monkeypatch.setattr(os, "stat", counted)
    assert len(Source(tmp_path).names) == 300
    assert looks[0] < 310


def test_the_memory_of_a_list_of_files_is_bounded(archive: Path) -> None:
    gc.collect()
    tracemalloc.start()
    found = Source(archive)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.names) == 2 * COUNT
    assert held / (2 * COUNT) < 700, "bytes for each file"


def test_a_source_and_a_member_travel_light(archive: Path) -> None:
    found = Source(archive)
    assert len(pickle.dumps(found)) < 1000
    assert len(pickle.dumps(found.members()[0])) < 1000
    assert pickle.loads(pickle.dumps(found)).members() == found.members()


def test_reading_a_member_lists_nothing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = Source(archive).members()
    monkeypatch.setattr(zipfile, "ZipFile", None)
    monkeypatch.setattr(os, "walk", None)
    assert members[0].read() == members[-1].read() != b""


def test_an_evaluation_data_set_travels_light(samples: list[Sample], spec: Callable[..., DataSpec]) -> None:
    dataset = evaluation(samples, spec())
    dataset.cache = None  # type: ignore[assignment]
    assert len(ForkingPickler.dumps(dataset)) < 10_000, "whatever the number of images"
    assert dataset.samples.buffer.nbytes / COUNT < 400


def test_items_of_an_evaluation_data_set(samples: list[Sample], spec: Callable[..., DataSpec]) -> None:
    dataset = evaluation(samples, spec())
    assert dataset.ids == [sample.id for sample in samples]
    assert list(dataset.samples) == samples
    for position in (0, 7, -1):
        item = dataset[position]
        assert item["id"] == samples[position].id
        assert item["mask"].shape == (1, 4, 4) and item["mask"].sum() == 4


def test_packed_objects_are_those_that_were_given() -> None:
    items: list[Any] = ["a", "", ("b", 2), None, [Path("x"), Path("y"), Path("x")], Path("y")]
    packed = Packed(items)
    assert [packed[n] for n in range(len(packed))] == list(packed) == items and packed[-1] == Path("y")
    assert packed.paths == [Path("x"), Path("y")]
    with pytest.raises(IndexError):
        packed[len(items)]
    assert list(Packed([])) == []


def private() -> int:
    """Bytes of memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell what is shared")
def test_the_memory_of_a_worker_stays_flat(
    samples: list[Sample], spec: Callable[..., DataSpec], in_processes: Callable[..., list[Any]]
) -> None:
    dataset = evaluation(samples, spec())

    def grown(look: Callable[[int], str]) -> int:
        before = private()
        assert all(look(number).startswith("img_") for number in range(COUNT))
        gc.collect()
        return private() - before

    def work(number: int) -> tuple[int, int]:
        _settle_in(number)
        for position in range(0, COUNT, 500):
            dataset[position]
        return grown(lambda n: str(dataset.samples[n].id)), grown(lambda n: str(samples[n].id))

    for packed, plain in in_processes(2, work):
        assert packed < 2e6 < plain, "a list is copied as it is read"


def draws(rank: int, world: int, weights: Any, folder: Path) -> tuple[list[list[Draw]], list[int]]:
    name = "weighted" if weights is not None else "shuffled"
    store = f"file://{folder / name}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        epochs = [list(EpochSampler(101, 3, lambda epoch=epoch: epoch, weights)) for epoch in range(3)]
        torch.distributed.barrier()  # neither leaves while the other still connects
        return epochs, list(ShardSampler(101))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weights", [None, np.arange(101.0)], ids=["shuffled", "weighted"])
def test_two_processes_share_an_epoch_without_overlap_or_loss(
    weights: Any, tmp_path: Path, in_processes: Callable[..., list[Any]]
) -> None:
    shares = in_processes(WORLD, lambda rank: draws(rank, WORLD, weights, tmp_path))
    for epoch in range(3):
        alone = list(EpochSampler(101, 3, lambda epoch=epoch: epoch, weights))
        together = [None] * 100
        for rank, (epochs, _) in enumerate(shares):
            together[rank::WORLD] = epochs[epoch]
        assert together == alone[:100], "the draw of one process, dealt in turn; the odd one is left out"
    assert sorted(position for _, shard in shares for position in shard) == [*range(101)]
