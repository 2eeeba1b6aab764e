import csv
import io
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

import medvision.models.__main__ as verb
from medvision import cli
from medvision.build import build, build_model
from medvision.costs import Cost
from medvision.errors import MedvisionError

SMALL = Cost(1_500_000, 1_500_000, 2_340_000_000, 0.0123, 45_600_000, 0.004, 7_800_000)
LARGE = Cost(20_000_000, 5_000_000, 10_000_000_000, 1.5, 900_000_000, 0.5, 300_000_000)
REFUSED = "batch_size=1: expected more than one value per channel [N, C]"
SETTINGS = {"height": 32, "width": 48, "batch_size": 2}
MODELS = cli.choices("model")


def run(*overrides):
    """Calls the verb as the command line does."""
    words = list(overrides)
    verb.start([cli.compose("models", variant) for variant in cli.variants(words, "model")], Path(), words)


@pytest.fixture
def answers(monkeypatch):
    """Costs in the place of measuring; what was asked for, by model."""
    asked = {}

    def answer(training, cfg, size, device):
        encoder = training.model.get("encoder")
        asked[encoder] = (training, cfg, size, device)
        return {"resnet34": LARGE, "pvt_v2_b0": SMALL, "pvt_v2_b2": LARGE}.get(encoder, REFUSED)

    monkeypatch.setattr(verb, "_apart", answer)
    return asked


def test_choices():
    folder = cli.config_folder() / "model"
    assert cli.choices("model") == sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    assert "_terms" not in cli.choices("loss") and "dice" in cli.choices("loss")


def test_choices_of_own_folders(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("mine", "_part"):
        (tmp_path / "model" / f"{name}.yaml").touch()
    found = cli.choices("model", ["seed=1", f"hydra.searchpath=[file://{tmp_path}]"])
    assert found == sorted([*MODELS, "mine"])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_configured_as_for_training(name, answers):
    words = [f"model={name}", "image_size=[64,96]", "batch_size=3", "in_channels=1", "num_outputs=5"]
    cfg = cli.compose("models", words)
    ((found, training),) = verb._trainings(cfg, (64, 96), words).items()
    facts = ["data.image_size=[64,96]", "data.spec.in_channels=1", "data.spec.num_outputs=5"]
    wanted = cli.compose("train", [f"model={name}", "data=phantom", *facts])
    assert found == name and OmegaConf.to_container(training.model, resolve=True) == OmegaConf.to_container(
        wanted.model, resolve=True
    )
    assert [*training.data.image_size] == [64, 96]
    assert (training.model.in_channels, training.model.num_outputs) == (1, 5)


def test_all_models_are_the_default(answers, capsys):
    with pytest.raises(MedvisionError, match="not measured"):
        run()
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in MODELS)


