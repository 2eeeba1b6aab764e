"""Which GPUs a job sees, and that no other has them: by threads, by processes, by what inherits the lock."""

import itertools
import json
import subprocess
import sys
import threading
import time
from threading import Event

import pytest

from medvision.errors import MedvisionError
from medvision.launchers.gpus import check, chosen, held, processes, visible, wish

LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa-1)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb-2)
  MIG 3g.20gb     Device  0: (UUID: MIG-cccc-3)
  MIG 3g.20gb     Device  1: (UUID: MIG-dddd-4)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-eeee-5)
"""
ALL = ["GPU-aaaa-1", "MIG-cccc-3", "MIG-dddd-4", "GPU-eeee-5"]


@pytest.fixture(autouse=True)
def locks(tmp_path, monkeypatch):
    """The locks of this test lie in a folder of its own, also for processes that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.mark.parametrize(
    ("asked", "listed", "names"),
    [
        (None, LISTED, ALL),
        (None, "", []),
        ("2,0", LISTED, ["GPU-eeee-5", "GPU-aaaa-1"]),
        ("1", LISTED, ["MIG-cccc-3", "MIG-dddd-4"]),
        ("GPU-ee, MIG-dddd-4", LISTED, ["GPU-eeee-5", "MIG-dddd-4"]),
        ("0,7,2", LISTED, ["GPU-aaaa-1"]),  # CUDA stops at one that is not there
        ("0,-1,2", LISTED, ["GPU-aaaa-1"]),
        ("", LISTED, []),
        ("-1", LISTED, []),
        ("0,1", "", ["0", "1"]),
    ],
)
def test_what_programs_see(asked, listed, names):
    assert chosen(asked, listed) == names


def test_what_is_set_is_respected(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible() == ALL
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert visible() == ["GPU-eeee-5"]


@pytest.mark.parametrize(
    ("accelerator", "devices", "wished"),
    [
        ("cpu", 2, 0),
        ("auto", 1, 1),
        ("gpu", "2", 2),
        ("cuda", "auto", -1),
        ("auto", -1, -1),
        ("gpu", [1, 3], (1, 3)),
        ("gpu", "0,2", (0, 2)),
    ],
)
def test_what_a_trainer_needs(accelerator, devices, wished):
    assert wish(accelerator, devices) == wished


@pytest.mark.parametrize(("devices", "count"), [(1, 1), ("2", 2), ([0, 3], 2), ("0,2,3", 3), ("auto", 1), (-1, 1)])
def test_how_many_processes_a_trainer_has(devices, count):
    assert processes(devices) == count


def test_more_than_there_are_is_refused():
    check(2, ["a", "b"])
    check(3, [])  # trains on the CPU, or says itself that it cannot
    with pytest.raises(MedvisionError, match=r"asks for 3 GPUs and 2 can be seen here \(a, b\)"):
        check(3, ["a", "b"])
    with pytest.raises(MedvisionError, match="asks for 3 GPUs"):
        check((0, 2), ["a", "b"])


def test_held_are_as_many_as_wished_or_those_that_are_named():
    stop = Event()
    with held(1, ["a", "b", "c"], stop) as (one, locks), held(-1, [], stop) as none, held(0, ["a"], stop) as cpu:
        assert one == {"CUDA_VISIBLE_DEVICES": "a"} and len(locks) == 1
        assert none == cpu == ({}, [])
        with held(2, ["a", "b", "c"], stop) as (two, _):
            assert two == {"CUDA_VISIBLE_DEVICES": "b,c"}
    with held((2,), ["a", "b", "c"], stop) as (named, _), held(2, ["a", "b", "c"], stop) as (others, _):
        assert named == {"CUDA_VISIBLE_DEVICES": "a,b,c"}  # the trainer picks its own by their places
        assert others == {"CUDA_VISIBLE_DEVICES": "a,b"}


def test_waiting_ends_when_asked_to():
    stop = Event()
    with held(1, ["a"], Event()):
        threading.Timer(0.2, stop.set).start()
        with held(1, ["a"], stop) as found:
            assert found == ({}, [])


SWEEP = """
import json, sys, time
from threading import Event
from medvision.launchers.gpus import held
log = []
for count in (1, 2, 1, 1):
    with held(count, ["a", "b"], Event()) as (seen, _):
        began = time.monotonic()
        time.sleep(0.15)
        log.append((seen["CUDA_VISIBLE_DEVICES"].split(","), began, time.monotonic()))
print(json.dumps(log))
"""


def test_two_sweeps_never_have_the_same():
    processes = [subprocess.Popen([sys.executable, "-c", SWEEP], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    logs = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
    assert [[len(names) for names, *_ in log] for log in logs] == [[1, 2, 1, 1]] * 3
    for gpu in "ab":
        times = sorted((began, ended) for log in logs for names, began, ended in log if gpu in names)
        assert len(times) >= 3
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


def test_a_job_that_outlives_its_sweep_keeps_its_gpu():
    with held(1, ["a"], Event()) as (_, locks):
        child = subprocess.Popen(["sleep", "0.7"], pass_fds=locks)
    began = time.monotonic()
    with held(1, ["a"], Event()) as (seen, _):
        assert child.poll() is not None or time.monotonic() - began > 0.4
    assert seen == {"CUDA_VISIBLE_DEVICES": "a"}
    assert child.wait() == 0
