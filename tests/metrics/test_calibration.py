import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from medvision.errors import MedvisionError
from medvision.metrics.calibration import FINE, Calibration, fit_temperature

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, shape=(4, 2, 5, 6)):
    generator = np.random.default_rng(seed)
    fine = np.round(FINE * logit(generator.uniform(0.001, 0.999, shape))) / FINE
    probability = expit(fine).astype(np.float32)  # those that are kept as they are
    return torch.from_numpy(probability), torch.from_numpy(generator.random(shape) < probability**2)


def reliability(probability, truth, bins=15):
    calibration = Calibration(probability.shape[1], bins)
    calibration.update(probability, truth)
    return calibration.compute()


@given(SEEDS, st.integers(1, 20))
def test_diagram_equals_looking_at_each_bin(seed, bins):
    probability, truth = drawn(seed)
    for k, found in enumerate(reliability(probability, truth, bins)):
        p, t = probability[:, k].double().flatten().numpy(), truth[:, k].flatten().numpy()
        error = 0.0
        for b in range(bins):
            here = (p * bins >= b) & ((p * bins < b + 1) | (b == bins - 1))
            assert found.count[b] == here.sum()
            if here.any():
                assert found.confidence[b] == pytest.approx(p[here].mean(), abs=1e-6)
                assert found.frequency[b] == pytest.approx(t[here].mean(), abs=1e-6)
                error += here.mean() * abs(t[here].mean() - p[here].mean())
            else:
                assert np.isnan(found.confidence[b]) and np.isnan(found.frequency[b])
        assert found.expected_error == pytest.approx(error, abs=1e-6)
        assert found.brier == pytest.approx(brier_score_loss(t, p), abs=1e-6)


@given(SEEDS)
def test_diagram_equals_scikit_learn(seed):
    probability, truth = drawn(seed, (50, 1))
    found = reliability(probability, truth, 8)[0]
    frequency, confidence = calibration_curve(truth[:, 0], probability[:, 0].double(), n_bins=8)
    np.testing.assert_allclose(found.frequency[found.count > 0], frequency)
    np.testing.assert_allclose(found.confidence[found.count > 0], confidence, rtol=1e-5)


@given(SEEDS, st.sampled_from([1, 5, 15]))
def test_error_equals_torchmetrics(seed, bins):
    probability, truth = drawn(seed)
    for k, found in enumerate(reliability(probability, truth, bins)):
        theirs = binary_calibration_error(probability[:, k], truth[:, k].int(), n_bins=bins)
        assert found.expected_error == pytest.approx(theirs.item(), abs=1e-6)


def test_torchmetrics_has_a_bin_of_its_own_for_a_probability_of_1():
    """The one difference: here 1 lies in the last bin, whose deviations may cancel."""
    probability, truth = torch.tensor([1.0, 0.9, 0.9, 0.9]), torch.tensor([0, 1, 1, 1])
    assert binary_calibration_error(probability, truth, n_bins=2) == pytest.approx((1 + 3 * 0.1) / 4)
    assert reliability(probability[:, None], truth[:, None], 2)[0].expected_error == pytest.approx(0.7 / 4, abs=1e-4)


def test_top_label_error_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn((200, 4), generator=generator).softmax(1)
    target = torch.randint(4, (200,), generator=generator)
    top = probability.max(1)
    found = reliability(top.values[:, None], (top.indices == target)[:, None])[0]
    theirs = multiclass_calibration_error(probability, target, num_classes=4, n_bins=15)
    assert found.expected_error == pytest.approx(theirs.item(), abs=1e-4)  # as they come, not as they are kept


