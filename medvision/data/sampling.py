"""What an epoch draws: a function of (seed, epoch, rank) and of nothing that happened before."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One training sample: its position in the split and the seed of its augmentation.

    The seed travels with the draw, so that the number of worker processes changes nothing.
    """

    position: int
    seed: int


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class EpochSampler(Sampler[Draw]):
    """A fresh permutation or weighted draw for each epoch, divided among the processes.

    Args:
        length: Samples in the split.
        seed: Seed of the run.
        epoch: Tells the epoch when an iteration begins. Lightning's `set_epoch` comes too late for a resumed
            run: the worker processes have drawn their first batches by then.
        weights: Chance of each sample, drawn with replacement; None is a permutation.
    """

    def __init__(
        self, length: int, seed: int, epoch: Callable[[], int], weights: NDArray[np.float64] | None = None
    ) -> None:
        self.length, self.seed, self.epoch, self.weights = length, seed, epoch, weights

    def __len__(self) -> int:
        """Samples that this process draws in an epoch."""
        return self.length // _rank_and_world()[1]

    def __iter__(self) -> Iterator[Draw]:
        """Draws the present epoch; processes get equal shares, the remainder is left out of this epoch."""
        rank, world = _rank_and_world()
        rng = np.random.default_rng([self.seed, self.epoch()])
        if self.weights is None:
            order = rng.permutation(self.length)
        else:
            order = rng.choice(self.length, self.length, p=self.weights / self.weights.sum())
        seeds = rng.integers(0, 2**31, self.length)
        for i in range(rank, self.length // world * world, world):
            yield Draw(int(order[i]), int(seeds[i]))


class ShardSampler(Sampler[int]):
    """Every sample of an evaluation split once, over all processes: no padding with repeated samples."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        """Samples of this process."""
        rank, world = _rank_and_world()
        return len(range(rank, self.length, world))

    def __iter__(self) -> Iterator[int]:
        """Positions of this process, in order."""
        rank, world = _rank_and_world()
        return iter(range(rank, self.length, world))
