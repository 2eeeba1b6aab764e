import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from medvision import cli
from medvision.build import build
from medvision.errors import MedvisionError
from medvision.losses import (
    OPTIONS,
    TERMS,
    CrossEntropy,
    DeepSupervision,
    SegmentationLoss,
    focal,
    focal_tversky,
    structure,
    tversky,
)

CONF = Path(__file__).resolve().parents[1] / "conf" / "loss"
REFERENCE = Path(os.environ.get("MEDVISION_REFERENCE", Path(__file__).resolve().parents[2] / "shared" / "reference"))
OVERLAP = ["dice", "jaccard", "tversky", "focal_tversky"]  # one minus an overlap: 0 to 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def each_plane(loss):
    """A formula for one image and class, for all: (N, K)."""

    def losses(logits, target, **options):
        planes = [loss(logits[i], target[i], **options) for i in np.ndindex(*logits.shape[:2])]
        return np.reshape(planes, logits.shape[:2])

    return losses


@each_plane
def naive_bce(logits, target, positive=1.0):
    p = sigmoid(logits)
    return -(positive * target * np.log(p) + (1 - target) * np.log(1 - p)).mean()


@each_plane
def naive_dice(logits, target, smooth=1e-5):
    p = sigmoid(logits)
    return 1 - (2 * (p * target).sum() + smooth) / (p.sum() + target.sum() + smooth) if target.any() else p.mean()


@each_plane
def naive_jaccard(logits, target, smooth=1e-5):
    p = sigmoid(logits)
    both = (p * target).sum()
    return 1 - (both + smooth) / (p.sum() + target.sum() - both + smooth) if target.any() else p.mean()


@each_plane
def naive_tversky(logits, target, alpha=0.3, beta=0.7, smooth=1e-5):
    p = sigmoid(logits)
    if not target.any():
        return p.mean()
    hit, extra, missed = p[target == 1].sum(), p[target == 0].sum(), (1 - p)[target == 1].sum()
    return 1 - (hit + smooth) / (hit + alpha * extra + beta * missed + smooth)


def naive_focal_tversky(logits, target, gamma=0.75, **options):
    return naive_tversky(logits, target, **options) ** gamma


@each_plane
def naive_focal(logits, target, gamma=2.0, alpha=0.25, positive=1.0):
    p = sigmoid(logits)
    right = np.where(target == 1, p, 1 - p)
    share = 1 if alpha is None else np.where(target == 1, alpha, 1 - alpha)
    return (share * np.where(target == 1, positive, 1) * (1 - right) ** gamma * -np.log(right)).mean()


@each_plane
def naive_structure(logits, target, window=31, boundary=5.0, positive=1.0):
    p, reach = sigmoid(logits), window // 2
    padded = np.pad(target, reach)
    weight = np.ones_like(target)
    for i in np.ndindex(*target.shape):
        around = padded[i[0] : i[0] + window, i[1] : i[1] + window].sum() / window**2
        weight[i] += boundary * abs(around - target[i])
    entropy = -(positive * target * np.log(p) + (1 - target) * np.log(1 - p))
    entropy = np.average(entropy, weights=weight)
    both, either = (weight * p * target).sum(), (weight * (p + target - p * target)).sum()
    return entropy + (1 - (both + 1) / (either + 1) if target.any() else p.mean())


@each_plane
def naive_lovasz(logits, target):
    """The Lovasz extension by its definition: the sorted errors, each times the growth of the Jaccard loss."""

    def jaccard_loss(truth, wrong):
        predicted = truth ^ wrong
        union = (truth | predicted).sum()
        return 1 - (truth & predicted).sum() / union if union else 0.0

    truth = target.ravel() > 0
    errors = np.maximum(0, 1 - logits.ravel() * np.where(truth, 1, -1))
    wrong, before, loss = np.zeros_like(truth), 0.0, 0.0
    for i in np.argsort(-errors, kind="stable"):
        wrong[i] = True
        after = jaccard_loss(truth, wrong)
        loss, before = loss + errors[i] * (after - before), after
    return loss


NAIVE = {
    "bce": naive_bce,
    "dice": naive_dice,
    "jaccard": naive_jaccard,
    "lovasz": naive_lovasz,
    "focal": naive_focal,
    "tversky": naive_tversky,
    "focal_tversky": naive_focal_tversky,
    "structure": naive_structure,
}
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
    assert TERMS[name](*tensors(*arrays)).numpy() == pytest.approx(NAIVE[name](*arrays), rel=1e-9, abs=1e-10)


