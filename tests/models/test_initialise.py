"""Initial weights have the variance that their rule promises; pretrained ones stay."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import SMP, UNetFamily, UNetIsensee, UNetPP, UNetV2
from medvision.models.initialise import RULES, initialise

MAKERS: dict[str, Callable[..., nn.Module]] = {
    "smp": lambda **options: SMP(encoder="resnet18", **options),
    "unetv2": lambda **options: UNetV2("pvt_v2_b0", channels=8, **options),
    "plain": lambda **options: UNetFamily(width=4, depth=2, **options),
    "library": lambda **options: UNetFamily("resnet18", width=4, depth=2, **options),
    "unetpp": lambda **options: UNetPP(channels=(4, 8), **options),
    "isensee": lambda **options: UNetIsensee(width=4, depth=2, **options),
}
WITH_ENCODER = ["smp", "unetv2", "plain", "library"]


def made(name: str, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return MAKERS[name](**options).state_dict()


@pytest.mark.parametrize(
    ("how", "variance"),
    [("xavier", 2 / (40 * 9 + 60 * 9)), ("kaiming", 2 / (40 * 9)), ("normal", 0.02**2), ("orthogonal", 1 / 360)],
)
def test_variances(how: str, variance: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(40, 60, 3)
    initialise(layer, how)
    assert layer.weight.mean().abs() < 0.1 * variance**0.5
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
    assert layer.bias is not None and not layer.bias.any()


def test_orthogonal_rows() -> None:
    layer = nn.Conv2d(8, 16, 3)
    initialise(layer, "orthogonal")
    rows = layer.weight.detach().flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(16), atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(300, 400),
        nn.Conv2d(64, 64, 3, groups=4),
        nn.ConvTranspose2d(64, 32, 2, stride=2),
        nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1, groups=2),
    ],
    ids=str,
)
def test_kaiming_keeps_the_power_of_what_relu_leaves(layer: nn.Module) -> None:
    torch.manual_seed(0)
    initialise(layer, "kaiming")
    signal = torch.randn(64, 300) if isinstance(layer, nn.Linear) else torch.randn(8, 64, 24, 24)
    with torch.no_grad():
        out = layer(F.relu(signal))
    inner = out if isinstance(layer, nn.Linear) else out[..., 2:-2, 2:-2]
    assert inner.square().mean().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", RULES)
def test_every_network_takes_every_rule(name: str, how: str) -> None:
    plain, drawn = made(name), made(name, init=how)
    assert plain.keys() == drawn.keys()
    changed = {key for key in plain if not torch.equal(plain[key], drawn[key])}
    assert {key for key in plain if key.endswith("weight") and plain[key].ndim == 4} <= changed
    assert all(value.isfinite().all() for value in drawn.values())


@pytest.mark.parametrize("name", MAKERS)
def test_none_draws_nothing(name: str) -> None:
    plain = made(name)
    state = torch.get_rng_state()
    same = made(name, init="none")
    assert all(torch.equal(value, same[key]) for key, value in plain.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_pretrained_weights_stay(name: str, tmp_path: Path) -> None:
    at = "model.encoder." if name == "smp" else "encoder."
    torch.manual_seed(4)
    donor = {key: value for key, value in MAKERS[name]().state_dict().items() if key.startswith(at)}
    file = tmp_path / "weights.pth"
    torch.save(donor, file)
    drawn, kept = made(name, encoder_weights=file, init="kaiming"), made(name, encoder_weights=file)
    assert all(torch.equal(drawn[key], value) for key, value in donor.items())
    assert any(not torch.equal(drawn[key], kept[key]) for key in kept.keys() - donor.keys())


@pytest.mark.parametrize("name", MAKERS)
def test_unknown_rule(name: str) -> None:
    with pytest.raises(MedvisionError, match=r"model\.init='he': choose of none, xavier, kaiming, orthogonal, normal"):
        made(name, init="he")
