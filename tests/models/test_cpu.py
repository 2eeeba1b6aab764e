"""Layers computed another way on CPUs: the values and gradients of the layers that they stand for."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.models import UNetFamily, UNetPP, UNetV2
from medvision.models.cpu import Attention, Conv2d, Linear, Stage, channels_last, suit_cpu


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients by the input and the parameters."""
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
    return [out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "out"),
    [((2, 300, 64), 96), ((600, 64), 640), ((2, 3, 4, 320), 40), ((0, 64), 8)],
    ids=["rows", "few_rows", "small", "none"],
)
def test_linear(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], out: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain, fast = nn.Linear(shape[-1], out, bias), Linear(shape[-1], out, bias)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(shape)
    wanted = gradients(plain, x)
    used = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: used.append(1) or convolve(*a, **k))
    got = gradients(fast, x)
    assert len(used) == (torch.backends.mkl.is_available() and x.numel() > 20480)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_linear_in_bfloat16_is_the_plain_one() -> None:
    torch.manual_seed(0)
    fast = Linear(64, 96)
    x = torch.randn(600, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), F.linear(x, fast.weight, fast.bias))
        assert fast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "kernel", "as_linear"),
    [((8, 12), 4, True), ((8, 12), (2, 3), True), ((9, 12), 4, False), ((8, 12), 1, False)],
    ids=["square", "oblong", "rest", "pixels"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_patches_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    as_linear: bool,
    bias: bool,
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, stride=kernel, bias=bias).to(memory_format=layout)
    fast = Conv2d(5, 7, kernel, stride=kernel, bias=bias).to(memory_format=layout)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, *size).to(memory_format=layout)
    wanted = gradients(plain, x)
    for one, other in zip(gradients(fast, x), wanted, strict=True):
        assert torch.equal(one, other)  # in float32 it is the same call
    plain.zero_grad()
    fast.zero_grad()
    used = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: used.append(1) or linear(*a))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(fast, x)
    assert len(used) == as_linear
    assert got[0].dtype == torch.bfloat16
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_a_suited_encoder_keeps_names_and_values() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("pvt_v2_b0", features_only=True)
    fast = suit_cpu(timm.create_model("pvt_v2_b0", features_only=True))
    fast.load_state_dict(plain.state_dict())
    kinds = {type(module) for module in fast.modules()}
    assert kinds >= {Linear, Conv2d, Attention, Stage}
    assert not kinds & {nn.Linear, nn.Conv2d}
    image = torch.randn(2, 3, 96, 64)
    for one, other in zip(fast(image), plain(image), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        assert one.is_contiguous(memory_format=torch.channels_last)


def test_attention_in_bfloat16() -> None:
    torch.manual_seed(0)
    attention = suit_cpu(timm.models.pvt_v2.Attention(64, 2, sr_ratio=2))
    x = torch.randn(2, 48, 64)
    assert attention.fused_attn
    wanted = attention(x, (8, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention.fused_attn
        torch.testing.assert_close(attention(x, (8, 6)).float(), wanted, rtol=0, atol=0.02)


def test_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    network = UNetV2("pvt_v2_b0", channels=8, drop_path_rate=0.0)
    image = torch.randn(2, 3, 64, 64)
    wanted = gradients(network, image)
    network.zero_grad()
    for module in network.modules():
        if isinstance(module, Stage):
            module.grad_checkpointing = True
    for one, other in zip(gradients(network, image), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_channels_last() -> None:
    image = torch.randn(2, 3, 8, 8)
    assert channels_last(image).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(channels_last(image), image)
    assert channels_last(torch.empty(2, 3, 8, 8, device="meta")).is_contiguous()


@pytest.mark.parametrize(
    "build",
    [
        partial(UNetV2, "pvt_v2_b0", channels=8),
        partial(UNetPP, channels=(4, 8, 8)),
        partial(UNetFamily, "tu-convnext_atto", width=4),
        partial(UNetFamily, width=4, depth=2, skip="attention"),
    ],
)
def test_export_with_any_batch(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = build().eval()
    program = torch.export.export(
        network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)
    )
    image = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), network(image), rtol=0, atol=1e-4)
