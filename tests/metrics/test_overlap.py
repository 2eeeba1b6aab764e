from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torchmetrics.functional import classification as torchmetrics

from medvision.metrics import GRID, Overlap, best_threshold, count, histogram, scores, summarise

ORACLES = {
    "dice": sklearn.f1_score,
    "jaccard": sklearn.jaccard_score,
    "sensitivity": sklearn.recall_score,
    "specificity": partial(sklearn.recall_score, pos_label=0),
    "precision": sklearn.precision_score,
    "accuracy": lambda truth, predicted, zero_division: sklearn.accuracy_score(truth, predicted),
}


def masks(seed, shape, share=0.4):
    """Random truth and prediction; some images and classes lack one, the other or both, or are full."""
    generator = np.random.default_rng(seed)
    shares = generator.choice([0, share, share, 1], (2, *shape[:2], 1, 1))
    truth, predicted = generator.random((2, *shape)) < shares
    return torch.from_numpy(truth), torch.from_numpy(predicted)


def counted(truth, predicted):
    return count(predicted, truth).numpy()


def oracle(name, truth, predicted, empty=1.0):
    """scikit-learn's value of some pixels; 0/0 is `empty` where neither has a pixel, and else no value."""
    if name == "threshold_jaccard":
        return value if (value := oracle("jaccard", truth, predicted, empty)) >= 0.65 else 0
    truth, predicted = np.asarray(truth).ravel(), np.asarray(predicted).ravel()
    undefined = name not in ("dice", "jaccard") and (truth.any() or predicted.any())
    if np.isnan(empty) and name in ("dice", "jaccard"):  # which take no NaN
        return oracle(name, truth, predicted, 0.0) if truth.any() or predicted.any() else empty
    return ORACLES[name](truth, predicted, zero_division=np.nan if undefined else empty)


def image(tp=0, fp=0, fn=0, tn=0):
    return [tp, fp, fn, tn]


def summary_of(*images, **options):
    """Summary of images of one class."""
    return summarise(np.array(images)[:, None], ["lesion"], **options)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), empty=st.sampled_from([0.0, 1.0, np.nan]))
def test_scores_equal_scikit_learn(seed, empty):
    truth, predicted = masks(seed, (3, 2, 3, 4))
    found = scores(counted(truth, predicted), empty)
    assert found.keys() == ORACLES.keys()
    for name, values in found.items():
        assert values.shape == (3, 2)
        for n, k in np.ndindex(3, 2):
            expected = oracle(name, truth[n, k], predicted[n, k], empty)
            assert values[n, k] == pytest.approx(expected, nan_ok=True), (name, n, k)


@pytest.mark.parametrize("classes", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("seed", range(5))
def test_summary_equals_scikit_learn(seed, classes):
    truth, predicted = masks(seed, (6, len(classes), 5, 5))
    found = summarise(counted(truth, predicted), classes)
    expected = {}
    for name in [*ORACLES, "threshold_jaccard"]:
        pooled = [oracle(name, truth[:, k], predicted[:, k]) for k in range(len(classes))]
        each = [
            [oracle(name, t, p) for t, p in zip(truth[:, k], predicted[:, k], strict=True)] for k in range(len(classes))
        ]
        images = [np.nanmean(values) for values in each]
        of_split = {} if name == "threshold_jaccard" else {name: pooled}
        for key, values in (of_split | {f"{name}_image": images}).items():
            expected[key] = np.nanmean(values)
            if len(classes) > 1:
                expected |= {f"{key}/{c}": value for c, value in zip(classes, values, strict=True)}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("dice", torchmetrics.binary_f1_score),
        ("jaccard", torchmetrics.binary_jaccard_index),
        ("sensitivity", torchmetrics.binary_recall),
        ("specificity", torchmetrics.binary_specificity),
        ("precision", torchmetrics.binary_precision),
        ("accuracy", torchmetrics.binary_accuracy),
    ],
)
def test_pooled_metrics_equal_torchmetrics(name, function):
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand((4, 1, 16, 16), generator=generator)
    target = (torch.rand((4, 1, 16, 16), generator=generator) < 0.3).float()
    metric = Overlap(["lesion"])
    metric.update(probability, target)
    assert metric.compute()[name] == pytest.approx(function(probability, target.int()).item(), rel=1e-6)


def test_count_takes_any_non_zero_target_for_the_class():
    target = torch.tensor([[[[0, 255, 255, 0, 1]]]], dtype=torch.uint8)
    predicted = torch.tensor([[[[True, True, False, False, True]]]])
    assert count(predicted, target).tolist() == [[[2, 1, 1, 1]]]


