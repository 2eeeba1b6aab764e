import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from medvision.errors import MedvisionError
from medvision.metrics import count, summarise
from medvision.metrics.challenge import (
    isic2016_task3,
    isic2017_part1,
    isic2018_task1,
    isic2018_task2,
    unetpp_iou,
)

ATTRIBUTES = ["network", "streaks"]
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, images=5, classes=1):
    """Masks of images of several sizes; some lack truth, prediction or both, or are full."""
    generator = np.random.default_rng(seed)
    masks = []
    for _ in range(images):
        size = (classes, *generator.integers(1, 5, 2))
        shares = generator.choice([0, 0.4, 0.4, 1], (2, classes, 1, 1))
        masks.append(generator.random((2, *size)) < shares)
    return masks


def counted(masks):
    return np.concatenate([count(*torch.from_numpy(pair[::-1].copy())[:, None]).numpy() for pair in masks])


def share(part, whole):
    """Of the pixels of `whole`, those that are in `part`; all of none."""
    return (part & whole).sum() / whole.sum() if whole.any() else 1.0


def naive_jaccard(truth, predicted):
    return share(truth & predicted, truth | predicted)


def naive_dice(truth, predicted):
    return 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()) if (truth | predicted).any() else 1.0


@given(SEEDS)
def test_part1_is_the_mean_over_images(seed):
    masks = drawn(seed)
    expected = {
        "jaccard": [naive_jaccard(t, p) for t, p in masks],
        "dice": [naive_dice(t, p) for t, p in masks],
        "accuracy": [(t == p).mean() for t, p in masks],
        "sensitivity": [share(p, t) for t, p in masks],
        "specificity": [share(~p, ~t) for t, p in masks],
    }
    means = {name: np.mean(values) for name, values in expected.items()}
    found = isic2017_part1(counted(masks))
    assert found == pytest.approx(means)
    assert [*found] == [*expected]
    kept = [value if value >= 0.65 else 0 for value in expected["jaccard"]]
    assert isic2018_task1(counted(masks)) == pytest.approx({"threshold_jaccard": np.mean(kept)} | means)


def test_part1_by_hand():
    """Images: neither truth nor prediction; truth missed; half of the union; no truth and a false positive; full."""
    counts = np.array([[0, 0, 0, 10], [0, 0, 4, 6], [2, 1, 1, 6], [0, 5, 0, 5], [10, 0, 0, 0]])[:, None]
    assert isic2017_part1(counts) == pytest.approx(
        {
            "jaccard": (1 + 0 + 2 / 4 + 0 + 1) / 5,
            "dice": (1 + 0 + 4 / 6 + 0 + 1) / 5,
            "accuracy": (1 + 0.6 + 0.8 + 0.5 + 1) / 5,
            "sensitivity": (1 + 0 + 2 / 3 + 1 + 1) / 5,
            "specificity": (1 + 1 + 6 / 7 + 0.5 + 1) / 5,
        }
    )


def test_where_no_ratio_is_undefined_part1_is_the_project_s_mean_over_images():
    counts = np.random.default_rng(0).integers(1, 9, (7, 1, 4))
    ours = summarise(counts, ["lesion"])
    for name, value in isic2017_part1(counts).items():
        assert value == pytest.approx(ours[f"{name}_image"])


@pytest.mark.parametrize(("tp", "expected"), [(64, 0), (65, 0.65), (66, 0.66), (100, 1), (0, 0)])
def test_threshold_jaccard(tp, expected):
    counts = np.array([[[tp, 0, 100 - tp, 7]]])
    found = isic2018_task1(counts)
    assert found["threshold_jaccard"] == expected
    assert found["jaccard"] == tp / 100


def test_threshold_jaccard_counts_an_empty_image_1():
    assert isic2018_task1(np.array([[[0, 0, 0, 9]], [[1, 1, 0, 7]]]))["threshold_jaccard"] == 0.5


