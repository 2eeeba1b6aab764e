import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medvision.errors import MedvisionError
from medvision.losses import TERMS, DeepSupervision, SegmentationLoss, bce, dice, lovasz

REFERENCE = Path(os.environ.get("MEDVISION_REFERENCE", Path(__file__).resolve().parents[2] / "shared" / "reference"))


def naive_bce(logits, target):
    p = 1 / (1 + np.exp(-logits))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()


def naive_dice(logits, target, smooth=1e-5):
    p = 1 / (1 + np.exp(-logits))
    losses = [
        1 - (2 * (p[n, k] * target[n, k]).sum() + smooth) / (p[n, k].sum() + target[n, k].sum() + smooth)
        for n, k in np.ndindex(*logits.shape[:2])
    ]
    return np.mean(losses)


def naive_lovasz(logits, target):
    """The Lovasz extension by its definition: the sorted errors, each times the growth of the Jaccard loss."""

    def jaccard_loss(truth, wrong):
        predicted = truth ^ wrong
        union = (truth | predicted).sum()
        return 1 - (truth & predicted).sum() / union if union else 0.0

    losses = []
    for n, k in np.ndindex(*logits.shape[:2]):
        truth = target[n, k].ravel() > 0
        errors = np.maximum(0, 1 - logits[n, k].ravel() * np.where(truth, 1, -1))
        wrong, before, loss = np.zeros_like(truth), 0.0, 0.0
        for i in np.argsort(-errors, kind="stable"):
            wrong[i] = True
            after = jaccard_loss(truth, wrong)
            loss, before = loss + errors[i] * (after - before), after
        losses.append(loss)
    return np.mean(losses)


NAIVE = {"bce": naive_bce, "dice": naive_dice, "lovasz": naive_lovasz}
TARGETS = {
    "random": lambda generator, shape: generator.integers(0, 2, shape),
    "rare": lambda generator, shape: generator.random(shape) < 0.05,
    "empty": lambda generator, shape: np.zeros(shape),
    "full": lambda generator, shape: np.ones(shape),
}


def sample(shape, target, seed=0):
    generator = np.random.default_rng(seed)
    return 3 * generator.standard_normal(shape), TARGETS[target](generator, shape).astype(np.float64)


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def test_every_term_has_an_oracle():
    assert NAIVE.keys() == TERMS.keys()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 5, 7), (3, 4, 6, 5)], ids=str)
@pytest.mark.parametrize("name", NAIVE)
def test_term_equals_a_naive_version(name, shape, target):
    arrays = sample(shape, target)
    assert TERMS[name](*tensors(*arrays)).item() == pytest.approx(NAIVE[name](*arrays), rel=1e-10, abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1), weights=st.tuples(*[st.floats(0.01, 10)] * 3))
def test_loss_is_the_weighted_sum_and_ignores_the_order_of_pixels(seed, weights):
    logits, target = sample((2, 2, 4, 3), "random", seed)
    terms = dict(zip(NAIVE, weights, strict=True))
    loss = SegmentationLoss(terms)
    value = loss(*tensors(logits, target)).item()
    assert value == pytest.approx(sum(w * NAIVE[n](logits, target) for n, w in terms.items()), rel=1e-4)
    flipped = loss(*tensors(logits[..., ::-1, ::-1].copy(), target[..., ::-1, ::-1].copy())).item()
    assert flipped == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAIVE)
def test_gradient_is_the_numerical_one(name, target):
    logits, truth = tensors(*sample((2, 2, 3, 4), target))
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, truth), logits.requires_grad_())


@pytest.mark.parametrize("case", ["bin96", "empty_gt", "extreme"])
@pytest.mark.parametrize(
    ("key", "terms"), [("bce_dice", {"bce": 0.5, "dice": 1}), ("lovasz_hinge_per_image", {"lovasz": 1})]
)
def test_equals_the_published_implementation(case, key, terms):
    if not (REFERENCE / "losses.npz").exists():
        pytest.skip("no reference outputs; set MEDVISION_REFERENCE to their folder")
    expected = json.loads((REFERENCE / "losses.json").read_text())[case][key]
    with np.load(REFERENCE / "losses.npz") as arrays:
        logits, target = tensors(arrays[f"{case}_logits"], arrays[f"{case}_target"], dtype=torch.float32)
    loss = SegmentationLoss(terms)(logits.requires_grad_(), target)
    loss.backward()
    assert loss.item() == pytest.approx(expected["value"], rel=1e-5)
    assert logits.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-3)


