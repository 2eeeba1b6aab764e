import json
import shlex
import threading
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from medvision import cli, search, train
from medvision.build import build
from medvision.errors import MedvisionError
from medvision.figures.study import importance, parallel
from medvision.files import read_json, write_json
from medvision.launchers.jobs import Outcome
from medvision.pruning import Pruning
from medvision.runs import RunFolder
from medvision.study import Dimension, Study, Trial
from medvision.terminal import quoted

TINY = ["model=unet", "model.encoder_weights=null", "data.images={train:6,val:4,test:4}", "data.image_size=32"]


def dimension(typed):
    return search.as_dimension(cli.parsed(typed))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("optimizer.lr=tag(log,interval(1e-4,1e-2))", Dimension("optimizer.lr", low=1e-4, high=1e-2, log=True)),
        ("optimizer.lr=interval(1,5)", Dimension("optimizer.lr", low=1.0, high=5.0)),
        ("model.width=int(interval(4,64))", Dimension("model.width", low=4, high=64)),
        ("model.width=tag(log,int(interval(4,64)))", Dimension("model.width", low=4, high=64, log=True)),
        ("data.batch_size=range(8,33,8)", Dimension("data.batch_size", low=8, high=32, step=8)),
        ("data.batch_size=range(8,32,8)", Dimension("data.batch_size", low=8, high=24, step=8)),
        ("data.batch_size=range(32,7,-8)", Dimension("data.batch_size", low=8, high=32, step=8)),
        ("model.dropout=range(0,0.5,0.1)", Dimension("model.dropout", low=0.0, high=0.4, step=0.1)),
        ("model.encoder=choice(resnet18,resnet34)", Dimension("model.encoder", ("resnet18", "resnet34"))),
        ("model=unet,unetpp", Dimension("model", ("unet", "unetpp"))),
        ("+loss.terms.bce=choice(0.5,1)", Dimension("+loss.terms.bce", ("0.5", "1"))),
        ("model.shape=choice([1,2],'a,b',true)", Dimension("model.shape", ("[1,2]", r"a\,b", "True"))),
        ("optimizer.lr=1e-3", None),
        ("data.image_size=[32,48]", None),
    ],
)
def test_the_space_is_that_of_hydra(typed, expected):
    found = dimension(typed)
    assert found == expected
    if found is not None:
        assert type(found.low) is type(expected.low) and found.high == pytest.approx(expected.high)


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 9))
def test_a_range_holds_what_python_has_in_it(start, length, step):
    numbers = range(start, start + length, step)
    found = dimension(f"x=range({start},{start + length},{step})")
    assert [*range(found.low, found.high + 1, found.step)] == [*numbers]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["model=unet"], "nothing is searched for: give at least one value as choice"),
        (["a=interval(x,y)"], r"^a=interval\(x,y\): .*str is incompatible with"),
        (["a=interval(2,1)"], r"^a=interval\(2,1\): expected interval\(low,high\) of finite numbers, the smaller one"),
        (["a=interval(0,inf)"], "of finite numbers"),
        (["a=interval(nan,1)"], "of finite numbers"),
        (["a=range(5,5)"], "holds no number"),
        (["a=glob(*)"], r"a=glob\(\*\): expected choice"),
        (["a=tag(lgo,interval(1,2))"], "there is no tag lgo"),
        (["a=tag(log,interval(0,2))"], "intervals above 0"),
        (["a=tag(log,range(8,33,8))"], "intervals above 0"),
        (["a=tag(log,choice(1,2))"], "choices have no order"),
        (["a=choice(1,2)", "a=3"], "a is given more than once"),
        (["a=choice(1,2)", "a=range(3)"], "a is given more than once"),
    ],
)
def test_what_is_no_space_is_refused(typed, message):
    with pytest.raises(MedvisionError, match=message):
        search.as_words(typed)


def start(folder, *typed):
    """What `python -m medvision.search` does in this process."""
    words = [*typed, f"hydra.sweep.dir={quoted(folder)}"]
    cfg = cli.compose("search", [word for word in words if not cli.parsed(word).is_sweep_override()])
    place = cfg.hydra.run.dir
    with open_dict(cfg):
        del cfg["hydra"]
    search.start(cfg, RunFolder(folder.parent / place).path, words)


