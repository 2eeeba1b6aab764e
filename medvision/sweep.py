"""`python -m medvision.train -m model=unet,unetv2 seed=1,2`: a folder of prepared runs, of which a launcher makes all.

The same command on the same folder goes on: what is finished stays, all else is run once more, new jobs are added.
"""

import json
import logging
import math
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from medvision import cli
from medvision.configs import changes, flat, portable, prepare, require_own
from medvision.errors import MedvisionError
from medvision.files import locked, read_json, writable_folder, write_json
from medvision.launchers import Job
from medvision.launchers.gpus import processes, wish
from medvision.launchers.jobs import LOG, Outcome, finished
from medvision.runs import RunFolder
from medvision.terminal import print_rows, quoted

log = logging.getLogger("medvision.sweep")

PLAN = "sweep.json"
"""In the folder of a sweep: the command and each job's overrides and config, written before the first is prepared."""


@dataclass(frozen=True)
class Planned:
    """A job as it is asked for.

    Attributes:
        overrides: What was typed for it.
        config: Its config as plain values.
    """

    overrides: list[str]
    config: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """The config but for the places of this machine: what is trained."""
        return {key: value for key, value in self.config.items() if key != "paths"}


def start(jobs: list[list[str]], configs: list[DictConfig], typed: list[str]) -> None:
    """Runs the jobs of a sweep that are not finished, shows how all ended, and compares them.

    Args:
        jobs: The overrides of each job.
        configs: The composed config of each, with its `hydra` node.
        typed: What was typed after the verb.

    Raises:
        MedvisionError: If the folder holds another sweep or is in use, or if a job failed.
    """
    cfg = configs[0]
    for word in ("resume", "repeat", "check"):
        if cfg[word]:
            raise MedvisionError(f"{word}={cfg[word]} is of one run; a sweep goes on by hydra.sweep.dir=<its folder>")
    for word in typed:
        if not word.startswith("-") and _of_the_sweep(word) and cli.parsed(word).is_sweep_override():
            name, _, value = word.partition("=")
            raise MedvisionError(
                f'{word}: a sweep has one {name}; if that is one value, quote it: "{name}={quoted(value)}"'
            )
    own = [OmegaConf.to_container(config.hydra.sweeper) for config in configs]
    if other := [n for n, choices in enumerate(own) if choices != own[0]]:
        raise MedvisionError(
            f"jobs 0 and {other[0]} come with different choices of their own (hydra.sweeper.params of experiments): "
            "sweep over each experiment in a folder of its own"
        )
    if dict(cfg.hydra.sweep.items_ex(resolve=False))["subdir"] != "${hydra.job.num}":
        raise MedvisionError("hydra.sweep.subdir: the folders of the jobs are their numbers; leave it out")
    folder = Path(cfg.hydra.sweep.dir).expanduser().resolve()
    launcher = instantiate(cfg.launcher)
    asked = [Planned(_kept(job), _plain(config)) for job, config in zip(jobs, configs, strict=True)]
    writable_folder(folder, "hydra.sweep.dir=<folder> or MEDVISION_RUNS")
    with locked(folder / ".lock", busy=f"{folder} is being swept by another process; wait for it or stop it"):
        command = _command(typed, folder)
        planned = plan(folder, asked, command)
        for n, job in planned.items():
            if not RunFolder(folder / str(n)).config.exists():
                prepare(OmegaConf.create(job.config), folder / str(n), job.overrides)
        todo = _jobs(folder, planned)
        done = {job.number: outcome for job in todo if (outcome := finished(job.folder))}
        log.info("sweep of %d jobs in %s%s", len(todo), folder, f"; {len(done)} are finished" if done else "")
        log.info("after any stop, go on with: %s", command)
        watch = Watching(todo, done, launcher.stop_on_failure, bar=sys.stdout.isatty() and not launcher.echo)
        if left := [job for job in todo if job.number not in done]:
            with _asked_to_stop(watch.stop), watch.progress:
                launcher.launch(left, watch)
        _show(folder, todo, watch.outcomes)
        if not watch.stop.is_set():
            _compare(folder, [planned[n].config for n, of in watch.outcomes.items() if of.state == "finished"])
    ended = {job: watch.outcomes.get(job.number, Outcome("stopped")) for job in todo}
    failed = [
        f"job {job.number} ({job.words}) failed: {of.reason}; {job.folder / LOG}"
        for job, of in ended.items()
        if of.state == "failed"
    ]
    if any(of.state != "finished" for of in ended.values()):
        count = sum(of.state == "finished" for of in ended.values())
        said = [f"{count} of {len(todo)} jobs are finished", *failed, f"go on with: {command}"]
        raise MedvisionError("\n  ".join(said))
    log.info("%s is finished; more jobs, as of another seed, are added with: %s", folder, command)


