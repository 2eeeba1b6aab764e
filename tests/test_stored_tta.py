"""The views that a run is measured with, from run folders as training leaves them."""

import csv
import json
import logging

import numpy as np
import pytest
import torch
from omegaconf import open_dict

from medvision import cli, evaluate
from medvision.build import build, load_run
from medvision.configs import save_config
from medvision.errors import MedvisionError
from medvision.prediction import Predictor
from medvision.report import finish
from medvision.runs import RunFolder

SETS = {
    "masks": ["data=phantom", "data.images={train:4,val:6,test:5}", "model=unet_plain", "model.width=4"],
    "labels": ["data=phantom_melanoma", "data.images={train:40,test:8}", "model=resnet18"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained("masks", "flips")`: a run folder with random weights, the same for all views, and its results."""
    made, root = {}, tmp_path_factory.mktemp("runs")

    def make(name, views):
        if (name, views) not in made:
            words = ["data.image_size=32", "data.num_workers=0", "trainer.accelerator=cpu", f"hydra.run.dir={root}"]
            cfg = cli.compose("train", [*SETS[name], *words, f"tta={views}"])
            with open_dict(cfg):
                del cfg["hydra"]
            place = RunFolder(root / f"{name}_{views}")
            save_config(cfg, place)
            best = {"best_epoch": 1, "best": 0.5}
            place.best.parent.mkdir()
            torch.save({"state_dict": build(cfg).task.state_dict(), "callbacks": {"Checkpoint": best}}, place.best)
            place.history.write_text("epoch,step,metric,value\n1,9,val/loss,0.6\n")
            finish(place)
            made[name, views] = place
        return made[name, views]

    with pytest.MonkeyPatch.context() as patch:
        for place in ("data", "cache", "runs"):
            patch.setenv(f"MEDVISION_{place.upper()}", str(root / place))
        yield make


def measured(place, *words):
    """What `evaluate` writes: the new JSON file and its name."""
    folder = place.path / "evaluations"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    cfg = cli.compose("evaluate", [f"run={place.path}", *words])
    evaluate.start(cfg, place.path, [])
    (written,) = [path for path in folder.glob("*.json") if path.stat().st_mtime_ns != before.get(path.name)]
    return written.stem, json.loads(written.read_text())


def probabilities(path):
    with path.open() as handle:
        return [float(row["probability"]) for row in csv.DictReader(handle)]


def test_a_run_of_masks_is_measured_with_its_views_and_so_is_its_threshold_chosen(trained, caplog):
    caplog.set_level(logging.INFO)
    plain, flips = trained("masks", "none"), trained("masks", "flips")
    before, stored = (json.loads(place.metrics.read_text()) for place in (plain, flips))
    assert "tta" not in before and stored["tta"] == "flips" and before["test"] != stored["test"]
    name, asked = measured(plain, "tta=flips", "threshold=validation")
    assert name == "test_validation_flips" and asked["without tta"] == before["test"]
    assert (asked["test"], asked["threshold"]) == (stored["test"], stored["threshold"])
    for words in ([], ["tta=flips"]):
        caplog.clear()
        name, again = measured(flips, *words)
        assert name == "test_stored" and again["test"] == stored["test"] and again["tta"] == "flips"
        assert "without tta" not in again and f"equal to the numbers in {flips.metrics}" in caplog.messages
    name, without = measured(flips, "tta=none")
    assert name == "test_stored_without_tta" and "tta" not in without
    assert without["test"] == measured(plain, f"threshold={stored['threshold']}")[1]["test"]


def test_a_run_of_labels_is_measured_with_its_views(trained):
    plain, flips = trained("labels", "none"), trained("labels", "flips")
    name, asked = measured(plain, "tta=flips", "threshold=validation")
    stored = json.loads(flips.metrics.read_text())
    assert (asked["test"], asked["threshold"]) == (stored["test"], stored["threshold"])
    found = [flips.results("test"), plain.path / "evaluations" / f"{name}.csv", plain.results("test")]
    with_views, asked_for, without = map(probabilities, found)
    assert with_views == asked_for and np.abs(np.subtract(with_views, without)).max() > 1e-4
    assert measured(flips)[1]["test"] == stored["test"]


def test_prediction_has_the_views_of_the_run_unless_told_otherwise(trained):
    plain, flips = (load_run(trained("masks", views).path).predicting() for views in ("none", "flips"))
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    assert (Predictor([plain]).tta, Predictor([flips]).tta, Predictor([plain, flips]).tta) == (
        "none",
        "flips",
        "none, flips",
    )
    both = [Predictor([plain])(image), Predictor([plain], "flips")(image)]
    assert np.abs(both[0] - both[1]).max() > 1e-4
    np.testing.assert_array_equal(Predictor([flips])(image), both[1])
    np.testing.assert_array_equal(Predictor([flips], "none")(image), both[0])
    np.testing.assert_allclose(Predictor([plain, flips])(image), np.mean(both, 0), atol=1e-6)


def test_views_that_cannot_be_are_refused(trained):
    with pytest.raises(MedvisionError, match="tta=flop: expected one of none, flips, d4, d4_scales"):
        build(cli.compose("train", [*SETS["masks"], "tta=flop"]))
    with pytest.raises(MedvisionError, match="tta_mean=logit is of views that are asked for"):
        measured(trained("masks", "flips"), "tta_mean=logit")