@given(SEEDS)
def test_task2_by_naive_sums(seed):
    masks = drawn(seed, images=4, classes=2)
    found = isic2018_task2(counted(masks), ATTRIBUTES)
    everywhere = {"jaccard": [], "dice": []}
    parts = {key: np.zeros(2) for key in ("both", "either", "sum", "both_share", "either_share", "sum_share")}
    for truth, predicted in masks:
        both, either = (truth & predicted).sum((1, 2)), (truth | predicted).sum((1, 2))
        total = truth.sum((1, 2)) + predicted.sum((1, 2))
        for key, value in (("both", both), ("either", either), ("sum", total)):
            parts[key] += value
            parts[f"{key}_share"] += value / truth[0].size
    for kind, name in (("", ""), ("_share", "_normalised")):
        both, either, total = (parts[key + kind] for key in ("both", "either", "sum"))
        for k, attribute in enumerate(ATTRIBUTES):
            jaccard = both[k] / either[k] if either[k] else 1
            assert found[f"jaccard{name}/{attribute}"] == pytest.approx(jaccard)
            dice = 2 * both[k] / total[k] if either[k] else 1
            assert found[f"dice{name}/{attribute}"] == pytest.approx(dice)
        for metric in everywhere:
            each = [found[f"{metric}{name}/{attribute}"] for attribute in ATTRIBUTES]
            assert found[f"{metric}{name}"] == pytest.approx(np.mean(each))
    both, either, total = (parts[f"{key}_share"].sum() for key in ("both", "either", "sum"))
    assert found["jaccard_normalised_micro"] == pytest.approx(both / either if either else 1)
    assert found["dice_normalised_micro"] == pytest.approx(2 * both / total if either else 1)


def test_task2_by_hand():
    """A large image that is right, a small one that is half right; the second attribute is found where it is not."""
    large = [[80, 0, 0, 20], [0, 10, 0, 90]]
    small = [[2, 2, 0, 6], [1, 0, 1, 8]]
    found = isic2018_task2(np.array([large, small]), ATTRIBUTES)
    assert found["jaccard/network"] == pytest.approx(82 / 84)
    assert found["jaccard/streaks"] == pytest.approx(1 / 12)
    assert found["jaccard_normalised/network"] == pytest.approx((0.8 + 0.2) / (0.8 + 0.4))
    assert found["jaccard_normalised/streaks"] == pytest.approx(0.1 / (0.1 + 0.2))
    assert found["jaccard_normalised"] == pytest.approx((1 / 1.2 + 1 / 3) / 2)
    assert found["jaccard_normalised_micro"] == pytest.approx(1.1 / 1.5)
    assert found["dice_normalised_micro"] == pytest.approx(2.2 / 2.6)


def test_task2_counts_an_attribute_that_is_neither_there_nor_found_1():
    counts = np.array([[[3, 1, 0, 6], [0, 0, 0, 10]]])
    found = isic2018_task2(counts, ATTRIBUTES)
    assert found["jaccard/streaks"] == found["dice_normalised/streaks"] == 1
    assert found["jaccard"] == found["jaccard_normalised"] == (0.75 + 1) / 2
    assert found["jaccard_normalised_micro"] == pytest.approx(0.75)  # what is absent adds nothing there


@given(SEEDS)
def test_task2_normalised_is_pooled_where_images_are_of_one_size(seed):
    masks = np.random.default_rng(seed).random((4, 2, 2, 3, 3)) < 0.4
    found = isic2018_task2(counted(masks), ATTRIBUTES)
    ours = summarise(counted(masks), ATTRIBUTES)
    for name in ("jaccard", "dice"):
        for end in ("", "/network", "/streaks"):
            assert found[f"{name}_normalised{end}"] == pytest.approx(found[f"{name}{end}"])
            assert found[f"{name}{end}"] == pytest.approx(ours[f"{name}{end}"])


