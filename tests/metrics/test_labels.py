import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torchmetrics.functional import classification as torchmetrics

from medvision.metrics import (
    NAMES,
    Bootstrap,
    Ranking,
    best_decision,
    decide,
    interval,
    one_hot,
    summarise_label_intervals,
    summarise_labels,
)

CLASSES = ("a", "b", "c")


def drawn(seed, images=40, classes=3, exclusive=True, decimals=2):
    """Probabilities with ties, and truths that they know something of."""
    generator = np.random.default_rng(seed)
    if exclusive:
        truth = np.eye(classes, dtype=bool)[generator.integers(0, classes, images)]
    else:
        truth = generator.random((images, classes)) < 0.4
    probability = np.clip(generator.normal(0.35 + 0.3 * truth, 0.25), 0, 1)
    if exclusive:
        probability /= np.maximum(probability.sum(1, keepdims=True), 1e-6)
    return probability.round(decimals).astype(np.float32), truth


def naive_auroc(probability, truth):
    """How often a positive is above a negative; ties count half."""
    pairs = [(p, n) for p in probability[truth] for n in probability[~truth]]
    return np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])


def naive_average_precision(probability, truth):
    """The precision at each threshold times the recall that it adds."""
    total, found = 0.0, 0
    for threshold in sorted(set(probability.tolist()), reverse=True):
        said = probability >= threshold
        hits = (said & truth).sum()
        total += hits / said.sum() * (hits - found) / truth.sum()
        found = hits
    return total


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exclusive=st.booleans())
def test_against_naive_formulas(seed, exclusive):
    probability, truth = drawn(seed, exclusive=exclusive)
    threshold = [] if exclusive else [0.3, 0.5, 0.62]
    found = summarise_labels(probability, truth, CLASSES, threshold)
    said = probability >= np.float32(threshold) if threshold else np.eye(3, dtype=bool)[probability.argmax(1)]
    np.testing.assert_array_equal(decide(probability, threshold), said)
    for k, name in enumerate(CLASSES):
        t, s, p = truth[:, k], said[:, k], probability[:, k]
        expected = {
            "auroc": naive_auroc(p, t),
            "average_precision": naive_average_precision(p, t),
            "sensitivity": s[t].mean(),
            "specificity": 1 - s[~t].mean(),
            "precision": t[s].mean() if s.any() else None,
            "f1": 2 * (s & t).sum() / (s.sum() + t.sum()),
            "brier": np.mean((p.astype(float) - t) ** 2),
        }
        if not exclusive:
            expected["accuracy"] = (s == t).mean()
            expected["balanced_accuracy"] = (s[t].mean() + 1 - s[~t].mean()) / 2
        for metric, value in expected.items():
            assert found.get(f"{metric}/{name}") == (None if value is None else pytest.approx(value, abs=1e-7)), metric
    if exclusive:
        right = probability.argmax(1) == truth.argmax(1)
        assert found["accuracy"] == pytest.approx(right.mean())
        assert found["balanced_accuracy"] == pytest.approx(np.mean([right[truth[:, k]].mean() for k in range(3)]))
    for metric in ("auroc", "average_precision", "sensitivity", "brier"):
        assert found[metric] == pytest.approx(np.mean([found[f"{metric}/{c}"] for c in CLASSES]))


def test_against_torchmetrics():
    probability, truth = drawn(3, images=200)
    found = summarise_labels(probability, truth, CLASSES, [])
    p, t = torch.from_numpy(probability), torch.from_numpy(truth).int().argmax(1)
    oracle = {
        "auroc": torchmetrics.multiclass_auroc(p, t, 3),
        "average_precision": torchmetrics.multiclass_average_precision(p, t, 3),
        "accuracy": torchmetrics.multiclass_accuracy(p, t, 3, average="micro"),
        "balanced_accuracy": torchmetrics.multiclass_recall(p, t, 3, average="macro"),
        "f1": torchmetrics.multiclass_f1_score(p, t, 3, average="macro"),
        "specificity": torchmetrics.multiclass_specificity(p, t, 3, average="macro"),
    }
    for name, value in oracle.items():
        assert found[name] == pytest.approx(float(value), abs=1e-5), name


def test_golden_values():
    probability = np.array([[0.9], [0.8], [0.4], [0.3], [0.1]])
    truth = np.array([[1], [0], [1], [0], [0]], bool)
    assert summarise_labels(probability, truth, ["malignant"], [0.5]) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "balanced_accuracy": (1 / 2 + 2 / 3) / 2,
            "auroc": 5 / 6,
            "average_precision": (1 + 2 / 3) / 2,
            "sensitivity": 1 / 2,
            "specificity": 2 / 3,
            "precision": 1 / 2,
            "f1": 1 / 2,
            "brier": (0.01 + 0.64 + 0.36 + 0.09 + 0.01) / 5,
        }
    )


