"""The U-Net family: every option alone, on the own encoder and on libraries' encoders; its parts by hand."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as library
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import UNetFamily, load_encoder_weights
from medvision.models.unet_family import BLOCKS, NORMS, AttentionGate, PlainBlock, ResidualBlock

OPTIONS = {
    "default": {},
    "residual": {"block": "residual"},
    "attention": {"skip": "attention"},
    "transposed": {"upsampling": "transposed"},
    "wider": {"width": 12},
    "shallow": {"depth": 1},
    "instance": {"norm": "instance"},
    "group": {"norm": "group"},
    "supervised": {"deep_supervision": True},
    "all": {
        "block": "residual",
        "skip": "attention",
        "upsampling": "transposed",
        "norm": "group",
        "dropout": 0.2,
        "deep_supervision": True,
    },
    "resnet18": {"encoder": "resnet18"},
    "vgg11": {"encoder": "tu-vgg11", "depth": 3},
    "convnext": {"encoder": "convnext_atto", "block": "residual", "skip": "attention", "deep_supervision": True},
}


def make(**options: Any) -> UNetFamily:
    torch.manual_seed(0)
    own = {} if "encoder" in options else {"depth": 3}
    return UNetFamily(**({"width": 8} | own | options))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def as_list(logits: Tensor | list[Tensor]) -> list[Tensor]:
    return logits if isinstance(logits, list) else [logits]


def randomise(module: nn.Module) -> None:
    """Weights, biases and statistics off their initial values."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 0.9) if tensor.ndim == 1 else tensor.normal_(0, 0.3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("in_channels", "num_outputs", "size"), [(1, 5, (33, 50)), (3, 1, (65, 97)), (4, 1, (48, 40))], ids=str
)
def test_every_parameter_learns(
    options: dict[str, Any], in_channels: int, num_outputs: int, size: tuple[int, int]
) -> None:
    model = make(in_channels=in_channels, num_outputs=num_outputs, **options).train()
    outputs = as_list(model(torch.randn(2, in_channels, *size)))
    assert len(outputs) == (model.depth if model.deep_supervision else 1)
    assert all(logits.shape == (2, num_outputs, *size) for logits in outputs)
    torch.stack([(logits * torch.randn_like(logits)).mean() for logits in outputs]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_evaluation(options: dict[str, Any]) -> None:
    """Any size, one tensor, the same under the same seed and after a round trip; no image sees another."""
    model, again = make(**options), make(**options)
    model.train()(torch.randn(2, 3, 64, 64))  # moves batch statistics off their initial values
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        for size in [(1, 1), (33, 50)]:
            image = torch.randn(2, 3, *size)
            logits = model.eval()(image)
            assert isinstance(logits, Tensor)
            assert logits.shape == (2, 1, *size) and logits.isfinite().all()
            assert torch.equal(logits, model(image)) and torch.equal(logits, again.eval()(image))
            torch.testing.assert_close(model(image[1:]), logits[1:], rtol=1e-4, atol=1e-4)
        fresh = [make(**options).eval()(image) for _ in range(2)]
    assert torch.equal(*fresh)


def test_padding_repeats_edges_and_is_cropped() -> None:
    model = make(norm="instance").eval()
    image = torch.randn(1, 3, 33, 50)
    by_hand = F.pad(image, (0, 6, 0, 7), mode="replicate")
    torch.testing.assert_close(model(image), model(by_hand)[..., :33, :50])


@pytest.mark.parametrize("norm", NORMS)
def test_one_pixel_is_trained(norm: str) -> None:
    assert make(norm=norm).train()(torch.randn(1, 3, 1, 1)).shape == (1, 1, 1, 1)


def test_deep_supervision() -> None:
    model = make(deep_supervision=True, num_outputs=2).train()
    outputs = model(torch.randn(2, 3, 32, 32))
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))
    # The finest level's weights move the main output alone, which comes first.
    finest = model.levels[0].block.conv1.weight
    seen = [torch.autograd.grad(y.sum(), finest, retain_graph=True, allow_unused=True)[0] for y in outputs]
    assert [gradient is not None for gradient in seen] == [True, False, False]
    # In evaluation the main output is what it was; batch statistics frozen, so that both calls agree.
    model.eval()
    image = torch.randn(1, 3, 32, 32)
    expected = model(image)
    model.training = True
    assert torch.equal(model(image)[0], expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_plain_block_by_hand(stride: int) -> None:
    block = PlainBlock(3, 5, nn.BatchNorm2d, 0.5, stride).eval()
    randomise(block)
    x = torch.randn(2, 3, 8, 6)
    y = F.max_pool2d(x, 2) if stride == 2 else x
    for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
        y = F.conv2d(y, conv.weight, padding=1)
        y = F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("of_image", [False, True])
@pytest.mark.parametrize(("out", "stride"), [(3, 1), (5, 1), (3, 2)])
def test_residual_block_by_hand(out: int, stride: int, of_image: bool) -> None:
    block = ResidualBlock(3, out, NORMS["instance"], 0.5, stride, of_image).eval()
    randomise(block)
    x = torch.randn(2, 3, 8, 6)
    y = x
    if not of_image:
        y = F.relu(F.instance_norm(x, weight=block.before[0].weight, bias=block.before[0].bias))
    y = F.conv2d(y, block.conv1.weight, stride=stride, padding=1)
    y = F.relu(F.instance_norm(y, weight=block.norm.weight, bias=block.norm.bias))
    y = F.conv2d(y, block.conv2.weight, padding=1)
    # The input itself where shapes agree, else its projection: no normalisation on this way.
    y = y + (x if (out, stride) == (3, 1) else F.conv2d(x, block.shortcut.weight, stride=stride))
    torch.testing.assert_close(block(x), y)


def test_attention_gate_by_hand() -> None:
    gate = AttentionGate(4, 6)
    randomise(gate)
    skip, signal = torch.randn(2, 4, 8, 12), torch.randn(2, 6, 4, 6)
    w, g, b = gate.of_skip.weight, gate.of_signal.weight[..., 0, 0], gate.of_signal.bias
    psi, shift = gate.score.weight[0, :, 0, 0], gate.score.bias
    alpha = torch.empty(2, 1, 4, 6)
    for n in range(2):
        for i in range(4):
            for j in range(6):
                seen = torch.einsum("ockl,ckl->o", w, skip[n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
                alpha[n, 0, i, j] = torch.sigmoid(psi @ F.relu(seen + g @ signal[n, :, i, j] + b) + shift)
    alpha = F.interpolate(alpha, size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(gate.coefficients(skip, signal), alpha)
    torch.testing.assert_close(gate(skip, signal), skip * alpha)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_attention_is_a_share(scale: float) -> None:
    torch.manual_seed(0)
    alpha = AttentionGate(4, 6).coefficients(scale * torch.randn(2, 4, 8, 8), scale * torch.randn(2, 6, 4, 4))
    assert alpha.shape == (2, 1, 8, 8)
    assert alpha.min() >= 0 and alpha.max() <= 1


def test_a_closed_gate_hides_its_skip() -> None:
    model = make(skip="attention").eval()
    level, below, skip = model.levels[0], torch.randn(1, 16, 8, 8), torch.randn(1, 8, 16, 16)
    assert not torch.allclose(level(below, skip), level(below, -skip))
    nn.init.constant_(level.gate.score.bias, -1e4)
    assert torch.equal(level(below, skip), level(below, -skip))


def test_bilinear_upsampling_commutes_with_its_convolution() -> None:
    up = make().levels[0].up
    x = torch.randn(1, 16, 5, 6)
    after = F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), up[0].weight)
    torch.testing.assert_close(up(x), after)


def test_dropout_is_inside_blocks_and_off_in_evaluation() -> None:
    model, image = make(dropout=0.5), torch.randn(1, 3, 32, 32)
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout2d)]
    assert len(drops) == 4 + 3 and {drop.p for drop in drops} == {0.5}
    assert torch.equal(model.eval()(image), make().eval()(image))
    assert not torch.equal(model.train()(image), model(image))


