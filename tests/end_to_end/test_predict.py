import csv
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from medvision.build import load_run
from medvision.data.images import read_image
from medvision.prediction import Predictor

NOWHERE = {"MEDVISION_DATA": "/proc/nowhere", "MEDVISION_CACHE": "/proc/nowhere"}


def rows(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def images(cli, finished, tmp_path_factory):
    """The images of the test split of the finished run as files of their own."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cli.environment.items():
            patch.setenv(name, value)
        for sample in load_run(finished[0]).data.splits["test"]:
            (folder / f"{sample.id}{Path(sample.image.name).suffix}").write_bytes(sample.image.read())
    return folder


@pytest.fixture
def moved(finished, tmp_path):
    """The folder of the finished run elsewhere, with the config that older runs have."""
    folder = tmp_path / "moved = and spaced"
    shutil.copytree(finished[0], folder)
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    config.loss.positive_weights = "auto"
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    return folder


def test_masks_of_the_test_split_from_the_run_folder_alone(cli, finished, moved, images, tmp_path):
    out = tmp_path / "out"
    words = [f"run='{moved}'", f"input={images}", f"output={out}", "probabilities=true", "format=isic2017"]
    done = cli("predict", *words, **NOWHERE)
    expected = rows(finished[0] / "results_test.csv")
    assert f"7 of 7 images predicted: {out / 'predictions.csv'}" in done.stdout
    assert f"threshold of lesion: {float(expected[0]['threshold']):g} as stored" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    for found, row in zip(rows(out / "predictions.csv"), expected, strict=True):
        assert Path(found["file"]).stem == row["id"] and found["threshold"] == row["threshold"]
        assert int(found["area"]) == int(row["tp"]) + int(row["fp"])
        assert float(found["share"]) == int(found["area"]) / (int(row["height"]) * int(row["width"]))
        mask = np.asarray(Image.open(out / f"{row['id']}_mask.png"))
        assert mask.shape == (int(row["height"]), int(row["width"])) and (mask > 0).sum() == int(found["area"])
        assert Image.open(out / f"{row['id']}_overlay.png").size == mask.shape[::-1]
        assert np.asarray(Image.open(out / f"{row['id']}_probability.png")).dtype == np.uint16
        with zipfile.ZipFile(out / "isic2017.zip") as archive:
            assert len(archive.namelist()) == 7
            with archive.open(f"{row['id']}_segmentation.png") as file:
                np.testing.assert_array_equal(np.asarray(Image.open(file)), mask)
    error = cli("predict", *words[:4], "format=isic2018_task2", code=1).stderr
    assert "format=isic2018_task2 wants masks of pigment_network, " in error and "predicted are lesion" in error


def test_a_run_answers_in_a_notebook_with_its_own_normalisation(moved, images, monkeypatch):
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    run = load_run(moved)
    stored = json.loads((moved / "splits.json").read_text())
    np.testing.assert_array_equal(run.data.normalisation, [stored["mean"], stored["std"]])
    predictor = Predictor([run.predicting()])
    image = Image.open(sorted(images.iterdir())[0]).convert("RGB")
    small = np.asarray(image.resize((48, 32), Image.Resampling.BOX)) / 255
    found = predictor(np.asarray(image))
    assert found.shape == (1, *image.size[::-1]) and 0 < found.min() < found.max() < 1
    normal = (small - stored["mean"]) / stored["std"]
    with torch.inference_mode():
        expected = run.task.probability(torch.from_numpy(normal).float().permute(2, 0, 1)[None])
    assert found.mean() == pytest.approx(float(expected.mean()), abs=0.01)


def test_without_a_record_the_normalisation_is_that_of_the_data(cli, moved, monkeypatch):
    for name, value in cli.environment.items():
        monkeypatch.setenv(name, value)
    stored = json.loads((moved / "splits.json").read_text())
    (moved / "splits.json").unlink()
    np.testing.assert_array_equal(load_run(moved).data.normalisation, [stored["mean"], stored["std"]])


def test_a_second_start_goes_on_and_other_settings_are_refused(cli, finished, images, tmp_path):
    words = [f"run={finished[0]}", f"input={images}/*.*", f"output={tmp_path / 'out'}"]
    some = sorted(images.iterdir())[0]
    cli("predict", words[0], f"input={some}", words[2])
    assert "1 of 7 images are already there" in cli("predict", *words).stdout
    error = cli("predict", *words, "threshold=0.25", "tta=flips", code=1).stderr
    assert "tta: none -> flips" in error and "-> [0.25]" in error and "Traceback" not in error
    cli("predict", *words, "threshold=0.25", "tta=flips", "window=[32,48]", "overwrite=true")
    settings = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert (settings["threshold"], settings["window"], settings["overlap"]) == ([0.25], [32, 48], 0.5)
    assert settings["runs"][0]["folder"] == str(finished[0])


def test_several_runs_are_averaged_and_broken_images_named(cli, finished, moved, images, tmp_path, monkeypatch):
    metrics = json.loads((moved / "metrics.json").read_text())
    (moved / "metrics.json").write_text(json.dumps(metrics | {"threshold": 0.25}))
    shutil.copytree(images, tmp_path / "in")
    broken = sorted((tmp_path / "in").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:300])
    (tmp_path / "in" / "notes.txt").write_text("words")
    words = [f"run=[{finished[0]},'{moved}']", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]
    done = cli("predict", *words, code=1)
    mean = (metrics["threshold"] + 0.25) / 2
    assert f"{mean:g} as stored, the mean of {metrics['threshold']:g}, 0.25" in done.stdout
    assert "skipped, no images: 1 .txt" in done.stdout and "6 of 7 images predicted" in done.stdout
    assert f"broken are 1 of 7 images:\n  {broken.name}: " in done.stderr and "Traceback" not in done.stderr
    found = rows(tmp_path / "out" / "predictions.csv")
    assert len(found) == 6 and {float(row["threshold"]) for row in found} == {mean}
    for name, value in cli.environment.items():
        monkeypatch.setenv(name, value)
    run = load_run(finished[0])
    sample = next(s for s in run.data.splits["test"] if s.id == Path(found[0]["file"]).stem)
    probability = Predictor([run.predicting()])(read_image(sample.image, 3))
    assert int(found[0]["area"]) == (probability >= np.float32(mean)).sum()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which run? run=<folder, as train printed it>"),
        (["run=x"], "which input? input=<image, folder or glob>"),
        (["run=x", "input=x"], "which output? output=<folder>"),
        (["run=x", "input=x", "output=y"], "input=x is not there"),
        (["run=x", "input=.", "output=y", "threshold=2"], "threshold=2: expected 'stored' or a probability"),
        (["run=x", "input=.", "output=y", "window=0"], "e.g. window=[192,256]"),
        (["run=x", "input=.", "output=y", "windows=9"], "did you mean 'window'"),
    ],
)
def test_refusals(cli, words, said):
    error = cli("predict", *words, code=1).stderr
    assert said in error and "Traceback" not in error


def test_temperature_and_cleaning_are_chosen_stored_and_applied(cli, tiny, images, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    chosen = ["temperature=validation", "cleaning=validation", "trainer.max_epochs=1"]
    done = cli("train", *tiny, *chosen, f"hydra.run.dir={folder}")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "cleaning of lesion: " in done.stdout + done.stderr
    assert metrics["temperature"] > 0 and metrics["beside"]["test"]["without temperature"].keys() == {"ece", "brier"}
    assert {"calibration_val.png", "calibration_test.png", "calibration_test.csv"} <= {p.name for p in folder.iterdir()}
    assert "equal to the numbers" in cli("evaluate", f"run={folder}").stdout

    areas = [int(row["tp"]) + int(row["fp"]) for row in rows(folder / "results_test.csv")]
    cleaning = [{"fill": False, "min_area": float(np.median(areas)) + 1, "largest": True}]  # removes half or more
    (folder / "metrics.json").write_text(json.dumps(metrics | {"cleaning": cleaning}))
    cli("evaluate", f"run={folder}")
    found = json.loads((folder / "evaluations" / "test_stored.json").read_text())
    assert found["cleaning"] == cleaning and found["without cleaning"]["sensitivity"] > found["test"]["sensitivity"]
    assert (found["threshold"], found["temperature"]) == (metrics["threshold"], metrics["temperature"])
    assert found["without temperature"]["brier"] != found["test"]["brier"]
    cli("predict", f"run={folder}", f"input={images}", f"output={out}", **NOWHERE)
    settings = json.loads((out / "prediction.json").read_text())
    assert (settings["threshold"], settings["cleaning"]) == ([metrics["threshold"]], cleaning)
    assert settings["runs"][0]["temperature"] == [metrics["temperature"]]
    for row, expected in zip(
        rows(out / "predictions.csv"), rows(folder / "evaluations" / "test_stored.csv"), strict=True
    ):
        assert int(row["area"]) == int(expected["tp"]) + int(expected["fp"]) and int(row["components"]) <= 1
    runs = f"run={folder},{tmp_path / 'other'}"
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "metrics.json").write_text(json.dumps(metrics | {"cleaning": []}))
    error = cli("predict", runs, f"input={images}", f"output={tmp_path / 'both'}", code=1, **NOWHERE).stderr
    assert "cleaned in different ways" in error and "cleaning=none leaves them" in error
    for words in (["cleaning=maybe"], ["temperature=2"]):
        error = cli("evaluate", f"run={folder}", *words, code=1).stderr
        assert f"{words[0]}: expected 'stored', 'none' or 'validation'" in error
