"""A prepared run folder, trained by a process of its own that does not outlive the one that waits for it."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import BinaryIO

from medvision.runs import RunFolder
from medvision.terminal import quoted

LOG = "output.log"
"""What a job prints, below its folder; each start adds to it."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE = 15.0
"""Seconds that a process has to end after it was asked to."""

# The kernel kills the process with the thread that started it (prctl(2), PR_SET_PDEATHSIG), which stays over exec; a
# function between fork and exec would not be safe beside other threads.
_TIED = (
    "import ctypes, os, signal, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "  # which a shell has its jobs in the background ignore
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT]); "  # which Ray blocks
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        state: `finished`, `failed`, or `stopped` where it was asked to.
        reason: Why it failed, in one line.
        seconds: How long it took, this time.
        result: The name and the value of the metric that chose the epoch; None unless it is finished.
    """

    state: str
    reason: str = ""
    seconds: float = 0.0
    result: tuple[str, float] | None = None


def resume_command(folder: Path) -> list[str]:
    """Begins a prepared run folder, or goes on with it; also where the folder's name has an `=` or a comma."""
    return ["-m", "medvision.train", f"resume={quoted(folder)}"]


def finished(folder: Path) -> Outcome | None:
    """The outcome of a run folder that holds a finished run, None of any other."""
    metrics = RunFolder(folder).metrics
    if not metrics.exists():
        return None
    monitor = json.loads(metrics.read_text(encoding="utf-8"))["monitor"]
    return Outcome("finished", result=(monitor["name"], monitor["value"]))


def share_of_cpus(processes: int) -> dict[str, str]:
    """The environment of one of several at once: the processors divided by their number, a smaller wish kept."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads(max(1, cpus // processes))


def threads(count: int) -> dict[str, str]:
    """The environment of a job with so many threads, or with fewer where the environment here says so."""
    every = os.environ.get("OMP_NUM_THREADS", "")  # is that of the others as well where they have none of their own
    wished = {name: os.environ.get(name) or every for name in THREADS}
    return {name: str(min(count, int(wish)) if wish.isdigit() else count) for name, wish in wished.items()}


def run_job(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    echo: bool = False,
    stop: Event | None = None,
    hold: Sequence[int] = (),
    cwd: Path | None = None,
) -> Outcome:
    """Trains a prepared run folder to its end in a process of its own, whatever state it is in; waits for it.

    Args:
        folder: The run folder, made by `configs.prepare`.
        environment: Variables in addition to those here, as `share_of_cpus` and `CUDA_VISIBLE_DEVICES`.
        echo: Whether to print what goes to its `output.log` here as well.
        stop: Once set, the process is asked to end, and killed after `GRACE` seconds.
        hold: File descriptors that the process inherits, as of a lock that is to last as long as it lives.
        cwd: Where relative paths begin; None for here.

    Returns:
        How it ended; the run folder holds the rest.
    """
    began = time.monotonic()
    command = resume_command(folder)
    with (folder / LOG).open("ab") as log:
        log.write(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(['python', *command])}\n".encode())
        log.flush()
        offset = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=hold,
            cwd=cwd,
            start_new_session=True,  # an interrupt at the terminal is ours to pass on
        )
    stopped = False
    with (folder / LOG).open("rb") as printed:
        printed.seek(offset)
        try:
            while process.poll() is None:
                if stop is not None and stop.wait(0.0 if stopped else 0.1) and not stopped:
                    stopped = True
                    _end(process)
                elif stop is None:
                    time.sleep(0.1)
                if echo:
                    _echo(printed)
        finally:
            _end(process)
        if echo:
            _echo(printed)
        printed.seek(offset)
        text = printed.read().decode(errors="replace")
    seconds, done = time.monotonic() - began, finished(folder)
    if done is not None:  # also where it was stopped just after
        return Outcome("finished", seconds=seconds, result=done.result)
    return Outcome("stopped" if stopped else "failed", reason(process.returncode, text), seconds)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks a process to end, then kills it with all that it started; does nothing to one that ended well."""
    if process.poll() == 0:
        return
    try:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _echo(printed: BinaryIO) -> None:
    if text := printed.read():
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def reason(code: int, printed: str) -> str:
    """Why a process ended: the signal, the last `error:` line, or the last line of a traceback."""
    if code < 0:
        return f"killed by signal {-code}" + (", perhaps out of memory" if code == -signal.SIGKILL else "")
    lines = [line for line in printed.splitlines() if line.strip()]
    for pattern in (r"error(?: in process \d+)?: (.*)", r"([\w.]+(?:Error|Exception|Interrupt|Exit)\b.*)", r"(.*)"):
        for line in reversed(lines):
            if match := re.fullmatch(pattern, line):
                return match[1]
    return f"exit code {code}"
