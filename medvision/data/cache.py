"""Images and masks decoded and resized once, as memory-mapped arrays that all processes share."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medvision.data.alike import alike, perceptual_hash
from medvision.data.images import Pixels, read_image, read_mask, resize_image, resize_mask
from medvision.data.source import Member, many_objects
from medvision.errors import MedvisionError
from medvision.files import locked, read_json, replacing, writable_folder, write_json

log = logging.getLogger(__name__)

FORMAT = 2  # raised when the same sources give other arrays
SHOWN = 10  # broken files named in one message
CHUNK = 256  # rows written before they count as done


class BrokenFiles(MedvisionError):
    """Files that cannot be used.

    Attributes:
        messages: What is wrong, for each id.
    """

    def __init__(self, messages: Mapping[str, str]) -> None:
        self.messages = dict(sorted(messages.items()))
        rest = f"\n... and {len(messages) - SHOWN} more" if len(messages) > SHOWN else ""
        super().__init__(
            "\n".join([*self.messages.values()][:SHOWN])
            + f"{rest}\nor leave them out: data.exclude=[{','.join([*self.messages][:SHOWN])}]"
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set.

    Attributes:
        id: Its name, unique in the data set.
        image: The image file.
        masks: For each class the files whose union is its mask; none means that the class is absent.
        labels: Numbers of the classes that the image as a whole belongs to, where there are no masks.
        group: What it must stay together with in one split (a sequence, a patient); None is nothing.
    """

    id: str
    image: Member
    masks: tuple[tuple[Member, ...], ...] = ()
    labels: tuple[int, ...] = ()
    group: str | None = None

    def read(self, channels: int) -> tuple[Pixels, Pixels]:
        """Image (H, W, channels) and masks (H, W, K) of 0 and 1, both uint8 at the file's own size.

        Raises:
            MedvisionError: If a file is broken or a mask has another size than its image.
        """
        image = read_image(self.image, channels)
        return image, self.read_masks(image.shape[:2])[0]

    def read_masks(self, size: tuple[int, ...]) -> tuple[Pixels, int]:
        """Masks (H, W, K) of 0 and 1, uint8, of an image of `size`; and how many pixels are neither black nor white."""
        result, between = np.zeros((*size, len(self.masks)), np.uint8), 0
        for k, members in enumerate(self.masks):
            for member in members:
                mask, odd = read_mask(member)
                if mask.shape != tuple(size):
                    raise MedvisionError(
                        f"{member} is {mask.shape[0]}x{mask.shape[1]}, its image {self.image} is "
                        f"{size[0]}x{size[1]} (height x width); expected equal sizes: fetch both again"
                    )
                result[..., k] |= mask
                between += odd
        return result, between