def test_pooled_and_image_means_are_different_numbers():
    found = summary_of(image(tp=90, fp=10), image(tp=1, fn=9))
    assert found["jaccard"] == pytest.approx(91 / 110)
    assert found["jaccard_image"] == pytest.approx((0.9 + 0.1) / 2)
    assert found["dice"] == pytest.approx(182 / 201)
    assert found["dice_image"] == pytest.approx((180 / 190 + 2 / 11) / 2)


@pytest.mark.parametrize(("options", "value"), [({}, 1.0), ({"empty": 0.0}, 0.0)])
def test_empty_truth_and_prediction(options, value):
    found = summary_of(image(tn=9), **options)
    for name in ("dice", "jaccard", "sensitivity", "precision"):
        assert found[name] == found[f"{name}_image"] == value
    assert found["specificity"] == found["accuracy"] == 1.0
    mixed = summary_of(image(tn=9), image(tp=2, fp=2), **options)
    assert mixed["jaccard_image"] == pytest.approx((value + 0.5) / 2)
    assert mixed["jaccard"] == 0.5  # pooled, an empty image adds nothing


@pytest.mark.parametrize(
    ("counts", "absent"),
    [(image(fp=2, tn=7), "sensitivity"), (image(fn=2, tn=7), "precision"), (image(tp=5, fn=4), "specificity")],
)
def test_ratio_without_a_value_is_absent(counts, absent):
    found = summary_of(counts)
    assert {name for name in ORACLES if name not in found} == {absent}
    assert f"{absent}_image" not in found
    known = summary_of(counts, image(tp=1, fp=1, fn=1, tn=1))
    assert known[f"{absent}_image"] == 0.5  # the mean of the image that has one


def test_classes_weigh_the_same_however_many_pixels_they_have():
    counts = np.array([[image(tp=1, fn=3), image(tp=1000)], [image(tp=1, fn=3), image(tp=1000)]])
    found = summarise(counts, ["small", "large"])
    assert found["jaccard"] == found["jaccard_image"] == pytest.approx((0.25 + 1) / 2)
    assert (found["jaccard/small"], found["jaccard_image/large"]) == (0.25, 1.0)


def test_class_without_a_value_is_left_out_of_the_mean():
    found = summarise(np.array([[image(fp=1, tn=3), image(tp=1, fn=1)]]), ["absent", "there"])
    assert found["sensitivity"] == found["sensitivity/there"] == 0.5
    assert "sensitivity/absent" not in found and "sensitivity_image/absent" not in found


def test_one_class_has_no_keys_of_its_own():
    found = summary_of(image(1, 1, 1, 1))
    assert found.keys() == {*ORACLES, *(f"{name}_image" for name in [*ORACLES, "threshold_jaccard"])}


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 7), max_size=4), classes=st.integers(1, 3))
def test_overlap_does_not_depend_on_the_batches(seed, cuts, classes):
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand((8, classes, 3, 3), generator=generator)
    target = (torch.rand((8, classes, 3, 3), generator=generator) < 0.3).float()
    names = [f"class{k}" for k in range(classes)]
    metric = Overlap(names, threshold=0.6)
    for batch in np.split(np.arange(8), sorted(set(cuts))):
        metric.update(probability[batch], target[batch])
    expected = summarise(count(probability >= 0.6, target).numpy(), names)
    assert metric.compute() == expected
    metric.counts = torch.cat(metric.counts)  # as it is after several processes were gathered
    metric._computed = None
    assert metric.compute() == expected


def test_overlap_forgets_on_reset_and_counts_a_probability_at_the_threshold():
    metric = Overlap(["lesion"])
    target = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    metric.update(torch.tensor([[[[0.9, 0.1, 0.9, 0.1]]]]), target)
    assert metric.compute()["jaccard"] == pytest.approx(1 / 3)
    metric.reset()
    metric.update(torch.tensor([[[[0.5, 0.5, 0.4999, 0.0]]]]), target)
    assert metric.compute()["jaccard"] == 1.0


def naive_histogram(probability, target, thresholds):
    rows = []
    for threshold in thresholds:
        predicted, truth = probability >= threshold, target > 0
        cells = (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
        rows.append(np.stack([cell.sum((1, 2)) for cell in cells], -1))
    return np.stack(rows)


NEAR_HALF = st.sampled_from([float(np.nextafter(np.float32(0.5), to, dtype=np.float32)) for to in (0, 1)])
PROBABILITIES = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5]),
    NEAR_HALF,
    st.sampled_from(GRID.tolist()),
    st.floats(0, 1, width=32),
)


