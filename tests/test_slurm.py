"""The launcher for Slurm, with one that runs jobs as processes of this machine: whole, killed, interrupted, refused."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medvision.errors import MedvisionError
from medvision.launchers import Slurm, engines
from medvision.launchers.jobs import LOG, THREADS, Outcome

submitit = pytest.importorskip("submitit")


class Watch:
    def __init__(self):
        self.stop, self.begun, self.outcomes = threading.Event(), [], {}

    def started(self, job):
        self.begun.append(job.number)

    def ended(self, job, outcome):
        self.outcomes[job.number] = outcome


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder in which Slurm keeps the jobs of this test, none of which outlives it."""
    commands, folder = tmp_path / "bin", tmp_path / "cluster"
    commands.mkdir()
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct", "scancel"):
        fake = Path(__file__).with_name("fake_slurm.py")
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {fake} {folder} {name} "$@"\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    yield folder
    for job in folder.iterdir():
        subprocess.run(["scancel", job.name], check=True)


@pytest.fixture
def run():
    """A run that notes that it ran, prints, and waits until it may end; that of job 1 breaks then."""

    def run(folder, environment):
        import time

        with (folder / "ran").open("a") as ran:
            ran.write(f"{environment['OMP_NUM_THREADS']} {environment['SLURM_JOB_NAME']}\n")
        (folder / LOG).write_text("printed")
        while not (folder.parent / "go").exists():
            time.sleep(0.02)
        if environment["JOB"] == "1":
            raise RuntimeError("a broken node")
        return Outcome("finished", f"result {environment['JOB']}")

    return run


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ran(job):
    return (job.folder / "ran").read_text().splitlines() if (job.folder / "ran").exists() else []


@pytest.mark.parametrize("where", ["slurm", "local"])
def test_jobs_run_in_processes_of_their_own(jobs, run, cluster, where):
    made, watch = [*jobs(3), *jobs(4, processes=3, gpus=1)[3:]], Watch()
    (made[0].folder.parent / "go").touch()
    Slurm(where, cpus=6, minutes=5).launch(made, watch, run)
    assert [watch.outcomes[n].state for n in range(4)] == ["finished", "failed", "finished", "finished"]
    assert watch.outcomes[2] == Outcome("finished", "result 2") and "a broken node" in watch.outcomes[1].reason
    assert sorted(watch.begun) == [0, 1, 2, 3]
    assert [ran(job) for job in made] == [["6 interactive"]] * 3 + [["2 interactive"]]
    submitted = [job.name.partition("_")[0] for job in cluster.iterdir()]
    assert len(submitted) == (4 if where == "slurm" else 0)
    assert len({*submitted}) == (2 if where == "slurm" else 0)  # an array, and what needs a GPU


def test_jobs_that_live_on_are_waited_for_and_not_submitted_again(jobs, run, cluster, caplog):
    caplog.set_level("INFO", "medvision")
    made = jobs(5)
    first = multiprocessing.get_context("fork").Process(target=Slurm(jobs=2).launch, args=(made[:4], Watch(), run))
    first.start()
    wait_for(lambda: ran(made[0]) and ran(made[1]))
    first.kill()
    first.join()
    assert sorted(job.read_text().split()[0] for job in cluster.iterdir()) == ["PENDING"] * 2 + ["RUNNING"] * 2
    (last,) = [job.name for job in cluster.iterdir() if job.name.endswith("_3")]
    subprocess.run(["scancel", last], check=True)

    watch = Watch()
    again = threading.Thread(target=Slurm(jobs=2).launch, args=(made, watch, run))
    again.start()
    wait_for(lambda: ran(made[3]) and ran(made[4]))  # one that Slurm no longer has, and a new one
    assert not ran(made[2])
    (made[0].folder.parent / "go").touch()
    again.join(60)
    array = last.partition("_")[0]
    assert f"in Slurm still: job 0 as {array}_0, job 1 as {array}_1, job 2 as {array}_2" in caplog.messages
    assert {n: (of.state, of.reason) for n, of in watch.outcomes.items() if n != 1} == {
        n: ("finished", f"result {n}") for n in (0, 2, 3, 4)
    }
    assert watch.outcomes[1].state == "failed" and "a broken node" in watch.outcomes[1].reason
    assert [len(ran(job)) for job in made] == [1] * 5


def test_a_stop_cancels_jobs_of_an_earlier_launch_too(jobs, run, cluster):
    made, watch = jobs(2), Watch()
    first = multiprocessing.get_context("fork").Process(target=Slurm(jobs=1).launch, args=(made, Watch(), run))
    first.start()
    wait_for(lambda: ran(made[0]))
    first.kill()
    first.join()
    again = threading.Thread(target=Slurm(jobs=1).launch, args=(made, watch, run))
    again.start()
    watch.stop.set()
    again.join(60)
    assert {job.read_text() for job in cluster.iterdir()} == {"CANCELLED"} and not ran(made[1])
    assert {of.state for of in watch.outcomes.values()} == {"stopped"}


def test_a_queue_that_does_not_tell_is_no_empty_one(jobs, run, cluster):
    (jobs(1)[0].folder.parent / "slurm").mkdir()
    (cluster.parent / "bin" / "squeue").write_text("#!/bin/sh\necho cannot contact the controller >&2; exit 1")
    with pytest.raises(MedvisionError, match=r"squeue does not tell \(cannot contact the controller\)"):
        Slurm().launch(jobs(1), Watch(), run)
    assert [*cluster.iterdir()] == []


def test_what_sbatch_refuses_is_told(jobs, run, cluster):
    (cluster.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2; exit 1")
    with pytest.raises(MedvisionError, match=r"^launcher=slurm: sbatch: error: invalid partition$"):
        Slurm(partition="x").launch(jobs(2), Watch(), run)


def test_what_is_asked_of_slurm(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launcher = Slurm(jobs=3, minutes=90, cpus=6, memory_gb=12, partition="short", options={"account": "lab"})
    executor = launcher.executor(tmp_path / "ablation" / "slurm", 2)._executor
    script = executor._make_submission_file_text("python job", "id").splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in script if line.startswith("#SBATCH")}
    assert {
        "job-name=ablation",
        "time=90",
        "cpus-per-task=6",
        "gpus-per-node=2",
        "mem=12GB",
        "nodes=1",
        "ntasks-per-node=1",
        "partition=short",
        "account=lab",
        "signal=USR2@90",
        "open-mode=append",
    } <= asked
    assert executor.parameters["array_parallelism"] == 3
    assert "srun" in script[-1] and script[-1].endswith("python job")


def test_slurm_is_asked_for_the_gpus_of_a_job(jobs):
    assert [Slurm()._count(job) for job in (*jobs(1), *jobs(1, gpus=2), *jobs(1, gpus=(1, 3)))] == [0, 2, 2]
    assert [Slurm(gpus=0)._count(job) for job in jobs(1, gpus=2)] == [0]
    with pytest.raises(MedvisionError, match=r"trainer.devices=-1 does not say how many"):
        Slurm()._count(*jobs(1, gpus=-1))


def test_slurm_that_is_not_there_is_named(jobs, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MedvisionError, match=r"launcher=slurm: .*run it where sbatch and srun are"):
        Slurm().launch(jobs(1), Watch())


def test_a_job_goes_on_after_its_time_limit(jobs):
    task = engines._Requeued(lambda folder, environment: Outcome("finished"), jobs(1)[0].folder, {})
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is task
    assert task().state == "finished"