VARIED = [
    ("focal", {"gamma": 0, "alpha": None}),
    ("focal", {"gamma": 0.5, "alpha": 0.9}),
    ("focal", {"gamma": 3, "alpha": None}),
    ("tversky", {"alpha": 0.9, "beta": 0.2}),
    ("tversky", {"alpha": 2, "beta": 1}),
    ("focal_tversky", {"gamma": 2}),
    ("focal_tversky", {"alpha": 0.6, "beta": 0.4, "gamma": 0.5}),
    ("structure", {"window": 3}),
    ("structure", {"window": 1, "boundary": 2}),
    ("structure", {"window": 5, "boundary": 0}),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "options"), VARIED)
def test_options_reach_the_formula(name, options, target):
    arrays = sample((3, 2, 6, 7), target)
    expected = NAIVE[name](*arrays, **options)
    assert TERMS[name](*tensors(*arrays), **options).numpy() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    loss = SegmentationLoss({name: 2}, options={name: options})
    assert loss(*tensors(*arrays)).item() == pytest.approx(2 * expected.mean(), rel=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["bce", "focal", "structure"])
def test_positive_weights_count_the_positives_of_each_class(name, target):
    logits, truth = sample((3, 2, 6, 7), target)
    weights = (4.0, 0.5)
    expected = np.mean([NAIVE[name](logits[:, [k]], truth[:, [k]], positive=w) for k, w in enumerate(weights)])
    assert SegmentationLoss({name: 1}, weights)(*tensors(logits, truth)).item() == pytest.approx(expected, rel=1e-5)
    none = SegmentationLoss({name: 1}, (1, 1))(*tensors(logits, truth)).item()
    assert none == pytest.approx(NAIVE[name](logits, truth).mean(), rel=1e-5)


@pytest.mark.parametrize("terms", [{name: 1} for name in NAIVE] + [{"bce": 0.5, "dice": 1}], ids=str)
def test_class_weights_are_those_of_a_mean_over_classes(terms):
    logits, truth = sample((3, 3, 6, 7), "random")
    weights = (1, 0, 3)
    expected = sum(w * np.average(NAIVE[name](logits, truth).mean(0), weights=weights) for name, w in terms.items())
    for scale in (1, 10):
        loss = SegmentationLoss(terms, class_weights=[scale * w for w in weights])
        assert loss(*tensors(logits, truth)).item() == pytest.approx(expected, rel=1e-5)


def monai(name):
    losses = pytest.importorskip("monai.losses")
    plain = {"sigmoid": True, "smooth_nr": 1e-5, "smooth_dr": 1e-5}
    twice = {"sigmoid": True, "smooth_nr": 2e-5, "smooth_dr": 2e-5}  # its union is counted double
    return {
        "dice": lambda: losses.DiceLoss(**plain),
        "jaccard": lambda: losses.DiceLoss(jaccard=True, **twice),
        "tversky": lambda: losses.TverskyLoss(alpha=0.3, beta=0.7, **plain),
        "focal": lambda: losses.FocalLoss(gamma=2.0, alpha=0.25),
    }[name]()


@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky", "focal"])
def test_equals_monai(name):
    logits, target = tensors(*sample((3, 2, 16, 12), "random"), dtype=torch.float32)
    assert SegmentationLoss({name: 1})(logits, target).item() == pytest.approx(monai(name)(logits, target).item())


def test_focal_tversky_equals_segmentation_models_pytorch():
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    logits, target = tensors(*sample((1, 1, 16, 12), "random"), dtype=torch.float32)
    expected = losses.TverskyLoss("binary", alpha=0.3, beta=0.7, gamma=0.75)(logits, target).item()
    assert SegmentationLoss({"focal_tversky": 1})(logits, target).item() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), target=st.sampled_from(sorted(TARGETS)), scale=st.floats(0, 100))
def test_every_loss_is_a_number_from_0_up_and_overlaps_end_at_1(seed, target, scale):
    logits, truth = tensors(*sample((2, 2, 4, 3), target, seed), dtype=torch.float32)
    for name, term in TERMS.items():
        losses = term(scale * logits, truth)
        assert losses.shape == (2, 2) and losses.isfinite().all() and losses.min() >= 0
        assert name not in OVERLAP or losses.max() <= 1 + 1e-6


