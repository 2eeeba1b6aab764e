"""Files written whole or not at all, and what keeps processes out of each other's way."""

import csv
import ctypes
import fcntl
import io
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medvision.errors import MedvisionError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, which takes its place once the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; NaN is refused, since it is no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        MedvisionError: If it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedvisionError(f"{path} is missing; expected a finished run there") from None
    except ValueError as error:
        raise MedvisionError(f"{path} is not JSON ({error})") from None


def writable_folder(path: Path, option: str) -> Path:
    """Makes a folder and proves that it can be written to.

    Raises:
        MedvisionError: If not, naming the option that chooses another.
    """
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MedvisionError(
            f"cannot write to {path} ({error.strerror}); choose a folder that can be written with {option}"
        ) from None
    return path


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Holds a lock file that the system lets go of when the process ends, however it ends.

    Args:
        path: The lock file.
        busy: What to say if another process holds it; without it, waits.

    Raises:
        MedvisionError: If another process holds it and `busy` is given.
    """
    with path.open("w") as handle:
        try:
            # lockf, not flock: the lock is the process's own and does not live on in its worker processes
            fcntl.lockf(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise MedvisionError(busy) from None
        yield


def end_with_parent() -> None:
    """Has the system end this process as soon as the one that started it ends, however it ends (Linux, prctl(2))."""
    if sys.platform == "linux":
        set_pdeathsig = 1
        ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGKILL)
