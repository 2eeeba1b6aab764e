import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit, softmax

from medvision.decision import Decision
from medvision.metrics import decide
from medvision.postprocess import Cleaning

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("threshold", [1e-9, 0.01, 0.3, 0.99, 1 - 1e-9])
def test_a_threshold_at_a_low_temperature_is_a_probability_still(threshold):
    [moved] = Decision((threshold,)).at((1e-4,)).threshold
    assert 0 < np.float32(moved) < 1 and (moved < 1e-30 if threshold < 0.5 else moved > 1 - 1e-7)
    assert Decision((threshold,)).at((0.9,)).threshold[0] == pytest.approx(expit(logit(threshold) / 0.9))


@pytest.mark.parametrize(
    ("decision", "entries"),
    [
        (Decision((0.4,)), {"threshold": 0.4}),
        (Decision((0.4, 0.7)), {"threshold": [0.4, 0.7]}),
        (Decision(()), {}),
        (Decision((), (1.5,)), {"temperature": 1.5}),
        (
            Decision((0.4, 0.5), (1.5, 0.5), (Cleaning(), Cleaning(True, 0.01, True))),
            {
                "threshold": [0.4, 0.5],
                "temperature": [1.5, 0.5],
                "cleaning": [
                    {"fill": False, "min_area": 0.0, "largest": False},
                    {"fill": True, "min_area": 0.01, "largest": True},
                ],
            },
        ),
    ],
)
def test_what_is_stored_is_read_again(decision, entries):
    assert decision.entries() == entries
    assert Decision.read(json.loads(json.dumps(entries | {"epoch": 3}))) == decision


def test_what_changes_nothing_is_none():
    assert Decision((0.5,), (1,), (Cleaning(),)) == Decision((0.5,))


def test_title():
    decision = Decision((0.4, 0.5), (1.5, 1), (Cleaning(), Cleaning(True, 0.01, True)))
    assert str(decision) == "threshold 0.4, 0.5, temperature 1.5, 1, cleaned"
    assert str(Decision(())) == ""


@given(SEEDS)
def test_temperature_divides_logits_of_each_class(seed):
    logits = np.random.default_rng(seed).normal(0, 2, (2, 5, 6)).astype(np.float32)
    found = Decision((0.5, 0.5), (0.5, 3)).calibrated(torch.from_numpy(logits).sigmoid())
    np.testing.assert_allclose(found, expit(logits / np.array([0.5, 3])[:, None, None]), atol=2e-6)
    turned = Decision((0.5, 0.5), (0.5, 3)).calibrated(torch.from_numpy(logits).sigmoid().movedim(0, 1), dim=1)
    np.testing.assert_array_equal(turned.movedim(1, 0), found)


@given(SEEDS)
def test_temperature_divides_logits_of_exclusive_classes(seed):
    logits = np.random.default_rng(seed).normal(0, 2, (7, 3)).astype(np.float32)
    found = Decision((), (2.5,)).calibrated(torch.from_numpy(logits).softmax(1), dim=1)
    np.testing.assert_allclose(found, softmax(logits / 2.5, axis=1), atol=1e-5)


@pytest.mark.parametrize("decision", [Decision((0.5,), (0.1,)), Decision((), (0.1,))])
def test_certain_probabilities_stay_numbers(decision):
    found = decision.calibrated(torch.tensor([[0.0, 1.0]]), dim=0 if decision.threshold else 1)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]), atol=1e-6, rtol=0)


def test_without_a_temperature_probabilities_are_the_same_object():
    probability = torch.rand(1, 3, 3)
    assert Decision((0.5,)).calibrated(probability) is probability


@given(SEEDS, st.floats(0.2, 5), st.floats(0.2, 5))
def test_another_temperature_decides_the_same(seed, before, after):
    generator = np.random.default_rng(seed)
    raw = torch.from_numpy(generator.random((2, 8, 9)).astype(np.float32))
    threshold = tuple(generator.uniform(0.05, 0.95, 2).tolist())
    one = Decision(threshold, (before, 1.0))
    other = one.at((after, 2.0))
    assert other.temperature == (after, 2.0)
    masks = [decision.masks(decision.calibrated(raw).numpy()) for decision in (one, other)]
    cut = expit(logit(np.array(threshold)) * [before, 1])[:, None, None]
    clear = np.abs(raw.numpy() - cut) > 1e-4  # else rounding decides
    np.testing.assert_array_equal(masks[0][clear], masks[1][clear])
    np.testing.assert_array_equal(masks[0][clear], (raw.numpy() >= cut)[clear])
    assert one.at(one.temperature).threshold == pytest.approx(threshold, rel=1e-12)
    assert one.at(()).threshold == pytest.approx(cut.ravel())


def test_another_temperature_of_exclusive_classes_decides_the_same():
    decision = Decision(()).at((3.0,))
    assert decision == Decision((), (3.0,))
    probability = torch.rand(20, 4).softmax(1)
    np.testing.assert_array_equal(
        decide(decision.calibrated(probability, 1).numpy(), ()), decide(probability.numpy(), ())
    )


def test_masks_are_compared_and_cleaned():
    probability = np.full((2, 4, 4), 0.45, np.float32)
    probability[:, 0, 0] = 0.1
    probability[:, 0, 2:] = probability[:, 1, 1] = 0.1
    masks = Decision((0.45, 0.4), (), (Cleaning(), Cleaning(fill=True))).masks(probability)
    np.testing.assert_array_equal(masks[0], probability[0] >= np.float32(0.45))
    assert masks.dtype == np.bool_ and masks[1, 1, 1] and not masks[1, 0, 0] and not masks[0, 1, 1]
