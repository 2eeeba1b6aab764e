import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medvision.errors import MedvisionError
from medvision.metrics import Bootstrap, interval, scores, summarise, summarise_intervals, summarise_labels

CLASSES = ["a", "b", "c"]


def drawn_counts(seed, images, classes=3):
    """Counts of images some of which lack truth, prediction or both; the last class is rare."""
    generator = np.random.default_rng(seed)
    there = generator.random((images, classes, 4)) < [0.7, 0.7, 0.7, 1]
    there[:, -1, :3] &= generator.random((images, 1)) < 0.2
    return generator.integers(1, 50, (images, classes, 4)) * there


def resamples(images, groups, number, seed):
    """The images of each resample, drawn group by group."""
    names = sorted(set(groups), key=groups.index)
    members = [[n for n in range(images) if groups[n] == name] for name in names]
    for row in np.random.default_rng(seed).integers(0, len(names), (number, len(names))):
        yield np.array([n for place in row for n in members[place]])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(4, 20), share=st.sampled_from([0, 0.3, 0.7]))
@pytest.mark.parametrize("grouped", [False, True])
def test_means_are_those_of_a_loop_over_the_draws(grouped, seed, images, share):
    generator = np.random.default_rng(seed)
    values = generator.normal(3, 10, (images, 2))
    values[generator.random((images, 2)) < share] = np.nan
    groups = generator.choice(list("abcde"), images).tolist() if grouped else None
    bootstrap = Bootstrap(images, groups, resamples=30, seed=seed)
    found = bootstrap.means(values)
    expected = np.full((30, 2), np.nan)
    for r, drawn in enumerate(resamples(images, groups or list(range(images)), 30, seed)):
        for k in range(2):
            known = values[drawn, k][~np.isnan(values[drawn, k])]
            units = {n if groups is None else groups[n] for n in np.flatnonzero(~np.isnan(values[:, k]))}
            if known.size and len(units) > 1:
                expected[r, k] = known.mean()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    if len(set(groups or range(images))) > 1:
        applied = bootstrap.apply(lambda drawn: np.ma.masked_invalid(values[drawn]).mean(0).filled(np.nan))
        few = np.isnan(found).all(0)
        np.testing.assert_allclose(applied[:, ~few], found[:, ~few], atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), empty=st.sampled_from([0.0, 1.0, np.nan]), grouped=st.booleans())
def test_intervals_of_a_summary_are_those_of_summaries(seed, empty, grouped):
    counts = drawn_counts(seed, 12)
    groups = [0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 7] if grouped else None
    bootstrap = Bootstrap(12, groups, resamples=40, seed=seed)
    distance = np.where(counts[..., 0] > 0, counts[..., 1] / 7, np.nan)  # any metric of an image, with gaps
    found = summarise_intervals(counts, CLASSES, bootstrap, empty, level=0.8, also={"distance": distance})
    point = summarise(counts, CLASSES, empty, {"distance": distance})
    assert found.keys() == point.keys()
    names = [name for name in point if not np.isnan(found[name]).any()]
    expected = {"dice/b", "accuracy_image/c", "distance_image/a"}  # without a value for empty images c may have too few
    assert expected | (set() if np.isnan(empty) else {"dice", "jaccard_image"}) <= set(names)

    def summary(drawn):
        values = summarise(counts[drawn], CLASSES, empty, {"distance": distance[drawn]})
        return [values.get(name, np.nan) for name in names]

    expected = np.nanquantile(bootstrap.apply(summary), [0.1, 0.9], axis=0).T
    np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-12)


def test_pooled_metrics_are_of_the_sum_of_counts():
    counts = drawn_counts(1, 9)
    bootstrap = Bootstrap(9, resamples=50)
    found = bootstrap.pooled(counts)
    for r, drawn in enumerate(resamples(9, list(range(9)), 50, 0)):
        for name, values in scores(counts[drawn].sum(0)).items():
            np.testing.assert_allclose(found[name][r], values, atol=1e-12)


def test_any_metric_of_the_images_drawn():
    generator = np.random.default_rng(0)
    truth = generator.random((60, 1)) < 0.4
    probability = np.clip(generator.normal(0.4 + 0.2 * truth, 0.2), 0, 1)

    def auroc(drawn):
        return summarise_labels(probability[drawn], truth[drawn], ["malignant"], [0.5]).get("auroc", np.nan)

    found = Bootstrap(60, resamples=100, seed=3).apply(auroc)
    expected = [auroc(drawn) for drawn in resamples(60, list(range(60)), 100, 3)]
    assert found == pytest.approx(np.array(expected))
    low, high = interval(found)
    assert low < auroc(np.arange(60)) < high


def test_against_scipy():
    values = np.random.default_rng(0).exponential(2, 50)
    found = interval(Bootstrap(50, resamples=20_000).means(values), level=0.9)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found == pytest.approx([expected.low, expected.high], abs=0.02)
    assert found[1] - found[0] == pytest.approx(2 * 1.645 * values.std() / 50**0.5, rel=0.05)


def covered(simulate, truth, number=200):
    """The share of simulated data sets whose interval holds the truth."""
    hits = 0
    for seed in range(number):
        values, groups = simulate(np.random.default_rng(seed))
        low, high = interval(Bootstrap(len(values), groups, resamples=400, seed=seed).means(values))
        hits += low <= truth <= high
    return hits / number


def test_the_truth_is_covered_as_often_as_said():
    assert 0.90 <= covered(lambda generator: (generator.normal(1, 2, 60), None), 1) <= 0.99


