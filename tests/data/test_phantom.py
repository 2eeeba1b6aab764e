from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medvision.data import ISIC2017, Folder
from medvision.data.drawing.lesions import write_isic2017
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

COUNTS = {"train": 4, "val": 2, "test": 2}
Make = Callable[..., ISIC2017]


@pytest.fixture
def make(tmp_path: Path, spec: Callable[..., DataSpec]) -> Make:
    def phantom(name: str = "phantom", **options: Any) -> ISIC2017:
        options = {"images": COUNTS, "root": tmp_path, "cache": tmp_path / "cache", "phantom": True, **options}
        return ISIC2017(spec(name=name), num_workers=0, **options)

    return phantom


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`writing(write)`: has `write(folder, seed, **counts)` draw."""

    def use(write: Callable[..., None]) -> None:
        monkeypatch.setattr(ISIC2017, "drawing", replace(ISIC2017.drawing, write=write))

    return use


@pytest.fixture
def drawn(writing: Callable[..., None]) -> list[int]:
    """The seed of each drawing."""
    seeds = []

    def write(folder: Path, seed: int, **counts: int) -> None:
        seeds.append(seed)
        write_isic2017(folder, seed, counts)

    writing(write)
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
    assert data.root == data.cache_root / "phantom" / "v1-seed0-test2-train4-val2"
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


def test_a_drawing_that_broke_off_is_drawn_again(make: Make, writing: Callable[..., None]) -> None:
    outcomes: list[Callable[..., Any]] = [
        lambda *_: 1 / 0,
        lambda folder, seed, counts: write_isic2017(folder, seed, counts),
    ]
    writing(lambda folder, seed, **counts: outcomes.pop(0)(folder, seed, counts))
    expected = make(draw_seed=7)
    with pytest.raises(ZeroDivisionError):
        _ = expected.splits
    assert {split: len(samples) for split, samples in expected.splits.items()} == COUNTS
    assert outcomes == []


def test_processes_that_draw_at_once_draw_once(
    make: Make, tmp_path: Path, writing: Callable[..., None], in_processes: Callable[..., list[Any]]
) -> None:
    log = tmp_path / "drawn"

    def write(folder: Path, seed: int, **counts: int) -> None:
        with log.open("a") as handle:
            handle.write("drawn\n")
        write_isic2017(folder, seed, counts)

    writing(write)
    assert len(set(in_processes(2, lambda _: make().cache.digest))) == 1
    assert log.read_text() == "drawn\n"


def test_a_cache_that_cannot_be_written_names_the_cure(
    make: Make, tmp_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    data = make(cache=folder)
    with unprivileged(), pytest.raises(MedvisionError, match=f"cannot write to {folder}.*MEDVISION_CACHE"):
        _ = data.splits


def test_a_number_of_images_is_divided(make: Make) -> None:
    assert {split: len(samples) for split, samples in make(images=8).splits.items()} == {
        "train": 4,
        "val": 2,
        "test": 2,
    }
    assert make(images=8).cache.digest == make().cache.digest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": None}, "how many images. data.images=<number>"),
        ({"images": {"train": 4, "val": 2}}, "expected a number, or one of each of train, val, test"),
        ({"images": {**COUNTS, "more": 1}}, "expected a number, or one of each of train, val, test"),
        ({"images": -3}, "data.images is -3; expected a number"),
        ({"phantom": False}, "data.images=.* is how many phantoms are drawn; expected data.phantom=true too"),
        ({"name": "isic2017"}, "phantoms are no images of isic2017: expected data.spec.name=phantom_isic2017"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: Make, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MedvisionError, match=said):
        make(**options)


def test_a_challenge_does_not_score_phantoms(tmp_path: Path, spec: Callable[..., DataSpec]) -> None:
    scored = spec(name="phantom", challenge="isic2017_part1")
    with pytest.raises(MedvisionError, match="no challenge"):
        ISIC2017(scored, tmp_path, tmp_path, phantom=True, images=COUNTS)


def test_what_has_no_drawing_is_refused(tmp_path: Path, spec: Callable[..., DataSpec]) -> None:
    with pytest.raises(MedvisionError, match="nothing draws in the layout of folder; leave it out"):
        Folder(spec(name="phantom_folder"), tmp_path, tmp_path, phantom=True, images=3)