def test_by_hand():
    probability = torch.tensor([[0.0], [0.1], [0.3], [0.5], [1.0]])
    truth = torch.tensor([[0], [1], [0], [1], [1]])
    found = reliability(probability, truth, 2)[0]
    assert found.count.tolist() == [3, 2]
    np.testing.assert_allclose(found.confidence, [0.4 / 3, 0.75], atol=1e-4)
    np.testing.assert_allclose(found.frequency, [1 / 3, 1])
    assert found.expected_error == pytest.approx((0.6 + 0.5) / 5, abs=1e-4)
    assert found.brier == pytest.approx((0 + 0.81 + 0.09 + 0.25 + 0) / 5, abs=1e-4)


@given(SEEDS, st.lists(st.integers(1, 3), max_size=3))
def test_batches_do_not_matter(seed, cuts):
    probability, truth = drawn(seed)
    calibration = Calibration(2)
    for batch in np.split(np.arange(4), sorted(set(cuts))):
        calibration.update(probability[batch], truth[batch])
    for found, expected in zip(calibration.compute(), reliability(probability, truth), strict=True):
        for name in ("count", "confidence", "frequency", "brier"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(("value", "bin"), [(0.0, 0), (1.0, 14), (0.5, 7), (float(np.nextafter(np.float32(1), 0)), 14)])
def test_bin_of_a_probability(value, bin):
    found = reliability(torch.full((1, 1), value), torch.ones(1, 1))[0]
    assert found.count.nonzero()[0].tolist() == [bin]
    assert found.confidence[bin] == pytest.approx(value, abs=2e-7) and found.frequency[bin] == 1


def test_right_probabilities_have_no_error_and_certain_mistakes_all():
    truth = torch.tensor([[0], [1], [1], [1]])
    assert reliability(torch.full((4, 1), 0.75), truth)[0].expected_error == pytest.approx(0, abs=1e-4)
    wrong = reliability(1 - truth.float(), truth)[0]
    assert (wrong.expected_error, wrong.brier) == pytest.approx((1, 1), abs=1e-6)


@pytest.mark.parametrize(
    ("probability", "truth", "message"),
    [
        (torch.tensor([[1.5]]), torch.ones(1, 1), "probabilities lie outside of 0 to 1 or are NaN"),
        (torch.tensor([[-0.1]]), torch.ones(1, 1), "probabilities lie outside"),
        (torch.tensor([[torch.nan]]), torch.ones(1, 1), "probabilities lie outside"),
        (torch.zeros(3, 1), torch.ones(3), r"values are \(3, 1\), truth is \(3,\); expected \(N, 1, ...\) of both"),
        (torch.zeros(3, 2), torch.ones(3, 2), r"expected \(N, 1, ...\) of both"),
    ],
)
def test_what_cannot_be_added_is_refused(probability, truth, message):
    with pytest.raises(MedvisionError, match=message):
        Calibration(1).update(probability, truth)


def test_nothing_added_is_refused():
    with pytest.raises(MedvisionError, match="no probability was added"):
        Calibration(1).compute()


def too_confident(seed, temperature, number=20_000):
    """Logits that are `temperature` times the true ones, and truths."""
    generator = np.random.default_rng(seed)
    true = generator.normal(-0.5, 1.5, number)
    return temperature * true, generator.random(number) < expit(true)


def likelihood(temperature, logits, target, weight=1.0):
    """Negative, mean."""
    if logits.ndim == 1:
        logits, target = np.stack([0 * logits, logits], 1), target.astype(int)
    return -np.mean(weight * log_softmax(logits / temperature, 1)[np.arange(len(logits)), target])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 40.0])
def test_known_temperature_is_found_and_calibrates(temperature):
    logits, truth = too_confident(0, temperature)
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(temperature, rel=0.03)
    before, after = (
        reliability(torch.from_numpy(expit(logits / t))[:, None], torch.from_numpy(truth)[:, None])[0]
        for t in (1, found)
    )
    assert after.expected_error < 0.015
    if temperature != 1:
        assert before.expected_error > 5 * after.expected_error
        assert after.brier < before.brier