@given(seed=st.integers(0, 2**32 - 1), target=st.sampled_from(sorted(TARGETS)), order=st.permutations(range(4)))
def test_images_and_classes_are_independent(seed, target, order):
    logits, truth = tensors(*sample((4, 4, 3, 5), target, seed))
    for term in TERMS.values():
        losses = term(logits, truth)
        torch.testing.assert_close(term(logits[order], truth[order]), losses[order])
        torch.testing.assert_close(term(logits[:, order], truth[:, order]), losses[:, order])


def test_terms_are_special_cases_of_each_other():
    logits, target = tensors(*sample((3, 2, 8, 8), "random"))
    torch.testing.assert_close(tversky(logits, target, 0.5, 0.5, smooth=5e-6), TERMS["dice"](logits, target))
    torch.testing.assert_close(tversky(logits, target, 1, 1), TERMS["jaccard"](logits, target))
    torch.testing.assert_close(focal_tversky(logits, target, gamma=1), tversky(logits, target))
    torch.testing.assert_close(focal(logits, target, gamma=0, alpha=None), TERMS["bce"](logits, target))
    torch.testing.assert_close(2 * focal(logits, target, gamma=0, alpha=0.5), TERMS["bce"](logits, target))


def test_structure_weighs_the_pixels_at_an_edge_most():
    target = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    target[..., :32] = 1

    def cost(column):
        logits = 10 * (2 * target - 1)
        logits[..., 32, column] *= -1  # one wrong pixel
        return structure(logits, target, window=15).item()

    assert cost(32) > cost(35) > cost(39) == pytest.approx(cost(50))
    assert cost(31) > cost(28) > cost(24)


@given(seed=st.integers(0, 2**32 - 1), weights=st.tuples(*[st.floats(0.01, 10)] * len(NAIVE)))
def test_loss_is_the_weighted_sum_and_ignores_the_order_of_pixels(seed, weights):
    logits, target = sample((2, 2, 4, 3), "random", seed)
    terms = dict(zip(NAIVE, weights, strict=True))
    loss = SegmentationLoss(terms)
    value = loss(*tensors(logits, target)).item()
    assert value == pytest.approx(sum(w * NAIVE[n](logits, target).mean() for n, w in terms.items()), rel=1e-4)
    flipped = loss(*tensors(logits[..., ::-1, ::-1].copy(), target[..., ::-1, ::-1].copy())).item()
    assert flipped == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAIVE)
def test_gradient_is_the_numerical_one(name, target):
    logits, truth = tensors(*sample((2, 2, 3, 4), target))
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, truth), logits.requires_grad_())


@pytest.mark.parametrize(("name", "options"), VARIED)
def test_gradient_is_the_numerical_one_with_options(name, options):
    logits, truth = tensors(*sample((2, 2, 3, 4), "random"))
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, truth, **options), logits.requires_grad_())


def published(case, key):
    if not (REFERENCE / "losses.npz").exists():
        pytest.skip("no reference outputs; set MEDVISION_REFERENCE to their folder")
    expected = json.loads((REFERENCE / "losses.json").read_text())[case][key]
    with np.load(REFERENCE / "losses.npz") as arrays:
        return expected, *tensors(arrays[f"{case}_logits"], arrays[f"{case}_target"], dtype=torch.float32)


@pytest.mark.parametrize(
    ("case", "key", "terms"),
    [
        ("bin96", "bce_dice", {"bce": 0.5, "dice": 1}),
        ("extreme", "bce_dice", {"bce": 0.5, "dice": 1}),
        ("bin96", "lovasz_hinge_per_image", {"lovasz": 1}),
        ("empty_gt", "lovasz_hinge_per_image", {"lovasz": 1}),
        ("extreme", "lovasz_hinge_per_image", {"lovasz": 1}),
        ("bin96", "structure_loss_reduction_none", {"structure": 1}),
        ("extreme", "structure_loss_reduction_none", {"structure": 1}),
    ],
)
def test_equals_the_published_implementation(case, key, terms):
    expected, logits, target = published(case, key)
    loss = SegmentationLoss(terms)(logits.requires_grad_(), target)
    loss.backward()
    assert loss.item() == pytest.approx(expected["value"], rel=1e-5)
    assert logits.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_published_dice_is_1_without_a_gradient_on_an_empty_target_and_this_one_is_not():
    expected, logits, target = published("empty_gt", "bce_dice")
    bce = SegmentationLoss({"bce": 0.5})(logits.requires_grad_(), target)
    bce.backward()
    assert 1 + bce.item() == pytest.approx(expected["value"], rel=1e-5)
    assert logits.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-3)
    loss = SegmentationLoss({"bce": 0.5, "dice": 1})(logits, target)
    assert loss.item() == pytest.approx(bce.item() + logits.sigmoid().mean().item(), rel=1e-5)


