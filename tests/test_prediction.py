from functools import partial

import cv2
import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.precision import HalfPrecision, MixedPrecision
from scipy.special import expit, logit
from torch import nn

from medvision.data.images import read_image
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.explanation import Choice, Target, explain
from medvision.losses import CrossEntropy, SegmentationLoss
from medvision.models import UNetFamily
from medvision.prediction import Explainer, Heat, Predictor, Trained
from medvision.tasks import ClassificationTask, SegmentationTask, resize_probability
from medvision.windows import SlidingWindow

OPTIMIZER = partial(torch.optim.SGD, lr=0.1)
MEAN, STD = np.array([0.7, 0.6, 0.5]), np.array([0.15, 0.2, 0.25])


class Pool(nn.Module):
    """Logits of labels."""

    def __init__(self, channels, classes):
        super().__init__()
        self.layer = nn.Conv2d(channels, classes, 3)

    def forward(self, image):
        return self.layer(image).mean((-2, -1))


def trained(spec, name="first", seed=0, model=None, **options):
    """A task with random weights, as plain objects alone."""
    torch.manual_seed(seed)
    mask, classes = spec.target == "mask", len(spec.classes)
    if model is None:
        model = nn.Conv2d(spec.in_channels, classes, 3, padding=1) if mask else Pool(spec.in_channels, classes)
    task = (SegmentationTask if mask else ClassificationTask)(
        model, SegmentationLoss({"bce": 1}) if mask else CrossEntropy(), OPTIMIZER, None, spec
    )
    return Trained(name, task, MEAN[: spec.in_channels], STD[: spec.in_channels], **options)


def photo(height=21, width=34, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def test_each_model_answers_at_its_temperature(spec):
    decision = Decision((0.5, 0.5), (0.5, 3.0))
    facts = spec("multilabel", classes=["a", "b"])
    plain, warm = (trained(facts, **options) for options in ({}, {"decision": decision}))
    raw, found = (Predictor([model])(photo()) for model in (plain, warm))
    np.testing.assert_allclose(found, expit(logit(raw) / np.array([0.5, 3])[:, None, None]), atol=1e-5)
    np.testing.assert_allclose(Predictor([plain, warm])(photo()), (raw + found) / 2, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 1])
def test_masks_are_bit_for_bit_those_of_evaluation(channels, dataset, fake_isic2017, tmp_path):
    facts = {"in_channels": channels}
    data = dataset("isic2017", fake_isic2017(tmp_path / "isic2017"), facts, image_size=(12, 20), batch_size=1)
    model = trained(data.spec)
    mean, std = data.normalisation
    predictor = Predictor([Trained("run", model.task, mean, std)])
    samples = {sample.id: sample for samples in data.splits.values() for sample in samples}
    for batch in data.evaluation_dataloader("val"):
        image = read_image(samples[batch["id"][0]].image, predictor.channels)
        assert image.shape[:2] != (12, 20)
        with torch.inference_mode():
            expected = resize_probability(model.task.probability(batch["image"])[0], batch["mask"][0].shape[-2:])
        found = predictor(image)
        assert found.dtype == np.float32 and found.shape == (1, *image.shape[:2])
        np.testing.assert_array_equal(found, expected)


def test_labels_are_bit_for_bit_those_of_evaluation(dataset, fake_hymenoptera, tmp_path):
    data = dataset("hymenoptera", fake_hymenoptera(tmp_path / "hymenoptera"), batch_size=1)
    model = trained(data.spec)
    predictor = Predictor([Trained("run", model.task, *data.normalisation)])
    assert predictor.exclusive and predictor.classes == ("ants", "bees")
    samples = {sample.id: sample for sample in data.splits["val"]}
    for batch in data.evaluation_dataloader("val"):
        with torch.inference_mode():
            expected = model.task.probability(batch["image"])[0]
        found = predictor(read_image(samples[batch["id"][0]].image, 3))
        np.testing.assert_array_equal(found, expected)
        assert found.sum() == pytest.approx(1)