LR = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["search.trials=0"], "search.trials=0: expected a whole number of 1 or more"),
        (["search.workers=1.5"], "search.workers=1.5"),
        (["search.reduction_factor=1"], "search.reduction_factor=1: expected a whole number of 2 or more"),
        (["search.timeout=-1"], "search.timeout=-1: expected seconds"),
        (["test=true"], "looks at validation alone"),
        (["resume=somewhere"], "resume=somewhere is of one run"),
        (["launcher=joblib"], "leave out launcher"),
        (["modle=choice(unet,unetpp)"], "there is no option 'modle' .did you mean 'model'"),
        (["model=choice(unet,unett)"], "model=unett: there is no such choice"),
        (["optimizer.rate=interval(1,2)"], "there is no option 'optimizer.rate'"),
        (["data=choice(phantom,phantom_nuclei)"], "data.spec.name is phantom_nuclei with data=phantom_nuclei"),
        (["task.monitor=choice(val/dice,val/jaccard)"], "task.monitor is val/jaccard with"),
        (["model=choice(resnet18,resnet50)"], "ResNet|resnet18|classif"),
    ],
)
def test_refused_before_any_trial(typed, message, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "run_job", lambda *_, **__: pytest.fail("a trial began"))
    space = [] if any(cli.parsed(word).is_sweep_override() for word in typed) else [LR]
    with pytest.raises(MedvisionError, match=message):
        start(tmp_path / "search", *typed, *space)


class Trainings:
    """In the place of processes: a trial's value is that of its learning rate; some fail, or are killed or pruned."""

    def __init__(self, fail=(), killed=(), pruned=(), at_once=1):
        self.fail, self.killed, self.pruned = set(fail), [*killed], set(pruned)
        self.begun, self.at_once, self.meeting = [], at_once, threading.Barrier(at_once)
        self.threads = set()

    def __call__(self, folder, environment, stop, hold):
        place, number = RunFolder(folder), int(folder.name)
        assert read_json(place.trial) == {"journal": "../search.journal", "number": number}
        assert environment["MEDVISION_JOB"] == str(number) and "optimizer.lr=" in environment["MEDVISION_TAGS"]
        self.begun.append(number)
        self.threads.add(environment["OMP_NUM_THREADS"])
        if number < self.at_once:
            self.meeting.wait(60)  # breaks where they come one after the other
        if number in self.killed:
            self.killed.remove(number)
            return Outcome("failed", "killed by signal 9, perhaps out of memory")
        if number in self.fail:
            return Outcome("failed", "the training loss is nan")
        if number in self.pruned:
            write_json(place.pruned, {"epoch": 1, "metric": "val/jaccard_image", "value": 0.1})
            return Outcome("failed", "exit code 0")
        value = float(OmegaConf.load(place.config).optimizer.lr)
        write_json(place.metrics, {"monitor": {"name": "val/jaccard_image", "value": value}})
        return Outcome("finished", result=("val/jaccard_image", value))


@pytest.fixture
def trainings(monkeypatch):
    """`trainings(fail=[1])` takes the place of processes."""
    monkeypatch.setattr(search, "_probe", lambda *_: None)

    def make(**options):
        made = Trainings(**options)
        monkeypatch.setattr(search, "run_job", made)
        return made

    return make


