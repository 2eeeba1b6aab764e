import json
import math
import os
import signal
import time

import pytest

from medvision import study as module
from medvision.errors import MedvisionError
from medvision.study import Dimension, Report, Study

SPACE = [
    Dimension("optimizer.lr", low=1e-4, high=1e-2, log=True),
    Dimension("model.encoder", choices=("resnet18", "resnet34")),
    Dimension("data.batch_size", low=8, high=32, step=8),
]


def open_study(journal, seed=0, rungs=(1, 3), **asked):
    return Study(journal, SPACE, True, seed, rungs, {"model": "unet"} | asked)


def quality(params):
    """Best at a rate of 1e-3."""
    return 0.9 - 0.1 * (math.log10(float(params["optimizer.lr"])) + 3) ** 2


def search(journal, trials, stop_after=None, seed=0):
    """Trials of three epochs; the process is gone after so many, in the midst of the next."""
    study = open_study(journal, seed)
    done = 0
    while trial := study.next(trials):
        report = Report(journal, trial.number)
        for epoch in range(1, 4):
            if report(epoch, quality(trial.params) * epoch / 3):
                study.prune(trial.number)
                break
            if done == stop_after and epoch == 2:
                return study.trials
        else:
            study.complete(trial.number, quality(trial.params))
        done += 1
    return study.trials


def test_trials_lie_in_the_space_and_get_better(tmp_path):
    study = open_study(tmp_path / "journal", seed=3, rungs=None)
    while trial := study.next(25):
        study.complete(trial.number, quality(trial.params))
    trials = study.trials
    assert [trial.number for trial in trials] == [*range(25)]
    for trial in trials:
        assert 1e-4 <= float(trial.params["optimizer.lr"]) <= 1e-2
        assert trial.params["model.encoder"] in ("resnet18", "resnet34")
        assert trial.params["data.batch_size"] in ("8", "16", "24", "32")
    distance = [abs(math.log10(float(trial.params["optimizer.lr"])) + 3) for trial in trials]
    assert (
        sum(distance[10:]) / 15 < 0.4
    )  # ten are random; of random ones the mean is 0.5 with a standard error of 0.075
    assert study.best.value == max(trial.value for trial in trials)
    shares = study.importance()
    assert next(iter(shares)) == "optimizer.lr" and shares["optimizer.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1) and shares.keys() == {d.name for d in SPACE}


def test_a_search_that_was_stopped_proposes_what_it_would_have(tmp_path):
    whole = search(tmp_path / "whole", 12)
    assert {trial.state for trial in whole} == {"complete", "pruned"}
    stopped = search(tmp_path / "stopped", 12, stop_after=3)
    assert [trial.state for trial in stopped].count("running") == 1
    search(tmp_path / "stopped", 12, stop_after=5)
    assert search(tmp_path / "stopped", 12) == whole
    assert search(tmp_path / "stopped", 12) == whole  # nothing is left to do
    assert len({str(trial.params) for trial in whole}) == 12
    assert search(tmp_path / "other", 12, seed=1) != whole


def test_successive_halving_against_its_rule(tmp_path):
    """At 1, 3, 9, ... epochs the best third of those that came there goes on, of one or two the best."""
    study = open_study(tmp_path / "journal", rungs=(1, 3))
    values = [0.5, 0.4, 0.6, 0.55, 0.7, 0.65]
    stopped = [Report(tmp_path / "journal", study.next(6).number)(1, value) for value in values]
    expected = []
    for n, value in enumerate(values):
        there = sorted(values[: n + 1], reverse=True)
        expected.append(value < there[max(1, (n + 1) // 3) - 1])
    assert stopped == expected == [False, True, False, True, False, False]
    assert not Report(tmp_path / "journal", 0)(2, 0.0)  # between two rungs


def test_an_epoch_that_is_repeated_keeps_its_value(tmp_path):
    study = open_study(tmp_path / "journal")
    study.next(1)
    report = Report(tmp_path / "journal", 0)
    assert [report(1, 0.5), report(2, 0.6)] == [False, False]
    resumed = Report(tmp_path / "journal", 0)
    lines = len((tmp_path / "journal").read_text().splitlines())
    assert [resumed(1, 0.1), resumed(2, 0.1)] == [False, False]
    assert len((tmp_path / "journal").read_text().splitlines()) == lines
    assert not resumed(3, 0.7)
    assert study.trials[0].epochs == {1: 0.5, 2: 0.6, 3: 0.7}


def test_one_that_diverged_is_pruned_and_one_that_failed_has_its_reason(tmp_path):
    study = open_study(tmp_path / "journal")
    study.next(3), study.next(3)
    assert Report(tmp_path / "journal", 0)(1, math.nan)
    study.prune(0)
    study.fail(1, "out of memory")
    first, second = study.trials
    assert (first.state, first.value, first.epochs) == ("pruned", None, {1: None})
    assert (second.state, second.reason) == ("fail", "out of memory")
    assert study.best is None and study.importance() == {}
    study.complete(study.next(3).number, 0.25)
    assert study.best == study.trials[2] and study.next(3) is None


def test_without_rungs_none_is_pruned(tmp_path):
    study = open_study(tmp_path / "journal", rungs=None)
    for value in (0.9, 0.1, math.nan):
        assert not Report(tmp_path / "journal", study.next(3).number)(9, value)


def test_another_search_in_the_folder_is_refused(tmp_path):
    journal = tmp_path / "found" / "journal"
    journal.parent.mkdir()
    open_study(journal, seed=0, **{"optimizer.lr": "interval(1,2)"})
    with pytest.raises(MedvisionError) as refused:
        open_study(journal, **{"optimizer.lr": "interval(1,3)", "data.fold": "1"})
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{journal.parent} holds a search for something else:"
    assert lines[1:3] == ["  data.fold: not there -> 1", "  optimizer.lr: interval(1,2) -> interval(1,3)"]
    assert "hydra.sweep.dir=<folder>" in lines[3]


def test_a_killed_writer_leaves_neither_lock_nor_half_a_line(tmp_path):
    journal = tmp_path / "journal"
    study = open_study(journal)
    study.next(9)
    if (child := os.fork()) == 0:
        lock = module._Lock(journal)
        lock.acquire()
        with journal.open("ab") as handle:
            handle.write(b'{"op_code":4,"wor')
        (tmp_path / "there").touch()
        time.sleep(60)
        os._exit(1)
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    study.complete(0, 0.5)
    assert [t.state for t in open_study(journal).trials] == ["complete"]
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_processes_share_the_journal(tmp_path, in_processes):
    open_study(tmp_path / "journal")

    def work(_):
        study, numbers = open_study(tmp_path / "journal", rungs=None), []
        for _ in range(5):
            numbers.append(study.study.ask().number)
        return numbers

    numbers = in_processes(3, work)
    assert sorted(number for of_one in numbers for number in of_one) == [*range(15)]


def test_a_trial_without_its_journal_is_refused(tmp_path):
    with pytest.raises(MedvisionError, match=r"journal of the search .* is missing"):
        Report(tmp_path / "journal", 0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123456789, "0.00123457"), (1e-05, "1e-05"), (2.0, "2.0"), (16, "16"), ("[1,2]", "[1,2]")]
)
def test_values_as_typed(value, text):
    assert Dimension("x").text(value) == text