def test_the_mean_of_several_models_of_several_sizes(spec):
    models = [trained(spec(image_size=size), f"run{size}", size) for size in (8, 16, 24)]
    image = photo()
    single = [Predictor([model])(image) for model in models]
    assert np.abs(single[0] - single[1]).max() > 0.01
    np.testing.assert_allclose(Predictor(models)(image), np.mean(single, 0, np.float64), atol=1e-6)
    np.testing.assert_array_equal(Predictor(models[:1])(image), single[0])


def test_a_model_of_grey_images_beside_one_of_colours(spec):
    grey, colours = trained(spec(in_channels=1)), trained(spec())
    both = Predictor([grey, colours])
    assert both.channels == 3 and Predictor([grey]).channels == 1
    image = photo()
    luma = np.round(image @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None]
    expected = (Predictor([grey])(luma) + Predictor([colours])(image)) / 2
    np.testing.assert_allclose(both(image), expected, atol=0.01)  # Pillow's weights are fractions of 65536
    single = Predictor([colours])(luma)
    np.testing.assert_array_equal(single, Predictor([colours])(luma.repeat(3, 2)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["polyp"]}, r"differ in classes has no sense: first has \('lesion',\), other has \('polyp',\)"),
        ({"target": "label"}, "differ in target has no sense: first has mask, other has label"),
        ({"kind": "multilabel"}, "differ in kind has no sense: first has binary, other has multilabel"),
    ],
)
def test_models_that_do_not_agree_are_refused(spec, changes, words):
    with pytest.raises(MedvisionError, match=words):
        Predictor(
            [trained(spec()), trained(spec(**changes | {"classes": changes.get("classes", ["lesion"])}), "other")]
        )


def test_views_are_averaged(spec):
    model, image = trained(spec(image_size=(21, 34))), photo()
    plain = Predictor([model])
    views = [plain(np.ascontiguousarray(image[::a, ::b]))[:, ::a, ::b] for a in (1, -1) for b in (1, -1)]
    np.testing.assert_allclose(Predictor([model], tta="flips")(image), np.mean(views, 0), atol=1e-6)
    with pytest.raises(MedvisionError, match=r"tta=mirror: expected one of none, flips"):
        Predictor([model], tta="mirror")


def test_windows_see_the_image_at_its_own_resolution(spec):
    pointwise = nn.Conv2d(3, 1, 1)
    image = photo(40, 50)
    for size in ((16, 16), (64, 20)):
        found = Predictor([trained(spec(), model=pointwise)], window=SlidingWindow(size))(image)
        whole = Predictor([trained(spec(image_size=(40, 50)), model=pointwise)])(image)
        np.testing.assert_allclose(found, whole, atol=1e-6)
    resized = Predictor([trained(spec(), model=pointwise)])(image)
    assert resized.shape == (1, 40, 50) and np.abs(resized - whole).max() > 0.01


def test_windows_that_a_model_cannot_answer_are_refused(spec):
    with pytest.raises(MedvisionError, match=r"window=\[8,9\] is for masks.* first answers labels"):
        Predictor([trained(spec(target="label"))], window=SlidingWindow((8, 9)))
    network = UNetFamily(in_channels=3, num_outputs=1, depth=4, width=4)
    with pytest.raises(MedvisionError, match=r"window=\[8,64\] does not fit first.*8x64 pixels, less than one"):
        Predictor([trained(spec(image_size=64), model=network)], window=SlidingWindow((8, 64)))


def test_the_precision_is_that_of_the_model(spec):
    plain = trained(spec())
    mixed = trained(spec(), precision=MixedPrecision("bf16-mixed", "cpu"))
    image = photo(16, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        batch = (torch.from_numpy(image / 255 - MEAN) / torch.from_numpy(STD)).float().permute(2, 0, 1)[None]
        expected = mixed.task.probability(batch)[0]
    found = Predictor([mixed])(image)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - Predictor([plain])(image)).max() > 1e-4


def test_weights_that_answer_nan_are_refused(spec):
    model = trained(spec())
    nn.init.constant_(model.task.model.bias, float("nan"))
    with pytest.raises(MedvisionError, match=r"answers NaN for 1\.png.*weights are broken"):
        Predictor([model])(photo(), "1.png")


