"""What is recorded of the circumstances, how two records and two runs are compared, and a run that is repeated."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from medvision import cli, provenance, train
from medvision.errors import MedvisionError
from medvision.provenance import compare_values, compare_weights, differences, environment

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = [
    *["data.images={train:8,val:4,test:3}", "data.image_size=32", "data.batch_size=4", "data.num_workers=0"],
    *["model=unet_plain", "model.width=4", "model.depth=2", "trainer.max_epochs=2", "trainer.accelerator=cpu"],
    *["trainer.enable_progress_bar=false", "task.tolerance=null", "seed=3"],
]


def start(*typed):
    cfg = cli.compose("train", typed)
    train.start(cfg, Path(cfg.hydra.run.dir), [*typed])


@pytest.fixture(scope="module")
def run(own_places):
    """A finished run."""
    folder = own_places / "runs" / "first"
    start(*TINY, f"hydra.run.dir={folder}")
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, for changes."""
    return shutil.copytree(run, tmp_path / "copied")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_repeated_run_is_the_same_bit_for_bit(run, capfd, caplog):
    new = run.parent / "second"
    with caplog.at_level("INFO", "medvision"):
        start(f"repeat={run}", f"hydra.run.dir={new}")
    assert f"run folder: {new}" in (new / "train.log").read_text()
    assert str(new) not in (run / "train.log").read_text()
    printed = capfd.readouterr().out
    for file in ("best.ckpt", "last.ckpt", "metrics.json", "results_val.csv", "results_test.csv", "metrics.csv"):
        assert [line.split("|")[2].strip() for line in printed.splitlines() if line.startswith(f"| {file} ")] == [
            "same"
        ]
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (run, new))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    overrides = [(folder / ".hydra" / "overrides.yaml").read_text() for folder in (run, new)]
    assert overrides[0] == overrides[1] and "repeat" not in overrides[1]


def check(folder, caplog):
    with caplog.at_level("INFO", "medvision.train"):
        start(f"repeat={folder}", "check=true")
    return [record.getMessage() for record in caplog.records if record.name == "medvision.train"]


def test_nothing_has_changed(run, caplog):
    before = sorted(run.parent.iterdir())
    assert check(run, caplog) == ["nothing has changed: it will be the same run"]
    assert sorted(run.parent.iterdir()) == before


def test_a_folder_that_was_there_is_left_as_it_was(run, copied, tmp_path, caplog):
    there = tmp_path / "there"
    (there / "mine").mkdir(parents=True)
    start(f"repeat={run}", "check=true", f"hydra.run.dir={there}")
    config = (copied / ".hydra" / "config.yaml").read_text()
    (copied / ".hydra" / "config.yaml").write_text(config.replace("val/", "val/no_"))
    with pytest.raises(MedvisionError, match="no_"):
        start(f"repeat={copied}", f"hydra.run.dir={there}")
    assert sorted(path.name for path in there.iterdir()) == ["mine"]


def test_what_has_changed_is_named(copied, caplog):
    def older(record):
        record["versions"]["torch"] = "1.13"
        record["source"] = "0123"
        record["hardware"]["threads"] = 96
        del record["settings"]["onednn"]
        record["git"], record["hardware"]["memory_gb"] = None, 1
        record["starts"].append({"changed": ["versions.numpy: 1 -> 2"]})

    def other(splits):
        splits["fingerprint"] = "abc"
        splits["val"][0] = "another"

    edit(copied / "environment.json", older)
    edit(copied / "splits.json", other)
    now, said = environment(3), check(copied, caplog)
    assert said == [
        "hardware.threads: 96 -> 1",
        f"settings.onednn: not recorded -> {now['settings']['onednn']}",
        f"source: 0123 -> {now['source']}",
        f"versions.torch: 1.13 -> {version('torch')}",
        "when it was resumed: versions.numpy: 1 -> 2",
        said[5],
        "data, val: 2 images differ",
        "it may come out differently",
    ]
    assert said[5].startswith("data, fingerprint: abc -> ")


