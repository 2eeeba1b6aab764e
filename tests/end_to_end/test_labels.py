"""Data sets of labels, from drawn images to an evaluated run."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from medvision.build import load_run
from medvision.decision import Decision
from medvision.metrics import NAMES, decide, summarise_labels
from medvision.prediction import Predictor

SMALL = ["model=resnet18", "data.image_size=32", "data.batch_size=8", "trainer.max_epochs=2"]
SETS = {
    "phantom_melanoma": [
        *["data.images={train:40,test:8}", "loss.positive_weights=auto", "loss.gamma=1"],
        *["task.mixup=0.2", "task.cutmix=1", "task.operating_point={sensitivity:1}"],
    ],
    "phantom_insects": ["data.images={train:16,val:8}", "trainer.precision=bf16-mixed", "loss.class_weights=auto"],
}


@pytest.fixture(scope="module", params=SETS)
def run(request, cli, tmp_path_factory):
    """A finished run on labels: the data set, its folder and what was printed."""
    folder = tmp_path_factory.mktemp("labels") / request.param
    done = cli("train", f"data={request.param}", *SETS[request.param], *SMALL, f"hydra.run.dir={folder}")
    return request.param, folder, done.stdout


def test_a_run_on_labels(run, cli):
    data, folder, printed = run
    metrics, splits = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "splits"))
    exclusive = data == "phantom_insects"
    assert ("threshold" in metrics) != exclusive
    assert metrics["monitor"]["name"] == ("val/accuracy" if exclusive else "val/average_precision")
    classes = ["ants", "bees"] if exclusive else ["malignant"]
    for split in ("val", "test") if "test" in metrics else ("val",):
        found = metrics[split].keys() | metrics["details"][split].get("not_defined", {}).keys()
        assert {name.split("/")[0] for name in found} == set(NAMES)
        rows = list(csv.DictReader((folder / f"results_{split}.csv").open()))
        shape = (-1, len(classes))
        probability = np.array([float(row["probability"]) for row in rows], np.float32).reshape(shape)
        truth = np.array([row["truth"] == "1" for row in rows]).reshape(shape)
        threshold = [] if exclusive else [metrics["threshold"]]
        assert summarise_labels(probability, truth, classes, threshold) == metrics[split]
        for name, (low, high) in metrics["intervals"][split].items():
            assert low - 1e-9 <= metrics[split][name] <= high + 1e-9, name
        assert {"accuracy", "brier"} <= metrics["intervals"][split].keys()
        for kind in ("", "_curves", "_mistakes"):
            assert Image.open(folder / f"predictions_{split}{kind}.png").size[0] > 400
        confusion = metrics["details"][split]["confusion"]
        assert np.sum(confusion if exclusive else confusion["malignant"]) == len(rows) / len(classes)
    assert exclusive or metrics["val"]["sensitivity"] == 1  # the operating point that was asked for
    assert min(Image.open(folder / "validation.png").size) > 200
    loss, train = OmegaConf.load(folder / ".hydra" / "config.yaml").loss, splits["train"]
    if exclusive:  # counted in the training split, and stored as numbers
        counts = [sum(name.startswith(f"{label}/") for name in train) for label in classes]
        assert [*loss.class_weights] == pytest.approx([len(train) / (2 * count) for count in counts])
    else:
        [weight] = loss.positive_weights
        assert (len(train) / (weight + 1)) % 1 == pytest.approx(0, abs=1e-9) and loss.class_weights is None
    history = {row["metric"] for row in csv.DictReader((folder / "metrics.csv").open())}
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/auroc", "lr"} <= history
    assert "average_precision" in printed and "dice" not in printed
    again = cli("evaluate", f"run={folder}", "split=val").stdout
    assert f"equal to the numbers in {folder / 'metrics.json'}" in again


def test_a_threshold_for_exclusive_classes_is_refused(run, cli):
    data, folder, _ = run
    if data == "phantom_melanoma":
        found = cli("evaluate", f"run={folder}", "threshold=0.5")
        assert "threshold 0.5" in found.stdout
    else:
        found = cli("evaluate", f"run={folder}", "threshold=0.5", code=1)
        assert "phantom_insects has exclusive classes" in found.stderr


def test_another_operating_point_is_chosen_on_validation(run, cli):
    data, folder, _ = run
    asked = ["threshold=validation", "task.operating_point={specificity:1}", "split=val"]
    if data == "phantom_melanoma":
        cli("evaluate", f"run={folder}", *asked)
        found = folder / "evaluations" / "val_validation_operating_point_specificity_1.json"
        assert json.loads(found.read_text())["val"]["specificity"] == 1
        refused = cli("evaluate", f"run={folder}", asked[1], code=1).stderr
        assert "is what a threshold is chosen for, but threshold=stored is no choice" in refused
    else:
        assert "phantom_insects has exclusive classes" in cli("evaluate", f"run={folder}", *asked, code=1).stderr


def test_predictions_are_those_of_evaluation(run, cli, tmp_path, monkeypatch):
    data, folder, _ = run
    for name, value in cli.environment.items():
        monkeypatch.setenv(name, value)
    split = "val" if data == "phantom_insects" else "test"
    for sample in load_run(folder).data.splits[split]:
        path = tmp_path / "in" / f"{sample.id}{Path(sample.image.name).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image.read())
    places = {"MEDVISION_DATA": "/nowhere", "MEDVISION_CACHE": "/nowhere"}
    cli("predict", f"run={folder}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", **places)
    found, expected = (
        list(csv.DictReader(path.open()))
        for path in (tmp_path / "out/predictions.csv", folder / f"results_{split}.csv")
    )
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one["file"].rpartition(".")[0] == other["id"]
        assert [one[key] for key in ("class", "threshold", "decision")] == [
            other[key] for key in ("class", "threshold", "decision")
        ]
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-6)


def test_the_mean_of_two_runs_over_views(run, cli, tmp_path):
    _, folder, _ = run
    twin = shutil.copytree(folder, tmp_path / "twin")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(tmp_path / "a.png")
    runs, output = f"run={folder},{twin}", tmp_path / "out"
    words = [runs, f"input={tmp_path / 'a.png'}", f"output={output}", "tta=flips", "heat=hires_cam"]
    cli("predict", *words)
    heat = (output / "a_heat.png").read_bytes()
    assert Image.open(output / "a_heat.png").size == (30, 40)
    (output / "a_heat.png").unlink()
    assert "already there" not in cli("predict", *words).stdout and (output / "a_heat.png").read_bytes() == heat
    rows = list(csv.DictReader((output / "predictions.csv").open()))
    predictor = Predictor([load_run(folder).predicting()], "flips")
    expected = predictor(np.asarray(Image.open(tmp_path / "a.png")))
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)
    decision = Decision.read(json.loads((folder / "metrics.json").read_text()))
    assert [row["decision"] == "1" for row in rows] == decide(expected[None], decision.threshold)[0].tolist()


def test_images_that_pretraining_has_seen_are_warned_of_and_recorded(run, cli, tmp_path):
    data, folder, _ = run
    if data == "phantom_insects":
        words = [*SETS[data], *SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
        place = tmp_path / "run"
        done = cli("train", f"data={data}", f"model.encoder_weights={folder}", *words, f"hydra.run.dir={place}")
        said = f"{folder}, from which these weights come, was trained on 8 of 8 images of val: results on them flatter"
        assert said in done.stdout
        [start] = json.loads((place / "environment.json").read_text())["starts"]
        assert sum(said in warning for warning in start["data_warnings"]) == 1
        splits = json.loads((folder / "splits.json").read_text())
        assert (place / f"seen_by_{folder.name}.txt").read_text().split() == splits["val"]


def test_an_encoder_goes_from_labels_to_masks(run, cli, tmp_path):
    _, folder, _ = run
    small = ["data.images={train:8,val:2,test:2}", "data.image_size=32", "trainer.max_epochs=1"]
    weights = f"model.encoder_weights={folder}"
    done = cli("train", "data=phantom", "model=unet", "model.encoder=resnet18", weights, *small,
               f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert "loaded 100 of 100" in done.stdout
    assert "seen before" not in done.stdout  # some have the same names, none is the same picture
