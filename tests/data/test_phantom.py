from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from medvision.data import ISIC2017, Phantom
from medvision.data import phantom as phantom_module
from medvision.data.drawing.lesions import write_isic2017
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

COUNTS = {"train": 4, "val": 2, "test": 2}
Make = Callable[..., Phantom]


@pytest.fixture
def make(tmp_path: Path, spec: Callable[..., DataSpec]) -> Make:
    def phantom(**options: Any) -> Phantom:
        options = {"images": COUNTS, "root": tmp_path / "phantom", "cache": tmp_path / "cache", **options}
        return Phantom(spec(name="phantom"), num_workers=0, **options)

    return phantom


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed of each drawing."""
    seeds = []

    def write(folder: Path, seed: int, counts: dict[str, int]) -> None:
        seeds.append(seed)
        write_isic2017(folder, seed, counts)

    monkeypatch.setattr(phantom_module.lesions, "write_isic2017", write)
    return seeds


def test_it_is_drawn_once_with_all_three_splits(make: Make, drawn: list[int], caplog: Any) -> None:
    first = make()
    assert drawn == [], "nothing is drawn before it is needed"
    assert {split: len(samples) for split, samples in first.splits.items()} == COUNTS
    assert first.reported_split == "test"
    second = make(seed=3, batch_size=2)
    assert second.cache.digest == first.cache.digest
    assert drawn == [0]
    assert caplog.messages == [], "the counts are those asked for"


def test_it_is_read_as_isic2017(make: Make, spec: Callable[..., DataSpec]) -> None:
    data = make()
    _ = data.splits
    plain = ISIC2017(spec(name="isic2017"), data.root, data.cache_root)
    assert isinstance(data, ISIC2017)
    assert {k: [s.id for s in v] for k, v in plain.splits.items()} == {
        k: [s.id for s in v] for k, v in data.splits.items()
    }
    assert plain.cache.digest == data.cache.digest
    assert 0.02 < data.cache.masks.mean() < 0.6


def test_seeds_and_counts_have_their_own_drawings(make: Make, drawn: list[int]) -> None:
    digests = {make(**options).cache.digest for options in ({}, {"draw_seed": 1}, {"images": {**COUNTS, "train": 5}})}
    assert len(digests) == 3 and drawn == [0, 1, 0]
    assert not [problem for problem in make().problems if problem.kind == "not the official number"]


def test_batches_have_masks_at_the_size_of_the_files(make: Make) -> None:
    data = make(batch_size=2)
    batch = next(iter(data.evaluation_dataloader("test")))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert [[*mask.shape] for mask in batch["mask"]] == [[1, *size] for size in data.cache.facts["size"][-2:].tolist()]


def test_a_drawing_that_broke_off_is_drawn_again(make: Make, drawn: list[int], monkeypatch: Any) -> None:
    expected = make(draw_seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(phantom_module.lesions, "write_isic2017", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _ = expected.splits
    assert {split: len(samples) for split, samples in expected.splits.items()} == COUNTS
    assert drawn == [7]


def test_processes_that_draw_at_once_draw_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_processes: Callable[..., list[Any]]
) -> None:
    log = tmp_path / "drawn"

    def write(folder: Path, seed: int, counts: dict[str, int]) -> None:
        with log.open("a") as handle:
            handle.write("drawn\n")
        write_isic2017(folder, seed, counts)

    monkeypatch.setattr(phantom_module.lesions, "write_isic2017", write)
    assert len(set(in_processes(2, lambda _: make().cache.digest))) == 1
    assert log.read_text() == "drawn\n"


def test_a_cache_that_cannot_be_written_names_the_cure(
    make: Make, tmp_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    data = make(root=folder / "phantom", cache=folder)
    with unprivileged(), pytest.raises(MedvisionError, match=f"cannot write to {folder}.*MEDVISION_CACHE"):
        _ = data.splits