def test_parameters_follow_options() -> None:
    base, widths = count(make()), [8, 16, 32, 64]
    ways = list(pairwise(widths))
    convolutions = sum(9 * (a * b + b * b) for a, b in [(3, 8), *ways, *((2 * a, a) for a in widths[:-1])])
    norms = sum(4 * c for c in widths + widths[:-1])
    assert base == convolutions + norms + sum(a * b for a, b in ways) + 8 + 1
    assert count(make(norm="group")) == count(make(norm="instance")) == count(make(dropout=0.5)) == base
    assert count(make(upsampling="transposed")) - base == 3 * sum(a * b for a, b in ways)
    assert count(make(deep_supervision=True)) - base == (16 + 1) + (32 + 1)
    gates = sum(4 * a * (a // 2) + b * (a // 2) + a // 2 + a // 2 + 1 for a, b in ways)
    assert count(make(skip="attention")) - base == gates
    projections = 3 * 8 + sum(a * b for a, b in ways) + sum(2 * a * a for a in widths[:-1])
    # Norms of inputs instead of the second ones; the image has none.
    moved = sum(2 * c for c in [*widths[:-1], *(2 * c for c in widths[:-1])]) - norms // 2
    assert count(make(block="residual")) - base == projections + moved
    assert 3.9 < count(make(width=16)) / base < 4.1
    assert count(make(depth=4)) > 3 * base
    assert count(make(in_channels=1)) == base - 2 * 9 * 8
    assert count(make(num_outputs=5)) == base + 4 * 9


@pytest.mark.parametrize(
    ("options", "skips"),
    [
        ({}, [8, 16, 32, 64]),
        ({"depth": 2}, [8, 16]),
        ({"encoder": None, "depth": 2}, [8, 16]),
        ({"encoder": "resnet18"}, [0, 64, 64, 128, 256]),  # none at the image's own size
        ({"encoder": "convnext_atto"}, [0, 0, 40, 80, 160]),  # the first at a stride of 4
        ({"encoder": "vgg11", "depth": 3}, [64, 128, 256]),
    ],
)
def test_depth_and_skips(options: dict[str, Any], skips: list[int]) -> None:
    model = UNetFamily(width=8, skip="attention", **options)
    assert model.depth == len(skips)
    assert [level.gate.of_skip.in_channels if level.gate else 0 for level in model.levels] == skips


def test_the_encoder_is_the_librarys() -> None:
    model = make(encoder="resnet18").eval()
    own = library.encoders.get_encoder("resnet18").eval()
    own.load_state_dict(model.encoder.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder(image), own(image), strict=True))


@pytest.mark.parametrize("encoder", ["plain", "resnet18", "convnext_atto"])
def test_weights_from_a_file(tmp_path: Path, encoder: str) -> None:
    donor, file = make(encoder=encoder).encoder, tmp_path / "weights.pth"
    for parameter in donor.parameters():
        nn.init.normal_(parameter)
    torch.save(donor.state_dict(), file)
    state = make(encoder=encoder, encoder_weights=file).encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in donor.state_dict().items())
    assert not load_encoder_weights(make(encoder=encoder).encoder, file).missing


