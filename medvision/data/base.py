"""The base of all data sets: found, indexed, cached, split, loaded."""

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from medvision.data.augment import Augment
from medvision.data.cache import Cache, Sample
from medvision.data.images import Pixels
from medvision.data.sampling import Draw, EpochSampler, ShardSampler
from medvision.data.source import Source
from medvision.errors import MedvisionError
from medvision.spec import DataSpec, as_size

log = logging.getLogger(__name__)

Splits = Mapping[str, Sequence[Sample]]


class ImageDataModule(pl.LightningDataModule):
    """Images with masks, in splits `train`, `val` and, where it can be had, `test`.

    A data set is a subclass with a `page` and an `index`. Batches are dictionaries:
    `image` float32 (N, C, H, W), normalised; `target` float32 (N, K, H, W) of 0 and 1; `id` list of str.

    Args:
        spec: The facts of the data set.
        root: Folder with what was downloaded; may be read-only.
        cache: Folder for what is derived.
        image_size: Side in pixels or (height, width), instead of the spec's.
        batch_size: Images in a training and evaluation batch.
        num_workers: Processes that load; None chooses none on a CPU machine and up to eight with a GPU. What is
            drawn does not depend on it.
        augment: Augmentation of the training split.
        seed: Decides the order and the augmentation of every epoch.

    Raises:
        MedvisionError: If `batch_size` is not positive.
    """

    page: str
    """The official page to get the data from."""

    def __init__(
        self,
        spec: DataSpec,
        root: Path | str,
        cache: Path | str,
        image_size: int | Sequence[int] | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise MedvisionError(f"data.batch_size is {batch_size}; expected 1 or more")
        self.spec = spec if image_size is None else dataclasses.replace(spec, image_size=as_size(image_size))
        self.root, self.cache_root = Path(root), Path(cache)
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        gpu_workers = min(8, torch.multiprocessing.cpu_count()) if torch.cuda.is_available() else 0
        self.num_workers = gpu_workers if num_workers is None else num_workers
        self._splits: dict[str, list[Sample]] | None = None
        self._cache: Cache | None = None

    @abstractmethod
    def index(self) -> Splits:
        """Lists the samples of each split, from names alone."""

    @property
    def splits(self) -> dict[str, list[Sample]]:
        """The samples of each split, sorted by id; indexed once.

        Raises:
            MedvisionError: If data is missing, a split empty, or a sample in two places.
        """
        if self._splits is None:
            splits = {name: sorted(samples, key=lambda s: s.id) for name, samples in self.index().items()}
            for name, samples in splits.items():
                if not samples:
                    raise MedvisionError(f"{self.spec.name}: no images for the split {name!r} in {self.root}")
            ids = [sample.id for samples in splits.values() for sample in samples]
            if twice := sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []:
                raise MedvisionError(f"{self.spec.name}: in two places: {', '.join(twice[:10])}; remove one of each")
            self._splits = splits
        return self._splits

    @property
    def reported_split(self) -> str:
        """The split that results are reported on: `test`, or `val` where no test masks are to be had."""
        return "test" if "test" in self.splits else "val"

    @property
    def cache(self) -> Cache:
        """The decoded arrays, a row for each sample in the order of the splits; built where needed."""
        if self._cache is None:
            samples = [sample for samples in self.splits.values() for sample in samples]
            self._cache = Cache.build(
                self.cache_root / self.spec.name, samples, self.spec.image_size, self.spec.in_channels
            )
        return self._cache

    def prepare_data(self) -> None:
        """Builds the cache, in one process."""
        _ = self.cache

    def dataset(self, split: str, train: bool = False, full: bool = False) -> "CachedDataset":
        """The samples of a split.

        Args:
            split: Its name.
            train: Whether to augment; items are then asked for by `Draw`.
            full: Whether to add `mask`, the target at the file's own size.

        Raises:
            MedvisionError: If there is no such split.
        """
        if split not in self.splits:
            raise MedvisionError(f"{self.spec.name} has no split {split!r} here; it has {', '.join(self.splits)}")
        names = list(self.splits)
        first = sum(len(self.splits[name]) for name in names[: names.index(split)])
        augment = self.augment if train else None
        return CachedDataset(self.cache, first, self.splits[split], self.spec, augment, full)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Augmented batches in the epoch's own order; a last, smaller batch is left out."""
        dataset = self.dataset("train", train=True)
        sampler = EpochSampler(len(dataset), self.seed, self._epoch)
        return self._loader(dataset, sampler, drop_last=len(sampler) > self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The validation split at network size."""
        dataset = self.dataset("val")
        return self._loader(dataset, ShardSampler(len(dataset)))

    def evaluation_dataloader(self, split: str) -> DataLoader[dict[str, Any]]:
        """A split with `mask`, a list of uint8 (K, H, W) at the files' own sizes, in each batch."""
        dataset = self.dataset(split, full=True)
        return self._loader(dataset, ShardSampler(len(dataset)))

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def _loader(self, dataset: "CachedDataset", sampler: Any, drop_last: bool = False) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_one_thread if self.num_workers else None,
        )

    def find(self, stem: str) -> Source | None:
        """The folder or archive `stem` below the root, if it is there."""
        return Source.find(self.root, stem)

    def expect(self, what: str, official: int, found: int) -> None:
        """Warns where the number of images is not the official one."""
        if found != official:
            log.warning("%s: %d %s images, officially %d", self.spec.name, found, what, official)

    def source(self, stem: str) -> Source:
        """The folder or archive `stem` below the root.

        Raises:
            MedvisionError: If it is missing, naming the page to get it from.
        """
        found = self.find(stem)
        if found is None:
            raise MedvisionError(
                f"{self.spec.name}: neither {stem}.zip nor a folder {stem} in {self.root.resolve()}. "
                f"Get it from {self.page} and put it there, or set MEDVISION_DATA to the folder that holds "
                f"{self.root.name}/. data=phantom needs no download."
            )
        return found


class CachedDataset(Dataset[dict[str, Any]]):
    """The samples of one split, read from the cache.

    Args:
        cache: Arrays of the whole data set.
        first: Row of the split's first sample.
        samples: The split's samples, in the order of the rows.
        spec: The facts of the data set.
        augment: Augmentation, or None.
        full: Whether items carry `mask` at the file's own size.
    """

    def __init__(
        self,
        cache: Cache,
        first: int,
        samples: Sequence[Sample],
        spec: DataSpec,
        augment: Augment | None = None,
        full: bool = False,
    ) -> None:
        self.cache, self.first, self.augment, self.full = cache, first, augment, full
        self.ids = np.array([sample.id for sample in samples])  # one array: a list is copied into every worker
        self.samples = samples if full else None
        self.scale = (1 / (255 * np.array(spec.std))).astype(np.float32)
        self.offset = (np.array(spec.mean) / np.array(spec.std)).astype(np.float32)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ids)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """One sample: a position in the split or, for training, a draw."""
        position, seed = item if isinstance(item, Draw) else (item, 0)
        position = range(len(self))[position]  # from the end where negative, an IndexError beyond it
        row = self.first + position
        image, mask = self.cache.images[row], self.cache.masks[row]
        if self.augment is not None:
            image, mask = self.augment(np.array(image), np.array(mask), seed)
        result: dict[str, Any] = {
            "image": torch.from_numpy(self.normalise(image)),
            "target": torch.from_numpy(np.ascontiguousarray(mask.transpose(2, 0, 1), np.float32)),
            "id": str(self.ids[position]),
        }
        if self.samples is not None:
            full = self.samples[position].read_masks(tuple(self.cache.sizes[row].tolist()))
            result["mask"] = torch.from_numpy(full).permute(2, 0, 1)
        return result

    def normalise(self, image: Pixels) -> NDArray[np.float32]:
        """uint8 (H, W, C) to float32 (C, H, W) with the training split's mean 0 and standard deviation 1."""
        result: NDArray[np.float32] = np.ascontiguousarray((image * self.scale - self.offset).transpose(2, 0, 1))
        return result


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks images and targets; ids and masks, which differ in size, stay lists."""
    stacked = {key: torch.stack([item[key] for item in items]) for key in ("image", "target")}
    return stacked | {key: [item[key] for item in items] for key in items[0] if key not in stacked}


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)