def alike(generator, groups=25, of_each=8):
    """Images that differ little within a group: all of what is seen of a patient looks the same."""
    values = generator.normal(0, 1, groups)[:, None] + generator.normal(0, 0.2, (groups, of_each))
    return values.ravel(), np.repeat(np.arange(groups), of_each).tolist()


def test_groups_that_are_alike():
    values, groups = alike(np.random.default_rng(0))
    images, grouped = (interval(Bootstrap(200, given).means(values)) for given in (None, groups))
    assert 2 < (grouped[1] - grouped[0]) / (images[1] - images[0]) < 4  # the square root of 8 is 2.8
    assert 0.88 <= covered(alike, 0) <= 0.99
    assert covered(lambda generator: (alike(generator)[0], None), 0) < 0.7


def test_groups_of_one_image_are_no_groups():
    values = np.random.default_rng(0).random(20)
    expected = Bootstrap(20).means(values)
    np.testing.assert_array_equal(Bootstrap(20, [f"patient {n}" for n in range(20)]).means(values), expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.0])
def test_equal_values_have_an_interval_without_width(value):
    values = np.full((17, 2), value)
    values[::3, 1] = np.nan
    for groups in (None, [n // 2 for n in range(17)]):
        assert interval(Bootstrap(17, groups).means(values)).tolist() == [[value] * 2] * 2
    counts = np.tile([3, 2, 4, 7], (17, 1, 1))
    low, high = summarise_intervals(counts, ["a"], Bootstrap(17))["jaccard"]
    assert low == high == 3 / 9


@pytest.mark.parametrize(("images", "groups"), [(1, None), (6, ["one"] * 6)])
def test_one_image_or_group_says_nothing_of_others(images, groups):
    bootstrap = Bootstrap(images, groups, resamples=20)
    counts = drawn_counts(0, images) + 1
    assert np.isnan(bootstrap.means(counts[..., 0])).all()
    assert np.isnan(bootstrap.apply(lambda drawn: np.zeros((2, 5)))).all()
    assert bootstrap.apply(lambda drawn: np.zeros((2, 5))).shape == (20, 2, 5)
    found = summarise_intervals(counts, CLASSES, bootstrap)
    assert found.keys() == summarise(counts, CLASSES).keys()
    assert np.isnan([*found.values()]).all()


def test_a_value_of_one_image_has_no_interval():
    values = np.array([[0.5, 1.0], [np.nan, 2.0], [np.nan, 4.0]])
    low, high = interval(Bootstrap(3, resamples=200).means(values))
    assert np.isnan([low[0], high[0]]).all()
    assert (low[1], high[1]) == (1.0, 4.0)
    # class a: the only truth is in the first image, and what is predicted in the others is no sensitivity
    counts = np.array([[[5, 1, 1, 9], [4, 1, 1, 9]], [[0, 2, 0, 9], [3, 1, 2, 9]], [[0, 3, 0, 9], [1, 1, 1, 9]]])
    found = summarise_intervals(counts, ["a", "b"], Bootstrap(3))
    assert np.isnan(found["sensitivity/a"]).all() and np.isnan(found["sensitivity_image/a"]).all()
    assert np.isnan(found["sensitivity"]).all()  # the mean over classes holds one whose interval is not known
    assert not np.isnan(found["sensitivity/b"]).any()


def test_a_class_without_a_value_is_left_out():
    counts = np.array([[[0, 2, 0, 9], [4, 1, 1, 9]], [[0, 2, 0, 9], [3, 1, 2, 9]]])
    found = summarise_intervals(counts, ["a", "b"], Bootstrap(2))
    assert found.keys() == summarise(counts, ["a", "b"]).keys()
    assert "sensitivity/a" not in found
    assert found["sensitivity"] == found["sensitivity/b"] == pytest.approx((3 / 5, 4 / 5))


def test_blocks_do_not_change_the_number_of_resamples():
    bootstrap = Bootstrap(2**20, resamples=5)  # four resamples fit into a block
    blocks = [*bootstrap._times()]
    assert [len(times) for times in blocks] == [4, 1]
    assert all((times.sum(1) == 2**20).all() for times in blocks)


def test_the_same_draws_for_all_metrics_and_each_seed_its_own():
    values = np.random.default_rng(0).random((30, 2))
    bootstrap = Bootstrap(30, resamples=100)
    difference = bootstrap.means(values[:, 0]) - bootstrap.means(values[:, 1])
    np.testing.assert_allclose(difference, bootstrap.means(values[:, 0] - values[:, 1]), atol=1e-12)
    assert not np.array_equal(bootstrap.means(values), Bootstrap(30, resamples=100, seed=1).means(values))


def test_quantiles_of_the_resamples():
    assert interval(np.arange(101.0)) == pytest.approx([2.5, 97.5])
    assert interval(np.append(np.arange(101.0), [np.nan] * 7), level=0.5) == pytest.approx([25, 75])
    assert interval(np.zeros((5, 2, 3))).shape == (2, 2, 3)
    assert np.isnan(interval([np.nan, np.nan])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bootstrap(0), "2000 resamples of 0 images; expected at least one of each"),
        (lambda: Bootstrap(3, resamples=0), "0 resamples of 3 images"),
        (lambda: Bootstrap(3, ["a", "b"]), "2 groups for 3 images; expected the group of each image"),
        (lambda: Bootstrap(3).means([1.0, 2.0]), "values of 2 images; expected those of the 3 drawn from"),
        (lambda: Bootstrap(3).pooled(drawn_counts(0, 4)), "values of 4 images; expected those of the 3"),
        (lambda: interval([1.0, 2.0], level=95), "level is 95; expected a share above 0 and below 1"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(MedvisionError, match=message):
        call()
