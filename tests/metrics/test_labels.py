import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torchmetrics.functional import classification as torchmetrics

from medvision.errors import MedvisionError
from medvision.metrics import (
    NAMES,
    Bootstrap,
    Ranking,
    best_decision,
    check_operating_point,
    decide,
    delong,
    interval,
    one_hot,
    summarise_label_intervals,
    summarise_labels,
    undefined_labels,
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
            "mcc": (1 * 2 - 1 * 1) / 6,
            "sensitivity_at_95_specificity": 1 / 2,
            "specificity_at_95_sensitivity": 2 / 3,
            "brier": (0.01 + 0.64 + 0.36 + 0.09 + 0.01) / 5,
            "ece": (0.1 + 0.8 + 0.6 + 0.3 + 0.1) / 5,  # each in a bin of its own
        }
    )


NEED_BOTH = {"auroc", "average_precision", "balanced_accuracy", "mcc"}
NEED_BOTH |= {"sensitivity_at_95_specificity", "specificity_at_95_sensitivity"}


@pytest.mark.parametrize(("there", "absent"), [(False, {"sensitivity"}), (True, {"specificity"})])
def test_a_split_of_one_kind_has_no_value_and_a_reason_where_there_is_none(there, absent):
    probability, truth = np.array([[0.2], [0.7]]), np.full((2, 1), there)
    found = summarise_labels(probability, truth, ["malignant"], [0.5])
    assert set(NAMES) - found.keys() == absent | NEED_BOTH
    assert found["accuracy"] == 0.5
    reason = f"{'every' if there else 'no'} image shows malignant"
    assert undefined_labels(probability, truth, ["malignant"], [0.5]) == dict.fromkeys(absent | NEED_BOTH, reason)


def test_reasons_are_those_of_each_class():
    probability, truth = np.array([[0.2, 0.1], [0.7, 0.2]]), np.array([[0, 1], [0, 0]], bool)
    found = undefined_labels(probability, truth, ["a", "b"], [0.5, 0.5])
    assert {name.split("/")[1] for name in found if "/" in name} == {"a", "b"}
    assert found["auroc/a"] == found["sensitivity/a"] == "no image shows a" and "auroc" not in found
    assert found["precision/b"] == "b is decided for in no image" and "precision/a" not in found
    none = undefined_labels(probability / 10, truth, ["a", "b"], [0.5, 0.5])
    assert none["precision"] == "a is decided for in no image; b is decided for in no image"
    assert undefined_labels(*drawn(0), CLASSES, []) == {}


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_correlation_of_matthews_against_scikit_learn(exclusive):
    probability, truth = drawn(4, images=60, exclusive=exclusive)
    found = summarise_labels(probability, truth, CLASSES, [] if exclusive else [0.5] * 3)
    said = decide(probability, [] if exclusive else [0.5] * 3)
    each = [sklearn.matthews_corrcoef(truth[:, k], said[:, k]) for k in range(3)]
    assert [found[f"mcc/{c}"] for c in CLASSES] == pytest.approx(each)
    of_all = sklearn.matthews_corrcoef(truth.argmax(1), said.argmax(1)) if exclusive else np.mean(each)
    assert found["mcc"] == pytest.approx(of_all)
    alike = summarise_labels(np.full((4, 1), 0.9), np.array([[1], [0], [1], [1]], bool), ["m"], [0.5])
    assert alike["mcc"] == 0


def naive_ece(confidence, right, bins=15):
    """The share of each bin times how far its mean confidence is from how often it is right."""
    total = 0.0
    for n in range(bins):
        inside = [(c, r) for c, r in zip(confidence, right, strict=True) if min(int(c * bins), bins - 1) == n]
        if inside:
            total += len(inside) / len(right) * abs(np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside]))
    return total


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_calibration_errors_against_a_loop(seed):
    probability, truth = drawn(seed, decimals=3)
    exact = probability.astype(float)
    found = summarise_labels(probability, truth, CLASSES, [])
    for k, name in enumerate(CLASSES):
        assert found[f"ece/{name}"] == pytest.approx(naive_ece(exact[:, k], truth[:, k]), abs=1e-9)
    right = probability.argmax(1) == truth.argmax(1)
    assert found["ece"] == pytest.approx(naive_ece(exact.max(1), right), abs=1e-9)
    of_each = summarise_labels(probability, truth, CLASSES, [0.5] * 3)
    assert of_each["ece"] == pytest.approx(np.mean([found[f"ece/{c}"] for c in CLASSES]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decimals=st.integers(1, 3))
def test_sensitivity_at_a_specificity_and_the_reverse(seed, decimals):
    probability, truth = drawn(seed, images=120, exclusive=False, decimals=decimals)
    found = summarise_labels(probability, truth, CLASSES, [0.5] * 3)
    for k, name in enumerate(CLASSES):
        rates = []
        for threshold in [*sorted(set(probability[:, k])), 2]:
            said = probability[:, k] >= threshold
            rates.append((said[truth[:, k]].mean(), (~said[~truth[:, k]]).mean()))
        one = max(sensitivity for sensitivity, specificity in rates if specificity >= 0.95)
        other = max(specificity for sensitivity, specificity in rates if sensitivity >= 0.95)
        assert found[f"sensitivity_at_95_specificity/{name}"] == pytest.approx(one)
        assert found[f"specificity_at_95_sensitivity/{name}"] == pytest.approx(other)


def naive_delong(probability, truth):
    """Placement values by a double loop, and their variances (DeLong et al. 1988)."""
    positive, negative = probability[truth], probability[~truth]
    above = np.array([[(x > y) + 0.5 * (x == y) for y in negative] for x in positive])
    v10, v01 = above.mean(1), above.mean(0)
    variance = ((v10 - above.mean()) ** 2).sum() / (len(v10) - 1) / len(v10)
    variance += ((v01 - above.mean()) ** 2).sum() / (len(v01) - 1) / len(v01)
    reach = 1.959963984540054 * variance**0.5
    return max(0, above.mean() - reach), min(1, above.mean() + reach)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decimals=st.integers(1, 3))
