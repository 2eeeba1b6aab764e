from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from medvision.data import sampling
from medvision.data.sampling import Draw, EpochSampler, ShardSampler

LENGTHS, SEEDS, EPOCHS = st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 10_000)


def draws(length: int, seed: int = 0, epoch: int = 0) -> list[Draw]:
    return list(EpochSampler(length, seed, lambda: epoch))


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(sampling, "_rank_and_world", lambda: (rank, world))

    return pretend


@given(LENGTHS, SEEDS, EPOCHS)
def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(length: int, seed: int, epoch: int) -> None:
    drawn = draws(length, seed, epoch)
    assert sorted(draw.position for draw in drawn) == [*range(length)]
    assert len(EpochSampler(length, seed, lambda: epoch)) == length
    np.random.default_rng(1).random()
    np.random.seed(length)
    torch.manual_seed(length)
    assert draws(length, seed, epoch) == drawn
    assert all(0 <= draw.seed < 2**31 and type(draw.seed) is int and type(draw.position) is int for draw in drawn)


def test_epochs_and_seeds_differ_in_order_and_augmentation() -> None:
    streams = [draws(40, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(draw.position for draw in drawn) for drawn in streams}) == 16
    seeds = [draw.seed for drawn in streams for draw in drawn]
    assert len(set(seeds)) == len(seeds)


def test_weighted_draws_follow_the_weights_and_are_a_function_of_seed_and_epoch() -> None:
    weights = np.array([6.0, 3.0, 1.0, 0.0])

    def weighted(seed: int, epoch: int) -> list[Draw]:
        return list(EpochSampler(4, seed, lambda: epoch, weights))

    counts = np.bincount([draw.position for epoch in range(2000) for draw in weighted(0, epoch)], minlength=4)
    assert counts.sum() == 8000 and np.abs(counts / 8000 - weights / 10).max() < 0.02 and counts[3] == 0
    assert weighted(3, 5) == weighted(3, 5) and len({tuple(weighted(s, e)) for s in range(3) for e in range(3)}) == 9


def test_seed_and_epoch_are_not_added_up() -> None:
    assert draws(40, 1, 2) != draws(40, 2, 1) and draws(40, 0, 3) != draws(40, 1, 2)


def test_orders_are_uniform() -> None:
    firsts = np.bincount([draws(5, 0, epoch)[0].position for epoch in range(1000)], minlength=5)
    assert firsts.min() > 150 and firsts.max() < 250


def test_the_epoch_is_asked_for_when_an_iteration_begins() -> None:
    now = [0]
    sampler = EpochSampler(30, 0, lambda: now[0])
    first = list(sampler)
    now[0] = 7
    assert list(sampler) == draws(30, 0, 7) != first
    now[0] = 0
    assert list(sampler) == first


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@given(length=LENGTHS, epoch=EPOCHS)
def test_processes_share_an_epoch_equally(world: int, length: int, epoch: int) -> None:
    whole = draws(length, 5, epoch)
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for rank in range(world):
            patch.setattr(sampling, "_rank_and_world", lambda rank=rank: (rank, world))
            shares.append(draws(length, 5, epoch))
            assert len(shares[-1]) == len(EpochSampler(length, 5, lambda: epoch)) == length // world
    together = [draw for share in shares for draw in share]
    assert len(set(together)) == len(together), "no draw twice"
    assert set(together) == set(whole[: length // world * world])


def test_what_is_left_out_of_an_epoch_changes(as_rank: Callable[[int, int], None]) -> None:
    seen = set()
    for epoch in range(60):
        for rank in range(2):
            as_rank(rank, 2)
            seen.update((epoch, draw.position) for draw in draws(5, 0, epoch))
    left_out = {position for epoch in range(60) for position in range(5) if (epoch, position) not in seen}
    assert left_out == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 12, 13])
def test_shards_hold_every_sample_once(world: int, length: int, as_rank: Callable[[int, int], None]) -> None:
    shards = []
    for rank in range(world):
        as_rank(rank, world)
        shards.append(list(ShardSampler(length)))
        assert len(ShardSampler(length)) == len(shards[-1])
    assert sorted(position for shard in shards for position in shard) == [*range(length)]
    assert all(a < b for shard in shards for a, b in pairwise(shard))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_the_ranks_are_those_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampling._rank_and_world() == (0, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 5)
    assert sampling._rank_and_world() == (2, 5)


class Echo(Dataset[list[int]]):
    """Gives back the draw and a number drawn from its seed."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, draw: Any) -> list[int]:
        return [draw.position, draw.seed, int(np.random.default_rng(draw.seed).integers(1000))]


def test_the_number_of_workers_changes_nothing() -> None:
    epochs = [0]

    def batches(workers: int) -> list[list[list[int]]]:
        sampler = EpochSampler(11, 3, lambda: epochs[0])
        loader = DataLoader(
            Echo(), 4, sampler=sampler, num_workers=workers, collate_fn=list, persistent_workers=workers > 0
        )
        found = []
        for epochs[0] in range(2):
            found += list(loader)
        return found

    alone, helped = batches(0), batches(2)
    assert alone == helped
    assert [len(batch) for batch in alone] == [4, 4, 3] * 2
    assert alone[:3] != alone[3:]