def test_a_model_is_asked_as_trained_not_as_training(spec):
    model = trained(spec(), model=nn.Sequential(nn.Conv2d(3, 1, 1), nn.Dropout(0.9)))
    model.task.train()
    predictor = Predictor([model])
    np.testing.assert_array_equal(predictor(photo()), predictor(photo()))


def small(spec, name="first", seed=0, **options):
    """A trained network with layers of which heat can be seen."""
    torch.manual_seed(seed)
    classes = len(spec.classes)
    body = [nn.Conv2d(spec.in_channels, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    ends = {
        "label": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)],
        "mask": [nn.Upsample(scale_factor=2), nn.Conv2d(8, classes, 1)],
    }
    return trained(spec, name, seed, nn.Sequential(*body, *ends[spec.target]), **options)


def test_heat_of_labels_is_the_mean_over_models_of_what_they_decide_together(spec):
    facts = spec("multiclass", target="label", image_size=(16, 24))
    models, image = [small(facts, seed=seed) for seed in range(2)], photo()
    models.append(small(spec("multiclass", target="label", image_size=(24, 24)), seed=2))  # sees another size
    probability = Predictor(models)(image)
    for given in (probability, probability[::-1].copy()):
        found = Heat(models, "grad_cam", ())(image, given)
        expected = []
        for model in models:
            name = facts.classes[int(given.argmax())]
            target = Target(facts, model.task.activate, name)
            seen = model.see(image, model.task.spec.image_size)[None]
            heat = explain(model.task.model, seen, ["3"], ["grad_cam"], target).heat["grad_cam"][0, 0]
            expected.append(cv2.resize(heat.numpy(), (34, 21)))
        assert found.shape == (21, 34) and found.dtype == np.float32 and found.max() > 0.3
        np.testing.assert_allclose(found, np.mean(expected, 0), atol=1e-6)


def test_heat_of_masks_is_of_the_largest_region_that_was_predicted(spec):
    facts, image = spec("multilabel", image_size=16), photo(32, 48)
    model = small(facts)
    probability = np.zeros((2, 32, 48), np.float32)
    probability[0, :4, :4], probability[1, 8:24, 12:36] = 0.9, 0.6
    first, second = torch.zeros(2, 16, 16)  # the same at network size
    first[:2, :2], second[4:12, 4:12] = torch.tensor([1, 1 / 3]), 1
    seen = model.see(image, facts.image_size)[None]
    for threshold, choice in (((0.5, 0.5), Choice(1, "", where=second)), ((0.5, 0.7), Choice(0, "", where=first))):
        target = Target(facts, torch.sigmoid)
        [[expected]] = explain(model.task.model, seen, ["4"], ["layer_cam"], target, [choice]).heat["layer_cam"]
        found = Heat([model], "layer_cam", threshold)(image, probability)
        assert found.max() > 0.9
        np.testing.assert_allclose(found, cv2.resize(expected.numpy(), (48, 32)), atol=1e-6)


@pytest.mark.parametrize("precision", [HalfPrecision("bf16-true"), MixedPrecision("bf16-mixed", "cpu")])
def test_runs_of_half_precision_are_explained_in_single_and_answer_as_before(precision, spec):
    facts, image = spec("multiclass", target="label"), photo()
    model, single = small(facts, precision=precision), small(facts)
    predictor = Predictor([model])
    before = predictor(image)
    heat = Heat([model], "grad_cam", ())(image, before)
    np.testing.assert_array_equal(predictor(image), before)
    if precision.precision == "bf16-true":
        single.task.to(torch.bfloat16).float()
    np.testing.assert_array_equal(heat, Heat([single], "grad_cam", ())(image, before))


def test_heat_is_refused_early(spec):
    with pytest.raises(MedvisionError, match="heat=gradcam: expected some of grad_cam, "):
        Heat([small(spec())], "gradcam", (0.5,))
    broken = small(spec("multiclass", target="label"))
    nn.init.constant_(broken.task.model[0].weight, float("nan"))
    explainer = Explainer(broken, ["3"])
    with pytest.raises(MedvisionError, match="photo"):
        explainer(photo(), ["grad_cam"], explainer.target(), name="photo")
