import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medvision.comparison import page_images
from medvision.comparison.page_images import chosen, disagreement, levels, pictured, resized
from medvision.comparison.variants import Measured
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.metrics import GRID, LabelRows, MaskRows
from medvision.postprocess import Cleaning

CLASSES = ("ants", "bees")


def compared(each, metric="dice_image", **more):
    """As much of a comparison as images are chosen by: for each variant the values of the images."""
    number = len(next(iter(each.values())))
    values = {name: np.array(of, float) for name, of in each.items()}
    facts = {"metrics": [metric], "each": {metric: values}, "each_is": {metric: metric}, "images": number}
    return SimpleNamespace(**{"ids": tuple(f"i{n:02d}" for n in range(number)), **facts, **more})


def test_half_are_those_that_variants_disagree_on():
    rng = np.random.default_rng(0)
    each = {name: rng.uniform(0, 1, 40).round(3) for name in "abc"}
    each["b"][7] = np.nan
    found = compared(each)
    values = np.stack([*each.values()])
    apart = np.nanmax(values, 0) - np.nanmin(values, 0)
    np.testing.assert_array_equal(disagreement(found), apart)
    most, rest = chosen(found, 13)
    assert most == sorted(range(40), key=lambda n: (-apart[n], n))[:6] and len(rest) == 7
    left = [n for n in range(40) if n not in most]
    mean = np.nanmean(values, 0)
    assert [mean[n] for n in rest] == sorted(mean[n] for n in rest)  # from the worst to the best
    assert (rest[0], rest[-1]) == (min(left, key=lambda n: mean[n]), max(left, key=lambda n: mean[n]))
    of_brier = chosen(compared(each, "brier"), 13)[1]
    assert (of_brier[0], of_brier[-1]) == (rest[-1], rest[0])


def test_all_are_chosen_once_where_more_are_asked_for():
    found = compared({"a": [0.5, np.nan, 0.7], "b": [0.1, np.nan, 0.9]})
    assert disagreement(found) == pytest.approx([0.4, 0, 0.2])
    most, rest = chosen(found, 60)
    assert most == [0] and rest == [2, 1]  # what has no value comes last
    assert chosen(compared({"a": [0.3, 0.1, 0.2]}), 60) == ([], [1, 2, 0])
    assert chosen(found, 1) == ([], [0])


def test_levels_decide_as_probabilities_do():
    rng = np.random.default_rng(1)
    probability = rng.uniform(0, 1, (2, 30, 40)).astype(np.float32)
    probability[0].flat[: len(GRID)] = GRID  # exactly the threshold is above it
    probability[1].flat[: len(GRID)] = np.nextafter(GRID, np.float32(0))  # and the next less is not
    steps = levels(resized(probability, (30, 40)))
    assert steps.shape == (2, 30, 40) and steps.dtype == np.uint8 and steps.max() <= 200
    for threshold in GRID:
        mask = steps >= float(f"{threshold:.2f}") * 200 - 1e-6
        np.testing.assert_array_equal(mask, probability >= threshold)
    assert levels(resized(np.full((1, 4, 4), 1, np.float32), (9, 7))).tolist() == np.full((1, 9, 7), 200).tolist()


class Picture:
    """A sample that counts how often it is read."""

    def __init__(self, name, label):
        self.id, self.labels, self.read_times = name, (label,), 0

    def read(self, channels):
        self.read_times += 1
        image = np.full((300, 400, channels), 40 * self.labels[0] + 100, np.uint8)
        return image, np.zeros((300, 400, 0), np.uint8)


def labelled(folder, ids, probability, **repetition):
    """A finished run on labels, of which every other image is a bee."""
    there = np.array([[int(i[1:]) % 2 == 0, int(i[1:]) % 2 == 1] for i in ids])
    both = np.stack([probability, 1 - probability], 1)
    decided = both == both.max(1, keepdims=True)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    config = {"seed": repetition.get("seed", 1), "data": {"fold": repetition.get("fold", 0)}}
    rows = LabelRows(tuple(ids), CLASSES, both, there, decided, True)
    return Measured(folder, config, [], rows, {}, {})


@pytest.fixture
def folds(tmp_path, monkeypatch, spec):
    """A comparison of two variants, the first of two folds and another seed, and its runs."""
    ids = [f"i{n:02d}" for n in range(10)]
    rng = np.random.default_rng(2)
    first, second = rng.uniform(0.1, 0.9, 10), rng.uniform(0.1, 0.9, 10)
    runs = [
        labelled(tmp_path / "a0", ids[:5], first[:5]),
        labelled(tmp_path / "a1", ids[5:], first[5:], fold=1),
        labelled(tmp_path / "again", ids, 1 - first, seed=2),
        labelled(tmp_path / "b", ids, second),
    ]
    samples = {name: Picture(name, int(name[1:]) % 2) for name in ids}
    facts = spec("multiclass", classes=[*CLASSES], num_outputs=2, target="label")
    fake = SimpleNamespace(data=SimpleNamespace(spec=facts))
    loaded = []
    monkeypatch.setattr(page_images, "load_run", lambda folder: loaded.append(folder) or fake)
    monkeypatch.setattr(page_images, "samples", lambda run, split: [*samples.values()])
    variants = [
        SimpleNamespace(name="a", runs=[{"folder": str(run.folder)} for run in runs[:3]]),
        SimpleNamespace(name="b", runs=[{"folder": str(runs[3].folder)}]),
    ]
    found = compared({"a": first, "b": second}, "brier", variants=variants, split="test")
    return found, runs, samples, loaded, (first, second)