@given(
    values=st.lists(PROBABILITIES, min_size=12, max_size=12),
    truth=st.lists(st.booleans(), min_size=12, max_size=12),
    classes=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    also=st.lists(st.one_of(NEAR_HALF, st.floats(2**-10, 1 - 2**-10, width=32)), max_size=4),
    kind=st.sampled_from([torch.uint8, torch.bool, torch.float32]),
)
@example([0.0] * 12, [True] * 12, 1, torch.float32, [], torch.uint8)
@example([1.0] * 12, [False] * 12, 2, torch.float16, [], torch.uint8)
@example([0.5, 0.5000001, 0.50390625, 1e-8] * 3, [True, False] * 6, 1, torch.float32, [0.5000001, 0.501], torch.bool)
def test_histogram_equals_comparing_with_each_threshold(values, truth, classes, dtype, also, kind):
    probability = torch.tensor(values, dtype=torch.float32).to(dtype).view(classes, 2, -1)
    target = torch.tensor(truth).to(kind).view(classes, 2, -1)
    thresholds = np.unique(np.append(GRID, np.asarray(also, np.float32)))
    found = histogram(probability, target, thresholds)
    assert found.shape == (len(thresholds), classes, 4) and found.dtype == np.int64
    np.testing.assert_array_equal(found, naive_histogram(probability.float().numpy(), target.numpy(), thresholds))


@pytest.mark.parametrize(
    ("values", "thresholds"),
    [
        (GRID, GRID),  # each threshold is reached by what is equal to it
        (np.nextafter(GRID, np.float32(0)), GRID),
        (np.nextafter(GRID, np.float32(1)), GRID),
        (np.arange(129) / 128, np.arange(1, 128) / 128),
        (np.linspace(0, 1, 97), np.linspace(0.5, 0.5001, 300)),  # all in one place
        (np.array([-1e-6, 0.3, 1 + 1e-6]), GRID),  # as interpolation rounds
        (np.array([np.nan, 0.3, 0.7]), np.append(GRID, 0.501)),  # what is no number reaches no threshold
        (np.array([0.3, 0.7]), GRID[:0]),
    ],
)
def test_histogram_where_thresholds_are_met_or_crowded(values, thresholds):
    values, thresholds = np.float32(values)[None, None], np.unique(np.float32(thresholds))
    target = np.arange(values.size).reshape(values.shape) % 3 == 0
    found = histogram(torch.from_numpy(values), torch.from_numpy(target), thresholds)
    expected = naive_histogram(values, target, thresholds) if len(thresholds) else np.zeros((0, 1, 4))
    np.testing.assert_array_equal(found, expected)


def test_grid_is_each_hundredth():
    assert GRID.dtype == np.float32
    np.testing.assert_array_equal(GRID, np.array([float(f"0.{n:02d}") for n in range(1, 100)], np.float32))


def exact_means(counts):
    """Mean Jaccard at each threshold, in fractions."""

    def jaccard(tp, fp, fn):
        return Fraction(tp, tp + fp + fn) if tp + fp + fn else Fraction(1)

    return [sum(jaccard(*map(int, row[:3])) for row in column) for column in np.swapaxes(counts, 0, 1)]


@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 4), high=st.sampled_from([2, 5]))
def test_best_threshold_equals_brute_force(seed, images, high):
    counts = np.random.default_rng(seed).integers(0, high, (images, len(GRID), 4))
    means = exact_means(counts)
    best = [n for n, mean in zip(range(1, 100), means, strict=True) if mean == max(means)]
    found = round(100 * best_threshold(counts, GRID))
    assert found in best
    assert abs(found - 50) == min(abs(n - 50) for n in best)


@pytest.mark.parametrize(
    ("best", "expected"), [([0.02, 0.97], 0.97), ([0.4, 0.5, 0.6], 0.5), ([0.3, 0.31, 0.32], 0.32), ([0.99], 0.99)]
)
def test_of_equal_thresholds_the_nearest_to_one_half(best, expected):
    counts = np.tile([1, 1, 0, 0], (1, 99, 1))
    counts[0, np.searchsorted(GRID, np.array(best, np.float32))] = [2, 1, 0, 0]
    assert best_threshold(counts, GRID) == expected


def test_best_threshold_of_another_metric():
    counts = np.array([[image(tp=1, fn=9, tn=9), image(tp=10, fp=9)]])
    thresholds = np.array([0.2, 0.7], np.float32)
    assert best_threshold(counts[:, ::-1], thresholds, "sensitivity") == 0.2
    assert best_threshold(counts[:, ::-1], thresholds, "precision") == 0.7


def test_best_threshold_of_pooled_pixels():
    """A class that most images lack: finding nothing wins by the mean over images, not pooled."""
    rare = [image(tp=8, fp=2, fn=2, tn=88), image(fn=10, tn=90)]
    absent = [image(fp=1, tn=99), image(tn=100)]
    counts = np.array([rare, absent, absent, absent])
    thresholds = np.array([0.5, 0.9], np.float32)
    assert best_threshold(counts, thresholds) == 0.9  # 0.75 against 0.17
    assert best_threshold(counts, thresholds, pooled=True) == 0.5  # 8 / 15 against 0
