"""Feature maps: the very values, whatever later layers do in place, and a trace of nothing afterwards."""

import pytest
import torch
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import SMP, UNetPP, feature_maps, layer_names


class Twice(nn.Module):
    """A layer that is used twice, one that answers two tensors, one that is not used, one that answers a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.both, self.idle, self.count = Both(), nn.Identity(), Count()
        self.parts = nn.ModuleList([nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x))
        self.count(x)
        return self.parts[0](sum(self.both(x)).relu_())


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


class Count(nn.Module):
    def forward(self, x: Tensor) -> int:
        return len(x)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_names() -> None:
    assert layer_names(Twice()) == ["conv", "both", "idle", "count", "parts.0"]


def test_answers() -> None:
    model, image = Twice(), torch.randn(2, 1, 4, 4)
    found = feature_maps(model, image, ["parts.0", "conv", "both"])
    assert list(found) == ["parts.0", "conv", "both"]
    first, second = found["conv"]
    torch.testing.assert_close(first, image * model.conv.weight + model.conv.bias)
    torch.testing.assert_close(second, first * model.conv.weight + model.conv.bias)
    assert torch.equal(found["both"][0], second) and torch.equal(found["both"][1], second + 1)
    assert torch.equal(found["parts.0"], model(image))
    assert hooks(model) == 0


def test_later_layers_in_place_do_not_change_them() -> None:
    model = UNetPP(channels=(4, 8)).eval()  # its rectifiers work in place
    image = torch.randn(1, 3, 16, 16)
    found = feature_maps(model, image, ["nodes.x0_0.bn1", "nodes.x0_0"])
    node = model.nodes["x0_0"]
    assert found["nodes.x0_0.bn1"].min() < 0
    torch.testing.assert_close(found["nodes.x0_0.bn1"], node.bn1(node.conv1(image)))
    torch.testing.assert_close(found["nodes.x0_0"], node(image))


def test_an_encoder_answers_its_levels() -> None:
    model = SMP(encoder="resnet18").eval()
    levels = feature_maps(model, torch.randn(1, 3, 64, 64), ["model.encoder"])["model.encoder"]
    assert [tuple(level.shape[1:]) for level in levels][1:3] == [(64, 32, 32), (64, 16, 16)]


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_the_callers(training: bool) -> None:
    model, image = UNetPP(channels=(4, 8)).train(training), torch.randn(2, 3, 16, 16)
    found = feature_maps(model, image, ["nodes.x0_0"])["nodes.x0_0"]
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()
    [gradient] = torch.autograd.grad(found.sum(), model.nodes["x0_0"].conv2.bias)
    assert gradient.isfinite().all()
    with torch.no_grad():
        assert not feature_maps(model, image, ["nodes.x0_0"])["nodes.x0_0"].requires_grad


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("part.0", r"Twice has no layer 'part\.0': did you mean parts\.0\?"),
        ("parts", r"no layer 'parts': did you mean parts\.0"),
        ("zzz", r"no layer 'zzz': layer_names\(model\) lists them"),
        ("", r"no layer ''"),
        ("idle", r"\['idle'\] of Twice are not used in this pass"),
        ("count", r"'count' \(Count\) answers int, expected tensors"),
    ],
)
def test_refuses_and_leaves_no_hook(layer: str, said: str) -> None:
    model = Twice()
    with pytest.raises(MedvisionError, match=said):
        feature_maps(model, torch.randn(1, 1, 2, 2), ["conv", layer])
    assert hooks(model) == 0


def test_an_error_inside_leaves_no_hook() -> None:
    model = Twice()
    with pytest.raises(RuntimeError):
        feature_maps(model, torch.randn(1, 3, 2, 2), ["conv"])
    assert hooks(model) == 0
