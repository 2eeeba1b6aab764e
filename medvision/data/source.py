"""A downloaded archive or the folder that it was extracted to, read in place: nothing is ever extracted."""

import os
import stat
import threading
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from medvision.errors import MedvisionError

MAX_MEMBER = 1 << 30  # bytes; a larger image or mask is an archive made to do harm


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    source: "Source"
    name: str

    def read(self) -> bytes:
        """The file's bytes."""
        return self.source.read(self.name)

    @property
    def signature(self) -> str:
        """Changes when the file changes; costs no read."""
        return self.source.signature(self.name)

    def __str__(self) -> str:
        """The place, as error messages name it."""
        return f"{self.source.path}: {self.name}"


class Source:
    """A folder or a zip archive with its files by name.

    Args:
        path: An existing folder or `.zip` file.

    Raises:
        MedvisionError: If the archive is broken, encrypted, or has names that lead out of it or links.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = _Handles()
        self._signatures: dict[str, str] = _list_folder(path) if path.is_dir() else _list_zip(path)
        self.names = sorted(self._signatures)

    @classmethod
    def find(cls, root: Path, stem: str) -> "Source | None":
        """The folder `root/stem` or the archive `root/stem.zip`, whichever is there (the folder first)."""
        folder, archive = root / stem, root / f"{stem}.zip"
        if folder.is_dir():
            return cls(folder)
        return cls(archive) if archive.is_file() else None

    def members(self) -> list[Member]:
        """All files, sorted by name."""
        return [Member(self, name) for name in self.names]

    def signature(self, name: str) -> str:
        """Size and checksum (zip) or size and time of the last change (folder)."""
        return self._signatures[name]

    def read(self, name: str) -> bytes:
        """The bytes of one file; safe from several threads and after a fork.

        Raises:
            MedvisionError: If the file is damaged or gone.
        """
        try:
            if self.path.is_dir():
                return (self.path / name).read_bytes()
            return self._local.zip(self.path).read(name)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            raise MedvisionError(
                f"{self.path}: {name} cannot be read ({error}); the download is damaged, fetch it again"
            ) from None


@dataclass
class _Handles:
    """One open archive per process and thread: a file position is shared by forks."""

    handles: threading.local = field(default_factory=threading.local)

    def zip(self, path: Path) -> zipfile.ZipFile:
        if getattr(self.handles, "pid", None) != os.getpid():
            self.handles.pid, self.handles.zip = os.getpid(), zipfile.ZipFile(path)
        handle: zipfile.ZipFile = self.handles.zip
        return handle

    def __reduce__(self) -> tuple[type["_Handles"], tuple[()]]:
        return _Handles, ()


def _list_folder(path: Path) -> dict[str, str]:
    def refuse(error: OSError) -> None:
        raise MedvisionError(f"{error.filename} cannot be listed ({error.strerror}); make the folder readable")

    found: dict[str, str] = {}
    for folder, _, files in os.walk(path, onerror=refuse):
        for file in files:
            where = os.path.join(folder, file)
            facts = os.stat(where, follow_symlinks=os.path.exists(where))  # a broken link is listed, read() names it
            found[os.path.relpath(where, path).replace(os.sep, "/")] = f"{facts.st_size}:{facts.st_mtime_ns}"
    return found


def _list_zip(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise MedvisionError(
            f"{path} is not a whole zip archive ({error}); the download broke off, fetch it again"
        ) from None
    for info in infos:
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
    return {info.filename: f"{info.file_size}:{info.CRC:08x}" for info in infos}
