"""What every network of conf/model keeps: shapes, gradients, modes, round trips, export. A new yaml is tested here."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from medvision import cli
from medvision.models import Network, feature_maps, layer_names

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
SMALLER = {"resnet34": "resnet18", "convnext_tiny": "convnext_atto"}
SMALL = {"width": 4, "channels": [4, 8, 8, 16, 16]}
"""Values of options, where a network has them."""

Make = Callable[..., Network]


@pytest.fixture(params=sorted(file.stem for file in CONF.glob("[!_]*.yaml")))
def make(request: pytest.FixtureRequest) -> Make:
    """`make(in_channels=1)`: the network of a yaml at a small size, with the weights of seed 0."""
    cfg = cli.compose("train", [f"model={request.param}", "data=phantom"]).model
    for option in cfg.keys() & SMALL.keys():
        cfg[option] = SMALL[option]
    for option in cfg.keys() & {"encoder", "name"}:
        cfg[option] = SMALLER.get(cfg[option], cfg[option])

    def build(in_channels: int = 3, num_outputs: int = 1) -> Network:
        torch.manual_seed(0)
        model = instantiate(cfg, in_channels=in_channels, num_outputs=num_outputs, _convert_="all")
        assert isinstance(model, Network)
        return model

    return build


def expected_shape(model: Network, image: Tensor, outputs: int) -> tuple[int, ...]:
    return (len(image), outputs, *image.shape[-2:]) if model.target == "mask" else (len(image), outputs)


def as_list(logits: Tensor | list[Tensor]) -> list[Tensor]:
    return logits if isinstance(logits, list) else [logits]


@pytest.mark.parametrize(
    ("in_channels", "num_outputs", "size"), [(1, 1, (64, 96)), (3, 5, (65, 50)), (4, 1, (64, 64))], ids=str
)
def test_every_parameter_learns(make: Make, in_channels: int, num_outputs: int, size: tuple[int, int]) -> None:
    model = make(in_channels, num_outputs).train()
    with torch.no_grad():  # scales that begin at zero and rectifiers that are closed hide what lies behind them
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    image = torch.randn(2, in_channels, *size)
    outputs = as_list(model(image))
    assert {tuple(logits.shape) for logits in outputs} == {expected_shape(model, image, num_outputs)}
    # Random weights, so that no gradient cancels by symmetry.
    torch.stack([(logits * torch.randn_like(logits)).mean() for logits in outputs]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    # A bias may have none at all: a normalisation behind it takes it away.
    assert [name for name, gradient in gradients.items() if gradient.ndim > 1 and not gradient.any()] == []


def test_evaluation_is_repeated_and_survives_a_round_trip(make: Make) -> None:
    model, again = make(), make()
    model.train()(torch.randn(2, 3, 64, 64))  # moves batch statistics off their initial values
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    model.eval(), again.eval()
    with torch.inference_mode():
        for size in [(1, 1), (33, 50), (96, 64)]:
            image = torch.randn(2, 3, *size)
            logits = model(image)
            assert isinstance(logits, Tensor) and logits.isfinite().all()
            assert logits.shape == expected_shape(model, image, 1)
            assert torch.equal(logits, model(image)) and torch.equal(logits, again(image))


def test_training_repeats_under_a_seed(make: Make) -> None:
    image = torch.randn(2, 3, 64, 64)
    answers = []
    for _ in range(2):
        model = make().train()
        torch.manual_seed(5)
        answers.append(as_list(model(image)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_export(make: Make) -> None:
    """In float64, for an exported program may use other kernels, whose rounding differs."""
    model, image = make().double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        exported = torch.export.export(model, (image,), strict=False).module()
        torch.testing.assert_close(exported(image), model(image))


def test_feature_maps(make: Make) -> None:
    """Against hooks set by hand, on layers that are followed by others in place and by none."""
    model, image = make().eval(), torch.randn(1, 3, 64, 64)
    by_hand: dict[str, Tensor] = {}

    def keep(name: str, answer: Tensor) -> None:
        by_hand.setdefault(name, answer.clone())

    handles = [
        layer.register_forward_hook(lambda _, __, answer, name=name: keep(name, answer))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    with torch.inference_mode():
        logits = model(image)
        for handle in handles:
            handle.remove()
        chosen = list(by_hand)[:: max(1, len(by_hand) // 5)]
        found = feature_maps(model, image, chosen)
        assert torch.equal(model(image), logits)
    assert set(chosen) <= set(layer_names(model)) and list(found) == chosen
    first = {name: each[0] if isinstance(each, list) else each for name, each in found.items()}
    assert all(torch.equal(first[name], by_hand[name]) for name in chosen)
