"""A downloaded archive or the folder that it was extracted to, read in place: nothing is ever extracted."""

import gc
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medvision.errors import MedvisionError

MAX_MEMBER = 1 << 30  # bytes; a larger image or mask is an archive made to do harm
ORDINARY = re.compile(r"(?!.*\.\.)[^./\\:][^\\:]*", re.DOTALL)  # names that need no closer look


class Member(NamedTuple):
    """One file of a source; all that reading it needs, so that a worker process never lists an archive.

    Attributes:
        place: The folder or the archive.
        name: The file's name in it.
        size: Bytes.
        stamp: Checksum (zip) or time of the last change (folder).
        offset: Where an archive has the file, -1 in a folder.
        packed: Bytes that the file takes in an archive.
        method: How an archive has packed it.
    """

    place: Path
    name: str
    size: int
    stamp: int
    offset: int = -1
    packed: int = 0
    method: int = zipfile.ZIP_STORED

    def read(self) -> bytes:
        """The file's bytes; safe from several threads and after a fork, since every call opens the file anew.

        Raises:
            MedvisionError: If the file is damaged, has changed in the archive, or is gone.
        """
        try:
            return self._from_folder() if self.offset < 0 else self._from_zip()
        except (OSError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError, struct.error) as error:
            raise _unreadable(self, error) from None

    @property
    def signature(self) -> str:
        """Changes when the file changes, and costs no read: size and checksum (zip), or size and time (folder)."""
        return f"{self.size}:{self.stamp}" if self.offset < 0 else f"{self.size}:{self.stamp:08x}"

    def __str__(self) -> str:
        """The place, as error messages name it."""
        return f"{self.place}: {self.name}"

    def _from_folder(self) -> bytes:
        with open(os.path.join(self.place, self.name), "rb") as handle:
            return handle.read()

    def _from_zip(self) -> bytes:
        info = zipfile.ZipInfo(self.name)
        info.file_size, info.CRC = self.size, self.stamp
        info.compress_size, info.compress_type = self.packed, self.method
        with open(self.place, "rb") as handle:
            handle.seek(self.offset)
            # sizes and checksum of this header may be 0, with the true ones behind the file: those listed count
            magic, name_length, extra_length = struct.unpack("<4s22xHH", handle.read(30))
            if magic != b"PK\3\4":
                raise zipfile.BadZipFile("it is not where it was listed")
            handle.seek(name_length + extra_length, os.SEEK_CUR)
            with zipfile.ZipExtFile(handle, "r", info) as stream:  # checks the checksum at the end
                content = stream.read()
        if len(content) != self.size:
            raise EOFError(f"{len(content)} of {self.size} bytes")
        return content


class Source:
    """A folder or a zip archive with its files by name.

    Args:
        path: An existing folder or `.zip` file.

    Raises:
        MedvisionError: If the archive is broken, encrypted, or has names that lead out of it or links.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = _list_folder(path) if path.is_dir() else _list_zip(path)
        self._members = {name: found[name] for name in sorted(found)}

    def __reduce__(self) -> tuple[type["Source"], tuple[Path]]:
        """Travels to other processes as a path."""
        return Source, (self.path,)

    @classmethod
    def find(cls, root: Path, stem: str) -> "Source | None":
        """The folder `root/stem` or the archive `root/stem.zip`, whichever is there (the folder first).

        Both are also found one folder deeper and with letters in either case.
        """
        folder = find_path(root, stem)
        if folder is not None and folder.is_dir():
            return cls(folder)
        archive = find_path(root, f"{stem}.zip")
        return None if archive is None else cls(archive)

    @property
    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return list(self._members)

    def members(self) -> list[Member]:
        """All files, sorted by name."""
        return list(self._members.values())

    def signature(self, name: str) -> str:
        """Size and checksum (zip) or size and time of the last change (folder)."""
        return self._members[name].signature

    def read(self, name: str) -> bytes:
        """The bytes of one file; safe from several threads and after a fork.

        Raises:
            MedvisionError: If there is no such file, or it is damaged or gone.
        """
        if name not in self._members:
            raise _unreadable(Member(self.path, name, 0, 0), KeyError(name))
        return self._members[name].read()


@contextmanager
def many_objects() -> Iterator[None]:
    """Rests the garbage collector, which takes half of the time while objects become more and none is garbage."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def find_path(root: Path, name: str) -> Path | None:
    """`root/name`, also one folder deeper and with letters in either case, if it is there."""
    if (root / name).exists():
        return root / name
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name.casefold() == name.casefold():
                return path
    return None


def _unreadable(member: Member, error: Exception) -> MedvisionError:
    return MedvisionError(f"{member} cannot be read ({error}); the download is damaged, fetch it again")


def _list_folder(path: Path) -> dict[str, Member]:
    def refuse(error: OSError) -> None:
        raise MedvisionError(f"{error.filename} cannot be listed ({error.strerror}); make the folder readable")

    found: dict[str, Member] = {}
    top = os.path.join(path, "")
    for folder, _, files in os.walk(top, onerror=refuse):
        inside = os.path.join(folder, "")
        prefix = inside[len(top) :].replace(os.sep, "/")
        for file in files:
            try:
                facts = os.stat(inside + file)
            except OSError:
                facts = os.lstat(inside + file)  # a broken link is listed, read() names it
            name = prefix + file
            found[name] = Member(path, name, facts.st_size, facts.st_mtime_ns)
    return found


def _list_zip(path: Path) -> dict[str, Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise MedvisionError(
            f"{path} is not a whole zip archive ({error}); the download broke off, fetch it again"
        ) from None
    found: dict[str, Member] = {}
    for info in infos:
        if not ORDINARY.fullmatch(info.filename):
            name = PurePosixPath(info.filename.replace("\\", "/"))
            if name.is_absolute() or not name.parts or ".." in name.parts or ":" in name.parts[0]:
                raise MedvisionError(f"{path} holds {info.filename!r}, which leads out of the archive; do not use it")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise MedvisionError(f"{path} holds the link {info.filename!r}; do not use it")
        if info.flag_bits & 1:
            raise MedvisionError(f"{path} is encrypted ({info.filename}); decrypt it first")
        if info.file_size > MAX_MEMBER:
            raise MedvisionError(
                f"{path} holds {info.filename!r} of {info.file_size:,} bytes; more than {MAX_MEMBER:,} is refused"
            )
        found[info.filename] = Member(
            path, info.filename, info.file_size, info.CRC, info.header_offset, info.compress_size, info.compress_type
        )
    return found
