"""Heat maps: those of the grad-cam library, and of formulas that can be written down; a trace of nothing afterwards."""

import copy
from functools import partial

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, SemanticSegmentationTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from timm.layers import BatchNormAct2d
from torch import nn

from medvision.errors import MedvisionError
from medvision.explanation.folder import channels
from medvision.explanation.heat import (
    METHODS,
    OF_LIBRARY,
    RULES,
    Choice,
    Target,
    explain,
    row,
    scale,
)
from medvision.explanation.maps import activations, as_maps, default_layers
from medvision.models import SMP, Classifier, UNetPP, UNetV2

LIBRARY = {
    "grad_cam": "GradCAM",
    "grad_cam_plus_plus": "GradCAMPlusPlus",
    "hires_cam": "HiResCAM",
    "element_wise": "GradCAMElementWise",
    "layer_cam": "LayerCAM",
    "x_grad_cam": "XGradCAM",
    "seg_eigen_cam": "SegEigenCAM",
    "random_cam": "RandomCAM",
}
SIZE = (48, 64)


class Net(nn.Module):
    """Rectified convolutions, the mean over places, a linear head."""

    def __init__(self, classes=2):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 8, 3, stride=2), nn.Linear(8, classes)
        self.act, self.drop, self.idle = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Identity()
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        x = self.act(self.norm(self.first(image)))
        self.idle(x)
        return self.head(self.drop(self.second(x).relu().mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def of_labels(spec, word="predicted", kind="multiclass", threshold=(), **facts):
    activate = partial(torch.softmax, dim=1) if kind == "multiclass" else torch.sigmoid
    return Target(spec(kind, target="label", **facts), activate, word, threshold)


def of_masks(spec, word="predicted", point=None, **facts):
    return Target(spec("multilabel", **facts), torch.sigmoid, word, (0.5, 0.5), point)


def by_library(name, model, image, layer, targets, reshape=None):
    with getattr(pytorch_grad_cam, name)(model, [model.get_submodule(layer)], reshape_transform=reshape) as cam:
        return cam(image, targets)


@pytest.mark.parametrize("method", LIBRARY)
def test_equal_to_the_library(method, net, image, spec, monkeypatch):
    layers = ["first", "second", "norm"]
    drawn = torch.rand(8, generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(
        np.random, "uniform", lambda low, high, size: np.tile(low + (high - low) * drawn[: size[1]], (size[0], 1))
    )
    found = explain(net, image, layers, [method], of_labels(spec, "b")).heat[method]
    assert found.shape == (2, 3, *SIZE) and found.min() >= 0 and found.max() <= 1
    plain = copy.deepcopy(net)
    plain.act = nn.ReLU()  # in place, it would change what the library keeps of `norm`
    for n, layer in enumerate(layers):
        expected = by_library(LIBRARY[method], plain, image, layer, [ClassifierOutputTarget(1)] * 2)
        np.testing.assert_allclose(found[:, n], expected, atol=1e-5)
        assert expected.max() > 0.99


def test_weak_heat_is_as_weak_as_the_librarys(net, image, spec):
    """Both divide by the greatest heat and 1e-7 more."""
    nn.init.uniform_(net.head.weight, 0, 1e-8)
    found = explain(net, image, ["second"], ["grad_cam"], of_labels(spec, "b")).heat["grad_cam"][:, 0]
    expected = by_library("GradCAM", net, image, "second", [ClassifierOutputTarget(1)] * 2)
    assert 0.5 < expected.max() < 0.999999
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pixels_that_become_channels(net, spec):
    """Before the first convolution, which then sees a smaller image."""
    model = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 1), net).eval()
    found = explain(model, torch.randn(2, 3, *SIZE), ["2.first"], ["grad_cam"], of_labels(spec, "b"))
    assert found.heat["grad_cam"].shape == (2, 1, *SIZE) and found.heat["grad_cam"].amax((1, 2, 3)).min() > 0.99


class Tokens(nn.Module):
    """One attention, after which a class token alone counts; a drop-out that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.before, self.after = nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(4, 4, 1), nn.LayerNorm(4)
        self.attend, self.drop, self.head = nn.MultiheadAttention(4, 1, batch_first=True), nn.Dropout(), nn.Linear(4, 2)

    def forward(self, image):
        x = self.drop(self.before(self.embed(image))).flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return self.head(self.drop(self.after(self.attend(x, x, x, need_weights=False)[0] + x)[:, 0]))


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_by_default_are_those_that_the_answer_depends_on(frozen, image, spec):
    torch.manual_seed(0)
    model = Tokens().requires_grad_(not frozen).eval()
    with torch.inference_mode():
        assert default_layers(model, image) == ["before"]
    assert explain(model, image, ["before"], ["grad_cam"], of_labels(spec)).heat["grad_cam"].max() > 0.99
    nn.init.zeros_(model.head.weight)  # answers the same to all images
    assert default_layers(model, image) == ["after"]


@pytest.mark.parametrize("method", ["eigen_cam", "eigen_grad_cam"])
def test_principal_components_are_the_librarys_but_for_their_sign(method, net, image, spec):
    layers = ["second"]
    found = explain(net, image, layers, [method], of_labels(spec, "b")).heat[method][:, 0]
    second = net.second(net.act(net.norm(net.first(image))))
    [gradient] = torch.autograd.grad(net.head(second.relu().mean((2, 3)))[:, 1].sum(), second)
    answer = second.detach().numpy() * (gradient.numpy() if method == "eigen_grad_cam" else 1)
    heat = get_2d_projection(answer)
    largest = [one.flat[np.abs(one).argmax()] for one in heat]
    heat = heat * np.sign(largest)[:, None, None]
    np.testing.assert_allclose(found, scale(torch.from_numpy(heat), SIZE, SIZE), atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_finer_cam_is_the_librarys(classes, frozen, image, spec):
    torch.manual_seed(0)
    net, layers = Net(classes).eval(), ["first", "second"]
    names = [*"abcdefg"[:classes]]
    target = of_labels(spec, "b", classes=names, num_outputs=classes)
    found = explain(net.requires_grad_(not frozen), image, layers, ["grad_cam", "finer_cam"], target).heat
    for n, layer in enumerate(layers):
        cam = pytorch_grad_cam.FinerCAM(net, [net.get_submodule(layer)])
        library = [cam(image[[i]].requires_grad_(), target_idx=1)[0] for i in range(len(image))]
        np.testing.assert_allclose(found["finer_cam"][:, n], library, atol=1e-5)
    assert not torch.allclose(found["finer_cam"], found["grad_cam"], atol=1e-2)


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_the_finer_cam_is_of_exclusive_classes(kind, net, image, spec):
    with pytest.raises(
        MedvisionError, match="finer_cam tells exclusive labels apart, which tiny has not; leave it out"
    ):
        explain(net, image, ["first"], ["finer_cam"], of_labels(spec, kind=kind))


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])
def test_the_shapley_cam_is_the_librarys(act, net, image, spec):
    net.act, layers = act(), ["first", "norm", "second"]
    net.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    found = explain(net, image, layers, ["grad_cam", "shapley_cam"], of_labels(spec, "b")).heat
    for n, layer in enumerate(layers):
        expected = by_library("ShapleyCAM", net, image, layer, [ClassifierOutputTarget(1)] * 2)
        np.testing.assert_allclose(found["shapley_cam"][:, n], expected, atol=1e-5)
    assert not torch.allclose(found["shapley_cam"], found["grad_cam"], atol=1e-3)


def test_the_shapley_cam_of_attention(spec):
    """With fused attention, which has no second derivative; against one that is written down, frozen and not."""
    torch.manual_seed(0)
    model, image = Classifier("vit_tiny_patch16_224", num_outputs=2).eval(), torch.randn(2, 3, 224, 224)
    layers, target = ["encoder.blocks.6.norm1", "encoder.blocks.11.norm1"], of_labels(spec, "b", image_size=(224, 224))
    found = explain(model, image, layers, ["grad_cam", "shapley_cam"], target).heat
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    written = explain(model.requires_grad_(False), image, layers, ["shapley_cam"], target).heat
    torch.testing.assert_close(found["shapley_cam"], written["shapley_cam"], atol=1e-4, rtol=0)
    assert not torch.allclose(found["shapley_cam"], found["grad_cam"], atol=1e-3)


def make_biased(model):
    """Biases and moments of norms as training would leave them; evaluation mode."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.3, 1)
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
        if isinstance(layer, nn.BatchNorm2d | nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.bias, 0, 0.3)
    return model.eval()


@pytest.mark.parametrize("frozen", [False, True])
def test_full_gradients_are_the_librarys(frozen, net, image, spec):
    mask = torch.zeros(SIZE)
    mask[10:30, 20:] = 1
    for model, target, choices, theirs, layers in (
        (net, of_labels(spec, "b"), None, ClassifierOutputTarget(1), ["first", "second"]),
        (
            # made in the order in which it is called, which the library takes for granted
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1)),
            of_masks(spec),
            [Choice(1, "square", where=mask)] * 2,
            SemanticSegmentationTarget(1, mask.numpy()),
            ["0", "2"],
        ),
    ):
        make_biased(model).requires_grad_(not frozen)
        with torch.inference_mode(frozen):
            found = explain(model, image, layers, ["full_grad", "grad_cam"], target, choices).heat["full_grad"]
        assert found.shape == (2, 1, *SIZE) and not any(module._forward_hooks for module in model.modules())
        cam = pytorch_grad_cam.FullGrad(model.requires_grad_(), [])
        np.testing.assert_allclose(found[:, 0], cam(image.clone().requires_grad_(), [theirs] * 2), atol=1e-5)
        assert found.amax((1, 2, 3)).min() > 0.99