@pytest.mark.parametrize(("there", "absent"), [(False, {"sensitivity", "average_precision"}), (True, {"specificity"})])
def test_a_split_of_one_kind_has_no_value_where_there_is_none(there, absent):
    found = summarise_labels(np.array([[0.2], [0.7]]), np.full((2, 1), there), ["malignant"], [0.5])
    assert set(NAMES) - found.keys() == absent | {"auroc", "balanced_accuracy"}
    assert found["accuracy"] == 0.5


def test_probabilities_that_are_no_numbers_have_no_metrics():
    assert summarise_labels(np.array([[0.2], [np.nan]]), np.array([[True], [False]]), ["m"], [0.5]) == {}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(2, 30))
def test_the_best_decision_is_the_best_of_all(seed, images):
    probability, truth = drawn(seed, images, 1, exclusive=False, decimals=1)
    probability, truth = probability[:, 0], truth[:, 0]
    best = best_decision(probability, truth)
    if truth.all() or not truth.any():
        assert best is None
        return

    def youden(threshold):
        said = probability >= threshold
        return said[truth].mean() - said[~truth].mean()

    assert 0 < best < 1 or best in (0, 1)
    assert youden(best) == pytest.approx(max(youden(t) for t in np.linspace(-0.05, 1.05, 23)))


def test_the_best_decision_lies_between_and_near_one_half():
    assert best_decision(np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.4)
    # two cuts are as good: below 0.2 and above 0.3
    assert best_decision(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, True, False, True])) == pytest.approx(0.35)


@pytest.mark.parametrize("exclusive", [True, False])
def test_an_epoch_in_batches_is_that_of_all(exclusive):
    probability, truth = drawn(5, exclusive=exclusive)
    metric = Ranking(CLASSES, exclusive)
    target = torch.from_numpy(truth.argmax(1) if exclusive else truth.astype(np.float32))
    for rows in (slice(0, 7), slice(7, 40)):
        metric.update(torch.from_numpy(probability[rows]), target[rows])
    found = metric.compute()
    assert found == summarise_labels(probability, truth, CLASSES, [] if exclusive else [0.5] * 3)
    assert found.keys() <= set(metric.names) and {name.split("/")[0] for name in metric.names} == set(NAMES)
    metric.reset()
    metric.update(torch.from_numpy(probability[:9]), target[:9])
    assert metric.compute()["brier"] == pytest.approx(np.mean((probability[:9].astype(float) - truth[:9]) ** 2))


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_every_name_is_known_before(classes):
    names = [f"c{k}" for k in range(classes)]
    known = Ranking(names, exclusive=False).names
    assert len(known) == len(set(known)) == len(NAMES) * (classes + 1 if classes > 1 else 1)


def test_one_hot():
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[False, False, True], [True, False, False]]
    assert one_hot(torch.tensor([[1.0, 0.0]]), 2).tolist() == [[True, False]]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exclusive=st.booleans(), grouped=st.booleans())
def test_intervals_are_those_of_a_loop_over_the_same_resamples(seed, exclusive, grouped):
    probability, truth = drawn(seed, images=12, exclusive=exclusive, decimals=1)
    threshold = [] if exclusive else [0.3, 0.5, 0.62]
    groups = [n // 2 for n in range(12)] if grouped else None
    bootstrap = Bootstrap(12, groups, resamples=30, seed=seed % 1000)
    found = summarise_label_intervals(probability, truth, CLASSES, threshold, bootstrap)
    summary = summarise_labels(probability, truth, CLASSES, threshold)
    assert found.keys() == summary.keys()

    def each(images):
        values = summarise_labels(probability[images], truth[images], CLASSES, threshold)
        return [values.get(name, np.nan) for name in summary]

    with np.errstate(all="ignore"):
        low, high = interval(bootstrap.apply(each))
    np.testing.assert_allclose([found[name] for name in summary], np.stack([low, high], 1), atol=1e-12)


def test_one_image_has_no_interval():
    found = summarise_label_intervals(np.array([[0.3]]), np.array([[True]]), ["m"], [0.5], Bootstrap(1))
    assert np.isnan(found["accuracy"]).all()


def test_ranking_against_scikit_learn():
    probability, truth = drawn(11, images=300, exclusive=False, decimals=1)  # many ties
    found = summarise_labels(probability, truth, CLASSES, [0.5] * 3)
    for k, name in enumerate(CLASSES):
        t, p = truth[:, k], probability[:, k]
        assert found[f"auroc/{name}"] == pytest.approx(sklearn.roc_auc_score(t, p), abs=1e-12)
        assert found[f"average_precision/{name}"] == pytest.approx(sklearn.average_precision_score(t, p), abs=1e-12)
