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
from torch import nn

from medvision.data import ISIC2016, ISIC2017, Hymenoptera, ISIC2017Diagnosis
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation import LabelEvaluation, MaskEvaluation, evaluate
from medvision.losses import CrossEntropy, SegmentationLoss
from medvision.metrics import COUNTS, GRID, decide, scores, summarise, summarise_labels
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
def test_examples_go_from_the_worst_to_the_best(data, task, trainer, number, ranks):
    decision = Decision((0.61,))
    evaluation = evaluate(trainer, task, data, "test")
    jaccard = sorted(
        (float(row["jaccard"]), row["id"]) for row in csv.DictReader(io.StringIO(evaluation.table(decision)))
    )
    assert jaccard[0][0] < jaccard[-1][0]
    shown = evaluation.examples(task, data, decision, number)
    expected = [f"{jaccard[r - 1][1]}   jaccard {jaccard[r - 1][0]:.3f}   (rank {r} of 5)" for r in ranks]
    assert [example.caption for example in shown] == expected
    sizes = {image.id: image.size for image in evaluation.images}
    for example, rank in zip(shown, ranks, strict=True):
        value, name = jaccard[rank - 1]
        assert example.image.dtype == np.uint8 and example.image.shape == (*sizes[name], 3)
        both = (example.truth & example.prediction).sum() / (example.truth | example.prediction).sum()
        assert both == pytest.approx(value)


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
    found.draw(tmp_path / "sheet.png", task, data, found.choose("val/accuracy"))
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
