"""The images that someone names: a file, a folder, an archive, a glob; and which of them are broken."""

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medvision.data.folder import ENDINGS
from medvision.data.source import Member, Source
from medvision.errors import MedvisionError

SHOWN = 10  # images named in one message


@dataclass(frozen=True)
class Inputs:
    """The images that are to be predicted.

    Attributes:
        root: The folder or zip archive that their names are relative to.
        images: Sorted by name.
        skipped: How many files with which ending are no images.
    """

    root: Path
    images: list[Member]
    skipped: Counter[str]

    @classmethod
    def find(cls, asked: str, output: Path) -> "Inputs":
        """Lists images: a file, a folder or zip archive with all below it, or a glob, in which folders count so too.

        What lies below `output` is no input.

        Raises:
            MedvisionError: If there is nothing, no image among it, or `output` is the folder of the images itself.
        """
        path, output = Path(os.path.abspath(Path(asked).expanduser())), output.resolve()
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
            root, found = path, Source(path).members()
        elif path.is_file():
            root, found = path.parent, [_member(path.parent, path)]
        elif glob.has_magic(str(path)):
            root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            files = {file for match in matches for file in (match.rglob("*") if match.is_dir() else [match])}
            found = [_member(root, file) for file in sorted(files) if not file.is_dir()]
        else:
            raise MedvisionError(f"input={asked} is not there; expected an image, a folder, a zip archive or a glob")
        if root.resolve() == output:
            raise MedvisionError(
                f"output={output} is the folder of the images, among which masks would be taken for images; choose a "
                "folder of its own"
            )
        if output.is_relative_to(root.resolve()):
            found = [member for member in found if not (root.resolve() / member.name).is_relative_to(output)]
        images = [member for member in found if _is_image(member.name)]
        others = (Path(member.name) for member in found if not _is_image(member.name))
        skipped = Counter("hidden" if other.name[:1] == "." else other.suffix or "no ending" for other in others)
        if not images:
            what = f" ({_counted(skipped)})" if skipped else ""
            raise MedvisionError(f"input={asked} holds no image{what}; expected .png, .jpg, .tif, .bmp or .webp")
        return cls(root, sorted(images, key=lambda member: member.name), skipped)

    @property
    def summary(self) -> str:
        """How many images there are, and what was skipped."""
        skipped = f"; skipped, no images: {_counted(self.skipped)}" if self.skipped else ""
        return f"{len(self.images)} images in {self.root}{skipped}"


def require_whole(broken: Mapping[str, str], images: int) -> None:
    """Names images that are broken.

    Args:
        broken: What is wrong with each.
        images: How many there are with the whole ones.

    Raises:
        MedvisionError: If there are any.
    """
    if broken:
        lines = [f"  {name}: {reason}" for name, reason in broken.items()]
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise MedvisionError("\n".join([f"broken are {len(broken)} of {images} images:", *lines[:SHOWN], *more]))


def _member(root: Path, file: Path) -> Member:
    return Member(root, file.relative_to(root).as_posix(), 0, 0)


def _is_image(name: str) -> bool:
    return re.search(rf"(?:^|/)[^/.][^/]*{ENDINGS}", name, re.IGNORECASE) is not None


def _counted(skipped: Counter[str]) -> str:
    return ", ".join(f"{number} {ending}" for ending, number in sorted(skipped.items()))
