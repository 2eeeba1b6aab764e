"""Where and when the jobs of a sweep run: in turn, several at once, on a Ray cluster, by Slurm. Imports no torch."""

import importlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, ClassVar, Protocol

from medvision.errors import MedvisionError
from medvision.launchers.gpus import Wish, check, held, visible
from medvision.launchers.jobs import GRACE, LOG, Outcome, finished, reason, run_job, share_of_cpus, threads

log = logging.getLogger(__name__)

Run = Callable[..., Outcome]
CARRIED = ("MEDVISION_", "WANDB_", "MLFLOW_", "PYTHONPATH", "TORCH_HOME", "HF_")
"""Beginnings of the variables that a job on another machine has from here."""


@dataclass(frozen=True, eq=False)
class Job:
    """A prepared run folder that is to be trained.

    Attributes:
        number: Its number in the sweep.
        folder: The run folder.
        words: What makes it differ from the other jobs.
        gpus: The GPUs that it needs where there are any.
        processes: How many it trains by; they divide its processors.
        environment: Variables of its process.
    """

    number: int
    folder: Path
    words: str
    gpus: Wish = 0
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


class Watch(Protocol):
    """Who is told how the jobs fare; calls come from several threads.

    Attributes:
        stop: Once set, running jobs are ended and no others begin.
    """

    stop: Event

    def started(self, job: Job) -> None:
        """A job has begun."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job that began has ended."""


@dataclass
class InTurn:
    """One job after the other, with the whole machine and what it prints on the terminal.

    Attributes:
        stop_on_failure: Whether a failed job ends the sweep.
    """

    stop_on_failure: bool = False
    echo: ClassVar[bool] = True

    def launch(self, jobs: Sequence[Job], watch: Watch, run: Run = run_job) -> None:
        """Runs jobs; those that did not begin when `watch.stop` was set are left out.

        Args:
            jobs: What to run.
            watch: Is told.
            run: What runs a job and waits for it.

        Raises:
            MedvisionError: If the engine is not installed, or a job can never run here.
        """
        here = _gpus_for(jobs)
        for job in jobs:
            _run_here(job, here, {}, watch, run, echo=True)


@dataclass
class Joblib:
    """Several jobs at once on this machine; its processors are divided between them.

    Attributes:
        jobs: How many at once; of those that need a GPU no more than there are free ones.
        stop_on_failure: Whether a failed job ends the sweep.
    """

    jobs: int = 2
    stop_on_failure: bool = False
    echo: ClassVar[bool] = False

    def launch(self, jobs: Sequence[Job], watch: Watch, run: Run = run_job) -> None:
        """As `InTurn.launch`."""
        if self.jobs < 1:
            raise MedvisionError(f"launcher.jobs={self.jobs}: expected 1 or more")
        joblib = _engine("joblib", "joblib")
        here = _gpus_for(jobs)
        # threads: each only waits for the process that is its job
        joblib.Parallel(n_jobs=self.jobs, backend="threading", batch_size=1)(
            joblib.delayed(_run_here)(job, here, share_of_cpus(self.jobs * job.processes), watch, run, echo=False)
            for job in jobs
        )