def test_own_models_are_measured_as_well(answers, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("defaults: [unet, _self_]\nencoder: pvt_v2_b0\n")
    with pytest.raises(MedvisionError, match="not measured"):
        run(f"hydra.searchpath=[file://{tmp_path}]")
    assert "| mine " in capsys.readouterr().out


def test_options_reach_the_model(answers):
    run("model=unetv2", "model.encoder=pvt_v2_b2", "+model.channels=8", "precision=bf16-mixed", "image_size=64")
    ((training, cfg, size, device),) = answers.values()
    assert (training.model.encoder, training.model.channels) == ("pvt_v2_b2", 8)
    assert (training.trainer.precision, cfg.steps, size) == ("bf16-mixed", 3, (64, 64))
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_model_is_that_of_training_without_weights_from_elsewhere():
    words = ["model=unetv2", "data=phantom", "model.freeze_encoder=true"]
    run = build(cli.compose("train", words))
    pl.seed_everything(0, verbose=False)
    model = build_model(cli.compose("train", [*words, "model.encoder_weights=/nowhere.pt"]))
    assert type(model) is type(run.task.model)
    states = model.state_dict(), run.task.model.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert not any(p.requires_grad for p in model.encoder.parameters())


@pytest.mark.parametrize(
    ("sort", "order"),
    [("parameters", ["small", "large", "a", "b"]), ("name", ["a", "b", "large", "small"])],
)
def test_order(sort, order):
    assert [*verb._sorted({"b": REFUSED, "large": LARGE, "small": SMALL, "a": REFUSED}, sort)] == order


def test_table():
    header, lines = verb.as_table({"small": SMALL})
    assert dict(zip(header, *lines, strict=True)) == {
        "model": "small",
        "parameters (M)": "1.50",
        "multiply-adds (G)": "2.34",
        "training (ms)": "12",
        "training (MB)": "46",
        "inference (ms)": "4",
        "inference (MB)": "8",
    }


def test_table_of_frozen_and_refused_models():
    header, lines = verb.as_table({"large": LARGE, "small": SMALL, "bad": REFUSED})
    assert [line[header.index("trainable (M)")] for line in lines] == ["5.00", "1.50", "-"]
    assert header[-1] == "not measured because" and [line[-1] for line in lines] == ["", "", REFUSED]
    assert lines[2][:-1] == ["bad", *"-------"]


def test_csv_is_exact():
    rows = list(csv.DictReader(io.StringIO(verb.as_csv({"large": LARGE, "bad, worse": REFUSED}, SETTINGS))))
    large, bad = rows
    assert (large["model"], int(large["parameters"]), int(large["trainable"])) == ("large", 20_000_000, 5_000_000)
    assert (float(large["training_seconds"]), int(large["inference_bytes"])) == (1.5, 300_000_000)
    assert (large["height"], large["width"], large["batch_size"], large["error"]) == ("32", "48", "2", "")
    assert (bad["model"], bad["parameters"], bad["height"], bad["error"]) == ("bad, worse", "", "32", REFUSED)


def test_a_refused_model_has_its_row_and_the_others_theirs(answers, tmp_path, capsys):
    with pytest.raises(MedvisionError, match=r"^not measured: unetpp; the table says why$"):
        run("model=unetpp,unetv2,unet", f"output={tmp_path}/new/table.csv", "image_size=[32,48]", "threads=1")
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| u")]
    assert [row[0] for row in rows] == ["unetv2", "unet", "unetpp"] and [row[-1] for row in rows] == ["", "", REFUSED]
    assert "32x48, batch 8, 3 channels in, 1 out, 32-true" in shown and "1 threads" in shown
    written = list(csv.DictReader((tmp_path / "new/table.csv").open()))
    assert [row["model"] for row in written] == ["unetv2", "unet", "unetpp"]
    assert {row["threads"] for row in written} == {"1"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("precision=16-mixed", "precision=16-mixed: expected one of 32-true, bf16-mixed"),
        ("device=gpu", "device=gpu: expected one of auto, cpu, cuda"),
        ("sort=time", "sort=time: expected one of parameters, name"),
        ("steps=0", "steps=0: expected a whole number of 1 or more"),
        ("batch_size=null", "batch_size=None: expected a whole number"),
        ("threads=true", "threads=True: expected a whole number"),
        (
            "image_size=[1,2,3]",
            r"image size is \[1, 2, 3\]; expected a positive int or .*, e.g. image_size=\[192,256\]",
        ),
        ("output=table.txt", "output=table.txt: expected the name of a .csv file"),
        ("output=/proc/none/table.csv", "cannot write to /proc/none .*output=<file.csv>"),
        ("loss=dice", "loss=dice: .*leave it out"),
        ("model=unetv3", "model=unetv3: there is no such choice .did you mean 'unetv2'"),
        ("imagesize=3", "imagesize=3: there is no option 'imagesize' .did you mean 'image_size'"),
        ("model=unetpp,unetv2 model.encoder=pvt_v2_b0", "model.encoder=pvt_v2_b0: there is no option"),
    ],
)
def test_what_has_no_sense_is_refused_before_any_work(answers, word, message):
    with pytest.raises(MedvisionError, match=message):
        run(*word.split())
    assert not answers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(answers):
    with pytest.raises(MedvisionError, match="device=cuda: PyTorch finds no GPU"):
        run("device=cuda")
    assert not answers
