"""What a sweep consists of, what it refuses, how it goes on and how it ends; jobs are not trained here."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
from omegaconf import OmegaConf

from medvision import cli, sweep
from medvision.configs import load_config
from medvision.errors import MedvisionError
from medvision.launchers.jobs import Outcome
from medvision.runs import RunFolder

SMALL = ["data.image_size=32", "trainer.accelerator=cpu"]


def test_choices_are_combined_as_hydra_does():
    typed = ["model=unet,unetv2", *SMALL, "seed=range(1,4)", "+x='a,b'", "~scheduler", "data.images={train:8,val:4}"]
    jobs = cli.expand(typed)
    assert len(jobs) == 6
    assert jobs[1] == ["model=unet", *SMALL, "seed=2", "+x='a,b'", "~scheduler", "data.images={train:8,val:4}"]
    assert [job[3] for job in jobs] == ["seed=1", "seed=2", "seed=3"] * 2


def test_what_is_typed_wins_over_an_experiment():
    assert cli.expand(["seed=5", "model=unet"], {"seed": "1,2", "optimizer.lr": "choice(0.1,0.2)"}) == [
        ["seed=5", "optimizer.lr=0.1", "model=unet"],
        ["seed=5", "optimizer.lr=0.2", "model=unet"],
    ]


def test_a_glob_finds_choices_and_own_ones_and_no_parts(tmp_path):
    assert cli.expand(["loss=glob(*tversky)"]) == [["loss=focal_tversky"], ["loss=tversky"]]
    assert len(cli.expand(["loss=glob(*)"])) == len(cli.choices("loss"))
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "my_tversky.yaml").touch()
    searchpath = f"hydra.searchpath=[file://{tmp_path}]"
    assert [job[0] for job in cli.expand(["loss=glob(*tversky)", searchpath])][1] == "loss=my_tversky"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=interval(1,2)", r"^seed=interval\(1,2\) holds no choice; a sweep needs some, as 1,2 or range\(1,4\)$"),
        ("seed=range(4,1)", r"^seed=range\(4,1\) holds no choice"),
        ("loss=glob(*tverksy)", r"^loss=glob\(\*tverksy\) holds no choice"),
        ("seed=choice(", r"^seed=choice\(: "),
        (
            "hydra.sweep.dir=a=b",
            r"^hydra.sweep.dir=a=b: .*; a value with such signs is quoted: \"hydra.sweep.dir='a=b'\"$",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(word, said):
    with pytest.raises(MedvisionError, match=said):
        cli.expand([word])


class Launcher:
    """Ends each job at once, finished or as its seed says."""

    echo, stop_on_failure = True, False

    def __init__(self, failing=(), interrupt=None):
        self.failing, self.interrupt, self.ran = failing, interrupt, []

    def launch(self, jobs, watch):
        for job in jobs:
            if watch.stop.is_set():
                return
            watch.started(job)
            self.ran.append(job)
            seed = load_config(RunFolder(job.folder)).seed
            if seed in self.failing:
                watch.ended(job, Outcome("failed", "killed by signal 9, perhaps out of memory", 2.0))
                continue
            RunFolder(job.folder).metrics.write_text(
                json.dumps({"monitor": {"name": "val/dice", "value": 0.5 + seed / 100}})
            )
            watch.ended(job, Outcome("finished", seconds=63.2, result=("val/dice", 0.5 + seed / 100)))
            if seed == self.interrupt:
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def start(tmp_path, monkeypatch, caplog):
    """`start("seed=1,2", failing={2})`: sweeps with it into one folder; answers the launcher."""
    monkeypatch.setattr(logging.getLogger("medvision"), "propagate", True)
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MEDVISION_DATA", "/data")

    def start(*typed, **options):
        start.launcher = Launcher(**options)
        monkeypatch.setattr(sweep, "instantiate", lambda _: start.launcher)
        words = [*SMALL, *typed, f"hydra.sweep.dir={start.folder}"]
        jobs = cli.expand(words)
        sweep.start(jobs, [cli.compose("train", job) for job in jobs], ["-m", *words])
        return start.launcher

    start.folder = tmp_path / "sweep"
    return start


def test_jobs_are_prepared_run_folders(start, capsys, caplog):
    launcher = start("seed=1,2", "launcher=joblib", "traceback=true", "loss.positive_weights=auto")
    for n, job in enumerate(launcher.ran):
        place = RunFolder(start.folder / str(n))
        cfg = load_config(place)
        assert (cfg.seed, cfg.loss.positive_weights) == (n + 1, "auto")
        assert not {"hydra", "launcher", "resume", "traceback"} & cfg.keys()
        assert OmegaConf.load(place.overrides) == [*SMALL, f"seed={n + 1}", "loss.positive_weights=auto"]
        assert job.words == f"seed={n + 1}" and job.gpus == 0
        assert job.environment == {
            "MEDVISION_SWEEP": "sweep",
            "MEDVISION_JOB": str(n),
            "MEDVISION_TAGS": f'["seed={n + 1}"]',
        }
    assert "job 1 started: seed=2" in caplog.messages
    assert "job 1 finished in 63 s: val/dice 0.5200; 2 of 2 are over" in caplog.messages
    command = f"python -m medvision.train -m {' '.join(SMALL)} seed=1,2 launcher=joblib traceback=true"
    ending = f"loss.positive_weights=auto hydra.sweep.dir={start.folder}"
    assert f"after any stop, go on with: {command} {ending}" in caplog.messages
    rows = [line.replace(" ", "").strip("|") for line in capsys.readouterr().out.splitlines() if "seed=" in line]
    assert rows == ["0|seed=1|finished|val/dice|0.5100", "1|seed=2|finished|val/dice|0.5200"]


def test_a_training_by_two_processes_says_so(start):
    assert [job.processes for job in start("trainer=default,ddp", "trainer.accelerator=cpu").ran] == [1, 2]


def test_finished_jobs_are_skipped_failed_ones_retried_and_new_ones_added(start):
    with pytest.raises(
        MedvisionError, match=r"1 of 2 jobs are finished\n  job 0 \(seed=1\) failed: killed by"
    ) as error:
        start("seed=1,2", failing={1})
    assert f"perhaps out of memory; {start.folder}/0/output.log" in str(error.value)
    with pytest.raises(MedvisionError, match="2 of 3 jobs are finished"):
        start("seed=3,1,2", failing={1})  # once more, and no second time
    assert [job.words for job in start.launcher.ran] == ["seed=1", "seed=3"]
    assert [job.words for job in start("seed=3,1,2").ran] == ["seed=1"]
    assert [load_config(RunFolder(start.folder / n)).seed for n in "012"] == [1, 2, 3]
    assert start("seed=3,1,2").ran == []


def test_a_sweep_that_was_killed_while_preparing_goes_on(start):
    start("seed=1,2")
    for path in (RunFolder(start.folder / "1").config, RunFolder(start.folder / "1").metrics):
        path.unlink()
    assert [job.number for job in start("seed=1,2").ran] == [1]
    assert load_config(RunFolder(start.folder / "1")).seed == 2


def test_another_place_of_the_data_is_the_same_sweep(start, monkeypatch):
    start("seed=1,2", "data=isic2017")
    monkeypatch.setenv("MEDVISION_DATA", "/elsewhere")
    assert start("seed=1,2", "data=isic2017").ran == []


def test_another_config_is_refused_with_its_differences(start):
    start("seed=1,2", "loss.positive_weights=auto")
    with pytest.raises(MedvisionError) as error:
        start("seed=1,2", "loss.positive_weights=auto", "optimizer.lr=0.5")
    assert f"{start.folder} holds jobs that this command does not have, or has with another config" in str(error.value)
    words = f"{' '.join(SMALL)} seed=2 loss.positive_weights=auto"
    assert f"\n  job 1 ({words}): optimizer.lr: 0.001 -> 0.5\n" in str(error.value)
    with pytest.raises(MedvisionError, match=r"job 0 \(.* seed=1 loss.positive_weights=auto\): not asked for"):
        start("seed=2", "loss.positive_weights=auto")


def test_the_same_job_twice_is_refused(start):
    with pytest.raises(MedvisionError, match=r"jobs 0 and 2 are the same: .* seed=1; leave one out"):
        start("seed=1,2,1")
    assert not (start.folder / "0").exists()


def test_what_json_cannot_hold_is_refused(start):
    with pytest.raises(MedvisionError, match=r"^trainer.gradient_clip_val=inf: sweep.json holds finite numbers alone"):
        start("trainer.gradient_clip_val=1,inf")
    assert not start.folder.exists()


def test_a_folder_of_other_runs_is_refused(start):
    start("seed=1,2")
    (start.folder / "sweep.json").unlink()
    with pytest.raises(MedvisionError, match=r"holds runs \(0\) but no sweep.json; choose another folder"):
        start("seed=1,2")


@pytest.mark.parametrize("word", ["resume=somewhere", "repeat=somewhere", "check=true"])
def test_what_is_of_one_run_is_refused(start, word):
    with pytest.raises(MedvisionError, match=rf"(?i)^{word} is of one run; a sweep goes on by hydra.sweep.dir="):
        start("seed=1,2", word)
    assert not start.folder.exists()


@pytest.mark.parametrize("word", ["launcher=in_turn,joblib", "hydra.sweep.dir=a b,c", "launcher.jobs=range(3)"])
def test_a_sweep_has_one_folder_and_one_launcher(start, word):
    name, _, value = word.partition("=")
    with pytest.raises(MedvisionError) as refused:
        start("seed=1,2", "launcher=joblib", word)
    assert str(refused.value) == f"{word}: a sweep has one {name}; if that is one value, quote it: \"{name}='{value}'\""


def test_folders_are_numbers(start):
    with pytest.raises(MedvisionError, match=r"the folders of the jobs are their numbers"):
        start("seed=1,2", "hydra.sweep.subdir=x")


def test_experiments_with_choices_of_their_own_are_sweeps_of_their_own(start):
    with pytest.raises(MedvisionError, match=r"^jobs 0 and 1 come with different choices of their own"):
        start("experiment=demo,isic2017_pretraining")
    assert not start.folder.exists()


def test_a_misspelled_job_is_refused_before_anything_is_made(tmp_path):
    words = ["-m", "model=unet,unetv3", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run([sys.executable, "-m", "medvision.train", *words], capture_output=True, text=True)
    assert done.returncode == 1 and "there is no such choice (did you mean 'unetv2'?)" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_choices_without_a_sweep_are_refused(tmp_path):
    done = subprocess.run([sys.executable, "-m", "medvision.train", "seed=1,2"], capture_output=True, text=True)
    assert done.returncode == 1 and "add --multirun to your command line" in done.stderr


def test_a_failure_stops_the_others_only_if_asked(start, monkeypatch):
    monkeypatch.setattr(Launcher, "stop_on_failure", True)
    with pytest.raises(MedvisionError, match="1 of 3 jobs are finished"):
        start("seed=1,2,3", failing={2})
    assert [job.number for job in start.launcher.ran] == [0, 1]


def test_sigterm_leaves_the_rest_for_later(start, caplog, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(MedvisionError, match=r"2 of 3 jobs are finished\n  go on with: python -m medvision.train -m "):
        start("seed=1,2,3", interrupt=2)
    assert "SIGTERM: ending the jobs that run" in caplog.messages
    assert "not run" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_sweep_that_was_stopped_does_not_compare(start, caplog):
    with pytest.raises(MedvisionError, match="3 of 4 jobs are finished"):
        start("seed=1,2", "model=unet,unetv2", interrupt=2)
    assert not any(message.startswith("not compared: ") for message in caplog.messages)


def test_variants_that_cannot_be_compared_do_not_spoil_the_sweep(start, caplog):
    start("seed=1", "model=unet,unetv2")
    assert any(message.startswith("not compared: ") for message in caplog.messages)  # they hold no results


def test_events_of_several_threads_are_counted(start, caplog):
    watch = sweep.Watching([], {}, False, bar=False)
    jobs = [sweep.Job(n, start.folder, f"seed={n}") for n in range(20)]
    threads = [threading.Thread(target=watch.ended, args=(job, Outcome("failed", "why", 1))) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(watch.outcomes) == [*range(20)] and not watch.stop.is_set()
