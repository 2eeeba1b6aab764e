"""The samples of a split as a torch data set, read from the cache."""

import io
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from medvision.data.augment import Augment
from medvision.data.cache import Cache, Sample
from medvision.data.images import Normalise
from medvision.data.sampling import Draw
from medvision.spec import DataSpec


class CachedDataset(Dataset[dict[str, Any]]):
    """The samples of one split, read from the cache.

    Args:
        cache: Arrays of the whole data set.
        rows: The rows of the split's samples.
        samples: The split's samples, in the order of the rows.
        spec: The facts of the data set.
        normalisation: Mean and standard deviation of each channel.
        augment: Augmentation, or None.
        full: Whether items carry `mask` at the file's own size.
    """

    def __init__(
        self,
        cache: Cache,
        rows: NDArray[np.int64],
        samples: Sequence[Sample],
        spec: DataSpec,
        normalisation: tuple[NDArray[np.float64], NDArray[np.float64]],
        augment: Augment | None = None,
        full: bool = False,
    ) -> None:
        self.cache, self.augment, self.full = cache, augment, full and spec.target == "mask"
        # what has an entry for each image is a tensor, which worker processes share
        self.rows = torch.from_numpy(rows)
        self.samples = Packed(samples if self.full else (sample.id for sample in samples))
        self.labels = torch.from_numpy(_targets(samples, spec)) if spec.target == "label" else None
        self.normalise = Normalise(*normalisation)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def ids(self) -> list[str]:
        """Names of the samples."""
        return [sample.id if self.full else sample for sample in self.samples]

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """One sample: a position in the split or, for training, a draw."""
        position, seed = item if isinstance(item, Draw) else (item, 0)
        position = range(len(self))[position]  # from the end where negative, an IndexError beyond it
        row, sample = int(self.rows[position]), self.samples[position]
        image, mask = self.cache.images[row], self.cache.masks[row]
        if self.augment is not None:
            image, mask = self.augment(np.array(image), np.array(mask), seed)
        result: dict[str, Any] = {
            "image": torch.from_numpy(self.normalise(image)),
            "target": torch.from_numpy(np.ascontiguousarray(mask.transpose(2, 0, 1), np.float32))
            if self.labels is None
            else self.labels[position].clone(),
            "id": sample.id if self.full else sample,
        }
        if self.full:
            full = sample.read_masks(tuple(self.cache.facts["size"][row].tolist()))[0]
            result["mask"] = torch.from_numpy(full).permute(2, 0, 1)
        return result


class Packed(Sequence[Any]):
    """Python objects in one buffer, unpacked one at a time.

    A list would grow the memory of every worker process up to a copy of its own: reading an object writes its
    reference count, and a forked process copies each page that is written to. Tensors are shared however the
    processes start.

    Args:
        items: Objects that can be pickled; the paths in them are stored once.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        buffer, ends = io.BytesIO(), [0]
        pickler = _Pickler(buffer)
        for item in items:
            pickler.clear_memo()  # each can be unpacked without those before it
            pickler.dump(item)
            ends.append(buffer.tell())
        self.paths, self.ends = list(pickler.paths), torch.tensor(ends)
        self.buffer = torch.from_numpy(np.frombuffer(bytearray(buffer.getbuffer()), np.uint8))

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.ends) - 1

    def __getitem__(self, position: Any) -> Any:
        """The object at a position."""
        position = range(len(self))[position]
        start, end = self.ends[position : position + 2].tolist()
        return _Unpickler(self.buffer[start:end].numpy().tobytes(), self.paths).load()


class _Pickler(pickle.Pickler):
    """Writes a number in the place of a path."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.paths: dict[Path, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        return self.paths.setdefault(value, len(self.paths)) if isinstance(value, Path) else None


class _Unpickler(pickle.Unpickler):
    """Reads a path where a number is written."""

    def __init__(self, content: bytes, paths: Sequence[Path]) -> None:
        super().__init__(io.BytesIO(content))
        self.paths = paths

    def persistent_load(self, number: int) -> Path:
        return self.paths[number]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks images and targets; ids and masks, which differ in size, stay lists."""
    stacked = {key: torch.stack([item[key] for item in items]) for key in ("image", "target")}
    return stacked | {key: [item[key] for item in items] for key in items[0] if key not in stacked}


def _targets(samples: Sequence[Sample], spec: DataSpec) -> NDArray[Any]:
    """Labels as a loss wants them: (N,) class numbers for multiclass, else (N, K) of 0 and 1."""
    if spec.kind == "multiclass":
        return np.array([s.labels[0] for s in samples], np.int64)
    return np.array([[k in s.labels for k in range(len(spec.classes))] for s in samples], np.float32)
