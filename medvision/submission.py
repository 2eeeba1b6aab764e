"""Predictions as the archive that a challenge takes, and a check of such an archive."""

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvision.errors import MedvisionError
from medvision.files import replacing

IMAGE = re.compile(r"ISIC_[0-9]{7}")


@dataclass(frozen=True)
class Format:
    """What a challenge takes: one zip without folders, of PNG masks of 8 bits and one channel, 0 or 255.

    Attributes:
        kinds: The masks of an image, in the order of the classes; a file is `<image>_<kind>.png`.
        page: The organisers' rules.
    """

    kinds: tuple[str, ...]
    page: str

    def names(self, image: str) -> list[str]:
        """The files of an image."""
        return [f"{image}_{kind}.png" for kind in self.kinds]


ATTRIBUTES = ("pigment_network", "negative_network", "streaks", "milia_like_cyst", "globules")
FORMATS = {
    "isic2017": Format(("segmentation",), "https://challenge.isic-archive.com/landing/2017/42/"),
    "isic2018_task1": Format(("segmentation",), "https://challenge.isic-archive.com/landing/2018/45/"),
    "isic2018_task2": Format(
        tuple(f"attribute_{name}" for name in ATTRIBUTES), "https://challenge.isic-archive.com/landing/2018/46/"
    ),
}
"""By name. ISIC 2018 Task 1 also asks for a single region without holes, which `Cleaning` of `postprocess` makes."""


def require_submittable(format: str, classes: Sequence[str], images: Sequence[str]) -> None:
    """Refuses predictions that cannot become a submission, before they are made.

    Args:
        format: A key of `FORMATS`.
        classes: Names of the K classes that are predicted.
        images: Ids of the images.

    Raises:
        MedvisionError: If the format is not known, wants other classes, or an id is no image of ISIC or comes twice.
    """
    rules = _format(format)
    wanted = [kind.removeprefix("attribute_") for kind in rules.kinds]
    if len(classes) != len(wanted) or (len(wanted) > 1 and list(classes) != wanted):
        raise MedvisionError(f"format={format} wants masks of {', '.join(wanted)}; predicted are {', '.join(classes)}")
    if foreign := [image for image in images if not IMAGE.fullmatch(image)]:
        raise MedvisionError(
            f"format={format} wants images named as ISIC_0000000 ({rules.page}); found {_listed(foreign)}"
        )
    if twice := [image for image, times in Counter(images).items() if times > 1]:
        raise MedvisionError(f"format={format} wants each image once; there more than once: {_listed(twice)}")


def write_submission(path: Path, format: str, masks: Iterable[tuple[str, NDArray[np.bool_]]]) -> None:
    """Writes an archive whole or not at all; equal masks, in whatever order, give equal bytes.

    Args:
        path: The zip; an older one is replaced.
        format: A key of `FORMATS`.
        masks: The id of each image, as `ISIC_0000000`, and bool (K, H, W) at its original size, the K classes in the
            order of the format.

    Raises:
        MedvisionError: If the format is not known, there is no image, an id is no image of ISIC or comes twice, or a
            mask is of another type or number of classes.
    """
    rules = _format(format)
    files: dict[str, bytes] = {}
    for image, mask in masks:
        if not IMAGE.fullmatch(image):
            raise MedvisionError(f"{image!r} is no image of {format}; expected an id as ISIC_0000000 ({rules.page})")
        if mask.dtype != np.bool_ or mask.ndim != 3 or len(mask) != len(rules.kinds):
            raise MedvisionError(
                f"the mask of {image} is {mask.dtype} {mask.shape}; {format} takes bool ({len(rules.kinds)}, H, W): "
                f"{', '.join(rules.kinds)}"
            )
        names = rules.names(image)
        if names[0] in files:
            raise MedvisionError(f"{image} comes twice; expected each image once")
        files |= {name: _png(layer) for name, layer in zip(names, mask, strict=True)}
    if not files:
        raise MedvisionError(f"there is no image to write to {path}; expected one or more")
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1980: the time of writing would make other bytes of the same masks
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])  # stored: a PNG is compressed


def check_submission(path: Path, format: str, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Checks an archive against the rules of its challenge.

    Args:
        path: The zip.
        format: A key of `FORMATS`.
        sizes: The id of each image asked for, and its height and width in pixels.

    Raises:
        MedvisionError: If the format is not known or `path` is no zip; or naming all that is wrong: what is missing,
            superfluous, there twice or wrongly named; what cannot be decoded, is no PNG, has another mode or size, or
            values other than 0 and 255.
    """
    rules = _format(format)
    wrong: dict[str, list[str]] = {}
    expected = {name: size for image, size in sizes.items() for name in rules.names(image)}
    valid = re.compile(rf"{IMAGE.pattern}_({'|'.join(rules.kinds)})\.png")
    try:
        with zipfile.ZipFile(path) as archive:
            found = Counter(archive.namelist())
            for name, times in found.items():
                if not valid.fullmatch(name):
                    wrong.setdefault(
                        f"wrongly named or in a folder, expected {' or '.join(rules.names('ISIC_<7 digits>'))}", []
                    ).append(name)
                elif name not in expected:
                    wrong.setdefault("superfluous", []).append(name)
                elif times > 1:
                    wrong.setdefault("there more than once", []).append(name)
                elif problem := _problem(archive, name, expected[name]):
                    wrong.setdefault(problem[0], []).append(name + problem[1])
    except (OSError, zipfile.BadZipFile) as error:
        raise MedvisionError(f"{path} cannot be read as a zip ({error}); expected a submission of {format}") from None
    if missing := sorted(expected.keys() - found.keys()):
        wrong["missing"] = missing
    if wrong:
        lines = [f"  {len(names)} {what}: {_listed(names)}" for what, names in wrong.items()]
        text = "\n".join([f"{path} is no submission of {format} ({rules.page}):", *lines])
        raise MedvisionError(text + "\nwrite it anew with write_submission")


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise MedvisionError(f"format is {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _png(mask: NDArray[np.bool_]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(data, "PNG")
    return data.getvalue()


def _problem(archive: zipfile.ZipFile, name: str, size: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with a mask, and what was found; None if nothing is."""
    try:
        data = archive.read(name)
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # the checksums and the end, which decoding does without
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
            kind, mode, found = image.format, image.mode, (image.height, image.width)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        return "that cannot be decoded", f" ({type(error).__name__}: {error})"
    if kind != "PNG":
        return "that are no PNG", f" ({kind})"
    if mode != "L":
        return "of another mode than 8 bits and one channel", f" ({mode})"
    if found != tuple(size):
        return "of another size than the image", f" ({found[0]}x{found[1]}, not {size[0]}x{size[1]})"
    if other := sorted({*np.unique(pixels).tolist()} - {0, 255}):
        return "with values other than 0 and 255", f" ({_listed([str(value) for value in other])})"
    return None


def _listed(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
