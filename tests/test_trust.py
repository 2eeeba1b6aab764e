"""Scores of explanations: curves and numbers that can be written down."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medvision.explanation.trust import STEPS, area, deletion_and_insertion, inside, likeness, randomised

SHARES = np.linspace(0, 1, STEPS + 1)


def test_curves_of_a_mean_over_pixels():
    """Every pixel counts alike, so the order does not matter; blurring changes nothing."""
    image = torch.ones(3, 20, 20)
    heat = torch.rand(20, 20, generator=torch.Generator().manual_seed(0))
    deletion, insertion = deletion_and_insertion(lambda images: images.mean((1, 2, 3)), image, heat)
    np.testing.assert_allclose(deletion, 1 - SHARES, atol=1e-6)
    np.testing.assert_allclose(insertion, np.ones(STEPS + 1), atol=1e-5)
    assert (area(deletion), area(insertion)) == (pytest.approx(0.5), pytest.approx(1))


def test_curves_of_what_hangs_on_a_quarter():
    image = torch.zeros(1, 20, 20)
    image[:, :10, :10] = 1
    right, wrong = image[0], 1 - image[0]

    def quarter(images):
        return images[:, 0, :10, :10].mean((1, 2))

    deletion, insertion = deletion_and_insertion(quarter, image, right)
    np.testing.assert_allclose(deletion, np.clip(1 - 4 * SHARES, 0, 1), atol=1e-6)
    assert insertion[0] < 0.99 and insertion[SHARES >= 0.25] == pytest.approx(1)
    reverse, later = deletion_and_insertion(quarter, image, wrong)
    np.testing.assert_allclose(reverse, np.clip(4 - 4 * SHARES, 0, 1), atol=1e-6)
    assert area(deletion) == pytest.approx(0.125) and area(reverse) == pytest.approx(0.875)
    assert area(insertion) > area(later) and later[-1] == 1


def test_flat_heat_has_no_order():
    """Else it would be scored by the order of rows."""
    curves = deletion_and_insertion(lambda images: images.mean((1, 2, 3)), torch.rand(3, 20, 20), torch.zeros(20, 20))
    assert [len(curve) for curve in curves] == [STEPS + 1] * 2 and np.isnan(curves).all()
    assert np.isnan(area(curves[0]))


def test_random_weights_are_the_same_numbers_elsewhere():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    before = copy.deepcopy(model.state_dict())
    shuffled, again, other = randomised(model), randomised(model), randomised(model, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        found = shuffled.state_dict()[name]
        assert torch.equal(found.flatten().sort().values, value.flatten().sort().values)
        assert torch.equal(found, again.state_dict()[name])
    assert not torch.equal(shuffled[0].weight, model[0].weight)
    assert not torch.equal(shuffled[0].weight, other[0].weight)


def test_likeness_and_share_inside():
    heat = torch.arange(12.0).view(3, 4)
    assert likeness(heat, heat**3) == pytest.approx(1) and likeness(heat, -heat) == pytest.approx(-1)
    assert np.isnan(likeness(heat, torch.zeros(3, 4)))
    mask = np.zeros((3, 4), bool)
    mask[2] = True
    assert inside(heat, mask) == pytest.approx((8 + 9 + 10 + 11) / 66)
    assert np.isnan(inside(torch.zeros(3, 4), mask))