def false_positives(name, logit=2.0, height=10):
    """Loss and gradient (64, 64) where nothing is true and some rows of a square are predicted."""
    logits = torch.full((1, 1, 64, 64), -6.0)
    logits[..., 20 : 20 + height, 20:30] = logit
    loss = SegmentationLoss({name: 1})(logits.requires_grad_(), torch.zeros_like(logits))
    loss.backward()
    return loss.item(), logits.grad[0, 0]


def test_what_each_term_is_on_an_empty_target():
    p, size = sigmoid(2), 64**2
    mean = (100 * p + (size - 100) * sigmoid(-6)) / size
    bce = (-100 * np.log(1 - p) - (size - 100) * np.log(1 - sigmoid(-6))) / size
    soft = 0.75 * (-100 * p**2 * np.log(1 - p) - (size - 100) * sigmoid(-6) ** 2 * np.log(1 - sigmoid(-6))) / size
    expected = dict.fromkeys(OVERLAP, mean) | {
        "bce": bce,
        "lovasz": 3,  # the largest margin error: 1 + 2
        "focal": soft,
        "focal_tversky": mean**0.75,
        "structure": bce + mean,
    }
    assert {name: false_positives(name)[0] for name in TERMS} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_no_term_is_blind_to_false_positives_on_an_empty_target(name):
    loss, gradient = false_positives(name)
    assert loss > false_positives(name, logit=1.5)[0] > false_positives(name, logit=-6)[0]
    square = gradient[20:30, 20:30]
    if name == "lovasz":  # the worst pixel takes all of it
        assert square.sum() == square.max() == 1
    else:
        assert loss > false_positives(name, height=5)[0]
        assert gradient.min() > 0
        # a tenth of what cross-entropy has, or more; what Dice as published has is below 1e-6 of it
        assert square.min() > 0.1 * false_positives("bce")[1][20:30, 20:30].max()


@given(seed=st.integers(0, 2**32 - 1), step=st.floats(0.5, 5))
def test_one_pixel_raised_on_an_empty_target_raises_every_loss(seed, step):
    logits, target = tensors(*sample((1, 1, 6, 5), "empty", seed))
    raised = logits.clone()
    worst = np.unravel_index(logits.argmax(), logits.shape)
    raised[worst] = raised[worst].clamp(min=0) + step
    for term in TERMS.values():
        assert term(raised, target) > term(logits, target)
    pixel = (0, 0, *np.random.default_rng(seed).integers(0, 5, 2))
    raised = logits.clone()
    raised[pixel] += step
    for name, term in TERMS.items():
        assert name == "lovasz" or term(raised, target) > term(logits, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-30, -200, -60000])
@pytest.mark.parametrize("name", TERMS)
def test_nothing_predicted_on_an_empty_target_costs_nothing(name, logit, dtype):
    logits = torch.full((2, 1, 8, 8), float(logit), dtype=dtype, requires_grad=True)
    loss = TERMS[name](logits, torch.zeros_like(logits)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-8)
    assert logits.grad.isfinite().all() and logits.grad.abs().max() < 1e-8


def test_an_empty_image_leaves_the_others_as_they_are():
    logits, target = tensors(*sample((3, 2, 5, 7), "random"))
    for term in TERMS.values():
        before = term(logits, target)
        emptied = target.clone()
        emptied[1, 0] = 0
        changed = term(logits, emptied) != before
        assert changed.nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize("name", NAIVE)