def plan(folder: Path, asked: Sequence[Planned], command: str) -> dict[int, Planned]:
    """Numbers the jobs, those of an earlier time as they were, and writes them to `sweep.json`.

    Raises:
        MedvisionError: If two are the same, or the folder holds jobs that are not asked for, naming what differs.
    """
    for n, one in enumerate(asked):
        for m, other in enumerate(asked[:n]):
            if one.run == other.run:
                raise MedvisionError(f"jobs {m} and {n} are the same: {' '.join(one.overrides)}; leave one out")
    path = folder / PLAN
    require_own(path)
    stored = read_json(path)["jobs"] if path.exists() else {}
    planned = {int(number): Planned(job["overrides"], job["config"]) for number, job in stored.items()}
    new = [job for job in asked if all(job.run != old.run for old in planned.values())]
    lacking = {n: old for n, old in planned.items() if all(job.run != old.run for job in asked)}
    if lacking:
        said = []
        for n, old in lacking.items():
            nearest = min((changes(old.config, job.config) for job in new), key=len, default=["not asked for"])
            said.append(f"job {n} ({' '.join(old.overrides)}): {', '.join(nearest)}")
        raise MedvisionError(
            f"{folder} holds jobs that this command does not have, or has with another config:\n  "
            + "\n  ".join(said)
            + "\nType what was typed for them (more jobs may be added), or choose another hydra.sweep.dir"
        )
    planned |= dict(enumerate(new, start=max(planned, default=-1) + 1))
    jobs = {n: {"overrides": job.overrides, "config": job.config} for n, job in planned.items()}
    write_json(path, {"command": command, "jobs": jobs})
    return planned


class Watching:
    """Says how the jobs fare, a line for each event.

    Args:
        jobs: All of them.
        done: The outcomes of those that are finished already.
        stop_on_failure: Whether a failed job stops the others.
        bar: Whether to draw a progress bar.
    """

    def __init__(self, jobs: Sequence[Job], done: dict[int, Outcome], stop_on_failure: bool, bar: bool) -> None:
        self.stop = Event()
        self.outcomes = dict(done)
        self.progress = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), disable=not bar)
        self._task = self.progress.add_task("jobs", total=len(jobs), completed=len(done))
        self._count, self._stop_on_failure = len(jobs), stop_on_failure
        self._lock = Lock()

    def started(self, job: Job) -> None:
        """Says so."""
        with self._lock:
            log.info("job %d started: %s", job.number, job.words)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Says how and after how long."""
        with self._lock:
            self.outcomes[job.number] = outcome
            over = sum(of.state != "stopped" for of in self.outcomes.values())
            said = f"{outcome.result[0]} {outcome.result[1]:.4f}" if outcome.result else outcome.reason
            ending = f" ({job.folder / LOG})" if outcome.state == "failed" else ""
            counted = f"{over} of {self._count} are over"
            log.info("job %d %s in %.0f s: %s%s; %s", job.number, outcome.state, outcome.seconds, said, ending, counted)
            self.progress.update(self._task, completed=over)
        if outcome.state == "failed" and self._stop_on_failure:
            self.stop.set()


@contextmanager
def _asked_to_stop(stop: Event) -> Iterator[None]:
    """An interrupt or SIGTERM sets `stop`, a second one has its usual effect."""

    def ask(number: int, _frame: object) -> None:
        log.info("%s: ending the jobs that run", signal.Signals(number).name)
        stop.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def _plain(cfg: DictConfig) -> dict[str, Any]:
    config = portable(cfg)
    if wrong := [f"{k}={v}" for k, v in flat(config).items() if isinstance(v, float) and not math.isfinite(v)]:
        raise MedvisionError(f"{', '.join(wrong)}: {PLAN} holds finite numbers alone; choose one")
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _kept(overrides: Sequence[str]) -> list[str]:
    """Of what was typed that which makes the run."""
    return [o for o in overrides if o.startswith("hydra.searchpath=") or not _of_the_sweep(o)]


def _of_the_sweep(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra", "launcher", "traceback"))


def _command(typed: Sequence[str], folder: Path) -> str:
    words = [word for word in typed if not word.startswith("hydra.sweep.dir=")]
    return shlex.join(["python", "-m", "medvision.train", *words, f"hydra.sweep.dir={quoted(folder)}"])


def _jobs(folder: Path, planned: dict[int, Planned]) -> list[Job]:
    shared = set.intersection(*(set(job.overrides) for job in planned.values())) if len(planned) > 1 else set()
    result = []
    for n, job in planned.items():
        words = [word for word in job.overrides if word not in shared]
        trainer = job.config["trainer"]
        result.append(
            Job(
                n,
                folder / str(n),
                " ".join(words),
                wish(trainer["accelerator"], trainer["devices"]),
                processes(trainer["devices"]),
                {
                    "MEDVISION_SWEEP": folder.name,
                    "MEDVISION_JOB": str(n),
                    "MEDVISION_TAGS": json.dumps(words),
                },
            )
        )
    return result


def _show(folder: Path, jobs: Sequence[Job], outcomes: dict[int, Outcome]) -> None:
    rows = []
    for job in jobs:
        of = outcomes.get(job.number, Outcome("not run"))
        name, value = of.result or ("-", None)
        rows.append([str(job.number), job.words, of.state, name, "-" if value is None else f"{value:.4f}"])
    print_rows(f"jobs of {folder}", ["job", "what", "state", "metric", "value"], rows, words=(0, 1, 2, 3))


def _compare(folder: Path, configs: Sequence[dict[str, Any]]) -> None:
    """Compares what is finished, where there are two variants or more."""
    if len(configs) < 2:
        return
    from medvision.compare import compare_folders
    from medvision.comparison.variants import grouped

    if len(grouped(configs)) < 2:
        return
    try:
        compare_folders([folder])
    except MedvisionError as error:
        log.warning("not compared: %s", error)