def test_a_run_that_comes_out_differently_for_no_reason_is_an_error(run, copied, tmp_path, monkeypatch, capfd):
    def worse(new, _):
        shutil.copytree(run, new.folder.path, dirs_exist_ok=True)
        edit(new.folder.metrics, lambda metrics: metrics["test"].update(dice=metrics["test"]["dice"] - 0.25))

    monkeypatch.setattr(train, "execute", worse)
    with pytest.raises(MedvisionError, match=r"are as they were, but metrics\.json came out differently"):
        start(f"repeat={copied}", f"hydra.run.dir={tmp_path / 'new'}")
    edit(copied / "environment.json", lambda record: record.update(source="0123"))
    start(f"repeat={copied}", f"hydra.run.dir={tmp_path / 'newer'}")  # there is a reason
    assert capfd.readouterr().out.count("values differ, by up to 0.25") == 2


@pytest.mark.parametrize(
    ("missing", "typed", "message"),
    [
        ("metrics.json", [], "is not finished; go on with python -m medvision.train resume="),
        (".hydra/config.yaml", [], "holds no run"),
        (None, ["seed=4", "model=unet"], "has the config of that run; leave out seed=4 model=unet"),
    ],
)
def test_what_cannot_be_repeated_is_refused(copied, missing, typed, message):
    if missing:
        (copied / missing).unlink()
    with pytest.raises(MedvisionError, match=message):
        start(f"repeat={copied}", *typed)


def test_check_belongs_to_repeat():
    with pytest.raises(MedvisionError, match="check=true goes with repeat=<folder>"):
        start("check=true")


def test_the_code_has_a_digest_that_tells_changes_apart(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    digests = set()
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("models/b.py", "x = 1"), ("models/b.txt", "no code")):
        (tmp_path / name).write_text(text)
        digests.add(provenance.source.__wrapped__())
    assert len(digests) == 3


def test_an_environment_has_what_can_move_a_bit():
    now = environment(5)
    assert now["hardware"]["threads"] == torch.get_num_threads()
    assert now["hardware"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert now["versions"]["torch"] == version("torch")
    assert {"deterministic", "cudnn", "onednn", "float32_matmul"} <= now["settings"].keys()
    assert differences(now, environment(6)) == []
    torch.use_deterministic_algorithms(True)
    try:
        assert differences(now, environment(5)) == ["settings.deterministic: False -> True"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda state: None, None),
        (lambda state: state["b"].__setitem__(0, -0.0), "1 of 3 tensors differ, by up to 0"),
        (lambda state: state["a"].__setitem__((0, 1), 2.5), "1 of 3 tensors differ, by up to 1.5"),
        (lambda state: state.update(c=torch.zeros(2)), "tensors have other shapes or types"),
        (lambda state: state.update(d=torch.zeros(1)), "1 tensors are only in one"),
    ],
)
def test_weights_are_compared_bit_for_bit(tmp_path, change, answer):
    state = {"a": torch.ones(2, 2), "b": torch.tensor([0.0, float("nan")]), "c": torch.zeros((), dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "one")
    change(state)
    torch.save({"state_dict": state, "epoch": 2}, tmp_path / "other")
    assert compare_weights(tmp_path / "one", tmp_path / "other") == answer


@pytest.mark.parametrize(
    ("name", "one", "other", "answer"),
    [
        ("a.json", '{"x": [1, {"y": 0.5}]}', '{"x": [1, {"y": 0.5}]}', None),
        ("a.json", '{"x": [1, {"y": 0.5}]}', '{"x": [1, {"y": 0.75}]}', "1 of 2 values differ, by up to 0.25"),
        ("a.json", '{"x": 1}', '{"y": 1}', "2 values are only in one"),
        ("a.csv", "id,dice\na,nan\n", "id,dice\na,nan\n", None),
        ("a.csv", "id,dice\na,1\nb,2\n", "id,dice\nc,1.5\nb,2\n", "2 of 6 values differ, by up to 0.5"),
        ("a.csv", "id\na\n", "id\na\nb\n", "1 values are only in one"),
    ],
)
def test_numbers_are_compared(tmp_path, name, one, other, answer):
    for folder, text in (("one", one), ("other", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    assert compare_values(tmp_path / "one" / name, tmp_path / "other" / name) == answer