def test_trials_are_run_folders_and_the_best_is_told(trainings, tmp_path, capsys):
    begun, folder = trainings(pruned=[2]), tmp_path / "a search"
    start(folder, *TINY, LR, "model.encoder=choice(resnet18,resnet34)", "search.trials=6")
    assert begun.begun == [*range(6)]
    found = json.loads((folder / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2 + ["pruned"] + ["complete"] * 3
    best = max(found["trials"], key=lambda trial: trial["value"] or 0)
    assert found["best"] == best["number"] and best["value"] == float(best["params"]["optimizer.lr"])
    for trial in found["trials"]:
        cfg = OmegaConf.load(folder / str(trial["number"]) / ".hydra" / "config.yaml")
        assert cfg.optimizer.lr == float(trial["params"]["optimizer.lr"]) and cfg.test is False
        assert cfg.model.encoder == trial["params"]["model.encoder"] and "search" not in cfg
    assert found["command"].startswith("python -m medvision.train model=unet ") and "test=" not in found["command"]
    assert f"optimizer.lr={best['params']['optimizer.lr']} model.encoder=" in found["command"]
    shown = capsys.readouterr().out
    assert "val/jaccard_image on phantom: 6 trials, 5 complete, 1 pruned" in shown and found["command"] in shown
    (measure,) = [line for line in shown.splitlines() if "medvision.evaluate" in line]
    run = cli.compose("evaluate", shlex.split(measure)[3:]).run
    assert RunFolder(folder / str(found["best"])) == RunFolder(folder.parent / run)
    for name in ("importance", "parallel"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 500 and len(picture.convert("L").getcolors(256)) > 10
    again = trainings()
    start(folder, *TINY, LR, "model.encoder=choice(resnet18,resnet34)", "search.trials=7")
    assert again.begun == [6] and json.loads((folder / "search.json").read_text())["trials"][:6] == found["trials"]


def test_failures_stop_nobody_and_are_told(trainings, tmp_path):
    begun, folder = trainings(fail=[1], killed=[3, 2, 2], at_once=2), tmp_path / "search"
    with pytest.raises(MedvisionError) as refused:
        start(folder, *TINY, LR, "search.trials=4", "search.workers=2")
    assert sorted(begun.begun) == [0, 1, 2, 2, 3, 3]
    lines = str(refused.value).splitlines()
    assert lines[0] == "2 of 4 trials failed:"
    assert lines[1] == f"  {folder / '1' / 'output.log'}: the training loss is nan" and "killed by signal 9" in lines[2]
    found = json.loads((folder / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete", "fail", "fail", "complete"]


def test_processors_are_divided_between_all_processes(trainings, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    begun, two = trainings(), ["trainer=ddp", "trainer.accelerator=cpu"]
    start(tmp_path / "search", *TINY, *two, LR, "search.trials=1", "search.workers=2")
    assert begun.threads == {"2"}


def test_values_that_do_not_go_together_are_a_failed_trial(trainings, tmp_path, monkeypatch):
    trainings()
    monkeypatch.setattr(search, "prepare", lambda *_: (_ for _ in ()).throw(MedvisionError("no such thing")))
    with pytest.raises(MedvisionError, match=r"1 of 1 trials failed:\n.*: no such thing"):
        start(tmp_path / "search", *TINY, LR, "search.trials=1")


def test_what_ended_while_nobody_watched_is_only_told(trainings, tmp_path):
    """The process died between the end of a training and the entry in the journal, or before the training."""
    folder, space = tmp_path / "search", [dimension(LR)]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    for _ in range(3):
        search.run_job = stopped
        with pytest.raises(MedvisionError, match=r"interrupted; hydra\.sweep\.dir=.*/search goes on"):
            start(folder, *TINY, LR, "search.trials=3")
    assert len(Study(folder / "search.journal", space, True, 0, (3, 3), asked(folder)).trials) == 1
    place = RunFolder(folder / "0")
    write_json(place.pruned, {"epoch": 3, "metric": "val/jaccard_image", "value": 0.1})
    begun = trainings()
    start(folder, *TINY, LR, "search.trials=3")
    assert begun.begun == [1, 2]
    assert json.loads((folder / "search.json").read_text())["trials"][0]["state"] == "pruned"


def asked(folder):
    """What the journal of a search says was asked."""
    lines = [json.loads(line) for line in (folder / "search.journal").read_text().splitlines()]
    return next(line["user_attr"]["asked"] for line in lines if "asked" in line.get("user_attr", {}))


def test_time_runs_out(trainings, tmp_path, caplog):
    caplog.set_level("INFO", "medvision")
    begun = trainings()
    start(tmp_path / "search", *TINY, LR, "search.trials=50", "search.timeout=0.2")
    assert 1 <= len(begun.begun) < 50
    assert f"{len(begun.begun)} of 50 trials; the same command goes on" in caplog.text


def test_a_folder_that_is_being_searched_is_refused(trainings, tmp_path, in_processes):
    trainings()
    folder = tmp_path / "search"

    def work(number):
        try:
            start(folder, *TINY, LR, "search.trials=8")
        except MedvisionError as error:
            return str(error)
        return "done"

    answers = sorted(in_processes(2, work), key=lambda answer: answer == "done")
    assert f"{folder} is being searched by another process" in answers[0] and answers[1] == "done"


def test_runs_of_others_are_no_trials(trainings, tmp_path):
    folder, begun = tmp_path / "sweep", trainings()
    search.prepare(cli.compose("train", TINY), folder / "0", TINY)
    write_json(RunFolder(folder / "0").metrics, {"monitor": {"name": "val/jaccard_image", "value": 0.9}})
    with pytest.raises(MedvisionError, match=r"sweep holds runs \(0\) but no search.journal; choose another folder"):
        start(folder, *TINY, LR)
    assert begun.begun == [] and not (folder / "search.json").exists()


def test_another_space_in_the_folder_is_refused(trainings, tmp_path):
    trainings()
    start(tmp_path / "search", *TINY, LR, "search.trials=1")
    with pytest.raises(MedvisionError) as refused:
        start(tmp_path / "search", *TINY, "optimizer.lr=interval(1,2)", "search.trials=1", "search.prune=false")
    text = str(refused.value)
    assert "optimizer.lr: tag(log,interval(1e-4,1e-2)) -> interval(1,2)" in text
    assert "search.prune: after 3 epochs, by 3 -> false" in text


def test_another_config_in_the_folder_is_refused(trainings, tmp_path):
    begun, part = trainings(), tmp_path / "optimizer" / "mine.yaml"
    typed = [*TINY, LR, "optimizer=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    part.parent.mkdir()
    for decay in (0.1, 0.2):
        part.write_text(f"defaults: [adamw, _self_]\nweight_decay: {decay}\n")
        if decay == 0.1:
            start(tmp_path / "search", *typed, "search.trials=1")
    with pytest.raises(MedvisionError, match=r"something else:\n  optimizer.weight_decay: 0.1 -> 0.2\nType the same"):
        start(tmp_path / "search", *typed, "search.trials=2")
    assert begun.begun == [0]


class Model(pl.LightningModule):
    """Its validation metric is a list."""

    def __init__(self, values):
        super().__init__()
        self.layer, self.values = nn.Linear(1, 1), values

    def training_step(self, batch, _):
        return self.layer(batch).sum()

    def validation_step(self, batch, _):
        self.log("val/score", self.values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(folder, number, values):
    """Epochs that a trial was trained for."""
    folder.mkdir()
    write_json(folder / "trial.json", {"journal": "../journal", "number": number})
    loader = DataLoader(torch.ones(1, 1))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=len(values),
        logger=False,
        callbacks=[Pruning(folder / "trial.json", folder / "pruned.json", "val/score")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(values), loader, loader)
    return trainer.current_epoch


def test_the_callback_reports_and_stops(tmp_path):
    study = Study(tmp_path / "journal", [Dimension("x", low=0, high=9)], True, 0, (1, 2), {})
    study.next(3), study.next(3), study.next(3)
    assert fit(tmp_path / "0", 0, [0.1, 0.2, 0.3, 0.4]) == 4
    assert study.trials[0].epochs == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    assert not (tmp_path / "0" / "pruned.json").exists()
    assert fit(tmp_path / "1", 1, [0.15, 0.1, 0.5, 0.5]) == 2  # better at first, worse at the second rung
    stopped = json.loads((tmp_path / "1" / "pruned.json").read_text())
    assert stopped == {"epoch": 2, "metric": "val/score", "value": pytest.approx(0.1)}
    assert fit(tmp_path / "2", 2, [0.2, 0.25, 0.0, 0.1]) == 4  # worse in the last epoch, which is over then
    assert not (tmp_path / "2" / "pruned.json").exists()


def test_a_pruned_trial_is_not_gone_on_with(tmp_path):
    write_json(tmp_path / "pruned.json", {"epoch": 1, "metric": "val/score", "value": 0.1})
    with pytest.raises(MedvisionError, match=r"a trial that its search stopped early, as pruned\.json tells"):
        train.execute(SimpleNamespace(folder=RunFolder(tmp_path)), None)


def test_what_watches_test_cannot_leave_it_alone():
    with pytest.raises(MedvisionError, match="protocol=paper watches the test split, test=false"):
        build(cli.compose("train", [*TINY, "test=false", "protocol=paper"]))


def test_figures_of_unusual_searches(tmp_path):
    space = [Dimension("a", ("only",)), Dimension("b", low=1e-5, high=1e-1, log=True)]
    trials = [
        Trial(0, "complete", {"a": "only", "b": "0.001"}, 0.5),
        Trial(1, "fail", {}, None, reason="no"),
        Trial(2, "pruned", {"a": "only", "b": "0.1"}, None, {1: None}),
    ]
    parallel(tmp_path / "p.png", space, trials, "val/loss", False, "title")
    importance(tmp_path / "i.png", {"a": 0.0, "b": 1.0}, "title")
    for name in ("p", "i"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 500