def test_full_gradients_have_the_biases_of_norms_with_an_activation(image, spec):
    """Which timm has in many networks, and the library passes over."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 48 * 64, 2))
    norm, both = nn.BatchNorm2d(6), BatchNormAct2d(6)
    apart = make_biased(nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.Sequential(norm, nn.ReLU()), *head))
    both.load_state_dict(norm.state_dict())
    together = nn.Sequential(apart[0], both.eval(), *head)
    found, expected = (
        explain(net, image, ["0"], ["full_grad"], of_labels(spec, "b")).heat["full_grad"] for net in (together, apart)
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    nn.init.zeros_(norm.bias)
    assert not torch.allclose(
        explain(apart, image, ["0"], ["full_grad"], of_labels(spec, "b")).heat["full_grad"], found
    )


def test_full_gradients_of_what_is_padded(spec):
    """A network that extends its image: the shares of its biases lie where those of the extended image do."""
    torch.manual_seed(0)
    model, image = make_biased(UNetPP(channels=(4, 8, 8), num_outputs=2)), torch.zeros(1, 3, 30, 41)
    choices = [Choice(0, "round", where=torch.ones(30, 41))]
    found = explain(model, image, ["nodes.x2_0"], ["full_grad"], of_masks(spec), choices).heat["full_grad"]
    whole = [Choice(0, "round", where=nn.functional.pad(torch.ones(30, 41), (0, 3, 0, 2)))]
    expected = explain(model, torch.zeros(1, 3, 32, 44), ["nodes.x2_0"], ["full_grad"], of_masks(spec), whole)
    cropped = expected.heat["full_grad"][0, 0, :30, :41]
    cropped = (cropped - cropped.min()) / (cropped.max() - cropped.min())
    torch.testing.assert_close(found[0, 0], cropped, atol=1e-5, rtol=0)


def test_full_gradients_need_biases(image, spec):
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(MedvisionError, match=r"^full_grad: Sequential has no biases of convolutions .*another method$"):
        explain(bare, image, ["0"], ["full_grad"], of_labels(spec))
    folding = Classifier("efficientvit_m0", num_outputs=2).eval()
    with pytest.raises(MedvisionError, match=r"^full_grad: Classifier has parts of images in a batch"):
        explain(folding, torch.randn(1, 3, 224, 224), ["encoder.stages.0"], ["full_grad"], of_labels(spec))


@pytest.mark.parametrize("method", OF_LIBRARY)
def test_other_methods_are_the_librarys(method, net, image, spec):
    layers = ["first", "norm", "second"]
    found = explain(net, image, layers, [method], of_labels(spec, "b")).heat[method]
    plain = copy.deepcopy(net)
    plain.act = nn.ReLU()  # in place, it would change what the library keeps of `norm`
    for n, layer in enumerate(layers):
        expected = by_library(OF_LIBRARY[method], plain, image, layer, [ClassifierOutputTarget(1)] * 2)
        np.testing.assert_allclose(found[:, n], expected, atol=1e-5)


def test_a_formula_of_pencil_and_paper(spec):
    """Of the mean over places and a linear head, Grad-CAM is the weighted sum of the maps (arXiv:1512.04150)."""
    torch.manual_seed(0)
    features, head = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU()), nn.Linear(8, 2)
    net, image = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), torch.rand(1, 3, *SIZE)
    heat = (head.weight[1][:, None, None] * features(image)).sum(1).detach()
    found = explain(net, image, ["0"], ["grad_cam", "hires_cam"], of_labels(spec, "b"))
    for method in ("grad_cam", "hires_cam"):
        torch.testing.assert_close(found.heat[method][:, 0], scale(heat, SIZE, SIZE), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("others", "passes"),
    [([], 1), (["finer_cam"], 2), (["finer_cam", "shapley_cam"], 2 + 3)],  # of layers below it
)
def test_one_pass_for_all_layers_and_methods_which_leaves_no_trace(net, image, spec, others, passes):
    methods = [method for method in RULES if method not in ("finer_cam", "shapley_cam")] + others
    backward = []
    net.second.register_full_backward_hook(lambda *_: backward.append(1))
    net.train()
    net.norm.eval()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    net.head.weight.grad = torch.ones_like(net.head.weight)
    found = explain(net, image, ["first", "norm", "act", "second"], methods, of_labels(spec))
    assert (net.calls, len(backward)) == (1, passes) and [*found.heat] == methods
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.weight"]
    assert net.head.weight.grad.eq(1).all()
    assert not any(module._forward_hooks for module in net.modules())


def test_frozen_networks_and_any_gradient_mode(net, image, spec):
    methods = ["grad_cam", "eigen_cam"]
    expected = explain(net, image, ["first", "second"], methods, of_labels(spec)).heat
    net.requires_grad_(False)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            found = explain(net, image.clone(), ["first", "second"], methods, of_labels(spec)).heat
        assert all(torch.equal(found[m], expected[m]) for m in methods)


def test_what_is_explained_of_labels(net, image, spec):
    probability = net(image).softmax(1)
    found = explain(net, image, ["second"], ["grad_cam"], of_labels(spec))
    assert [c.index for c in found.choices] == probability.argmax(1).tolist()
    assert found.probability == pytest.approx(probability.max(1).values.tolist())
    named = explain(net, image, ["second"], ["grad_cam"], of_labels(spec, "a"))
    assert [c.name for c in named.choices] == ["a", "a"]
    assert named.probability == pytest.approx(probability[:, 0].tolist())


def test_a_binary_label_is_explained_as_it_is_decided(spec):
    logits = torch.tensor([[-1.0], [2.0]])  # probabilities 0.27 and 0.88
    for threshold, names in (((), ["not lesion", "lesion"]), ((0.2,), ["lesion"] * 2), ((0.9,), ["not lesion"] * 2)):
        choices = of_labels(spec, kind="binary", threshold=threshold).choose(logits)
        assert [c.name for c in choices] == names
        signs = [-1 if name.startswith("not") else 1 for name in names]
        assert [float(c(one)) for c, one in zip(choices, logits, strict=True)] == [-1 * signs[0], 2 * signs[1]]
        values = [c.probability(one.sigmoid()) for c, one in zip(choices, logits, strict=True)]
        of_lesion = [p if sign > 0 else 1 - p for p, sign in zip(values, signs, strict=True)]
        assert of_lesion == pytest.approx(logits[:, 0].sigmoid().tolist())
    for word in ("positive", "lesion"):
        assert of_labels(spec, word, "binary").choose(logits) == [Choice(0, "lesion")] * 2


def test_of_labels_that_go_together_one_that_is_decided_for_is_explained(spec):
    logits = torch.tensor([[0.4, 0.45], [0.6, 0.7], [0.2, 0.45]]).logit()
    choices = of_labels(spec, kind="multilabel", threshold=(0.3, 0.5)).choose(logits)
    assert [(c.index, c.name) for c in choices] == [(0, "round"), (1, "square"), (1, "square, not decided for")]
    names = [c.name for c in of_labels(spec, kind="multilabel").choose(logits)]  # no threshold is known yet
    assert names == ["square", "square", "square"]


def test_a_region_and_a_point_are_the_librarys(spec):
    torch.manual_seed(0)
    model, image = UNetPP(channels=(4, 8), num_outputs=2).eval(), torch.randn(1, 3, *SIZE)
    mask = (model(image).sigmoid() >= 0.5)[0].float()
    point = torch.zeros(SIZE)
    point[int(0.5 * SIZE[0]), int(0.25 * SIZE[1])] = 1
    largest = int(mask.sum((1, 2)).argmax())
    for target, k, where in (
        (of_masks(spec, "round"), 0, mask[0]),
        (of_masks(spec), largest, mask[largest]),
        (of_masks(spec, "square", (0.5, 0.25)), 1, point),
    ):
        found = explain(model, image, ["nodes.x1_0"], ["grad_cam"], target)
        expected = by_library("GradCAM", model, image, "nodes.x1_0", [SemanticSegmentationTarget(k, where.numpy())])
        assert expected.max() > 0.99
        np.testing.assert_allclose(found.heat["grad_cam"][:, 0], expected, atol=1e-5)
        inside = model(image).sigmoid()[0, k][where > 0].mean()
        assert found.probability == [pytest.approx(float(inside), abs=1e-6)]


@pytest.mark.parametrize("method", ["layer_cam", "eigen_cam", "fem"])
def test_heat_lies_where_the_image_lies_in_what_is_padded(method, spec):
    """A network that extends its image answers the same to an image that was extended before."""
    torch.manual_seed(0)
    model, image = UNetPP(channels=(4, 8, 8), num_outputs=2).eval(), torch.randn(1, 3, 30, 41)
    whole = nn.functional.pad(image, (0, 3, 0, 2), mode="replicate")
    where = torch.zeros(32, 44)
    where[5:20, 5:20] = 1
    choices = [[Choice(0, "round", where=where[:30, :41])], [Choice(0, "round", where=where)]]
    layers = ["nodes.x1_0", "nodes.x2_0"]
    found, expected = (
        explain(model, seen, layers, [method], of_masks(spec), choice).heat[method]
        for seen, choice in zip((image, whole), choices, strict=True)
    )
    assert default_layers(model, image) == default_layers(model, whole)
    for n in range(2):
        cropped = expected[0, n, :30, :41]
        cropped = (cropped - cropped.min()) / (cropped.max() - cropped.min())
        assert found[0, n].max() > 0.99
        torch.testing.assert_close(found[0, n], cropped, atol=1e-5, rtol=0)


def test_where_nothing_is_predicted_the_whole_image_is_explained(spec):
    [choice] = of_masks(spec).choose(torch.tensor([-3.0, -2.0])[None, :, None, None].expand(1, 2, 4, 4))
    assert (choice.index, choice.name) == (1, "square, nowhere predicted") and choice.where.eq(1).all()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (8, 2)])
def test_tokens_become_maps(prefix, shape):
    maps = torch.arange(2 * 7 * shape[0] * shape[1], dtype=torch.float32).view(2, 7, *shape)
    size = (shape[0] * 16, shape[1] * 16)
    tokens = torch.cat([torch.full((2, prefix, 7), -1.0), maps.flatten(2).mT], 1)
    assert torch.equal(as_maps(tokens, size=size), maps)
    assert torch.equal(as_maps(maps, size=size), maps)
    assert torch.equal(as_maps(maps.permute(0, 2, 3, 1), size=size), maps)  # channels last, as Swin


def test_transformers(spec):
    torch.manual_seed(0)
    model, size = Classifier("vit_tiny_patch16_224", num_outputs=2).eval(), (224, 224)
    image = torch.randn(1, 3, *size)
    layers = default_layers(model, image)
    assert layers == [f"encoder.blocks.{n}.norm1" for n in (8, 9, 10, 11)]

    def reshape(tokens):
        return tokens[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)

    found = explain(model, image, layers, ["grad_cam", "layer_cam"], of_labels(spec, "b", image_size=size)).heat
    for method, name in (("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM")):
        expected = by_library(name, model, image, layers[-1], [ClassifierOutputTarget(1)], reshape)
        assert expected.max() > 0.99
        np.testing.assert_allclose(found[method][:, -1], expected, atol=1e-5)
    ablated = explain(model, image, layers[-1:], ["fem"], of_labels(spec, image_size=size)).heat["fem"]
    assert ablated.shape == (1, 1, *size) and ablated.max() > 0.99


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (partial(Classifier, "resnet10t"), [f"encoder.layer{n}" for n in (1, 2, 3, 4)]),
        (partial(Classifier, "convnext_atto"), [*(f"encoder.stages.{n}" for n in (0, 1, 2)), "encoder.norm_pre"]),
        (partial(SMP, encoder="resnet18"), [f"model.encoder.layer{n}" for n in (1, 2, 3, 4)]),
        (partial(UNetV2, "pvt_v2_b0"), [f"encoder.stages_{n}" for n in range(4)]),
        (partial(UNetPP, channels=(4, 8, 8)), ["nodes.x2_0", "nodes.x1_1", "nodes.x0_2"]),
    ],
)
def test_layers_by_default(model, layers, spec):
    network, image = model(num_outputs=2).train(), torch.randn(1, 3, 64, 96)
    before = copy.deepcopy(network.state_dict())
    assert default_layers(network, image) == layers
    assert network.training and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    label = isinstance(network, Classifier)
    target = of_labels(spec, image_size=[64, 96]) if label else of_masks(spec, image_size=[64, 96])
    heat = explain(network, image, layers, ["layer_cam"], target).heat["layer_cam"]
    assert heat.shape == (1, len(layers), 64, 96) and heat.isfinite().all()


@pytest.mark.parametrize(
    ("layer", "method", "words"),
    [
        ("second", "gradcam", "method=gradcam: expected some of grad_cam, "),
        ("secnd", "grad_cam", "no layer 'secnd': did you mean second"),
        ("idle", "grad_cam", r"does not depend on what \['idle'\] answer"),
        ("head", "grad_cam", "layer head answers 2 for an image of 48x64: no map; choose another"),
    ],
)
def test_refuses(layer, method, words, net, image, spec):
    with pytest.raises(MedvisionError, match=words):
        explain(net, image, [layer], [method], of_labels(spec))
    assert not any(module._forward_hooks for module in net.modules())


def test_broken_weights_have_no_heat(net, image, spec):
    """A training that diverges goes on with the callback as without."""
    nn.init.constant_(net.second.weight, float("nan"))
    methods = [*RULES, "full_grad"]
    found = explain(net, image, ["second"], methods, of_labels(spec, "a"))
    assert np.isnan(found.probability).all() and [*found.heat] == methods
    assert all(not heat.any() for heat in found.heat.values())


def test_refuses_a_network_without_maps(image):
    with pytest.raises(MedvisionError, match="no layer of Sequential answers maps; name some"):
        default_layers(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 2)), image)


def test_refuses_layers_that_answer_several(spec):
    model = SMP(encoder="resnet18", num_outputs=2).eval()
    with pytest.raises(MedvisionError, match=r"layer model\.encoder answers 6 tensors, or is used so often"):
        explain(model, torch.randn(1, 3, 64, 64), ["model.encoder"], ["grad_cam"], of_masks(spec))


def test_an_error_within_the_library_is_heard_and_leaves_no_trace(net, image, spec):
    second, calls = net.second, []

    def fail(*_):
        calls.append(net.second)
        if len(calls) == 4:
            raise IndexError("as it happens")

    net.head.register_forward_pre_hook(fail)
    with pytest.raises(IndexError, match="as it happens"):
        explain(net, image, ["second"], ["ablation_cam"], of_labels(spec))
    assert calls[-1] is not second and net.second is second and not second._forward_hooks


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda spec: of_labels(spec, "c"), "target=c: expected one of predicted, a, b$"),
        (lambda spec: of_labels(spec, "positive"), "target=positive: expected one of predicted, a, b$"),
        (lambda spec: of_labels(spec, "x", "binary"), "expected one of predicted, positive, lesion$"),
        (lambda spec: of_masks(spec, point=(0.5, 1.0)), "lies outside of the image"),
        (
            lambda spec: Target(spec("multiclass", target="label"), torch.sigmoid, point=(0.5, 0.5)),
            "is of masks; tiny has labels",
        ),
    ],
)
def test_refuses_what_cannot_be_explained(make, words, spec):
    with pytest.raises(MedvisionError, match=words):
        make(spec)


def test_activations_of_any_layer():
    model, image = SMP(encoder="resnet18", num_outputs=2).eval(), torch.randn(1, 3, 64, 96)
    found = activations(model, image, ["model.encoder", "model.encoder.layer2"])
    assert [*found] == [*(f"model.encoder.{n}" for n in range(6)), "model.encoder.layer2"]
    with torch.no_grad():
        torch.testing.assert_close(found["model.encoder.layer2"], model.model.encoder(image)[3])
    values = found["model.encoder.layer2"][0].numpy()
    tiles, spread = channels(values, 5), values.std((1, 2))
    shown = [int(tile.caption.split(":")[0]) for tile in tiles]
    assert sorted(shown) == shown and set(shown) == set(np.argsort(-spread)[:5])
    assert all(tile.image.shape == (8, 12, 1) and np.ptp(tile.image) == 255 for tile in tiles)
    assert tiles[0].caption == f"{shown[0]}: {values[shown[0]].min():.3g} to {values[shown[0]].max():.3g}"
    assert channels(np.arange(5, dtype=np.float32))[0].image.shape == (1, 5, 1)


def test_a_row_of_a_sheet():
    image = np.full((20, 30, 3), 100, np.uint8)
    heat = np.zeros((4, 6), np.float32)
    heat[:, 3:] = 1
    tiles = row(image, {"layer": heat, "a" * 40: heat, "b": 0 * heat}, "cat 0.9", np.ones((1, 20, 30), bool))
    assert [tile.caption for tile in tiles] == ["cat 0.9", "layer", "..." + "a" * 27, "b: no heat"]
    assert np.array_equal(tiles[0].image, image) and tiles[0].masks.all() and not tiles[1].masks.size
    hot, cold = tiles[1].image[:, -1].astype(int), tiles[1].image[:, 0].astype(int)
    assert (hot[:, 0] > hot[:, 2] + 50).all() and (cold[:, 2] > cold[:, 0] + 50).all()  # red, and blue
    assert len(METHODS) == len(RULES) + 1 + len(OF_LIBRARY)
