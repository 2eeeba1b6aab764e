"""How launchers run jobs: how many at once, on what, what is told; Ray on a cluster of two nodes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate

from medvision import cli
from medvision.errors import MedvisionError
from medvision.launchers import InTurn, Joblib, Ray, Slurm, engines
from medvision.launchers.jobs import LOG, THREADS, Outcome
from medvision.runs import RunFolder


class Watch:
    def __init__(self, stop_after=None):
        self.stop, self.told, self.outcomes, self._stop_after = threading.Event(), [], {}, stop_after

    def started(self, job):
        self.told.append(("started", job.number))

    def ended(self, job, outcome):
        self.told.append(("ended", job.number))
        self.outcomes[job.number] = outcome
        if len(self.outcomes) == self._stop_after:
            self.stop.set()


@pytest.fixture
def run():
    """A run that takes a moment and notes when it ran, and with what."""
    log = []

    def run(folder, environment, echo=False, stop=None, hold=(), cwd=None):
        log.append(entry := {"job": int(folder.name), "echo": echo, "began": time.monotonic(), **environment})
        time.sleep(0.2)
        entry["ended"] = time.monotonic()
        if environment["JOB"] == "1":
            raise OSError("disk full")
        return Outcome("finished", seconds=0.2)

    run.log = log
    return run


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine of 8 processors and two GPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(engines, "visible", lambda: ["a", "b"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)


CHOICES = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "conf" / "launcher").glob("*.yaml"))


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_a_launcher_with_its_own_defaults(name):
    made = instantiate(cli.compose("train", [f"launcher={name}"]).launcher)
    assert made == type(made)() and callable(made.launch) and made.echo is (name == "in_turn")
    assert type(made).__name__.lower() == name.replace("_", "")


def at_once(log):
    return max(sum(one["began"] <= entry["began"] < one["ended"] for one in log) for entry in log)


def test_in_turn_one_after_the_other_and_a_failure_stops_none(jobs, run):
    watch = Watch()
    InTurn().launch(jobs(3), watch, run)
    assert watch.told == [(what, n) for n in range(3) for what in ("started", "ended")]
    assert [of.state for of in watch.outcomes.values()] == ["finished", "failed", "finished"]
    assert watch.outcomes[1].reason == "OSError: disk full"
    assert at_once(run.log) == 1 and all(entry["echo"] for entry in run.log)
    assert not any(name in entry for entry in run.log for name in (*THREADS, "CUDA_VISIBLE_DEVICES"))


def test_after_a_stop_no_other_job_begins(jobs, run):
    watch = Watch(stop_after=2)
    InTurn().launch(jobs(4), watch, run)
    assert [*watch.outcomes] == [0, 1]


def test_joblib_several_at_once_with_a_share_of_the_processors(jobs, run):
    watch = Watch()
    Joblib(jobs=3).launch(jobs(7), watch, run)
    assert sorted(watch.outcomes) == [*range(7)] and at_once(run.log) == 3
    assert {entry[name] for entry in run.log for name in THREADS} == {"2"}  # 8 by 3
    assert not any(entry["echo"] for entry in run.log)


def test_the_last_job_has_the_same_share(jobs, run):
    Joblib(jobs=4).launch(jobs(1), Watch(), run)  # as when it began beside others: results depend on it
    assert run.log[0]["OMP_NUM_THREADS"] == "2"


def test_processes_of_one_job_divide_its_share(jobs, run):
    Joblib(jobs=2).launch([*jobs(1), *jobs(2, processes=2)[1:], *jobs(3, processes=9)[2:]], Watch(), run)
    assert [entry["OMP_NUM_THREADS"] for entry in sorted(run.log, key=lambda entry: entry["job"])] == ["4", "2", "1"]
    elsewhere = engines._environment(jobs(1, processes=2)[0], 4)
    assert {elsewhere[name] for name in THREADS} == {"2"} and elsewhere["JOB"] == "0"


def test_a_smaller_number_of_threads_is_kept(jobs, run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Joblib(jobs=2).launch(jobs(2), Watch(), run)
    assert {(entry["OMP_NUM_THREADS"], entry["MKL_NUM_THREADS"]) for entry in run.log} == {("1", "1")}


def test_joblib_gives_each_job_a_gpu_of_its_own(jobs, run):
    Joblib(jobs=4).launch(jobs(5, gpus=1), Watch(), run)
    for gpu in "ab":
        assert at_once([entry for entry in run.log if entry["CUDA_VISIBLE_DEVICES"] == gpu]) == 1
    assert len(run.log) == 5 and at_once(run.log) == 2


def test_a_job_that_needs_more_gpus_than_there_are_is_refused_before_any_begins(jobs, run):
    with pytest.raises(MedvisionError, match=r"trainer.devices asks for 3 GPUs and 2 can be seen here"):
        Joblib().launch([*jobs(1), *jobs(1, gpus=3)], Watch(), run)
    assert run.log == []


def test_no_jobs_at_once_is_refused(jobs, run):
    with pytest.raises(MedvisionError, match=r"launcher.jobs=0: expected 1 or more"):
        Joblib(jobs=0).launch(jobs(1), Watch(), run)


@pytest.mark.parametrize(("launcher", "module", "extra"), [(Ray(), "ray", "ray"), (Slurm(), "submitit", "slurm")])
def test_an_engine_that_is_not_there_is_named(launcher, module, extra, jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MedvisionError, match=rf"needs {module} .*pip install 'medvision\[{extra}\]'"):
        launcher.launch(jobs(1), Watch())


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two processors and one GPU each, none of which is real."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "num_gpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=3, num_gpus=1)
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        yield made
        ray.shutdown()
        made.shutdown()


def test_ray_divides_gpus_of_two_nodes_by_share(cluster, jobs, tmp_path):
    assert len(cluster.list_all_nodes()) == 2

    def run(folder, environment, cwd=None):
        import time

        import ray

        context = ray.get_runtime_context()
        began = time.time()
        time.sleep(0.3)
        seen = (context.get_node_id(), *context.get_accelerator_ids()["GPU"])
        share = context.get_assigned_resources().get("GPU", 0)
        return Outcome(
            "finished", repr((seen, share, began, time.time(), environment["JOB"], environment["OMP_NUM_THREADS"]))
        )

    watches = [Watch(), Watch(), Watch()]
    sweeps = [(Ray(gpus=0.5), jobs(6, gpus=1)), (Ray(), jobs(4, gpus=1)), (Ray(gpus=0.5), jobs(1, gpus=0))]
    threads = [
        threading.Thread(target=launcher.launch, args=(of, watch, run))
        for (launcher, of), watch in zip(sweeps, watches, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    found = [[eval(of.reason) for of in watch.outcomes.values()] for watch in watches]
    assert [len(of) for of in found] == [6, 4, 1]
    assert [{share for _, share, *_ in of} for of in found] == [{0.5}, {1.0}, {0}]
    assert {threads for of in found for *_, threads in of} == {"1"}
    used = [entry for of in found for entry in of if entry[1]]
    assert len({seen for seen, *_ in used}) == 2  # the GPU of each node
    for seen, _, began, *_ in used:
        assert sum(share for other, share, start, end, *_ in used if other == seen and start <= began < end) <= 1


def test_ray_ends_its_jobs_when_asked_to(cluster, jobs, tmp_path):
    def run(folder, environment, cwd=None):
        import time

        (folder / "output.log").write_text("began")
        try:
            for _ in range(1000):
                time.sleep(0.1)
        except BaseException:
            (folder / "ended").touch()
            raise

    watch, made = Watch(), jobs(1)
    thread = threading.Thread(target=Ray().launch, args=(made, watch, run))
    thread.start()
    while not watch.told:
        time.sleep(0.05)
    watch.stop.set()
    thread.join(60)
    assert watch.told == [("started", 0), ("ended", 0)] and watch.outcomes[0].state == "stopped"
    assert (made[0].folder / "ended").exists()


@pytest.mark.parametrize(
    ("launcher", "gpus", "needs"),
    [(Ray(), 3, "1 CPUs and 3 GPUs"), (Ray(), 2, "1 CPUs and 2 GPUs"), (Ray(cpus=4), 0, "4 CPUs and 0 GPUs")],
)
def test_ray_refuses_what_no_node_has(cluster, jobs, launcher, gpus, needs):
    watch = Watch()
    watch.stop.set()  # not to wait for ever
    have = "3 CPUs and 1 GPUs; 3 CPUs and 1 GPUs"
    with pytest.raises(
        MedvisionError, match=rf"job 0 \(seed=0\) needs {needs} of one machine; .* have {have}: ask for"
    ):
        launcher.launch(jobs(1, gpus=gpus), watch)


def test_a_cluster_that_is_not_there_is_named(jobs, monkeypatch):
    def init(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(MedvisionError, match=r"^launcher.address=auto: Could not find any running Ray instance\.$"):
        Ray("auto").launch(jobs(1), Watch())


def test_ray_leaves_sigterm_to_the_sweep(jobs, monkeypatch):
    class Engine:
        is_initialized = shutdown = staticmethod(lambda: None)
        init = staticmethod(lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
        nodes = staticmethod(lambda: [{"Alive": True, "Resources": {}}])

    monkeypatch.setitem(sys.modules, "ray", Engine)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(MedvisionError, match=r"needs 1 CPUs and 0 GPUs of one machine"):
        Ray().launch(jobs(1), Watch())
    after = signal.signal(signal.SIGTERM, before)
    assert after is before


def test_what_is_cancelled_is_not_asked_for_its_result(jobs):
    one, other = jobs(2)
    RunFolder(one.folder).metrics.write_text('{"monitor": {"name": "val/dice", "value": 0.5}}')
    watch, cancelled = Watch(), []
    watch.stop.set()
    pending = {"a": one, "b": other}
    engines._follow(pending, watch, lambda h: h in cancelled, lambda _: pytest.fail("asked"), cancelled.append)
    assert [of.state for of in watch.outcomes.values()] == ["finished", "stopped"]


def test_the_log_is_where_a_start_is_seen(jobs):
    (job,) = jobs(1)
    (job.folder / LOG).write_text("of an earlier time")
    watch, pending, calls = Watch(), {"handle": job}, []

    def done(_):
        calls.append(len(watch.told))
        if len(calls) == 2:
            (job.folder / LOG).write_text("of an earlier time, and now")
        return len(calls) == 4

    engines._follow(pending, watch, done, lambda _: Outcome("finished"), lambda _: None)
    assert calls == [0, 0, 1, 1] and watch.told == [("started", 0), ("ended", 0)]
