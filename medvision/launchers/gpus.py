"""GPUs of this machine, each held by one job at a time, of whichever sweep of this user. Imports no torch."""

import fcntl
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import IO

from medvision.errors import MedvisionError

Wish = int | tuple[int, ...]
"""How many GPUs a job needs, -1 for all; or which, by their places among those that can be seen."""


def wish(accelerator: str, devices: object) -> Wish:
    """The GPUs that a Lightning trainer would use, if there are any."""
    return _devices(devices) if accelerator in ("auto", "gpu", "cuda") else 0


def processes(devices: object) -> int:
    """How many processes a Lightning trainer has, one on each device; 1 if that is left to it."""
    found = _devices(devices)
    return len(found) if isinstance(found, tuple) else max(1, found)


def _devices(devices: object) -> Wish:
    if isinstance(devices, str) and "," in devices:
        devices = [int(word) for word in devices.split(",") if word.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return tuple(int(place) for place in devices)
    return -1 if devices == "auto" else int(str(devices))


def visible() -> list[str]:
    """The UUIDs of the GPUs, or of their parts by MIG, that programs started here would see."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    return chosen(os.environ.get("CUDA_VISIBLE_DEVICES"), listed)


def chosen(asked: str | None, listed: str) -> list[str]:
    """The UUIDs in an answer of `nvidia-smi -L` that `CUDA_VISIBLE_DEVICES` names; all if it is None.

    Numbers are those of `nvidia-smi`. Without an answer the names are as they were asked for.
    """
    gpus: list[list[str]] = []  # a GPU, or its parts
    for line in listed.splitlines():
        if found := re.search(r"UUID: ([^)\s]+)", line):
            if line.startswith("GPU"):
                gpus.append([found[1]])
            else:
                gpus[-1] = [uuid for uuid in gpus[-1] if uuid.startswith("MIG")] + [found[1]]
    every = [uuid for parts in gpus for uuid in parts]
    if asked is None:
        return every
    names: list[str] = []
    for word in (word.strip() for word in asked.split(",")):
        if word.isdigit():
            found_here = gpus[int(word)] if int(word) < len(gpus) else [] if gpus else [word]
        else:
            found_here = [uuid for uuid in every if word and uuid.startswith(word)][:1] or [word] * (not gpus)
        if not found_here or found_here == [""] or word.startswith("-"):
            break  # what comes after a wrong one is not seen
        names += found_here
    return names


def check(wished: Wish, gpus: Sequence[str]) -> None:
    """Refuses what this machine can never give.

    Raises:
        MedvisionError: If there are fewer GPUs than are wished for; with none at all a job runs on the CPU.
    """
    most = max(wished) + 1 if isinstance(wished, tuple) and wished else wished if isinstance(wished, int) else 0
    if gpus and most > len(gpus):
        raise MedvisionError(
            f"trainer.devices asks for {most} GPUs and {len(gpus)} can be seen here ({', '.join(gpus)}); ask for fewer"
        )


@contextmanager
def held(wished: Wish, gpus: Sequence[str], stop: Event) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Waits until the wished GPUs are free and holds them, all or none of them.

    Args:
        wished: What the job needs.
        gpus: Those that can be seen.
        stop: Ends the waiting.

    Yields:
        The environment in which a program sees no others, and the descriptors of the locks, which it is to inherit:
        they are then held until the last process lets go of them.
    """
    count = len(wished) if isinstance(wished, tuple) else len(gpus) if wished < 0 else wished
    among = [gpus[place] for place in wished] if isinstance(wished, tuple) and gpus else gpus
    if not gpus or not count:
        yield {}, []
        return
    while not stop.is_set():
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for name in among:
                if len(files) < count and (file := _locked(name)):
                    files[name] = stack.enter_context(file).fileno()
            if len(files) == count:
                # a trainer that names places counts them among all that can be seen
                shown = gpus if isinstance(wished, tuple) else list(files)
                yield {"CUDA_VISIBLE_DEVICES": ",".join(shown)}, list(files.values())
                return
        stop.wait(random.uniform(0.5, 1.5))  # two that want the same must not meet again and again
    yield {}, []


def _locked(name: str) -> IO[str] | None:
    """The lock file of a GPU, None if another job holds it."""
    folder = Path(tempfile.gettempdir()) / f"medvision-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = (folder / f"{re.sub(r'[^-a-zA-Z0-9]', '_', name)}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the open file, not of the process: threads differ as well
    except BlockingIOError:
        file.close()
        return None
    return file