@given(SEEDS, st.integers(1, 7))
def test_task2_normalised_does_not_depend_on_the_resolution(seed, scale):
    masks = drawn(seed, classes=2)
    first, *rest = masks
    enlarged = [first.repeat(scale, -1).repeat(scale, -2), *rest]
    before, after = (isic2018_task2(counted(m), ATTRIBUTES) for m in (masks, enlarged))
    for key in before:
        if "normalised" in key:
            assert after[key] == pytest.approx(before[key])


def test_average_precision_of_melanoma():
    probability = np.array([0.9, 0.8, 0.4, 0.6, 0.1], np.float32)
    truth = np.array([True, False, True, False, False])
    found = isic2016_task3(probability, truth)
    assert [*found] == ["average_precision", "auroc", "accuracy", "sensitivity", "specificity"]
    assert found["average_precision"] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    assert found["average_precision"] == pytest.approx(average_precision_score(truth, probability))
    assert found["auroc"] == pytest.approx(4 / 6)
    assert (found["sensitivity"], found["specificity"], found["accuracy"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))


@pytest.mark.parametrize("truth", [True, False])
def test_melanoma_everywhere_or_nowhere_is_refused(truth):
    with pytest.raises(MedvisionError, match="of 3 images show melanoma; expected some and not all"):
        isic2016_task3(np.full(3, 0.5), np.full(3, truth))


@given(SEEDS, st.integers(1, 6), st.sampled_from([1, 2]))
def test_unetpp_iou_by_naive_batches(seed, batch_size, classes):
    generator = np.random.default_rng(seed)
    probability, target = generator.random((2, 5, classes, 3, 3)) * generator.choice([0, 1], (2, 5, 1, 1, 1))
    total, images = 0.0, 0
    for start in range(0, 5, batch_size):
        p, t = (a[start : start + batch_size] > 0.5 for a in (probability, target))
        total += len(p) * (np.sum(p & t) + 1e-5) / (np.sum(p | t) + 1e-5)
        images += len(p)
    counts = count(torch.from_numpy(probability > 0.5), torch.from_numpy(target > 0.5)).numpy()
    assert unetpp_iou(counts, batch_size) == pytest.approx(total / images)


def test_unetpp_iou_by_hand_depends_on_batch_and_order():
    counts = np.array([[[9, 1, 0, 0]], [[0, 0, 2, 8]], [[3, 0, 1, 6]]])
    assert unetpp_iou(counts, 1) == pytest.approx((0.9 + 0 + 0.75) / 3, abs=1e-5)
    assert unetpp_iou(counts, 2) == pytest.approx((2 * 9 / 12 + 1 * 0.75) / 3, abs=1e-5)
    assert unetpp_iou(counts[::-1], 2) == pytest.approx((2 * 3 / 6 + 1 * 0.9) / 3, abs=1e-5)
    assert unetpp_iou(counts, 3) == unetpp_iou(counts, 16) == pytest.approx(12 / 16, abs=1e-5)
    assert unetpp_iou(np.array([[[0, 0, 0, 10]]]), 16) == 1


@pytest.mark.parametrize(
    ("score", "shape", "found"),
    [
        (isic2017_part1, (0, 1, 4), "(0, 1, 4); expected (images, 1, 4)"),
        (isic2018_task1, (3, 2, 4), "(3, 2, 4); expected (images, 1, 4)"),
        (lambda counts: isic2018_task2(counts, ATTRIBUTES), (3, 1, 4), "(3, 1, 4); expected (images, 2, 4)"),
        (lambda counts: unetpp_iou(counts, 16), (0, 3, 4), "(0, 3, 4); expected (images, classes, 4)"),
        (lambda counts: unetpp_iou(counts, 16), (3, 4), "(3, 4); expected (images, classes, 4)"),
        (lambda counts: unetpp_iou(counts, 0), (2, 1, 4), "batch_size is 0; expected a positive number"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, shape, found):
    with pytest.raises(MedvisionError) as error:
        score(np.ones(shape, int))
    assert found in str(error.value)