@dataclass
class Ray:
    """Tasks of a Ray cluster, or of one that is started on this machine.

    Attributes:
        address: Of the cluster, as `auto`; None starts one here.
        cpus: Processors of a job.
        gpus: GPUs of a job, as 0.5 for two jobs on each; None for what its `trainer.devices` says.
        stop_on_failure: Whether a failed job ends the sweep.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float | None = None
    stop_on_failure: bool = False
    echo: ClassVar[bool] = False

    def launch(self, jobs: Sequence[Job], watch: Watch, run: Run = run_job) -> None:
        """As `InTurn.launch`; the folder of the sweep has to be there on all machines of the cluster."""
        ray = _engine("ray", "ray")
        begun_here = not ray.is_initialized()
        if begun_here:
            asked_to_stop = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level="error")
            except ConnectionError as error:
                raise MedvisionError(f"launcher.address={self.address}: {error}") from error
            signal.signal(signal.SIGTERM, asked_to_stop)  # in the place of which Ray has put one that exits
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            shares = [self._share(job, machines) for job in jobs]
            task, place = ray.remote(max_retries=0)(run), Path.cwd()
            pending = {
                task.options(num_cpus=self.cpus, num_gpus=share, name=f"job {job.number}").remote(
                    job.folder, _environment(job, int(self.cpus)), cwd=place
                ): job
                for job, share in zip(jobs, shares, strict=True)
            }
            _follow(
                pending, watch, lambda ref: bool(ray.wait([ref], timeout=0)[0]), ray.get, lambda ref: ray.cancel(ref)
            )
        finally:
            if begun_here:
                ray.shutdown()

    def _share(self, job: Job, machines: Sequence[Mapping[str, float]]) -> float:
        there = max(int(machine.get("GPU", 0)) for machine in machines)
        wished = len(job.gpus) if isinstance(job.gpus, tuple) else there if job.gpus < 0 else job.gpus
        share = wished if self.gpus is None else self.gpus if wished else 0
        needs = {"CPU": self.cpus, "GPU": share if there else 0}
        if not any(all(machine.get(name, 0) >= of for name, of in needs.items()) for machine in machines):
            have = "; ".join(
                " and ".join(f"{machine.get(name, 0):g} {name}s" for name in needs) for machine in machines
            )
            raise MedvisionError(  # Ray would wait for ever
                f"job {job.number} ({job.words}) needs {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs of one machine; "
                f"those of the cluster have {have}: ask for fewer"
            )
        return needs["GPU"]


@dataclass
class Slurm:
    """Jobs of Slurm, by submitit, one array for those that need the same; requeued at their time limit, three times.

    Attributes:
        cluster: `slurm`, or `local` to try it out with processes on this machine.
        jobs: How many at once; None for what Slurm gives.
        minutes: Time limit of a job, which then goes on in another.
        cpus: Processors of a job.
        memory_gb: Memory of a job; None for the cluster's own default.
        gpus: GPUs of a job; None for what its `trainer.devices` says.
        partition: Where to; None for the cluster's own default.
        options: More of sbatch, as {account: name}.
        stop_on_failure: Whether a failed job ends the sweep.
    """

    cluster: str = "slurm"
    jobs: int | None = None
    minutes: int = 1440
    cpus: int = 4
    memory_gb: float | None = None
    gpus: int | None = None
    partition: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stop_on_failure: bool = False
    echo: ClassVar[bool] = False

    def executor(self, folder: Path, count: int) -> Any:
        """The executor of submitit for jobs of `count` GPUs, which keeps its files in `folder`."""
        submitit = _engine("submitit", "slurm")
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        except RuntimeError as error:
            raise MedvisionError(f"launcher=slurm: {error}; run it where sbatch and srun are") from error
        executor.update_parameters(
            name=folder.parent.name[:40],
            timeout_min=self.minutes,
            cpus_per_task=self.cpus,
            tasks_per_node=1,
            nodes=1,
            **({"mem_gb": self.memory_gb} if self.memory_gb else {}),
            **({"gpus_per_node": count} if count else {}),
            **({"slurm_partition": self.partition} if self.partition else {}),
            **({"slurm_array_parallelism": self.jobs} if self.jobs else {}),
            slurm_additional_parameters=dict(self.options),
        )
        return executor

    def launch(self, jobs: Sequence[Job], watch: Watch, run: Run = run_job) -> None:
        """As `InTurn.launch`; jobs live on in Slurm if this process is killed, and the next launch waits for them."""
        submitit, folder = _engine("submitit", "slurm"), jobs[0].folder.parent / "slurm"
        pending = self._left(submitit, jobs, folder)
        by_gpus: dict[int, list[Job]] = {}
        for job in jobs:
            if job not in pending.values():
                by_gpus.setdefault(self._count(job), []).append(job)
        interactive = {"SLURM_JOB_NAME": "interactive"}  # so Lightning starts its own processes
        for count, group in by_gpus.items():
            executor = self.executor(folder, count)
            try:
                with executor.batch():
                    handles = [
                        executor.submit(_Requeued(run, job.folder, _environment(job, self.cpus) | interactive))
                        for job in group
                    ]
            except submitit.core.utils.FailedJobError as error:
                raise MedvisionError(f"launcher=slurm: {str(error).strip()}") from error
            pending |= dict(zip(handles, group, strict=True))
        _follow(pending, watch, lambda h: h.done(), lambda h: h.result(), lambda h: h.cancel(check=False))

    def _left(self, submitit: Any, jobs: Sequence[Job], folder: Path) -> dict[Any, Job]:
        """Jobs that an earlier launch has submitted and Slurm still has, waiting or running, with their handles."""
        if self.cluster != "slurm" or not folder.exists():
            return {}
        asked = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        try:
            queue = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip()
            raise MedvisionError(
                f"launcher=slurm: jobs of an earlier start may still be in the queue, but squeue does not tell ({said})"
                "; start again where it does"
            ) from error
        left = {}
        for number in queue:
            if submitit.core.utils.JobPaths(folder, number).submitted_pickle.exists():
                handle = submitit.SlurmJob(folder, number)
                left[handle.submission().function.folder] = handle
        found = {left[job.folder]: job for job in jobs if job.folder in left}
        if found:
            log.info("in Slurm still: %s", ", ".join(f"job {job.number} as {h.job_id}" for h, job in found.items()))
        return found

    def _count(self, job: Job) -> int:
        wished = len(job.gpus) if isinstance(job.gpus, tuple) else job.gpus
        if wished < 0 and self.gpus is None:
            raise MedvisionError(
                "trainer.devices=-1 does not say how many GPUs to ask of Slurm: launcher.gpus=<number>"
            )
        return 0 if not wished else wished if self.gpus is None else self.gpus


@dataclass(frozen=True)
class _Requeued:
    """A job as submitit calls it, and again after its time limit: a run folder goes on by itself."""

    run: Run
    folder: Path
    environment: Mapping[str, str]

    def __call__(self) -> Outcome:
        return self.run(self.folder, self.environment)

    def checkpoint(self) -> Any:
        return importlib.import_module("submitit").helpers.DelayedSubmission(self)


def _engine(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MedvisionError(
            f"this launcher needs {module} ({error}): pip install 'medvision[{extra}]', or pip install {module}"
        ) from error


def _environment(job: Job, cpus: int) -> dict[str, str]:
    """What a job on another machine has of the environment here, with its share of so many processors."""
    carried = {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}
    return {**carried, **threads(max(1, cpus // job.processes)), **job.environment}


def _gpus_for(jobs: Sequence[Job]) -> list[str]:
    """The GPUs of this machine, if any job wants one."""
    found = visible() if any(job.gpus for job in jobs) else []
    for job in jobs:
        check(job.gpus, found)
    return found


def _run_here(
    job: Job, here: Sequence[str], environment: Mapping[str, str], watch: Watch, run: Run, echo: bool
) -> None:
    with held(job.gpus, here, watch.stop) as (seen, locks):
        if watch.stop.is_set():
            return
        watch.started(job)
        try:
            outcome = run(job.folder, {**environment, **job.environment, **seen}, echo, watch.stop, locks)
        except Exception as error:  # as a full disk; the other jobs go on
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        watch.ended(job, outcome)


def _follow(
    pending: dict[Any, Job],
    watch: Watch,
    done: Callable[[Any], bool],
    result: Callable[[Any], Outcome],
    cancel: Callable[[Any], None],
) -> None:
    """Waits for jobs that run elsewhere; that one has begun is seen by what it prints."""

    def printed(job: Job) -> int:
        path = job.folder / LOG
        return path.stat().st_size if path.exists() else 0

    before, begun = {job.number: printed(job) for job in pending.values()}, set[int]()
    deadline = None
    try:
        while pending and (deadline is None or time.monotonic() < deadline):
            for handle, job in [*pending.items()]:
                over = done(handle)
                if job.number not in begun and (over or printed(job) > before[job.number]):
                    begun.add(job.number)
                    watch.started(job)
                if over:
                    del pending[handle]
                    watch.ended(job, _cancelled(job) if watch.stop.is_set() else _result(result, handle))
            if watch.stop.is_set() and deadline is None:
                deadline = time.monotonic() + 2 * GRACE
                for handle in pending:
                    cancel(handle)
            time.sleep(0.2)
    finally:
        for handle in pending:
            cancel(handle)


def _result(result: Callable[[Any], Outcome], handle: Any) -> Outcome:
    try:
        return result(handle)
    except Exception as error:  # of the engine, as a machine that was lost
        return Outcome("failed", reason(0, str(error) or type(error).__name__))


def _cancelled(job: Job) -> Outcome:
    """What became of a job, without waiting for an answer of the engine, which may never come."""
    return finished(job.folder) or Outcome("stopped", "cancelled")
