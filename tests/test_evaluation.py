import csv
import io
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.special import expit, logit
from torch import nn

from medvision import figures
from medvision.data import ISIC2016, ISIC2017, Hymenoptera, ISIC2017Diagnosis
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation import LabelEvaluation, MaskEvaluation, choose_decision, evaluate
from medvision.losses import CrossEntropy, SegmentationLoss
from medvision.metrics import (
    BOUNDARY,
    CHOICES,
    COUNTS,
    GRID,
    boundary_scores,
    decide,
    scores,
    summarise,
    summarise_labels,
)
from medvision.metrics.calibration import fit_temperature
from medvision.postprocess import OPTIONS, Cleaning
from medvision.tasks import ClassificationTask, ImageCounts, SegmentationTask

SIZE = (12, 20)  # height and width at which the network sees an image
CLASSES = ("round", "square")


def naive_counts(probability, truth, threshold):
    predicted = probability >= threshold
    cells = (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
    return np.array([cell.sum() for cell in cells])


def made(seed=0, images=5, thresholds=GRID):
    """Random probabilities and truths with two classes, and their evaluation, counted one by one."""
    generator = np.random.default_rng(seed)
    arrays, counted = [], []
    for n in range(images):
        size = (3 + n, 4)
        truth = generator.random((2, *size)) < generator.choice([0, 0.5])
        probability = np.clip(generator.normal(0.35 + 0.3 * truth, 0.25), 0, 1).astype(np.float32)
        arrays.append((probability, truth))
        rows = [[naive_counts(probability[k], truth[k], t) for k in range(2)] for t in thresholds]
        counted.append(ImageCounts(f"image{n}", size, np.array(rows), np.array(rows)[49]))
    return arrays, MaskEvaluation("val", CLASSES, tuple(counted), thresholds)


@pytest.mark.parametrize("threshold", [[0.5, 0.5], [0.01, 0.99], [0.29, 0.58]])
def test_counts_at_a_threshold_for_each_class(threshold):
    arrays, evaluation = made()
    expected = [[naive_counts(p[k], t[k], np.float32(threshold[k])) for k in range(2)] for p, t in arrays]
    np.testing.assert_array_equal(evaluation.counts(Decision(tuple(threshold))), expected)
    assert evaluation.summary(Decision(tuple(threshold))) == summarise(np.array(expected), CLASSES)


def test_every_threshold_of_the_grid_is_found():
    _, evaluation = made(images=1)
    for n in range(99):
        expected = evaluation.images[0].counts[n]
        np.testing.assert_array_equal(evaluation.counts(Decision(((n + 1) / 100,) * 2))[0], expected)


@pytest.mark.parametrize("threshold", [0.333, 0.005, 0.995])
def test_threshold_that_was_not_counted_is_refused(threshold):
    _, evaluation = made(images=1)
    with pytest.raises(MedvisionError, match=f"threshold {threshold}.*not counted"):
        evaluation.summary(Decision((0.5, threshold)))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_chosen_threshold_of_each_class_is_the_best(seed):
    _, evaluation = made(seed)
    chosen = evaluation.choose("jaccard_image").threshold
    for k in range(2):
        means = [scores(evaluation.counts(Decision((t, t))))["jaccard"][:, k].mean() for t in GRID.tolist()]
        assert means[round(100 * chosen[k]) - 1] == pytest.approx(max(means), abs=1e-12)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_threshold_chosen_by_pooled_pixels_is_the_best(seed):
    _, evaluation = made(seed)
    chosen = evaluation.choose("jaccard").threshold
    for k in range(2):
        tp, fp, fn, _ = np.stack([evaluation.counts(Decision((t, t)))[:, k].sum(0) for t in GRID.tolist()]).T
        pooled = np.where(tp + fp + fn, tp / np.maximum(tp + fp + fn, 1), 1)
        assert pooled[round(100 * chosen[k]) - 1] == pytest.approx(pooled.max(), abs=1e-12)


def test_choice_looks_at_the_grid_alone():
    also = np.float32(0.505)
    thresholds = np.unique(np.append(GRID, also))
    counts = np.tile([1, 1, 0, 2], (len(thresholds), 1, 1))
    counts[thresholds == also] = [2, 0, 0, 2]  # better than any of the grid
    counts[thresholds == GRID[69], 0, 1] = 0
    evaluation = MaskEvaluation("val", ("lesion",), (ImageCounts("a", (2, 2), counts, counts[49]),), thresholds)
    assert evaluation.choose("jaccard_image") == Decision((0.7,))
    assert evaluation.summary(Decision((0.505,)))["jaccard"] == 1.0


def test_every_summary_can_be_recomputed_from_the_table():
    _, evaluation = made()
    decision = Decision((0.4, 0.62))
    rows = list(csv.DictReader(io.StringIO(evaluation.table(decision))))
    assert [(row["id"], row["class"]) for row in rows] == [(f"image{n}", c) for n in range(5) for c in CLASSES]
    assert [float(row["threshold"]) for row in rows] == [0.4, 0.62] * 5
    for row in rows:
        assert sum(int(row[name]) for name in COUNTS) == int(row["height"]) * int(row["width"])
    counts = np.array([[int(row[name]) for name in COUNTS] for row in rows]).reshape(5, 2, 4)
    summary = evaluation.summary(decision)
    assert summarise(counts, CLASSES) == summary
    for name in ("dice", "jaccard", "sensitivity", "precision"):
        each = [[float(r[name]) for r in rows if r["class"] == c and r[name]] for c in CLASSES]
        assert summary[f"{name}_image"] == pytest.approx(np.mean([np.mean(values) for values in each]), abs=1e-15)


def test_intervals_lie_around_the_summary_and_grow_with_groups_that_are_alike():
    _, evaluation = made(images=8)
    decision = Decision((0.5, 0.5))
    summary, found = evaluation.summary(decision), evaluation.intervals(decision)
    assert found.keys() <= summary.keys() and {"dice", "jaccard_image/round"} <= found.keys()
    for name, (low, high) in found.items():
        assert low <= summary[name] + 1e-12 and summary[name] <= high + 1e-12, name
    twice = replace(evaluation, images=evaluation.images * 2)
    alone, grouped = (
        replace(twice, groups=groups).intervals(decision)["dice"] for groups in (None, tuple("abcdefgh" * 2))
    )
    assert grouped[1] - grouped[0] > 1.2 * (alone[1] - alone[0])
    assert grouped == pytest.approx(found["dice"], abs=0.02)
    one = replace(evaluation, images=evaluation.images[:1])
    assert one.intervals(decision) == {}


def test_value_that_is_not_there_is_an_empty_cell():
    counts = np.tile([0, 3, 0, 1], (99, 1, 1))
    table = MaskEvaluation("val", ("a, b",), (ImageCounts("x", (2, 2), counts, counts[49]),), GRID).table(
        Decision((0.5,))
    )
    (row,) = csv.DictReader(io.StringIO(table))
    assert (row["class"], row["sensitivity"], row["precision"]) == ("a, b", "", "0.0")


class Darkness(nn.Module):
    """A 1x1 convolution that takes what is dark for a lesion."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.conv.weight, -0.5)
        nn.init.constant_(self.conv.bias, -0.4)

    def forward(self, image):
        return self.conv(image)


@pytest.fixture
def data(fake_isic2017, spec, tmp_path):
    root = fake_isic2017(tmp_path / "isic2017", counts={"train": 3, "val": 3, "test": 5})
    return ISIC2017(spec(), root, tmp_path / "cache", image_size=SIZE, batch_size=2, num_workers=0)


@pytest.fixture
def task(spec):
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return SegmentationTask(Darkness(), SegmentationLoss({"bce": 1}), optimizer, None, spec(image_size=SIZE))


@pytest.fixture
def trainer():
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, **quiet)


def naive_probability(image, spec):
    """What the network says of a file's pixels (H, W, 3), at the file's own size."""
    small = cv2.resize(image, SIZE[::-1], interpolation=cv2.INTER_AREA)
    normalised = (small / 255 - np.array(spec.mean)) / np.array(spec.std)
    probability = 1 / (1 + np.exp(0.5 * normalised.sum(-1) + 0.4))
    return cv2.resize(probability, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_is_measured_at_the_original_sizes(data, task, trainer, split):
    evaluation = evaluate(trainer, task, data, split, Decision((0.333,)))
    samples = sorted(data.splits[split], key=lambda sample: sample.id)
    assert (evaluation.split, evaluation.classes) == (split, ("lesion",))
    assert [image.id for image in evaluation.images] == [sample.id for sample in samples]
    assert len({image.size for image in evaluation.images}) > 1
    for image, sample in zip(evaluation.images, samples, strict=True):
        pixels, mask = sample.read(3)
        assert image.size == pixels.shape[:2]
        probability, truth = naive_probability(pixels, data.spec), mask[..., 0] > 0
        assert image.counts.shape == (100, 1, 4)
        assert (image.counts.sum(-1) == truth.size).all()
        for threshold in (0.333, 0.5, 0.8):
            tp, fp, fn, _ = evaluation.counts(Decision((threshold,)))[[s.id for s in samples].index(image.id), 0]
            # the same but for pixels whose probability is the threshold up to rounding
            high, low = (naive_counts(probability, truth, threshold + e) for e in (1e-5, -1e-5))
            assert high[0] <= tp <= low[0] and high[1] <= fp <= low[1]
            assert 0 < tp < truth.size and tp + fn == truth.sum()


def test_a_second_evaluation_forgets_the_first(data, task, trainer):
    first = evaluate(trainer, task, data, "test")
    evaluate(trainer, task, data, "val", Decision((0.123,)))
    again = evaluate(trainer, task, data, "test")
    assert len(again.thresholds) == 99
    assert again.table(Decision((0.5,))) == first.table(Decision((0.5,)))


def test_a_threshold_of_the_grid_is_not_counted_twice(data, task, trainer):
    evaluation = evaluate(trainer, task, data, "val", Decision((0.07,)))
    np.testing.assert_array_equal(evaluation.thresholds, GRID)


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan")])
def test_threshold_that_is_no_probability_is_refused(data, task, trainer, threshold):
    with pytest.raises(MedvisionError, match=f"threshold is {threshold}; expected .* above 0 and below 1"):
        evaluate(trainer, task, data, "val", Decision((0.5, threshold)))


def test_unknown_split_is_refused(data, task, trainer):
    with pytest.raises(MedvisionError, match="no split 'tset' here; it has train, val, test"):
        evaluate(trainer, task, data, "tset")


@pytest.mark.parametrize(("number", "ranks"), [(1, [1]), (2, [1, 5]), (3, [1, 3, 5]), (9, [1, 2, 3, 4, 5])])
def test_images_from_the_worst_to_the_best(data, task, trainer, number, ranks):
    decision = Decision((0.61,))
    evaluation = evaluate(trainer, task, data, "test")
    jaccard = sorted(
        (float(row["jaccard"]), row["id"]) for row in csv.DictReader(io.StringIO(evaluation.table(decision)))
    )
    assert jaccard[0][0] < jaccard[-1][0]
    assert [*evaluation.spread(decision, number).items()] == [(jaccard[rank - 1][1], rank) for rank in ranks]


def labels(exclusive=False):
    probability = np.array([[0.9, 0.2], [0.4, 0.6], [0.3, 0.1], [0.2, 0.7]], np.float32)
    truth = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
    return LabelEvaluation("val", ("a", "b"), exclusive, ("w", "x", "y", "z"), probability, truth)


def test_thresholds_of_labels_are_chosen_by_sensitivity_plus_specificity():
    # a: 0.9 and 0.3 against 0.4 and 0.2: either cut misses one, 0.65 is nearer to one half; b: between 0.2 and 0.6
    assert labels().choose("val/accuracy").threshold == pytest.approx([0.65, 0.4])
    assert labels(exclusive=True).choose("val/accuracy") == Decision(())


def test_a_class_that_no_image_shows_keeps_one_half_and_says_so(caplog):
    evaluation = LabelEvaluation("val", ("a",), False, ("x",), np.array([[0.3]], np.float32), np.array([[False]]))
    assert evaluation.choose("val/accuracy") == Decision((0.5,))
    assert "a is shown by all images of val or by none: no threshold can be chosen there, it is 0.5" in caplog.text


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_summary_of_labels_can_be_recomputed_from_the_table(exclusive):
    evaluation = labels(exclusive)
    decision = evaluation.choose("val/accuracy")
    rows = list(csv.DictReader(io.StringIO(evaluation.table(decision))))
    assert [(row["id"], row["class"]) for row in rows] == [(i, c) for i in "wxyz" for c in "ab"]
    probability = np.array([float(row["probability"]) for row in rows]).reshape(4, 2)
    truth = np.array([row["truth"] == "1" for row in rows]).reshape(4, 2)
    assert summarise_labels(probability, truth, ("a", "b"), decision.threshold) == pytest.approx(
        evaluation.summary(decision)
    )
    decided = np.array([row["decision"] == "1" for row in rows]).reshape(4, 2)
    np.testing.assert_array_equal(decided, decide(probability, decision.threshold))
    assert {row["threshold"] for row in rows} == ({""} if exclusive else {str(t) for t in decision.threshold})


class Redness(nn.Module):
    """Logits from the mean of each channel."""

    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(3, outputs, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(outputs, 3))

    def forward(self, image):
        return self.head(image.mean((2, 3)))


SETS = {
    "binary": (ISIC2016, ["malignant"]),
    "multilabel": (ISIC2017Diagnosis, ["melanoma", "seborrheic_keratosis"]),
    "multiclass": (Hymenoptera, ["ants", "bees"]),
}


@pytest.mark.parametrize(("kind", "fake"), [(k, f"fake_{c.__name__.lower()}") for k, (c, _) in SETS.items()])
def test_labels_of_a_split_are_measured(kind, fake, spec, trainer, tmp_path, request):
    cls, classes = SETS[kind]
    facts = spec(kind, target="label", classes=classes)
    root = request.getfixturevalue(fake.replace("2017diagnosis", "2017_diagnosis"))(tmp_path / "x")
    data = cls(facts, root, tmp_path / "cache", batch_size=4)
    model = Redness(len(facts.classes))
    task = ClassificationTask(model, CrossEntropy(), partial(torch.optim.SGD, lr=0.1), None, facts)
    found = evaluate(trainer, task, data, "val")
    assert isinstance(found, LabelEvaluation) and found.exclusive == (kind == "multiclass")
    samples = sorted(data.splits["val"], key=lambda s: s.id)
    assert found.ids == tuple(s.id for s in samples)
    positions = {name: n for n, name in enumerate(data.dataset("val").ids)}
    for n, sample in enumerate(samples):
        item = data.dataset("val")[positions[sample.id]]
        logits = item["image"].mean((1, 2))[: len(facts.classes)].numpy()
        odds = np.exp(logits)
        np.testing.assert_allclose(
            found.probability[n], odds / odds.sum() if kind == "multiclass" else odds / (1 + odds), rtol=1e-5
        )
        assert [k in sample.labels for k in range(len(facts.classes))] == found.truth[n].tolist()
    found.draw(tmp_path / "sheet.png", data, found.choose("val/accuracy"))
    assert min(Image.open(tmp_path / "sheet.png").size) > 200


def test_scores_of_challenges():
    _, evaluation = made(images=4)
    found = evaluation.challenge("isic2018_task2", Decision((0.5, 0.5)))
    assert found["jaccard"] == pytest.approx(evaluation.summary(Decision((0.5, 0.5)))["jaccard"])
    one = LabelEvaluation("val", ("m",), False, ("x", "y"), np.array([[0.3], [0.6]]), np.array([[False], [True]]))
    assert one.challenge("isic2016_task3", Decision((0.1,)))["average_precision"] == 1
    assert replace(one, truth=np.array([[True], [True]])).challenge("isic2016_task3", Decision((0.1,))) == {}


def test_broken_weights_are_named(spec, trainer, tmp_path, fake_isic2016):
    facts = spec("binary", target="label", classes=["malignant"])
    data = ISIC2016(facts, fake_isic2016(tmp_path / "x"), tmp_path / "cache", batch_size=4)
    model = Redness(1)
    nn.init.constant_(model.head.weight, float("nan"))
    task = ClassificationTask(model, CrossEntropy(), partial(torch.optim.SGD, lr=0.1), None, facts)
    with pytest.raises(MedvisionError, match=r"the model answers NaN for ISIC_.*these weights are broken"):
        evaluate(trainer, task, data, "val")


def surfaces(evaluation, arrays, decision, tolerance=1.0, empty=1.0):
    """The same evaluation with boundaries measured one by one."""
    images = []
    for image, (probability, truth) in zip(evaluation.images, arrays, strict=True):
        found = boundary_scores(decision.masks(probability), truth, tolerance, both_empty=empty)
        images.append(replace(image, surface=found))
    return replace(evaluation, images=tuple(images), decision=decision, empty=empty)


def test_boundaries_are_in_the_table_the_summary_and_the_intervals_of_their_decision_alone():
    arrays, evaluation = made(seed=3, images=9)
    decision, other = Decision((0.4, 0.75)), Decision((0.5, 0.5))
    measured = surfaces(evaluation, arrays, decision)
    summary, rows = measured.summary(decision), [*csv.DictReader(io.StringIO(measured.table(decision)))]
    distances = {}
    for k, name in enumerate(CLASSES):
        pairs = [(probability[k] >= np.float32(decision.threshold[k]), truth[k]) for probability, truth in arrays]
        assert any(p.any() != t.any() for p, t in pairs) and any(p.any() and t.any() for p, t in pairs)
        distances[name] = sum(p.any() == t.any() for p, t in pairs)
        of_class = [row for row in rows if row["class"] == name]
        for row, (predicted, truth) in zip(of_class, pairs, strict=True):
            assert (int(row["area_truth"]), int(row["area_predicted"])) == (truth.sum(), predicted.sum())
            assert (row["hd95"] == "") == (predicted.any() != truth.any())
        for metric in BOUNDARY:
            known = [float(row[metric]) for row in of_class if row[metric]]
            assert len(known) == (len(arrays) if metric == "nsd" else distances[name])
            assert summary[f"{metric}_image/{name}"] == pytest.approx(np.mean(known))
    assert {name: summary[f"distances/{name}"] for name in CLASSES} == distances
    assert summary["distances"] == sum(distances.values())
    intervals = measured.intervals(decision)
    for metric in BOUNDARY:
        low, high = intervals[f"{metric}_image"]
        assert low < summary[f"{metric}_image"] < high
    without = evaluation.summary(decision)
    assert without == {name: value for name, value in summary.items() if name in without}
    assert without.keys() == measured.summary(other).keys()
    assert "hd95" not in measured.table(other)


@pytest.mark.parametrize(("empty", "jaccard", "nsd"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (float("nan"), 0.5, 0.5)])
def test_one_convention_for_images_of_nothing(empty, jaccard, nsd):
    """Two images: one half right with its boundary half within the tolerance, one of nothing."""
    right, nothing = np.array([[[1, 1, 1, 1]]], bool), np.zeros((1, 1, 4), bool)
    probability = [np.array([[[0.1, 0.1, 0.9, 0.9]]], np.float32), np.full((1, 1, 4), 0.1, np.float32)]
    images = []
    for n, (values, truth) in enumerate(zip(probability, (right, nothing), strict=True)):
        counts = np.array([[naive_counts(values[0], truth[0], t)] for t in GRID])
        images.append(ImageCounts(str(n), (1, 4), counts, counts[49]))
    decision = Decision((0.5,))
    evaluation = MaskEvaluation("val", ("lesion",), tuple(images), GRID)
    evaluation = surfaces(evaluation, list(zip(probability, (right, nothing), strict=True)), decision, 0.5, empty)
    summary = evaluation.summary(decision)
    first = 4 / 6  # 4 pixels of truth, of which 2 coincide, and 2 of prediction
    assert summary["jaccard_image"] == pytest.approx(np.nanmean([0.5, jaccard] if empty == empty else [0.5]))
    assert summary["nsd_image"] == pytest.approx(np.mean([first, nsd]) if empty == empty else first)
    assert summary["distances"] == (2 if empty == 1 else 1)
    assert summary["jaccard"] == 0.5
    # at 0.1 all of the first image is right and nothing of the second
    assert evaluation.choose("jaccard_image").threshold == ((0.1,) if empty == 0 else (0.5,))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), empty=st.sampled_from([1.0, 0.0, float("nan")]))
@pytest.mark.parametrize("by", CHOICES)
def test_each_way_to_choose_takes_the_best_of_the_grid(by, seed, empty):
    _, evaluation = made(seed)
    evaluation = replace(evaluation, empty=empty)
    chosen = evaluation.choose(by).threshold
    for k, name in enumerate(CLASSES):
        values = [
            summarise(evaluation.counts(Decision((t, t))), CLASSES, empty).get(f"{by}/{name}", -1)
            for t in GRID.tolist()
        ]
        assert values[round(100 * chosen[k]) - 1] == pytest.approx(max(values), abs=1e-12)


@pytest.mark.parametrize("by", CHOICES)
def test_the_curve_is_that_of_summaries_with_their_intervals(by, tmp_path, monkeypatch):
    _, evaluation = made(seed=1, images=7)
    evaluation = replace(evaluation, groups=("a", "a", "b", "c", "d", "e", "e"))
    drawn = []
    monkeypatch.setattr(figures, "sweep", lambda *arguments: drawn.append(arguments))
    chosen = evaluation.choose(by)
    evaluation.draw_choice(tmp_path / "threshold.png", by, chosen)
    ((path, thresholds, curves, at, metric, _),) = drawn
    assert (path, at, metric, [*curves]) == (tmp_path / "threshold.png", chosen.threshold, by, [*CLASSES])
    for n in range(0, 99, 14):
        decision = Decision((float(thresholds[n]),) * 2)
        summary, bounds = evaluation.summary(decision), evaluation.intervals(decision)
        for name, bands in curves.items():
            assert bands[0, n] == pytest.approx(summary[f"{by}/{name}"])
            assert tuple(bands[1:, n]) == pytest.approx(bounds[f"{by}/{name}"])


def test_no_threshold_can_be_chosen_where_no_image_has_a_value(caplog):
    counts = np.tile([0, 0, 0, 4], (99, 1, 1))
    images = (ImageCounts("a", (2, 2), counts, counts[49]),)
    evaluation = MaskEvaluation("val", ("lesion",), images, GRID, empty=float("nan"))
    assert evaluation.choose("jaccard_image") == Decision((0.5,))
    assert "lesion is shown by" in caplog.text and "it is 0.5" in caplog.text


@pytest.mark.parametrize("tolerance", [0.0, 3.0, None])
def test_boundaries_are_measured_at_the_original_sizes(data, task, trainer, tolerance):
    task.tolerance, decision = tolerance, Decision((0.61,))
    assert "nsd_image" not in evaluate(trainer, task, data, "test").summary(decision)
    found = evaluate(trainer, task, data, "test", decision)
    if tolerance is None:
        assert found.surface(decision) == {} and "distances" not in found.summary(decision)
        return
    for n, (probability, truth) in enumerate(maps(data, task, "test").values()):
        expected = boundary_scores(probability >= 0.61, truth, tolerance)
        assert {name: values[n].tolist() for name, values in found.surface(decision).items()} == {
            name: values.tolist() for name, values in expected.items()
        }


def test_metrics_at_network_size_are_those_of_training(data, task, trainer):
    (logged,) = trainer.validate(task, data.evaluation_dataloader("test"), verbose=False)
    found = evaluate(trainer, task, data, "test").at_network_size(batch_size=2)
    iou = found.pop("unetpp_iou")
    assert found == pytest.approx({name[4:]: value for name, value in logged.items() if name != "val/loss"})
    overlaps, sizes = [], []
    for batch in data.evaluation_dataloader("test"):
        with torch.inference_mode():
            predicted, truth = task(batch["image"]) >= 0, batch["target"] > 0.5
        overlaps.append(((predicted & truth).sum() / (predicted | truth).sum()).item())
        sizes.append(len(batch["id"]))
    assert sizes == [2, 2, 1] and iou == pytest.approx(np.average(overlaps, weights=sizes), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty": 0.5}, "task.empty=0.5: expected 1, 0, or null"),
        ({"tolerance": -1}, "task.tolerance=-1: expected 0 pixels or more, or null"),
        ({"threshold_by": "dise"}, "task.threshold_by=dise: expected null or one of dice, jaccard, dice_image"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message, spec):
    with pytest.raises(MedvisionError, match=message):
        SegmentationTask(Darkness(), SegmentationLoss({"bce": 1}), partial(torch.optim.SGD), None, spec(), **options)


@pytest.mark.parametrize(
    ("monitor", "by", "chosen_by"),
    [
        ("val/jaccard_image", None, "jaccard_image"),
        ("val/jaccard", None, "jaccard"),
        ("val/dice/round", None, "dice"),
        ("val/loss", None, "jaccard_image"),
        ("val/jaccard", "dice_image", "dice_image"),
    ],
)
def test_the_threshold_is_chosen_as_the_epoch_unless_it_is_said_otherwise(monitor, by, chosen_by, spec):
    loss, optimizer = SegmentationLoss({"bce": 1}), partial(torch.optim.SGD)
    mode = "min" if monitor == "val/loss" else "max"
    task = SegmentationTask(Darkness(), loss, optimizer, None, spec("multilabel"), monitor, mode, threshold_by=by)
    assert task.chosen_by == chosen_by


def maps(data, task, split):
    """Probabilities and truth of each image at its own size, by id."""
    dataset, result = data.dataset(split, full=True), {}
    for n, name in enumerate(dataset.ids):
        item = dataset[n]
        with torch.inference_mode():
            small = task.eval().probability(item["image"][None])
        full = torch.nn.functional.interpolate(small, item["mask"].shape[1:], mode="bilinear")[0]
        result[str(name)] = full.double().numpy(), item["mask"].numpy() > 0
    return dict(sorted(result.items()))


CLEANED = Decision((0.55,), (1.7,), (Cleaning(fill=True, min_area=170),))


def test_masks_are_calibrated_cleaned_and_counted(data, task, trainer):
    found = evaluate(trainer, task, data, "test", CLEANED)
    each = maps(data, task, "test")
    masks = [expit(logit(p) / 1.7)[0] >= 0.55 for p, _ in each.values()]
    truths = [truth[0] for _, truth in each.values()]
    plain = [naive_counts(mask, truth, 0.5) for mask, truth in zip(masks, truths, strict=True)]
    cleaned = [naive_counts(CLEANED.cleaning[0](m), t, 0.5) for m, t in zip(masks, truths, strict=True)]
    assert not np.array_equal(plain, cleaned)
    np.testing.assert_array_equal(found.counts(CLEANED)[:, 0], cleaned)
    np.testing.assert_array_equal(found.counts(replace(CLEANED, cleaning=()))[:, 0], plain)
    beside = found.beside(CLEANED)
    assert beside.keys() == {"without cleaning", "without temperature"}
    assert beside["without cleaning"]["dice"] != found.summary(CLEANED)["dice"]


def test_what_was_not_counted_is_refused(data, task, trainer):
    found = evaluate(trainer, task, data, "test", CLEANED)
    assert found.beside(replace(CLEANED, cleaning=(), temperature=())) == {}
    for other in (replace(CLEANED, threshold=(0.5,)), replace(CLEANED, cleaning=(), temperature=())):
        with pytest.raises(MedvisionError, match=r"threshold 0.5.* was not counted; hand the decision to evaluate"):
            found.summary(other)


def test_calibration_of_masks_is_that_of_all_pixels(data, task, trainer, tmp_path):
    found = evaluate(trainer, task, data, "val", CLEANED)
    p, there = (np.concatenate([x.ravel() for x in of]) for of in zip(*maps(data, task, "val").values(), strict=True))
    for temperature, probability in ((), p), ((1.7,), expit(logit(p) / 1.7)):
        place = (probability * 15).astype(int).clip(0, 14)
        error = sum(abs((there[place == b] - probability[place == b]).sum()) for b in range(15)) / len(p)
        expected = {"ece": error, "brier": ((probability - there) ** 2).mean()}
        assert found.calibrated(temperature) == pytest.approx(expected, abs=2e-3)
    summary = found.summary(CLEANED)
    assert found.calibrated((1.7,)) == {name: summary[name] for name in ("ece", "brier")}
    found.draw_calibration(tmp_path / "calibration.png", CLEANED)
    assert min(Image.open(tmp_path / "calibration.png").size) > 400
    rows = [*csv.DictReader((tmp_path / "calibration.csv").open())]
    assert [row["probabilities"] for row in rows] == ["as they are"] * 15 + ["with temperature"] * 15
    assert sum(int(row["count"]) for row in rows) == 2 * len(p)


def test_validation_chooses_temperature_then_threshold_then_cleaning(data, task, trainer):
    decision, measured = choose_decision(trainer, task, data, None, None, None)
    each = maps(data, task, "val")
    p, there = (np.concatenate([x.ravel() for x in of]) for of in zip(*each.values(), strict=True))
    assert decision.temperature == pytest.approx([fit_temperature(logit(p), there)], rel=1e-3)
    plain, _ = choose_decision(trainer, task, data)
    assert plain == measured.choose(task.chosen_by) and not plain.temperature + plain.cleaning
    assert decision.at(()).threshold == pytest.approx(plain.threshold)
    images = [(p >= np.float32(plain.threshold[0]), truth) for p, truth in each.values()]
    jaccards = []
    for option in OPTIONS:
        both = [(option(mask[0]), truth[0]) for mask, truth in images]
        jaccards.append(np.mean([(m & t).sum() / (m | t).sum() for m, t in both]))
    best = [option for option, value in zip(OPTIONS, jaccards, strict=True) if value > max(jaccards) - 1e-9]
    assert Decision(plain.threshold, (), best[:1]) == replace(decision.at(()), threshold=plain.threshold)


def test_what_is_given_is_not_chosen(data, task, trainer):
    assert choose_decision(trainer, task, data, *vars(CLEANED).values()) == (CLEANED, None)
    moved, _ = choose_decision(trainer, task, data, CLEANED, (0.9,), ())
    assert moved == replace(CLEANED.at((0.9,)), cleaning=())
    decision, measured = choose_decision(trainer, task, data, (0.4,), None)
    assert decision.threshold == (0.4,) and decision.temperature == measured.temperatures()


@pytest.mark.parametrize("exclusive", [True, False])
def test_labels_have_a_temperature(exclusive):
    generator = np.random.default_rng(3)
    true = generator.normal(0, 1.5, (400, 2))
    truth = generator.random((400, 2)) < expit(true)
    raw = expit(3 * true)
    if exclusive:
        truth = np.eye(2, dtype=bool)[(true + generator.gumbel(size=true.shape)).argmax(1)]
        raw = np.exp(3 * true) / np.exp(3 * true).sum(1, keepdims=True)
    evaluation = LabelEvaluation("val", ("a", "b"), exclusive, tuple(map(str, range(400))), raw.astype("f4"), truth)
    found = evaluation.temperatures()
    assert found == pytest.approx([3] if exclusive else [3, 3], rel=0.25)
    after = evaluation.at(found)
    assert after.calibrated(found)["brier"] < after.calibrated(())["brier"] == evaluation.calibrated(())["brier"]
    assert after.temperatures() == found
    decision = evaluation.choose("accuracy")
    ranked = [e.summary(d)["auroc"] for e, d in ((evaluation, decision), (after, decision.at(found)))]
    assert ranked[0] == pytest.approx(ranked[1])
    decisions = [
        [row.split(",")[6] for row in e.table(d).split()]
        for e, d in ((evaluation, decision), (after, decision.at(found)))
    ]
    assert decisions[0] == decisions[1]


def test_thresholds_of_labels_are_chosen_at_the_temperature():
    """So low a temperature makes 0 and 1 of most probabilities; what is chosen parts what is left as well as can be."""
    probability = np.array([[0.2], [0.30], [0.31], [0.6], [0.9]], np.float32)
    truth = np.array([[0], [0], [1], [1], [1]], bool)
    evaluation = LabelEvaluation("val", ("a",), False, tuple("vwxyz"), probability, truth)
    for temperature in ((), (0.5,), (0.01,)):
        decision = evaluation.choose("accuracy", temperature)
        assert decision.temperature == temperature
        assert evaluation.at(temperature).summary(decision)["accuracy"] == 1
    saturated = evaluation.choose("accuracy", (1e-4,))  # below 0.5 all is 0
    assert evaluation.at((1e-4,)).summary(saturated)["accuracy"] == pytest.approx(4 / 5)


def test_no_best_temperature_is_1_and_says_so(caplog):
    evaluation = LabelEvaluation(
        "val", ("a",), False, ("x", "y"), np.array([[0.3], [0.6]], np.float32), np.array([[False], [True]])
    )
    assert evaluation.temperatures() == (1.0,)
    assert "the temperature of a stays 1: every decision is right" in caplog.text


def test_labels_are_not_cleaned(spec, trainer, tmp_path, fake_isic2016):
    facts = spec("binary", target="label", classes=["malignant"])
    data = ISIC2016(facts, fake_isic2016(tmp_path / "x"), tmp_path / "cache", batch_size=4)
    task = ClassificationTask(Redness(1), CrossEntropy(), partial(torch.optim.SGD, lr=0.1), None, facts)
    decision, measured = choose_decision(trainer, task, data, temperature=None)
    np.testing.assert_array_equal(
        evaluate(trainer, task, data, "val", decision).probability, measured.at(decision.temperature).probability
    )
    with pytest.raises(MedvisionError, match="only masks can be cleaned"):
        choose_decision(trainer, task, data, cleaning=None)
