import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from medvision.errors import MedvisionError
from medvision.metrics import (
    Bootstrap,
    LabelRows,
    MaskRows,
    holm,
    interval,
    paired_test,
    rank_probabilities,
    resample,
    two_sided,
)
from medvision.metrics.paired import exchange_test, rank_biserial, unit_means, wilcoxon

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "comparison.py"


def rows(scores):
    """Images of one class whose Jaccard is a share of 1000 pixels."""
    tp = np.round(np.asarray(scores) * 1000).astype(int)
    counts = np.stack([tp, 1000 - tp, 0 * tp, 0 * tp + 50], -1)[:, None]
    return MaskRows(tuple(map(str, range(len(tp)))), ("a",), counts)


def test_exact_and_random_exchanges_are_scipy_s_permutation_test():
    difference = np.array([0.3, -0.1, 0.25, 0.4, 0.05, -0.02, 0.31, 0.15])

    def mean(exchanged):
        return (1 - 2 * exchanged) @ difference / len(difference)

    expected = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert exchange_test(mean, np.arange(8), 256) == pytest.approx(expected, abs=1e-12)
    random = exchange_test(mean, np.arange(8), 255)
    assert random != pytest.approx(expected, abs=1e-12) and random == pytest.approx(expected, abs=0.05)
    many = np.concatenate([difference] * 4) + np.random.default_rng(0).normal(-0.1, 0.3, 32)
    expected = stats.permutation_test((many,), np.mean, permutation_type="samples", n_resamples=20000, rng=0).pvalue
    found = exchange_test(lambda e: (1 - 2 * e) @ many / 32, np.arange(32), 20000)
    assert 0.01 < expected < 0.9 and found == pytest.approx(expected, abs=0.015)


def test_groups_are_exchanged_whole():
    difference = np.array([0.3, 0.1, 0.25, -0.4, 0.05, 0.2])
    units = np.array([0, 0, 1, 2, 2, 1])
    sums = np.bincount(units, difference)
    flips = np.array([*itertools.product([1, -1], repeat=3)])
    expected = (np.abs(flips @ sums) >= abs(sums.sum()) - 1e-12).mean()
    assert exchange_test(lambda e: (1 - 2 * e) @ difference, units, 100) == expected
    paired = paired_test([rows(0.4 + difference)], [rows(np.full(6, 0.4))], "jaccard_image", units, 100)
    assert paired.permutation == pytest.approx(expected)
    assert paired.wilcoxon == stats.wilcoxon(np.round(sums / np.bincount(units), 12)).pvalue