def test_confident_and_right_costs_nothing_and_wrong_costs_more(name):
    target = torch.tensor(sample((2, 1, 8, 8), "random")[1])
    right, unsure, wrong = (TERMS[name](scale * (2 * target - 1), target).mean().item() for scale in (50, 0, -50))
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
        ({"bce": 1, "focus": 1}, r"\['focus'\].*\['bce', 'dice', 'focal', .*'tversky'\]"),
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
    assert loss(logits, target).item() == pytest.approx(2 * TERMS["bce"](logits, target).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("terms", "arguments", "message"),
    [
        ("dice", {"positive_weights": [2]}, r"positive_weights is \[2\].*bce, focal or structure in it.*\['dice'\]"),
        ("bce", {"positive_weights": [0]}, "positive_weights is .*above 0"),
        ("bce", {"positive_weights": []}, "positive_weights is .*above 0"),
        ("bce", {"class_weights": [2]}, "class_weights is .*two or more classes"),
        ("bce", {"class_weights": [2, -1]}, "class_weights is .*0 or more"),
        ("bce", {"class_weights": [0, 0]}, "class_weights is .*one of them above 0"),
        ("bce", {"options": {"bce": {"gamma": 1}}}, r"options names bce.gamma.*'focal.gamma'"),
        ("focal", {"options": {"focal": {"gama": 1}}}, r"options names focal.gama.*'focal.gamma'"),
        ("focal", {"options": {"focal": {"gamma": -1}}}, "focal.gamma is -1; expected a number of 0 or more"),
        ("focal", {"options": {"focal": {"alpha": 1}}}, "focal.alpha is 1; expected None or a number between 0 and 1"),
        ("tversky", {"options": {"tversky": {"alpha": 0}}}, "tversky.alpha is 0; expected a number above 0"),
        ("focal_tversky", {"options": {"focal_tversky": {"gamma": 0}}}, "focal_tversky.gamma is 0; expected .*above 0"),
        (
            "structure",
            {"options": {"structure": {"window": 30}}},
            "structure.window is 30; expected an odd int above 0",
        ),
        (
            "structure",
            {"options": {"structure": {"window": -1}}},
            "structure.window is -1; expected an odd int above 0",
        ),
        ("structure", {"options": {"structure": {"boundary": -1}}}, "structure.boundary is -1; .* 0 or more"),
    ],
)
def test_wrong_weights_and_options_are_refused(terms, arguments, message):
    with pytest.raises(MedvisionError, match=f"loss.*{message}"):
        SegmentationLoss({terms: 1}, **arguments)


@pytest.mark.parametrize("name", ["positive_weights", "class_weights"])
def test_weights_for_another_number_of_classes_are_refused(name):
    loss = SegmentationLoss({"bce": 1}, **{name: [1, 2]})
    with pytest.raises(MedvisionError, match=f"loss.{name} has 2 numbers, the model 3 classes"):
        loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_weights_are_no_part_of_a_checkpoint():
    assert not SegmentationLoss({"bce": 1}, [1, 2], [1, 2]).state_dict()


def test_the_config_names_every_term_and_option_with_its_default():
    base = OmegaConf.load(CONF / "_terms.yaml")
    assert base.terms == dict.fromkeys(TERMS, 0)
    assert {name: set(values) for name, values in base.options.items()} == {n: set(r) for n, r in OPTIONS.items()}
    for name, values in base.options.items():
        parameters = inspect.signature(TERMS[name]).parameters
        assert values == {option: parameters[option].default for option in values}


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_a_loss_by_its_name(name):
    assert cli.compose("train", [f"loss={name}"]).loss.terms == dict.fromkeys(TERMS, 0) | {name: 1}


def test_a_sum_of_terms_with_options_by_overrides():
    overrides = ["loss=dice", "loss.terms.bce=0.5", "loss.terms.focal=2", "loss.options.focal.gamma=3"]
    loss = build(cli.compose("train", [*overrides, "loss.positive_weights=[4]"])).task.loss.loss
    logits, target = sample((2, 1, 4, 4), "random")
    expected = (
        naive_dice(logits, target)
        + 0.5 * naive_bce(logits, target, positive=4)
        + 2 * naive_focal(logits, target, gamma=3, positive=4)
    )
    assert loss(*tensors(logits, target)).item() == pytest.approx(expected.mean(), rel=1e-5)


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