def test_imagenet_weights_are_asked_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], library.encoders.get_encoder

    def answer(name: str, weights: object = None, **options: Any) -> nn.Module:
        asked.append((name, weights))
        return real(name, **options)

    monkeypatch.setattr(library.encoders, "get_encoder", answer)
    monkeypatch.setattr("medvision.models.weights._reachable", lambda url: True)
    for encoder in ("resnet18", "convnext_atto"):
        make(encoder=encoder, encoder_weights="imagenet")
    assert asked == [("resnet18", "imagenet"), ("tu-convnext_atto", True)]


def test_a_failed_download_is_no_random_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(library.encoders, "get_encoder", offline)
    monkeypatch.setattr("medvision.models.weights._reachable", lambda url: False)
    with pytest.raises(MedvisionError, match=r"'resnet18' could not be downloaded.*model\.encoder_weights=<file>"):
        make(encoder="resnet18", encoder_weights="imagenet")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": "dense"}, r"model\.block='dense': choose of plain, residual\."),
        ({"skip": "add"}, r"model\.skip='add': choose of concat, attention\."),
        ({"upsampling": "nearest"}, r"model\.upsampling='nearest': choose of bilinear, transposed\."),
        ({"norm": None}, r"model\.norm=None: choose of batch, instance, group\."),
        ({"norm": ["batch"]}, r"model\.norm=\['batch'\]: choose"),
        ({"width": 0}, r"model\.width=0.*whole number of 1 or more"),
        ({"width": 8.5}, r"model\.width=8\.5"),
        ({"depth": 0}, r"model\.depth=0.*whole number"),
        ({"dropout": 1}, r"model\.dropout=1.*share from 0 to below 1"),
        ({"dropout": -0.1}, r"model\.dropout=-0\.1"),
        ({"dropout": float("nan")}, r"model\.dropout=nan"),
        ({"encoder": "resnet19"}, r"model\.encoder='resnet19'.*resnet18"),
        ({"encoder": "resnet18", "depth": 6}, r"'resnet18'.*model\.depth=6.*depth of 1 to 5"),
        ({"encoder": "convnext_atto", "depth": 1}, r"model\.depth=1.*greater model\.depth"),
        ({"encoder": "vit_tiny_patch16_224"}, r"'tu-vit_tiny_patch16_224' cannot serve UNetFamily.*convnext_tiny"),
        ({"encoder_weights": "imagenet"}, r"model\.encoder=plain has no ImageNet weights"),
        ({"encoder_weights": "nowhere.pth"}, "nowhere.pth.*no such file"),
        ({"encoder": "resnet18", "encoder_weights": "nowhere.pth"}, "nowhere.pth.*no such file"),
    ],
)
def test_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MedvisionError, match=said):
        make(**options)


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d), ("group", nn.GroupNorm)]
)
def test_norm(norm: str, kind: type[nn.Module]) -> None:
    kinds = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
    norms = [module for module in make(norm=norm, width=32).modules() if isinstance(module, kinds)]
    assert {type(module) for module in norms} == {kind} and len(norms) == 2 * (4 + 3)
    assert all(module.num_groups == 8 for module in norms if isinstance(module, nn.GroupNorm))


@pytest.mark.parametrize("encoder", ["plain", "resnet18", "convnext_atto"])
def test_a_new_model_is_in_training_mode(encoder: str) -> None:
    assert all(module.training for module in make(encoder=encoder).modules())


def test_every_block_and_norm_is_an_option_above() -> None:
    tried = [{"block": "plain", "norm": "batch"} | options for options in OPTIONS.values()]
    assert {options["block"] for options in tried} == set(BLOCKS)
    assert {options["norm"] for options in tried} == set(NORMS)