def gradient_on_empty_target(term):
    logits = torch.full((1, 1, 64, 64), -6.0)
    logits[..., 20:30, 20:30] = 2  # false positives
    loss = term(logits.requires_grad_(), torch.zeros_like(logits))
    loss.backward()
    return loss.item(), logits.grad[..., 20:30, 20:30].sum().item()


def test_bce_and_lovasz_see_false_positives_on_an_empty_target():
    value, gradient = gradient_on_empty_target(bce)
    assert gradient == pytest.approx(100 / 64**2 / (1 + np.exp(-2)), rel=1e-4)
    value, gradient = gradient_on_empty_target(lovasz)
    assert value == pytest.approx(3)  # the largest margin error: 1 + 2
    assert gradient == pytest.approx(1)


def test_dice_hardly_sees_false_positives_on_an_empty_target():
    value, gradient = gradient_on_empty_target(dice)
    assert value == pytest.approx(1, abs=1e-6)
    assert 0 <= gradient < 1e-6


@pytest.mark.parametrize("name", NAIVE)
def test_confident_and_right_costs_nothing_and_wrong_costs_more(name):
    target = torch.tensor(sample((2, 1, 8, 8), "random")[1])
    right, unsure, wrong = (TERMS[name](scale * (2 * target - 1), target).item() for scale in (50, 0, -50))
    assert right == pytest.approx(0, abs=1e-9)
    assert right < unsure < wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAIVE)
def test_half_precision_logits_give_a_finite_float32_loss(name, dtype):
    logits = torch.linspace(-60000, 60000, 2 * 256 * 256).view(2, 1, 256, 256).to(dtype).requires_grad_()
    loss = SegmentationLoss({name: 1})(logits, (torch.arange(256) % 3 == 0).expand(2, 1, 256, 256))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and loss > 0
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"bce": 1, "focal": 1}, r"\['focal'\].*\['bce', 'dice', 'lovasz'\]"),
        ({"bce": 1, "dice": -0.5}, "'dice': -0.5.*0 or more"),
        ({"bce": 0, "dice": 0}, "one of them above 0"),
        ({}, "one of them above 0"),
    ],
)
def test_wrong_terms_are_refused(terms, message):
    with pytest.raises(MedvisionError, match=message):
        SegmentationLoss(terms)


def test_weight_0_leaves_a_term_out():
    logits, target = tensors(*sample((2, 1, 4, 4), "random"))
    loss = SegmentationLoss({"bce": 2, "dice": 0, "lovasz": 0})
    assert list(loss.terms) == ["bce"]
    assert loss(logits, target).item() == pytest.approx(2 * bce(logits, target).item(), rel=1e-6)


class Mean(nn.Module):
    def forward(self, logits, target):
        return (logits - target).mean()


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, (1 + 2 + 6) / 3), ([1, 0.5, 0.25], 1 + 1 + 1.5), ([0, 0, 1], 6)]
)
def test_deep_supervision_weighs_the_outputs_the_main_one_first(weights, expected):
    outputs = [torch.full((1, 1, 2, 2), value) for value in (1.0, 2.0, 6.0)]
    supervised = DeepSupervision(Mean(), weights)
    assert supervised(outputs, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(expected)
    assert supervised(tuple(outputs), torch.zeros(1, 1, 2, 2)).item() == pytest.approx(expected)


@pytest.mark.parametrize("weights", [None, [0.7, 0.3]])
def test_deep_supervision_of_one_tensor_is_the_plain_loss(weights):
    logits, target = tensors(*sample((2, 2, 4, 4), "random"))
    loss = SegmentationLoss({"bce": 0.5, "dice": 1})
    assert DeepSupervision(loss, weights)(logits, target).item() == loss(logits, target).item()


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5, 0.25]])
def test_deep_supervision_refuses_a_wrong_number_of_weights(weights):
    outputs = [torch.zeros(1, 1, 2, 2)] * 2
    with pytest.raises(MedvisionError, match=f"supervision_weights has {len(weights)} numbers, the model 2 outputs"):
        DeepSupervision(Mean(), weights)(outputs, outputs[0])


def test_deep_supervision_trains_every_output():
    outputs = [torch.zeros(1, 1, 4, 4, requires_grad=True) for _ in range(3)]
    DeepSupervision(SegmentationLoss({"bce": 1}), [1, 0.5, 0.25])(outputs, torch.ones(1, 1, 4, 4)).backward()
    assert [o.grad.sum().item() for o in outputs] == pytest.approx([-0.5, -0.25, -0.125])