def test_a_mean_over_images_is_tested_by_flipping_signs():
    rng = np.random.default_rng(3)
    one, two = rng.uniform(0.4, 0.9, (2, 9)).round(3)
    found = paired_test([rows(one)], [rows(two)], "jaccard_image", np.arange(9), 512)
    expected = stats.permutation_test((one - two,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert found.images == 9 and found.permutation == pytest.approx(expected)
    assert found.wilcoxon == stats.wilcoxon(one, two).pvalue
    back = paired_test([rows(two)], [rows(one)], "jaccard_image", np.arange(9), 512)
    assert (back.permutation, back.wilcoxon, back.rank_biserial) == (
        pytest.approx(found.permutation),
        found.wilcoxon,
        -found.rank_biserial,
    )


def test_pooled_metrics_exchange_counts():
    rng = np.random.default_rng(5)
    one, two = (MaskRows(tuple("abcde"), ("a", "b"), rng.integers(1, 100, (5, 2, 4))) for _ in range(2))
    found = paired_test([one], [two], "dice", np.arange(5), 32)
    gaps = []
    for flags in itertools.product([False, True], repeat=5):
        swap = np.array(flags)[:, None, None]
        pair = [np.where(swap, b, a) for a, b in ((one.counts, two.counts), (two.counts, one.counts))]
        dice = [(2 * c[..., 0].sum(0) / (2 * c[..., 0] + c[..., 1] + c[..., 2]).sum(0)).mean() for c in pair]
        gaps.append(abs(dice[0] - dice[1]))
    assert found.permutation == pytest.approx(np.mean(np.array(gaps) >= gaps[0] - 1e-12))
    assert (found.wilcoxon, found.rank_biserial, found.images) == (None, None, 5)


def test_rankings_exchange_probabilities():
    truth = np.array([1, 1, 1, 0, 0, 0], bool)[:, None]
    good, bad = np.array([[0.9, 0.8, 0.7, 0.3, 0.2, 0.1], [0.2, 0.5, 0.1, 0.6, 0.4, 0.3]])[..., None]
    one, two = (LabelRows(tuple("abcdef"), ("a",), p, truth, p > 0.5, False) for p in (good, bad))
    found = paired_test([one], [two], "auroc", np.arange(6), 64)
    gaps = []
    for flags in itertools.product([False, True], repeat=6):
        swapped = [np.where(np.array(flags)[:, None], b, a)[:, 0] for a, b in ((good, bad), (bad, good))]
        areas = [np.mean(p[:3, None] > p[None, 3:]) + 0.5 * np.mean(p[:3, None] == p[None, 3:]) for p in swapped]
        gaps.append(abs(areas[0] - areas[1]))
    assert found.permutation == pytest.approx(np.mean(np.array(gaps) >= gaps[0] - 1e-12))


def test_seeds_are_averaged_each_as_often():
    rng = np.random.default_rng(7)
    two, three = rng.uniform(0.4, 0.9, (2, 8)).round(3), rng.uniform(0.4, 0.9, (3, 8)).round(3)
    difference = two.mean(0) - three.mean(0)
    found = paired_test([rows(s) for s in two], [rows(s) for s in three], "jaccard_image", np.arange(8), 256)
    expected = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert found.permutation == pytest.approx(expected)
    assert found.wilcoxon == stats.wilcoxon(difference).pvalue


def test_images_that_one_has_no_value_of_are_left_out():
    without = MaskRows(tuple("abc"), ("a",), np.array([[[5, 1, 2, 9]], [[0, 3, 0, 9]], [[4, 0, 4, 9]]]))
    found = paired_test([without], [without], "sensitivity_image", np.arange(3), 8)
    assert (found.images, found.wilcoxon, found.rank_biserial, found.permutation) == (2, 1.0, 0.0, 1.0)
    never = MaskRows(tuple("ab"), ("a",), np.array([[[0, 1, 0, 9]], [[0, 3, 0, 9]]]))
    found = paired_test([never], [never], "sensitivity_image", np.arange(2), 8)
    assert (found.images, found.wilcoxon, found.rank_biserial, found.permutation) == (0, None, None, None)


def test_signed_ranks():
    assert rank_biserial([1, 2, 3]) == 1 and rank_biserial([-1, -2]) == -1
    assert rank_biserial([1, -2, 3, 0]) == pytest.approx((1 + 3 - 2) / 6)
    assert rank_biserial([0.1 + 0.2 - 0.3, 0]) == 0 and wilcoxon([0.1 + 0.2 - 0.3, 0]) == 1  # rounding is no difference
    values = np.random.default_rng(0).normal(0.2, 1, 60)
    statistic = stats.wilcoxon(values).statistic  # the smaller of both sums of ranks
    assert abs(rank_biserial(values)) == pytest.approx(1 - 4 * statistic / (60 * 61))
    assert wilcoxon(values) == stats.wilcoxon(values).pvalue
    np.testing.assert_allclose(unit_means(np.array([1.0, 2, 6]), np.array([4, 4, 0])), [6, 1.5])


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R's p.adjust
    assert holm([0.5, 0.9]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []
    with pytest.raises(MedvisionError, match=r"a p value is 1\.2; expected 0 to 1"):
        holm([0.1, 1.2])


def test_two_sided():
    drawn = np.concatenate([np.full(20, -1.0), np.full(980, 1.0), [np.nan]])
    assert two_sided(drawn) == two_sided(-drawn) == pytest.approx(2 * 21 / 1001)
    assert two_sided(np.zeros(10)) == 1 and two_sided(np.array([np.nan])) is None


def test_ranks():
    drawn = np.array([[3, 2, 1], [3, 1, 2], [1, 1, 0], [np.nan, 1, 2]])
    expected = [[2.5 / 3, 0.5 / 3, 0], [0.5 / 3, 1.5 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]
    np.testing.assert_allclose(rank_probabilities(drawn), expected)
    np.testing.assert_allclose(rank_probabilities(drawn, lower=True), np.fliplr(expected))
    assert np.isnan(rank_probabilities(np.full((2, 2), np.nan))).all()


def test_one_seed_is_the_bootstrap_over_images_with_the_same_draws_for_all():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.3, 0.9, 20).round(3)
    units = np.arange(20) // 2
    drawn = resample([[rows(scores)], [rows(scores + 0.05)]], ["jaccard_image"], units, 300)["jaccard_image"]
    expected = Bootstrap(20, units.tolist(), 300).means(scores)
    np.testing.assert_allclose(drawn.contrast([1, 0]), expected, atol=1e-12)
    np.testing.assert_allclose(drawn.contrast([-1, 1]), 0.05, atol=1e-9)  # of pairs
    np.testing.assert_array_equal(drawn.each(), drawn.means)


def test_the_error_of_few_seeds_is_student_s_and_of_differences_welch_s():
    """Without chance in the images, the intervals are those of t tests on the seeds."""
    one, two = np.array([0.50, 0.53, 0.58]), np.array([0.61, 0.62, 0.60, 0.615])
    groups = [[rows(np.full(12, mean)) for mean in means] for means in (one, two)]
    drawn = resample(groups, ["jaccard_image"], np.arange(12), 40000)["jaccard_image"]
    expected = stats.t(2, one.mean(), one.std(ddof=1) / 3**0.5).interval(0.95)
    np.testing.assert_allclose(interval(drawn.contrast([1, 0])), expected, rtol=0.02)
    welch = stats.ttest_ind(two, one, equal_var=False)
    np.testing.assert_allclose(interval(drawn.contrast([-1, 1])), welch.confidence_interval(), rtol=0.05)
    assert two_sided(drawn.contrast([-1, 1])) == pytest.approx(welch.pvalue, rel=0.1)
    np.testing.assert_allclose(interval(drawn.each()[:, 0]), expected, rtol=0.02)


def test_what_one_image_has_a_value_of_has_no_resamples():
    counts = np.array([[[5, 1, 2, 9]], [[0, 3, 0, 9]], [[0, 3, 0, 9]]])
    rows = MaskRows(tuple("abc"), ("a",), counts)
    drawn = resample([[rows], [rows, rows]], ["sensitivity_image", "dice"], np.arange(3), 50)
    assert np.isnan(drawn["sensitivity_image"].contrast([-1, 1])).all()
    np.testing.assert_array_equal(drawn["dice"].contrast([-1, 1]), 0)


@pytest.fixture(scope="module")
def simulate():
    return runpy.run_path(str(BENCHMARK))["simulate"]


def test_intervals_hold_the_truth_and_tests_keep_their_level(simulate):
    """Ranges are three standard errors of 60 studies about the nominal share; the benchmark has more studies."""
    found = simulate(seeds=3, luck=0.02, studies=60, images=40, resamples=400)
    assert found["mean holds"] >= 0.87 and found["difference holds"] >= 0.87
    assert found["naive difference"] < 0.87  # what drawing three seeds with replacement gives
    assert found["any verdict of 3"] <= 0.14
    alike = simulate(seeds=1, luck=0.0, studies=60, images=40, resamples=400)
    assert alike["permutation"] <= 0.14 and alike["wilcoxon"] <= 0.14 and alike["the same by Holm"] <= 0.14
    assert alike["mean holds"] >= 0.86
