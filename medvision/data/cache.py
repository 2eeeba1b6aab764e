"""Images and masks decoded and resized once, as memory-mapped arrays that all processes share."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medvision.data.images import Pixels, read_image, read_mask, resize_image, resize_mask
from medvision.data.source import Member
from medvision.errors import MedvisionError
from medvision.files import locked, read_json, writable_folder, write_json

FORMAT = 1  # raised when the same sources give other arrays
SHOWN = 10  # broken files named in one message


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        id: Its name, unique in the data set.
        image: The image file.
        masks: For each class the files whose union is its mask; none means that the class is absent.
    """

    id: str
    image: Member
    masks: tuple[tuple[Member, ...], ...]

    def read(self, channels: int) -> tuple[Pixels, Pixels]:
        """Image (H, W, channels) and masks (H, W, K) of 0 and 1, both uint8 at the file's own size.

        Raises:
            MedvisionError: If a file is broken or a mask has another size than its image.
        """
        image = read_image(self.image, channels)
        return image, self.read_masks(image.shape[:2])

    def read_masks(self, size: tuple[int, ...]) -> Pixels:
        """Masks (H, W, K) of 0 and 1, uint8, of an image of `size`."""
        result = np.zeros((*size, len(self.masks)), np.uint8)
        for k, members in enumerate(self.masks):
            for member in members:
                mask = read_mask(member)
                if mask.shape != tuple(size):
                    raise MedvisionError(
                        f"{member} is {mask.shape[0]}x{mask.shape[1]}, its image {self.image} is "
                        f"{size[0]}x{size[1]} (height x width); expected equal sizes: fetch both again"
                    )
                result[..., k] |= mask
        return result


@dataclass(frozen=True)
class Cache:
    """The arrays of a data set at one size, a row for each sample.

    Attributes:
        folder: Where they lie.
        images: uint8 (N, H, W, C).
        masks: uint8 (N, H, W, K) of 0 and 1.
        sizes: int32 (N, 2), height and width of the files.
        digest: Checksum of ids, images and masks: the fingerprint of the data.
    """

    folder: Path
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    digest: str

    @classmethod
    def build(cls, folder: Path, samples: Sequence[Sample], size: tuple[int, int], channels: int) -> "Cache":
        """Opens the cache of these samples below `folder`; builds it first where it is not there yet.

        The folder's name is a checksum of the sources and the settings. It appears whole or not at all.

        Raises:
            MedvisionError: If files are broken (all are named), the disk is full or the folder not writable.
        """
        target = writable_folder(folder, "MEDVISION_CACHE") / _key(samples, size, channels)
        building = folder / f".{target.name}.building"
        try:
            with locked(folder / ".lock"):  # a second process waits and finds it built
                if not target.is_dir():
                    shutil.rmtree(building, ignore_errors=True)
                    try:
                        _write(building, samples, size, channels)
                        building.rename(target)
                    finally:
                        shutil.rmtree(building, ignore_errors=True)
        except OSError as error:
            raise MedvisionError(
                f"cannot write the cache to {folder} ({error}); make room, or choose another disk with MEDVISION_CACHE"
            ) from None
        return cls.open(target)

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Maps the arrays of a built cache into memory."""
        images, masks, sizes = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        return cls(folder, images, masks, sizes, read_json(folder / "cache.json")["digest"])

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        """Travels to worker processes as a path."""
        return Cache.open, (self.folder,)


_ARRAYS = ("images", "masks", "sizes")


def _key(samples: Sequence[Sample], size: tuple[int, int], channels: int) -> str:
    facts = [(s.id, s.image.signature, [[m.signature for m in ms] for ms in s.masks]) for s in samples]
    text = json.dumps([FORMAT, size, channels, facts])
    return f"{size[0]}x{size[1]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _write(folder: Path, samples: Sequence[Sample], size: tuple[int, int], channels: int) -> None:
    classes = len(samples[0].masks)
    shapes = {"images": (len(samples), *size, channels), "masks": (len(samples), *size, classes)}
    needed = sum(int(np.prod(shape)) for shape in shapes.values())
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MedvisionError(
            f"the cache needs {needed / 1e9:.2f} GB, {folder.parent} has {free / 1e9:.2f} GB free; make room, "
            "choose another disk with MEDVISION_CACHE, or a smaller data.image_size"
        )
    images, masks = (_reserve(folder / f"{name}.npy", shape) for name, shape in shapes.items())
    sizes = np.zeros((len(samples), 2), np.int32)
    broken: list[str] = []

    def fill(row: int) -> None:
        try:
            image, mask = samples[row].read(channels)
        except MedvisionError as error:
            broken.append(str(error))
            return
        sizes[row] = image.shape[:2]
        images[row] = resize_image(image, size)
        for k in range(classes):
            masks[row, ..., k] = resize_mask(mask[..., k] > 0, size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resizing let go of the interpreter's lock
        label = f"decoding {len(samples)} images ({needed / 1e6:.0f} MB)"
        for _ in tqdm(pool.map(fill, range(len(samples))), label, len(samples), disable=None, leave=False):
            pass
    if broken:
        rest = f"\n... and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise MedvisionError("\n".join(sorted(broken)[:SHOWN]) + rest)
    np.save(folder / "sizes.npy", sizes)
    digest = hashlib.sha256(json.dumps([s.id for s in samples]).encode())
    for array in (images, masks):
        for row in array:
            digest.update(row.data)
    write_json(folder / "cache.json", {"digest": digest.hexdigest(), "images": len(samples), "size": list(size)})


def _reserve(path: Path, shape: tuple[int, ...]) -> Pixels:
    array: Pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with path.open("r+b") as handle:
        # writing to a mapped hole of a full disk would kill the process
        os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    return array