@dataclass(frozen=True)
class Cache:
    """The arrays of a data set at one size, a row for each sample.

    Attributes:
        folder: Where they lie.
        images: uint8 (N, H, W, C).
        masks: uint8 (N, H, W, K) of 0 and 1.
        facts: What was seen of each file: `size` (height and width), `content` (checksum of the pixels), `hash`
            (perceptual, see `perceptual_hash`), `pixels` (of each class, at the file's size), `between` (mask pixels
            neither black nor white), `sums` (of each channel and of its squares, at network size).
        digest: Checksum of ids, labels, images and masks: the fingerprint of the data.
    """

    folder: Path
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    facts: NDArray[Any]
    digest: str

    @classmethod
    def build(cls, folder: Path, samples: Sequence[Sample], size: tuple[int, int], channels: int) -> "Cache":
        """Opens the cache of these samples below `folder`; builds it first where it is not there yet.

        The folder's name is a checksum of the sources and the settings. It appears whole or not at all; what an
        interrupted or failed build had decoded is kept beside it for the next one.

        Raises:
            BrokenFiles: If files are broken (all are named).
            MedvisionError: If the disk is full or the folder not writable.
        """
        target = writable_folder(folder, "MEDVISION_CACHE") / _key(samples, size, channels)
        building = folder / f".{target.name}.building"
        try:
            with locked(folder / ".lock"):  # a second process waits and finds it built
                if not target.is_dir():
                    for other in set(folder.glob(".*.building")) - {building}:
                        shutil.rmtree(other)
                    _write(building, samples, size, channels)
                    building.rename(target)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise MedvisionError(
                f"cannot write the cache to {folder} ({error}); make room, or choose another disk with MEDVISION_CACHE"
            ) from None
        return cls.open(target)

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Maps the arrays of a built cache into memory."""
        images, masks, facts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        return cls(folder, images, masks, facts, read_json(folder / "cache.json")["digest"])

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Travels to worker processes as a path."""
        return Cache.open, (self.folder,)

    def statistics(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each channel over the pixels of some rows, in [0, 1]; exact sums."""
        sums, squares = self.facts["sums"][rows].sum(0)
        pixels = len(rows) * self.images.shape[1] * self.images.shape[2]
        mean = sums / pixels
        deviation = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
        return mean / 255, np.maximum(deviation, 0.5) / 255  # images of one colour have no deviation

    @property
    def pairs(self) -> NDArray[np.int64]:
        """Rows of images that look alike, (P, 3): first, second, Hamming distance of their hashes; kept once found."""
        path = self.folder / "pairs.npy"
        if not path.exists():
            found = alike((self.facts["hash"], self.images))
            try:
                with replacing(path) as temporary, temporary.open("wb") as handle:
                    np.save(handle, found)
            except OSError as error:
                raise MedvisionError(
                    f"cannot write {path} ({error}); make room, or choose another MEDVISION_CACHE"
                ) from None
        kept: NDArray[np.int64] = np.load(path)
        return kept


_ARRAYS = ("images", "masks", "facts")


def _key(samples: Sequence[Sample], size: tuple[int, int], channels: int) -> str:
    with many_objects():
        facts = [(s.id, s.image.signature, [[m.signature for m in ms] for ms in s.masks], s.labels) for s in samples]
        text = json.dumps([FORMAT, size, channels, facts])
    return f"{size[0]}x{size[1]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _write(folder: Path, samples: Sequence[Sample], size: tuple[int, int], channels: int) -> None:
    """Fills the arrays; a row that an earlier attempt had finished is kept."""
    classes = len(samples[0].masks)
    facts_of_a_row = np.dtype(
        [
            ("done", bool),
            ("size", np.int32, 2),
            ("content", "S32"),
            ("hash", np.uint64, 4),
            ("pixels", np.int64, classes),
            ("between", np.int64),
            ("sums", np.int64, (2, channels)),
        ]
    )
    shapes = {"images": (len(samples), *size, channels), "masks": (len(samples), *size, classes)}
    needed = sum(int(np.prod(shape)) for shape in shapes.values())
    log.info("cache of %d images: %.0f MB in %s", len(samples), needed / 1e6, folder.parent)
    if not (folder / "facts.npy").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        free = shutil.disk_usage(folder).free
        if needed > free:
            folder.rmdir()
            raise MedvisionError(
                f"the cache needs {needed / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free; make room, "
                "choose another disk with MEDVISION_CACHE, or a smaller data.image_size"
            )
        for name, shape in shapes.items():
            _reserve(folder / f"{name}.npy", shape, np.dtype(np.uint8))
        with replacing(folder / "facts.npy") as temporary:  # the last one: now there is something to keep
            _reserve(temporary, (len(samples),), facts_of_a_row)
    images, masks, facts = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS)
    broken: dict[str, str] = {}

    def fill(row: int) -> None:
        try:
            image = read_image(samples[row].image, channels)
            mask, between = samples[row].read_masks(image.shape[:2])
        except MedvisionError as error:
            broken[samples[row].id] = str(error)
            return
        small = images[row] = resize_image(image, size)
        for k in range(classes):
            masks[row, ..., k] = resize_mask(mask[..., k] > 0, size)
        wide = small.astype(np.int64)
        facts[row] = (
            False,
            image.shape[:2],
            hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest(),
            perceptual_hash(image),
            mask.sum((0, 1), np.int64),
            between,
            (wide.sum((0, 1)), (wide**2).sum((0, 1))),
        )

    left = np.flatnonzero(~facts["done"])
    label = f"decoding {len(samples)} images ({needed / 1e6:.0f} MB)"
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,  # decoding and resizing let go of the interpreter's lock
        tqdm(total=len(samples), desc=label, initial=len(samples) - len(left), disable=None, leave=False) as progress,
    ):
        for start in range(0, len(left), CHUNK):
            rows = left[start : start + CHUNK]
            for _ in pool.map(fill, rows):
                progress.update()
            for array in (images, masks):
                array.flush()  # a row that counts as done is on the disk
            facts["done"][[row for row in rows if samples[row].id not in broken]] = True
            facts.flush()
    if broken:
        raise BrokenFiles(broken)
    digest = hashlib.sha256(json.dumps([[s.id for s in samples], [s.labels for s in samples]]).encode())
    for array in (images, masks):
        for row in array:
            digest.update(row.data)
    write_json(folder / "ids.json", [s.id for s in samples])
    write_json(folder / "cache.json", {"digest": digest.hexdigest(), "images": len(samples), "size": list(size)})


def _reserve(path: Path, shape: tuple[int, ...], kind: np.dtype[Any]) -> None:
    if 0 in shape:
        np.save(path, np.zeros(shape, kind))  # nothing to map
        return
    np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    with path.open("r+b") as handle:
        # writing to a mapped hole of a full disk would kill the process
        os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
