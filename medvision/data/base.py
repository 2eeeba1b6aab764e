"""The base of all data sets: found, indexed, cached, split, loaded."""

import dataclasses
import gc
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from medvision.data.augment import Augment
from medvision.data.cache import BrokenFiles, Cache, Sample
from medvision.data.checks import check
from medvision.data.dataset import CachedDataset, collate
from medvision.data.indexing import Indexing
from medvision.data.phantom import Drawing, Phantoms
from medvision.data.problems import Problem, settle
from medvision.data.sampling import EpochSampler, ShardSampler
from medvision.data.source import many_objects
from medvision.data.splitting import assign_folds, rarest
from medvision.errors import MedvisionError
from medvision.spec import DataSpec, as_size

log = logging.getLogger(__name__)

Splits = Mapping[str, Sequence[Sample]]


class ImageDataModule(Indexing, pl.LightningDataModule):
    """Images with masks or labels, in splits `train`, `val` and, where it can be had, `test`.

    A data set is a subclass with a `page` and an `index`. Batches are dictionaries:
    `image` float32 (N, C, H, W), normalised; `target` float32 (N, K, H, W) of 0 and 1 for masks, float32 (N, K) for
    binary and multilabel labels, int64 (N,) for multiclass ones; `id` list of str.

    Splits are the official ones where they exist. What is missing is dealt from the training images in `folds`
    folds, stratified and with groups kept together: fold number `fold` is `test`, the next one `val`; where the
    official `test` is there, fold number `fold` is `val`.

    Args:
        spec: The facts of the data set.
        root: Folder with what was downloaded; may be read-only. Phantoms lie in the cache instead.
        cache: Folder for what is derived.
        image_size: Side in pixels or (height, width), instead of the spec's.
        batch_size: Images in a training and evaluation batch.
        num_workers: Processes that load; None chooses none on a CPU machine and up to eight with a GPU. What is
            drawn does not depend on it.
        augment: Augmentation of the training split.
        seed: Decides the order and the augmentation of every epoch.
        folds: Number of folds of a cross-validation, which takes the place of the official train and val; None
            keeps the official splits and deals what is missing in five folds.
        fold: Which of them is held out, from 0.
        split_seed: Decides who is in which fold.
        exclude: Ids to leave out, or a text file with one in each line.
        alike_together: Whether images that look alike stay in one split where splits are dealt.
        balanced: Whether an epoch draws images of rare classes as often as those of frequent ones.
        phantom: Whether images are drawn in the layout of the data set, in the place of those that were downloaded.
        images: How many are drawn, altogether or in the words of the drawing.
        draw_seed: Seed of the drawing; that of a run does not change the data.

    Raises:
        MedvisionError: If a number is out of its range, the file of `exclude` is not there, or nothing can be drawn.
    """

    drawing: ClassVar[Drawing | None] = None
    """What draws phantoms in the layout of the data set."""

    watched: str | None = None
    """A split that is measured beside validation while training, as `protocol=paper` wants it."""
    dealt_folds = 5
    """Folds where official splits are missing and none are asked for."""

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
        folds: int | None = None,
        fold: int = 0,
        split_seed: int = 0,
        exclude: Sequence[str] | str = (),
        alike_together: bool = True,
        balanced: bool = False,
        phantom: bool = False,
        images: int | Mapping[str, int] | None = None,
        draw_seed: int = 0,
    ) -> None:
        pl.LightningDataModule.__init__(self)
        self.phantoms = Phantoms(spec, self.drawing, images, draw_seed) if phantom else None
        if self.phantoms is not None:
            root = Path(cache) / spec.name / self.phantoms.folder
        elif images is not None:
            raise MedvisionError(f"data.images={images} is how many phantoms are drawn; expected data.phantom=true too")
        spec = spec if image_size is None else dataclasses.replace(spec, image_size=as_size(image_size))
        Indexing.__init__(self, spec, Path(root))
        if batch_size < 1:
            raise MedvisionError(f"data.batch_size is {batch_size}; expected 1 or more")
        if folds is not None and folds < 2:
            raise MedvisionError(f"data.folds is {folds}; expected 2 or more, or null for the official splits")
        if not 0 <= fold < (folds or self.dealt_folds):
            raise MedvisionError(f"data.fold is {fold}; expected 0 to {(folds or self.dealt_folds) - 1}")
        self.cache_root = Path(cache)
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.folds, self.fold, self.split_seed = folds, fold, split_seed
        self.alike_together, self.balanced = alike_together, balanced
        self.exclude = _read_exclude(exclude)
        gpu_workers = min(8, torch.multiprocessing.cpu_count()) if torch.cuda.is_available() else 0
        self.num_workers = gpu_workers if num_workers is None else num_workers

    @abstractmethod
    def index(self) -> Splits:
        """Lists the samples of each official split, from names and tables alone.

        What is wrong goes to `problem`. A data set without official splits gives all as `train`.
        """

    @cached_property
    def indexed(self) -> dict[str, list[Sample]]:
        """The samples of each official split, sorted by id, without the excluded ones.

        Raises:
            MedvisionError: If data is missing, an id in two places, a split empty, or an excluded id unknown.
        """
        self.noted.clear()
        if self.phantoms is not None:
            self.phantoms.draw(self.root)
        with many_objects():
            splits = {name: sorted(samples, key=lambda s: s.id) for name, samples in self.index().items()}
        ids = [sample.id for samples in splits.values() for sample in samples]
        if len(set(ids)) < len(ids):
            twice = sorted(i for i, times in Counter(ids).items() if times > 1)
            raise MedvisionError(f"{self.spec.name}: in two places: {', '.join(twice[:10])}; remove one of each")
        known = {*ids, *(item for problem in self.noted for item in problem.items)}
        if unknown := sorted(self.exclude - known):
            raise MedvisionError(f"data.exclude names {', '.join(unknown[:10])}, which {self.spec.name} does not have")
        splits = {name: [s for s in samples if s.id not in self.exclude] for name, samples in splits.items()}
        for name in ("train", *splits):
            if not splits.get(name):
                why = "".join(f"\n  {problem}" for problem in self.noted)
                raise MedvisionError(f"{self.spec.name}: no images for the split {name!r} in {self.root}{why}")
        return splits

    def expect(self, what: str, official: int, found: int) -> None:
        """Warns where the number of images is not the official one; of phantoms any is right."""
        if self.phantoms is None:
            super().expect(what, official, found)

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples, sorted by id: the rows of the cache."""
        return sorted((s for samples in self.indexed.values() for s in samples), key=lambda s: s.id)

    @property
    def problems(self) -> list[Problem]:
        """What the index found wrong, without what is excluded."""
        _ = self.indexed
        return [left for problem in self.noted if (left := problem.without(self.exclude))]

    @cached_property
    def dealt(self) -> dict[str, list[Sample]]:
        """The samples of each split, sorted by id, whatever is wrong with the data."""
        return self.indexed if self.folds is None and "val" in self.indexed else self._deal(self.indexed)

    @cached_property
    def split_of(self) -> list[str]:
        """The split of each of `samples`."""
        split = {sample.id: name for name, samples in self.dealt.items() for sample in samples}
        return [split[sample.id] for sample in self.samples]

    @cached_property
    def splits(self) -> dict[str, list[Sample]]:
        """The samples of each split, sorted by id.

        Raises:
            MedvisionError: If the index found errors, or there are too few images for the folds.
        """
        settle(self.spec.name, self.problems)
        return self.dealt

    @cached_property
    def findings(self) -> list[Problem]:
        """What the index, the files and the splits have wrong; decodes the files where that was not done yet.

        Broken files are an error here, not an exception.
        """
        found = list(self.problems)
        try:
            _ = self.cache
        except BrokenFiles as error:
            found += [Problem("error", "broken files", (i,), text) for i, text in error.messages.items()]
            return found
        return found + check(self.spec, self.samples, self.cache, self.presence, self.split_of)

    def _deal(self, found: Mapping[str, list[Sample]]) -> dict[str, list[Sample]]:
        """Deals what is no official test split in folds."""
        test = found.get("test", [])
        held = {s.id for s in test}
        rows = [row for row, sample in enumerate(self.samples) if sample.id not in held]
        pool = [self.samples[row] for row in rows]
        strata, groups = ([of[row] for row in rows] for of in (self.strata(), self.groups()))
        # with few images or groups, so many folds as there are
        folds, least = self.folds or min(self.dealt_folds, len(set(groups))), 2 if test else 3
        if folds < least:
            raise MedvisionError(
                f"data.folds is {folds}; expected {least} or more: {self.spec.name} has no official test split "
                "here, so one fold is tested on and the next one validates"
            )
        dealt = assign_folds([s.id for s in pool], folds, strata, groups, self.split_seed)
        if self.fold >= folds:
            raise MedvisionError(
                f"data.fold is {self.fold}; {self.spec.name} has images for {folds} folds, 0 to {folds - 1}"
            )
        val = self.fold if test else (self.fold + 1) % folds
        names = ["val" if f == val else "test" if f == self.fold else "train" for f in range(folds)]
        splits: dict[str, list[Sample]] = {name: [] for name in ("train", "val", "test")}
        for sample, fold in zip(pool, dealt, strict=True):
            splits[names[fold]].append(sample)
        splits["test"] = test or splits["test"]
        if empty := [name for name, samples in splits.items() if not samples]:
            raise MedvisionError(f"{self.spec.name}: {len(pool)} images in {folds} folds leave {empty} empty")
        return splits

    def strata(self) -> Sequence[Hashable]:
        """What every fold is to hold its share of, for each of `samples`: the rarest class that is present."""
        strata: list[int] = rarest(self.presence).tolist()
        return strata

    def groups(self) -> list[Hashable]:
        """What folds must not tear apart, for each of `samples`: its group, identical images and look-alikes."""
        joined: dict[Hashable, Hashable] = {}

        def root(key: Hashable) -> Hashable:
            while (above := joined.setdefault(key, key)) != key:
                key = above
            return key

        keys: list[Hashable] = [("id", s.id) if s.group is None else ("group", s.group) for s in self.samples]
        for key, content in zip(keys, self.cache.facts["content"].tolist(), strict=True):
            joined[root(("content", content))] = root(key)
        for first, second, _ in self.cache.pairs.tolist() if self.alike_together else []:
            joined[root(keys[first])] = root(keys[second])
        return [root(key) for key in keys]

    @cached_property
    def presence(self) -> NDArray[np.bool_]:
        """Whether each of `samples` shows each class: bool (N, K)."""
        if self.spec.target == "mask":
            return np.asarray(self.cache.facts["pixels"] > 0)
        return np.array([[k in s.labels for k in range(len(self.spec.classes))] for s in self.samples], bool)

    @property
    def reported_split(self) -> str:
        """The split that results are reported on: `test`, or `val` where no test masks are to be had."""
        return "test" if "test" in self.splits else "val"

    @cached_property
    def cache(self) -> Cache:
        """The decoded arrays, a row for each of `samples`; built where needed."""
        return Cache.build(self.cache_folder, self.samples, self.spec.image_size, self.spec.in_channels)

    @property
    def cache_folder(self) -> Path:
        """What is derived from this data set."""
        return self.cache_root / self.spec.name

    def rows(self, split: str) -> NDArray[np.int64]:
        """The rows of the cache that are a split, in the order of its samples.

        Raises:
            MedvisionError: If there is no such split.
        """
        if split not in self.dealt:
            raise MedvisionError(f"{self.spec.name} has no split {split!r} here; it has {', '.join(self.dealt)}")
        return np.flatnonzero(np.array(self.split_of) == split)

    def hashes(self, split: str) -> list[str]:
        """The perceptual hash of each image of a split, as hexadecimal digits."""
        return [value.tobytes().hex() for value in self.cache.facts["hash"][self.rows(split)]]

    @cached_property
    def normalisation(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each channel, in [0, 1]: the spec's, or those of the training split."""
        if self.spec.mean is not None and self.spec.std is not None:
            return np.array(self.spec.mean), np.array(self.spec.std)
        return self.cache.statistics(self.rows("train"))

    def prepare_data(self) -> None:
        """Builds the cache and checks what is in it, in one process.

        Raises:
            MedvisionError: If anything has errors.
        """
        _ = self._settled

    @cached_property
    def _settled(self) -> bool:
        _ = self.splits, self.cache  # with the exceptions of their own
        settle(self.spec.name, [problem for problem in self.findings if problem not in self.problems])
        return True

    def dataset(self, split: str, train: bool = False, full: bool = False) -> "CachedDataset":
        """The samples of a split.

        Args:
            split: Its name.
            train: Whether to augment; items are then asked for by `Draw`.
            full: Whether to add `mask`, the target at the file's own size.

        Raises:
            MedvisionError: If there is no such split.
        """
        rows, augment = self.rows(split), self.augment if train else None
        return CachedDataset(self.cache, rows, self.splits[split], self.spec, self.normalisation, augment, full)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Augmented batches in the epoch's own order; a last, smaller batch is left out."""
        dataset = self.dataset("train", train=True)
        weights = self.sample_weights("train") if self.balanced else None
        sampler = EpochSampler(len(dataset), self.seed, self._epoch, weights)
        return self._loader(dataset, sampler, drop_last=len(sampler) > self.batch_size)

    def sample_weights(self, split: str) -> NDArray[np.float64]:
        """Chance of each image of a split in a balanced draw: every stratum, the rarest class shown, alike."""
        stratum = rarest(self.presence)[self.rows(split)]
        _, index, counts = np.unique(stratum, return_inverse=True, return_counts=True)
        result: NDArray[np.float64] = 1 / (len(counts) * counts[index])
        return result

    def positive_weights(self, split: str = "train") -> list[float]:
        """For each class, negatives over positives in a split: of pixels for masks, of images for labels.

        Raises:
            MedvisionError: If a class does not occur.
        """
        return [float((1 - s) / s) for s in self._present_share(split)]

    def class_weights(self, split: str = "train") -> list[float]:
        """For each of exclusive classes, the inverse of its share of the images of a split over the number of classes.

        Raises:
            MedvisionError: If classes do not exclude each other, or one does not occur.
        """
        if self.spec.kind != "multiclass":
            raise MedvisionError(
                f"loss.class_weights=auto is of exclusive classes, those of {self.spec.name} are each there or not; "
                "expected a number for each, or loss.positive_weights=auto"
            )
        share = self._present_share(split)
        return [float(1 / (len(share) * s)) for s in share]

    def positive_share(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """For each class its mean share of an image's area, for labels its share of images, over rows of the cache."""
        if self.spec.target == "label":
            return np.asarray(self.presence[rows].mean(0))
        facts = self.cache.facts[rows]
        return np.asarray((facts["pixels"] / facts["size"].astype(np.int64).prod(1)[:, None]).mean(0))

    def _present_share(self, split: str) -> NDArray[np.float64]:
        """The `positive_share` of a split in which every class occurs."""
        share = self.positive_share(self.rows(split))
        if missing := [name for name, s in zip(self.spec.classes, share, strict=True) if s == 0]:
            raise MedvisionError(f"{self.spec.name}: {', '.join(missing)} does not occur in {split}: no weight for it")
        return share

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """The validation split at network size; if a split is `watched` beside it, a list of both."""
        val, *watched = (
            self._loader(dataset, ShardSampler(len(dataset)))
            for dataset in (self.dataset(split) for split in ("val", self.watched) if split is not None)
        )
        return [val, *watched] if watched else val

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
            worker_init_fn=_settle_in if self.num_workers else None,
        )


def _read_exclude(exclude: Sequence[str] | str) -> frozenset[str]:
    if not isinstance(exclude, str):
        return frozenset(map(str, exclude))
    try:
        lines = Path(exclude).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MedvisionError(
            f"data.exclude={exclude} cannot be read ({error.strerror}); expected a list of ids, or a text file with "
            "one in each line"
        ) from None
    return frozenset(line.strip() for line in lines if line.strip())


def _settle_in(_: int) -> None:
    """Readies a worker process."""
    cv2.setNumThreads(0)
    gc.freeze()  # a collection would write to every object of the index, and so copy its pages into this process
