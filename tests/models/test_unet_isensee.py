"""The context and localisation network: its parts by hand, its maps summed, any size."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision import cli
from medvision.errors import MedvisionError
from medvision.models import UNetIsensee
from medvision.models.unet_isensee import Context, Conv


def make(**options: Any) -> UNetIsensee:
    torch.manual_seed(0)
    return UNetIsensee(**({"width": 4, "depth": 3} | options))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def normed(x: Tensor, norm: nn.InstanceNorm2d) -> Tensor:
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    x = (x - mean) / (variance + 1e-5).sqrt()
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return torch.where(x > 0, x, 0.01 * x)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(
    ("in_channels", "num_outputs", "size"), [(1, 5, (33, 50)), (3, 1, (65, 97)), (4, 1, (48, 40))], ids=str
)
def test_every_parameter_learns(depth: int, in_channels: int, num_outputs: int, size: tuple[int, int]) -> None:
    model = make(depth=depth, in_channels=in_channels, num_outputs=num_outputs).train()
    logits = model(torch.randn(2, in_channels, *size))
    assert logits.shape == (2, num_outputs, *size)
    (logits * torch.randn_like(logits)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (33, 50), (65, 97)])
def test_evaluation(depth: int, size: tuple[int, int]) -> None:
    model = make(depth=depth).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = UNetIsensee(width=4, depth=depth).eval()
    again.load_state_dict(torch.load(file, weights_only=True))
    image = torch.randn(2, 3, *size)
    with torch.inference_mode():
        logits = model(image)
        assert logits.shape == (2, 1, *size) and logits.isfinite().all()
        for other in (model, again, make(depth=depth).eval()):
            assert torch.equal(logits, other(image))
        torch.testing.assert_close(model(image[1:]), logits[1:], rtol=1e-4, atol=1e-4)


def test_training_differs_by_dropout_alone() -> None:
    image = torch.randn(2, 3, 32, 32)
    sure, unsure = make(dropout=0.0), make()
    assert torch.equal(sure.train()(image), sure.eval()(image))
    assert torch.equal(sure(image), unsure.eval()(image))
    assert not torch.equal(unsure.train()(image), unsure(image))
    assert {module.p for module in unsure.modules() if isinstance(module, nn.Dropout2d)} == {0.3}


def test_padding_repeats_edges_and_is_cropped() -> None:
    model, image = make().eval(), torch.randn(1, 3, 33, 50)
    by_hand = F.pad(image, (0, 6, 0, 7), mode="replicate")
    torch.testing.assert_close(model(image), model(by_hand)[..., :33, :50])
    assert make().train()(torch.randn(1, 3, 1, 1)).shape == (1, 1, 1, 1)


def test_context_by_hand() -> None:
    block = Context(3, 0.3).eval()
    randomise(block)
    x = torch.randn(2, 3, 8, 6)
    inner = F.conv2d(normed(x, block.norm1), block.conv1.weight, padding=1)
    expected = x + F.conv2d(normed(inner, block.norm2), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_conv_by_hand(kernel: int, stride: int) -> None:
    conv = Conv(3, 5, kernel, stride)
    randomise(conv)
    x = torch.randn(2, 3, 8, 6)
    expected = normed(F.conv2d(x, conv[0].weight, stride=stride, padding=kernel // 2), conv[1])
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    assert conv(x).shape[-2:] == (8 // stride, 6 // stride)


@pytest.mark.parametrize(("depth", "maps"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_the_maps_of_the_finest_levels_are_summed(depth: int, maps: int) -> None:
    model, image = make(depth=depth, num_outputs=2).eval(), torch.randn(1, 3, 64, 96)
    found = model.maps(image)
    assert [tuple(each.shape) for each in found] == [(1, 2, 64 >> i, 96 >> i) for i in range(maps)]
    repeated = [each.repeat_interleave(2**i, 2).repeat_interleave(2**i, 3) for i, each in enumerate(found)]
    torch.testing.assert_close(model(image), torch.stack(repeated).sum(0))


def test_localisation_by_hand() -> None:
    """The decoder of the smallest network: repeated pixels, a convolution, the skip, a convolution, a map."""
    model, image = make(depth=1).eval(), torch.randn(1, 3, 8, 8)
    fine = model.down[0](image)
    coarse = model.down[1](fine)
    assert fine.shape == (1, 4, 8, 8) and coarse.shape == (1, 8, 4, 4)
    up = model.up[0](coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
    joined = model.localise[0](torch.cat([up, fine], 1))
    torch.testing.assert_close(model(image), F.conv2d(joined, model.out[0].weight, model.out[0].bias))


def test_widths_double_below_and_localisation_halves() -> None:
    model = make(width=4, depth=3)
    assert [step[0][0].out_channels for step in model.down] == [4, 8, 16, 32]
    assert [step[0][0].stride[0] for step in model.down] == [1, 2, 2, 2]
    shapes = [[(c[0].in_channels, c[0].out_channels, c[0].kernel_size[0]) for c in step] for step in model.localise]
    assert shapes == [[(8, 8, 3)], [(16, 16, 3), (16, 8, 1)], [(32, 32, 3), (32, 16, 1)]]


def test_parameter_count() -> None:
    widths = [16, 32, 64, 128, 256]
    down = sum(9 * a * b + 2 * b + 2 * (9 * b * b + 2 * b) for a, b in pairwise([3, *widths]))
    up = sum(9 * 2 * c * c + 2 * c + 9 * 4 * c * c + 2 * 2 * c for c in widths[:-1])
    halving = sum(2 * c * c + 2 * c for c in widths[1:-1])
    assert count(UNetIsensee()) == down + up + halving + (32 + 1) + (32 + 1) + (64 + 1)
    assert count(make(depth=4)) > 3 * count(make())
    assert count(make(dropout=0.0)) == count(make())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 0}, r"model\.width=0.*whole number of 1 or more"),
        ({"depth": "deep"}, r"model\.depth='deep'.*whole number"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0.*share from 0 to below 1"),
    ],
)
def test_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MedvisionError, match=said):
        make(**options)


def test_dice_is_the_loss_unless_another_is_asked_for(tmp_path: Path) -> None:
    def terms(*overrides: str) -> dict[str, float]:
        cfg = cli.compose("train", ["model=unet_isensee", *overrides], str(tmp_path))
        return {name: weight for name, weight in cfg.loss.terms.items() if weight}

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /loss: lovasz\n")
    assert terms() == terms("data=isic2017") == {"dice": 1}
    assert terms("loss=bce") == {"bce": 1}
    assert terms("experiment=mine") == {"lovasz": 1}
