"""A job's process: how it ends and why, what it sees, and that it does not outlive who waits for it."""

import signal
import subprocess
import sys
import threading
import time
from threading import Event

import psutil
import pytest

from medvision.launchers import jobs
from medvision.launchers.jobs import LOG, finished, reason, run_job, share_of_cpus, threads

RESULT = '{{"monitor": {{"name": "val/dice", "value": 0.5}}}}'
FINISH = f'open("{{folder}}/metrics.json", "w").write({RESULT!r})'


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`program("print(1)")`: a run folder, for which that is run in the place of the training."""

    def make(code):
        monkeypatch.setattr(jobs, "resume_command", lambda folder: ["-c", code.format(folder=folder)])
        return tmp_path

    return make


def test_a_finished_job_has_the_metric_that_chose_its_epoch(program, capsys):
    folder = program(f"print('epoch 1'); {FINISH}")
    outcome = run_job(folder, echo=True)
    assert (outcome.state, outcome.reason, outcome.result) == ("finished", "", ("val/dice", 0.5))
    assert 0 < outcome.seconds < 60
    assert capsys.readouterr().out == "epoch 1\n"
    assert finished(folder).result == ("val/dice", 0.5) and finished(folder / "other") is None


def test_starts_are_added_to_the_log_and_the_reason_is_of_the_last(program):
    run_job(program("raise ValueError('first')"))
    outcome = run_job(program("import sys; print('error: second\\n(more)', file=sys.stderr); sys.exit(1)"))
    assert (outcome.state, outcome.reason) == ("failed", "second")
    log = (program("") / LOG).read_text()
    assert log.count("--- ") == 2 and "ValueError: first" in log and "error: second" in log


@pytest.mark.parametrize(
    ("code", "printed", "said"),
    [
        (-9, "epoch 1", "killed by signal 9, perhaps out of memory"),
        (-15, "", "killed by signal 15"),
        (1, "error: no such file\n(traceback=true shows where)", "no such file"),
        (
            1,
            "Traceback\n  x\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nmore",
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
        ),
        (1, "Traceback\n  x\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        (1, "error in process 1: no such file\n(traceback=true shows where)", "no such file"),
        (3, "something else\n\n", "something else"),
        (3, "", "exit code 3"),
    ],
)
def test_why_a_job_failed(code, printed, said):
    assert reason(code, printed) == said


def test_a_job_killed_by_the_system(program):
    outcome = run_job(program("import os; os.kill(os.getpid(), 9)"))
    assert (outcome.state, outcome.reason) == ("failed", "killed by signal 9, perhaps out of memory")


def test_a_job_without_results_has_failed(program):
    assert run_job(program("print('bye')")).state == "failed"


def test_a_job_has_its_environment_and_place(program, tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    code = f"import os; print(os.environ['X'], os.environ['Y'], os.getcwd(), flush=True); {FINISH}"
    monkeypatch.setenv("X", "here")
    monkeypatch.setenv("Y", "here")
    assert run_job(program(code), {"Y": "there"}, cwd=tmp_path / "place").state == "finished"
    assert f"here there {tmp_path / 'place'}\n" in (tmp_path / LOG).read_text()


def test_a_job_hears_an_interrupt_also_where_a_shell_has_the_sweep_ignore_it_or_ray_blocks_it(program, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    heard = "signal.getsignal(2) == signal.default_int_handler, signal.pthread_sigmask(signal.SIG_BLOCK, [])"
    try:
        run_job(program(f"import signal; print({heard})"))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / LOG).read_text().endswith("True set()\n")


def wait_for_lines(log, count):
    deadline = time.monotonic() + 100
    while not log.exists() or log.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return log.read_text().splitlines()


def wait_for_end(pid):
    """Waits until a process has ended, if nobody takes note of it as a zombie."""
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_stop_ends_a_job_even_one_that_does_not_listen(program, monkeypatch, deaf):
    monkeypatch.setattr(jobs, "GRACE", 1.0)
    lines = ["import signal, subprocess, time", "child = subprocess.Popen(['sleep', '1000'])"]
    lines += ["signal.signal(signal.SIGINT, signal.SIG_IGN)"] if deaf else []
    folder = program("; ".join([*lines, "print(child.pid, flush=True)", "time.sleep(1000)"]))
    stop = Event()
    threading.Thread(target=lambda: wait_for_lines(folder / LOG, 2) and stop.set()).start()
    outcome = run_job(folder, stop=stop)
    assert outcome.state == "stopped"
    assert outcome.reason == ("killed by signal 9, perhaps out of memory" if deaf else "killed by signal 2")
    wait_for_end(int((folder / LOG).read_text().splitlines()[1]))  # what it started


def test_a_job_dies_with_who_waits_for_it(tmp_path):
    code = (
        "from pathlib import Path; from medvision.launchers import jobs; "
        "training = 'import os, time; print(os.getpid(), flush=True); time.sleep(1000)'; "
        "jobs.resume_command = lambda folder: ['-c', training]; "
        f"jobs.run_job(Path({str(tmp_path)!r}))"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code])
    pid = int(wait_for_lines(tmp_path / LOG, 2)[1])
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    wait_for_end(pid)


def test_processors_are_shared(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    for name in jobs.THREADS:
        monkeypatch.delenv(name, raising=False)
    assert [share_of_cpus(n)["OMP_NUM_THREADS"] for n in (1, 2, 4, 9)] == ["6", "3", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(4) == dict.fromkeys(jobs.THREADS, "2")  # torch obeys that of MKL before that of OpenMP
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert threads(4) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