def test_each_image_is_shown_by_the_run_that_measured_it(folds):
    found, runs, samples, loaded, probability = folds
    result = pictured(found, runs, 10)
    json.dumps(result, allow_nan=False)
    assert [run["name"] for run in result["runs"]] == ["a0", "a1", "again", "b"]
    assert result["seeds"] == [["seed 1", "seed 2"], ["seed 1"]]
    assert result["target"] == "label" and result["every"]["ids"] == found.ids
    for v in range(2):
        np.testing.assert_array_equal(np.array(result["every"]["probability"][v][0])[:, 0], probability[v])
    np.testing.assert_array_equal(np.array(result["every"]["probability"][0][1])[:, 0], 1 - probability[0])
    names = [run["name"] for run in result["runs"]]
    for image in result["images"]:
        number = int(image["id"][1:])
        assert [[names[n] for n in of] for of in image["runs"]] == [["a0" if number < 5 else "a1", "again"], ["b"]]
        assert image["truth"] == [number % 2 == 0, number % 2 == 1] and image["answers"] == [[None, None], [None]]
        assert image["size"] == [144, 192] and image["original"] == [300, 400]
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(image["image"].partition(",")[2]))))
        assert shown.shape == (144, 192, 3) and abs(shown.mean() - (40 * (number % 2) + 100)) < 2
        truth = probability[0][number] if number % 2 == 0 else 1 - probability[0][number]
        place = result["metrics"].index("probability of the truth")
        assert [of[place] for of in image["values"][0]] == pytest.approx([truth, 1 - truth], abs=1e-6)
    assert [sample.read_times for sample in samples.values()] == [1] * 10
    assert [Path(folder).name for folder in loaded] == ["a0", "a1"]  # the others have no image that is new
    one = pictured(found, runs, 1)  # all probabilities are there whichever images are
    assert len(one["images"]) == 1 and one["runs"] == result["runs"] and one["every"] == result["every"]


def test_masks_that_are_not_made_smaller_are_those_that_the_run_decides_for(tmp_path, monkeypatch, spec):
    """Two parts of which the cleaning keeps one, at a temperature that moves the threshold between two steps."""
    probability, truth = np.zeros((2, 20, 30), np.float32), np.zeros((20, 30, 2), np.uint8)
    probability[0, 2:5, 2:5], probability[0, 8:16, 8:20], probability[1, 4:9] = 0.7, 0.4372, 0.4368
    truth[3:9, 3:9, 0] = 255
    decision = Decision((0.437, 0.437), cleaning=(Cleaning(largest=True), Cleaning()))
    (tmp_path / "metrics.json").write_text(json.dumps(decision.entries()))
    counts = np.ones((1, 2, 4), np.int64)
    run = Measured(tmp_path, {"seed": 4, "data": {}}, [], MaskRows(("i",), ("a", "b"), counts), {}, {})
    sample = SimpleNamespace(id="i", read=lambda channels: (np.zeros((20, 30, channels), np.uint8), truth))
    facts = spec("multilabel", classes=["a", "b"], image_size=8)
    loaded = SimpleNamespace(data=SimpleNamespace(spec=facts), decision=decision, predicting=lambda: None)
    asked = []
    monkeypatch.setattr(page_images, "load_run", lambda folder: loaded)
    monkeypatch.setattr(page_images, "samples", lambda run, split: [sample])
    monkeypatch.setattr(
        page_images, "Predictor", lambda models: lambda image, name: asked.append(image.shape) or probability
    )
    variants = [SimpleNamespace(name="all runs", runs=[{"folder": str(tmp_path)}])]
    result = pictured(compared({"all runs": [0.5]}, variants=variants, split="test", ids=("i",)), [run], 1)
    assert asked == [(20, 30, 3)] and result["images"][0]["size"] == [20, 30]  # not at the size of the network
    [[answer]] = result["images"][0]["answers"]
    steps, decided = np.split(np.array(Image.open(io.BytesIO(base64.b64decode(answer.partition(",")[2])))), 2)
    np.testing.assert_array_equal(steps, np.floor(probability.reshape(40, 30) * 200 + 1e-4))
    expected = np.zeros((2, 20, 30), np.uint8)
    expected[0, 8:16, 8:20] = 255  # the smaller part is gone, though surer; of the other class none is likely enough
    np.testing.assert_array_equal(decided, expected.reshape(40, 30))
    assert result["runs"][0]["cleaned"] and result["images"][0]["values"][0][0]


def test_an_image_that_is_gone_is_named(folds):
    found, runs, samples, *_ = folds
    del samples["i03"]
    with pytest.raises(MedvisionError, match=r"has measured i03, which is not in test of the data now"):
        pictured(found, runs, 10)
