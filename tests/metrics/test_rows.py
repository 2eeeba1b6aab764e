from dataclasses import replace

import numpy as np
import pytest

from medvision.metrics import (
    Bootstrap,
    LabelRows,
    MaskRows,
    decide,
    limits,
    lower_is_better,
    summarise,
    summarise_labels,
)
from medvision.metrics.intervals import summarise_intervals


def mask_rows(seed=0, images=30, classes=("a", "b", "c")):
    """Counts of images some of which lack truth, prediction or both."""
    rng = np.random.default_rng(seed)
    there = rng.random((images, len(classes), 4)) < [0.7, 0.7, 0.7, 1]
    counts = rng.integers(1, 50, (images, len(classes), 4)) * there
    return MaskRows(tuple(f"i{n}" for n in range(images)), classes, counts)


def label_rows(seed=0, images=40, classes=("a", "b", "c"), exclusive=True):
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.ones(len(classes)), images)
    there = np.eye(len(classes), dtype=bool)[rng.integers(0, len(classes), images)]
    decided = decide(probability, [] if exclusive else [0.4] * len(classes))
    return LabelRows(tuple(f"i{n}" for n in range(images)), classes, probability, there, decided, exclusive)


@pytest.mark.parametrize("classes", [("a",), ("a", "b", "c")])
def test_equal_weights_give_the_summary_of_masks(classes):
    rows = mask_rows(classes=classes)
    expected = summarise(rows.counts, classes)
    assert rows.summary() == expected
    for name, value in expected.items():
        np.testing.assert_allclose(rows.weighed(name, np.ones((2, 30))), [value] * 2, rtol=1e-12)


@pytest.mark.parametrize("exclusive", [True, False])
def test_equal_weights_give_the_summary_of_labels(exclusive):
    rows = label_rows(exclusive=exclusive)
    threshold = [] if exclusive else [0.4] * 3
    expected = summarise_labels(rows.probability, rows.there, rows.classes, threshold)
    assert rows.summary() == expected
    for name, value in expected.items():
        assert rows.weighed(name, np.ones((1, 40)))[0] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("make", [mask_rows, label_rows])
def test_weights_are_how_often_an_image_counts(make):
    rows = make()
    times = np.random.default_rng(1).integers(0, 3, len(rows.ids))
    repeated = rows.take(np.repeat(np.arange(len(rows.ids)), times))
    assert len(repeated.ids) == times.sum() and repeated.ids[0] == f"i{np.flatnonzero(times)[0]}"
    for name, value in repeated.summary().items():
        assert rows.weighed(name, times[None].astype(float))[0] == pytest.approx(value, abs=1e-12)


def test_resamples_are_those_of_the_intervals_of_a_run():
    rows, bootstrap = mask_rows(), Bootstrap(30, resamples=200)
    expected = summarise_intervals(rows.counts, rows.classes, bootstrap)
    for name in ("dice", "dice_image", "sensitivity_image/b", "precision", "jaccard/c"):
        drawn = np.concatenate([rows.weighed(name, weights) for weights in bootstrap.weights()])
        np.testing.assert_allclose(np.nanquantile(drawn, [0.025, 0.975]), expected[name], atol=1e-12)


@pytest.mark.parametrize(
    "rows", [mask_rows(), label_rows(), label_rows(exclusive=False)], ids=["masks", "exclusive", "labels"]
)
def test_the_values_of_images_have_the_summary_as_their_mean(rows):
    of_images = {}
    for name, value in rows.summary().items():
        each = rows.each(name)
        if each is not None and name.partition("_")[0] not in ("sensitivity", "precision"):  # not all have a value
            of_images[name.partition("/")[0]] = None
            assert each.mean() == pytest.approx(value, abs=1e-12), name
        if each is not None:
            assert (rows.has_value(name) | np.isnan(each)).all()
    assert [*of_images] == (
        ["dice_image", "jaccard_image", "specificity_image", "accuracy_image", "threshold_jaccard_image"]
        if isinstance(rows, MaskRows)
        else ["accuracy", "brier"]
    )
    assert rows.each("dice" if isinstance(rows, MaskRows) else "auroc") is None


def test_images_without_a_value_are_left_out_and_named():
    counts = np.array([[[5, 5, 0, 9]], [[0, 5, 0, 9]], [[0, 0, 0, 9]]])
    rows = MaskRows(("x", "y", "z"), ("a",), counts)
    np.testing.assert_array_equal(rows.each("sensitivity_image"), [1, np.nan, 1])  # the empty image counts 1
    assert rows.has_value("sensitivity").tolist() == [True, False, True]
    assert rows.weighed("sensitivity_image", np.array([[0.0, 3, 0], [1, 1, 0]])).tolist()[1] == 1
    assert np.isnan(rows.weighed("sensitivity_image", np.array([[0.0, 3, 0]])))


def test_joined_and_reordered():
    rows = mask_rows(images=4)
    both = rows.take([3, 1]).and_of(rows.take([0]), rows.take([2]))
    assert both.ids == ("i3", "i1", "i0", "i2")
    np.testing.assert_array_equal(both.counts, rows.counts[[3, 1, 0, 2]])
    np.testing.assert_array_equal(both.truth[0, 0], [rows.counts[3, 0, [0, 2]].sum(), rows.counts[3, 0].sum()])


def test_direction():
    lower = ["brier", "brier/a", "ece", "hd95_image", "assd_image/b"]
    assert all(map(lower_is_better, lower))
    assert [limits(name) for name in ("dice_image/a", "brier", "mcc", "hd95_image", "nsd")] == [
        *((0, 1), (0, 1), (-1, 1), (0, np.inf), (0, 1))
    ]
    assert not any(map(lower_is_better, ["dice", "auroc/brier", "nsd_image", "jaccard_image"]))


def test_distances_and_empty_images_count_as_the_run_had_them():
    rows = mask_rows(images=6, classes=("a", "b"))
    rows.counts[2, 0] = [0, 0, 0, 9]
    distance = np.arange(12.0).reshape(6, 2)
    distance[1, 0] = np.nan
    for empty in (0.0, 1.0, np.nan):
        made = replace(rows, also={"hd95": distance}, empty=empty)
        expected = summarise(made.counts, ("a", "b"), empty, {"hd95": distance})
        assert made.summary() == expected
        for name in ("hd95_image", "hd95_image/a", "dice_image", "jaccard_image/a", "threshold_jaccard_image"):
            assert made.weighed(name, np.ones((1, 6)))[0] == pytest.approx(expected[name])
    both = made.take([1, 0]).and_of(replace(rows, also={"hd95": distance, "assd": distance}).take([3]))
    assert both.ids == ("i1", "i0", "i3") and [*both.also] == ["hd95"]
    np.testing.assert_array_equal(both.also["hd95"], distance[[1, 0, 3]])