def naive_cross_entropy(logits, target, smoothing, classes):
    """Mean over the images of minus the smoothed truth times the logarithm of the softmax, weighed."""
    total = weights = 0.0
    for row, label in zip(logits, target, strict=True):
        logarithm = row - np.log(np.exp(row).sum())
        truth = (1 - smoothing) * np.eye(len(row))[label] + smoothing / len(row)
        total -= (classes * truth * logarithm).sum()
        weights += classes[label]
    return total / weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_cross_entropy_of_class_numbers(smoothing, weights):
    generator = np.random.default_rng(0)
    logits, target = generator.normal(size=(7, 3)), generator.integers(0, 3, 7)
    found = CrossEntropy(smoothing, class_weights=weights)(torch.tensor(logits), torch.tensor(target))
    classes = np.ones(3) if weights is None else np.array(weights) / np.mean(weights)
    assert float(found) == pytest.approx(naive_cross_entropy(logits, target, smoothing, classes), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("positive", [None, [3.0, 0.5]])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_cross_entropy_of_labels_that_may_be_many_or_none(smoothing, positive, weights):
    generator = np.random.default_rng(1)
    logits, target = generator.normal(size=(6, 2)), (generator.random((6, 2)) < 0.5).astype(float)
    loss = CrossEntropy(smoothing, positive, weights)(torch.tensor(logits), torch.tensor(target))
    smooth = target * (1 - smoothing) + smoothing / 2
    p, w = sigmoid(logits), np.ones(2) if positive is None else np.array(positive)
    losses = -(w * smooth * np.log(p) + (1 - smooth) * np.log(1 - p))
    losses *= 1 if weights is None else np.array(weights) / np.mean(weights)
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 4.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_of_exclusive_classes(gamma, weights, smoothing):
    generator = np.random.default_rng(2)
    logits, target = generator.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classes = np.ones(3) if weights is None else np.array(weights) / np.mean(weights)
    losses = [
        (1 - row[t]) ** gamma
        * ((1 - smoothing) * classes[t] * -np.log(row[t]) + smoothing / 3 * (classes * -np.log(row)).sum())
        for row, t in zip(p, target, strict=True)
    ]
    found = CrossEntropy(smoothing, class_weights=weights, gamma=gamma)(torch.tensor(logits), torch.tensor(target))
    assert float(found) == pytest.approx(sum(losses) / classes[target].sum(), rel=1e-5)


@pytest.mark.parametrize("gamma", [0, 2])
def test_a_batch_of_classes_that_do_not_count_costs_nothing(gamma):
    logits = torch.randn(3, 2, requires_grad=True)
    loss = CrossEntropy(class_weights=[0, 1], gamma=gamma)(logits, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("positive", [None, [3.0, 0.5]])
def test_focal_loss_of_labels_that_may_be_many_or_none(positive):
    generator = np.random.default_rng(3)
    logits, target = generator.normal(size=(6, 2)), (generator.random((6, 2)) < 0.5).astype(float)
    p, w = sigmoid(logits), np.ones(2) if positive is None else np.array(positive)
    losses = np.where(target == 1, -w * (1 - p) ** 2 * np.log(p), -(p**2) * np.log(1 - p))
    found = CrossEntropy(positive_weights=positive, gamma=2)(torch.tensor(logits), torch.tensor(target))
    assert float(found) == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("target", [torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
def test_focal_loss_of_labels_has_finite_gradients_at_any_logit(target):
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0]], requires_grad=True)  # surely right, surely wrong
    loss = CrossEntropy(gamma=0.5)(logits, target)
    loss.backward()
    assert torch.isfinite(logits.grad).all() and float(logits.grad[0].abs().max()) < 1e-6 < float(loss)


def test_cross_entropy_on_images_without_a_class_sees_each_false_positive():
    logits = torch.tensor([[-8.0, 5.0]], requires_grad=True)
    CrossEntropy()(logits, torch.zeros(1, 2)).backward()
    assert logits.grad[0, 1] > 0.4 > 0.01 > logits.grad[0, 0] > 0


@pytest.mark.parametrize("target", [torch.tensor([0, 2]), torch.tensor([[0.0, 1, 1], [0, 0, 0]]).double()])
@pytest.mark.parametrize("gamma", [0, 1.5])
def test_gradients_of_cross_entropy(target, gamma):
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = CrossEntropy(0.1, gamma=gamma)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # gradcheck needs float64
        assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing": 1}, "loss.label_smoothing is 1; expected a share from 0 to below 1"),
        ({"positive_weights": [1, 0]}, r"loss.positive_weights is \[1, 0\]; expected numbers above 0"),
        ({"gamma": -1}, "loss.gamma is -1; expected a number of 0 or more"),
        ({"class_weights": [1]}, r"loss.class_weights is \[1\]; expected a number of 0 or more for each of two"),
    ],
)
def test_cross_entropy_refuses(options, said):
    with pytest.raises(MedvisionError, match=said):
        CrossEntropy(**options)


def test_cross_entropy_names_weights_that_do_not_fit():
    with pytest.raises(MedvisionError, match=r"loss.class_weights has 2 numbers, the model 3 classes"):
        CrossEntropy(class_weights=[1, 2])(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(MedvisionError, match=r"exactly one class; give loss.class_weights, or data.balanced=true"):
        CrossEntropy(positive_weights=[1, 2])(torch.zeros(1, 2), torch.tensor([0]))