def test_known_temperature_of_a_softmax_is_found():
    generator = np.random.default_rng(1)
    true = generator.normal(0, 2, (20_000, 3))
    target = (log_softmax(true, 1) + generator.gumbel(size=true.shape)).argmax(1)
    assert fit_temperature(1.7 * true, target) == pytest.approx(1.7, rel=0.03)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([1, 2, 4]), st.floats(0.2, 5))
def test_temperature_has_the_least_likelihood(seed, classes, scale):
    generator = np.random.default_rng(seed)
    if classes == 1:
        logits = generator.normal(0, scale, 60)
        target = generator.random(60) < expit(logits / scale)
    else:
        logits = generator.normal(0, scale, (60, classes))
        target = (logits / scale + generator.gumbel(size=logits.shape)).argmax(1)
    try:
        found = fit_temperature(logits, target)
    except MedvisionError as error:
        assert "no better than chance" in str(error)
        assert likelihood(1e9, logits, target) <= likelihood(scale, logits, target)
        return
    best = minimize_scalar(lambda cold: likelihood(1 / cold, logits, target), (0.5 / found, 2 / found), tol=1e-10)
    assert found == pytest.approx(1 / best.x, rel=1e-5)


@given(SEEDS, st.floats(0.1, 10))
def test_temperature_goes_with_the_logits(seed, factor):
    logits, truth = too_confident(seed, 2.0, 200)
    assert fit_temperature(factor * logits, truth) == pytest.approx(factor * fit_temperature(logits, truth))


def test_weight_is_how_often_one_was_seen_and_softmax_of_two_is_the_sigmoid():
    logits, truth = too_confident(3, 2.0, 300)
    weight = np.random.default_rng(0).integers(0, 4, 300)
    expected = fit_temperature(logits.repeat(weight), truth.repeat(weight))
    assert fit_temperature(logits, truth, weight) == pytest.approx(expected)
    shifted = np.stack([0 * logits, logits], 1) + np.arange(300)[:, None]
    assert fit_temperature(shifted, truth.astype(int), weight) == pytest.approx(expected)
    probability = expit(logits)
    assert fit_temperature(logit(probability), truth, weight) == pytest.approx(expected)
    assert fit_temperature(log_softmax(shifted, 1), truth.astype(int), weight) == pytest.approx(expected)


def test_one_histogram_knows_the_temperature_and_what_it_mends():
    pairs = [too_confident(seed, temperature, 6000) for seed, temperature in ((4, 0.4), (5, 3.0))]
    logits, truth = (torch.from_numpy(np.stack(of, 1).reshape(6, 1000, 2)).mT for of in zip(*pairs, strict=True))
    calibration = Calibration(2)
    for image in range(6):
        calibration.update(logits[image, None].sigmoid(), truth[image, None])
    assert calibration.count.sum() == 12_000
    found = [calibration.temperature(k) for k in range(2)]
    assert found == pytest.approx([fit_temperature(*pair) for pair in pairs], rel=1e-3)
    anew = Calibration(2)
    anew.update((logits / torch.tensor(found)[:, None]).sigmoid(), truth)
    for before, after, expected in zip(calibration.compute(), calibration.compute(found), anew.compute(), strict=True):
        assert after.expected_error == pytest.approx(expected.expected_error, abs=1e-3)
        assert after.brier == pytest.approx(expected.brier, abs=1e-5)
        assert before.expected_error > 3 * after.expected_error


TRUTH = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (np.array([-2.0, -1, 1, 2]), TRUTH, "every decision is right"),
        (np.array([2.0, 1, -1, -2]), TRUTH, "no better than chance"),
        (np.zeros((4, 3)), TRUTH, "no better than chance"),
        (np.array([-2.0, np.inf, 1, 2]), TRUTH, "a logit is infinite or NaN"),
        (np.array([]), np.array([]), "there is no logit"),
    ],
)
def test_where_no_temperature_is_best_an_error_says_so(logits, target, message):
    with pytest.raises(MedvisionError, match=message):
        fit_temperature(logits, target)