def test_delong_against_a_double_loop(seed, decimals):
    probability, truth = drawn(seed, images=30, classes=1, exclusive=False, decimals=decimals)
    probability, truth = probability[:, 0].astype(float), truth[:, 0]
    if min(truth.sum(), (~truth).sum()) < 2:
        assert delong(probability, truth) is None
    else:
        assert delong(probability, truth) == pytest.approx(naive_delong(probability, truth), abs=1e-12)


def test_delong_on_published_ratings():
    """Hanley and McNeil 1982 (Radiology 143:29-36), table I; the interval is that of Stata's manual for roctab."""
    rating = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33]).astype(float)
    truth = np.arange(109) >= 58
    assert naive_auroc(rating, truth) == pytest.approx(0.8932, abs=5e-5)
    assert delong(rating, truth) == pytest.approx((0.83295, 0.95339), abs=5e-6)
    assert delong(-rating, truth) == pytest.approx((1 - 0.95339, 1 - 0.83295), abs=5e-6)


def test_delong_where_all_are_ranked_right_or_wrong():
    probability, truth = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    assert delong(probability, truth) == (1, 1) and delong(probability, ~truth) == (0, 0)
    assert delong(probability[:3], truth[:3]) is None


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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), wanted=st.sampled_from([0.5, 0.8, 0.95, 1.0]), name=st.sampled_from([0, 1]))
def test_the_decision_at_a_wanted_rate_is_the_best_of_all(seed, wanted, name):
    probability, truth = drawn(seed, 30, 1, exclusive=False, decimals=1)
    probability, truth = probability[:, 0], truth[:, 0]
    if truth.all() or not truth.any():
        return

    def rates(threshold):
        said = probability >= threshold
        return said[truth].mean(), (~said[~truth]).mean()

    found = rates(best_decision(probability, truth, {["sensitivity", "specificity"][name]: wanted}))
    if probability.max() == 1 or probability.min() == 0:
        return  # see below
    possible = [rates(t) for t in np.linspace(-0.05, 1.05, 23) if rates(t)[name] >= wanted]
    best = max(rate[1 - name] for rate in possible)
    assert found[name] >= wanted and found[1 - name] == pytest.approx(best)
    assert found[name] == pytest.approx(max(rate[name] for rate in possible if rate[1 - name] >= best - 1e-12))


@pytest.mark.parametrize(
    "point",
    ["best", {"sensitivity": 0}, {"sensitivity": 1.1}, {"recall": 0.9}, {}, {"sensitivity": 1, "specificity": 1}],
)
def test_an_unknown_operating_point_is_refused(point):
    with pytest.raises(MedvisionError, match=r"task.operating_point=.*: expected youden, {sensitivity: 0.95} or"):
        check_operating_point(point)


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
        expected = np.stack(interval(bootstrap.apply(each)), 1)
    # what has no value without some one image or group is known of that one only, and so is a mean with it
    units = np.array(groups or range(12))
    one = np.isnan([each(np.flatnonzero(units != unit)) for unit in set(units)]).any(0)
    lost = {name for name, lone in zip(summary, one, strict=True) if lone}
    lost |= {name.split("/")[0] for name in lost}
    lost |= {"balanced_accuracy"} & summary.keys() if exclusive and "sensitivity" in lost else set()
    expected[[name in lost for name in summary]] = np.nan
    np.testing.assert_allclose([found[name] for name in summary], expected, atol=1e-12)


def test_one_image_has_no_interval():
    found = summarise_label_intervals(np.array([[0.3]]), np.array([[True]]), ["m"], [0.5], Bootstrap(1))
    assert np.isnan(found["accuracy"]).all()


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2, 3, 4, 5, 6]], ids=["images", "patients"])
def test_one_positive_has_no_interval_of_what_needs_positives(groups):
    probability = np.array([0.9, 0.8, 0.2, 0.1, 0.3, 0.7, 0.6, 0.4])[:, None]
    truth = (np.arange(8) < (1 if groups is None else 2))[:, None]  # of one patient
    found = summarise_label_intervals(probability, truth, ["m"], [0.5], Bootstrap(8, groups))
    unknown = {name for name, bounds in found.items() if np.isnan(bounds).any()}
    assert {*NAMES} - unknown == {"accuracy", "specificity", "precision", "f1", "brier", "ece"}


def test_ranking_against_scikit_learn():
    probability, truth = drawn(11, images=300, exclusive=False, decimals=1)  # many ties
    found = summarise_labels(probability, truth, CLASSES, [0.5] * 3)
    for k, name in enumerate(CLASSES):
        t, p = truth[:, k], probability[:, k]
        assert found[f"auroc/{name}"] == pytest.approx(sklearn.roc_auc_score(t, p), abs=1e-12)
        assert found[f"average_precision/{name}"] == pytest.approx(sklearn.average_precision_score(t, p), abs=1e-12)
