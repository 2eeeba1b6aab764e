"""A frozen encoder is moved by nothing: gradients, weight decay, momentum, running statistics."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import SMP, EncoderModel, UNetFamily, UNetV2

MAKERS: dict[str, Callable[..., EncoderModel]] = {
    "smp": lambda **options: SMP(encoder="resnet18", **options),
    "smp_timm": lambda **options: SMP("FPN", "convnext_atto", **options),
    "unetv2": lambda **options: UNetV2("pvt_v2_b0", channels=8, **options),
    "plain": lambda **options: UNetFamily(width=4, depth=2, **options),
    "library": lambda **options: UNetFamily("resnet18", width=4, **options),
}


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Stochastic depth may leave out a block of all images, which then does not move."""
    torch.manual_seed(0)


def encoder(model: EncoderModel) -> nn.Module:
    return model.get_submodule(model.encoder_at)


def step(model: EncoderModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(2, 3, 64, 64) * 3 + 1).square().mean().backward()
    optimizer.step()


def of_encoder(model: EncoderModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in encoder(model).state_dict().items()}


def moved(before: dict[str, Tensor], model: EncoderModel) -> list[str]:
    return [key for key, value in encoder(model).state_dict().items() if not torch.equal(value, before[key])]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("everything", [True, False], ids=["all_parameters", "trainable_parameters"])
def test_frozen(name: str, everything: bool) -> None:
    model = MAKERS[name](freeze_encoder=True).train()
    parameters = [p for p in model.parameters() if everything or p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    before = of_encoder(model)
    rest = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(model.encoder_at)}
    for _ in range(2):
        model.eval()
        model.train()
        model.start_epoch(50)  # True is for good
        step(model, optimizer)
    assert moved(before, model) == []
    assert not any(module.training for module in encoder(model).modules())
    assert model.training
    after = model.state_dict()
    assert all(not torch.equal(after[key], value) for key, value in rest.items() if key.endswith("running_mean"))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    ],
    ids=["adamw", "sgd"],
)
def test_thaws_at_its_epoch(name: str, make) -> None:
    model = MAKERS[name](freeze_encoder=3).train()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    before = of_encoder(model)
    for epoch in (1, 2):
        model.start_epoch(epoch)
        step(model, optimizer)
        assert model.frozen and moved(before, model) == []
    model.start_epoch(3)
    step(model, optimizer)
    assert not model.frozen and all(module.training for module in encoder(model).modules())
    learning = {key for key, parameter in encoder(model).named_parameters() if parameter.grad is not None}
    statistics = {key for key in before if key.endswith(("running_mean", "running_var"))}
    assert learning and learning | statistics <= set(moved(before, model)) | {
        key
        for key in before
        if "attn" in key  # attention over one position does not depend on its query
    }


def test_not_frozen_by_default() -> None:
    model = MAKERS["plain"]()
    model.start_epoch(1)
    assert not model.frozen
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


def test_what_a_library_fixes_stays_fixed() -> None:
    model = MAKERS["plain"](freeze_encoder=2)
    fixed = next(encoder(model).parameters())
    fixed.requires_grad_(False)
    model._begin("none", False, 2)
    for epoch in (1, 2):
        model.start_epoch(epoch)
    assert [p for p in model.parameters() if not p.requires_grad] == [fixed]


def test_a_copy_is_frozen_by_itself() -> None:
    model = MAKERS["plain"](freeze_encoder=2)
    model.start_epoch(1)
    twin = copy.deepcopy(model)
    twin.start_epoch(2)
    assert model.frozen and not twin.frozen
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in encoder(model).parameters())


def test_weights_keep_their_names() -> None:
    assert MAKERS["plain"](freeze_encoder=True).state_dict().keys() == MAKERS["plain"]().state_dict().keys()


@pytest.mark.parametrize("value", [0, -1, 1.5, "yes", None])
def test_impossible_values(value: object) -> None:
    with pytest.raises(MedvisionError, match=r"model\.freeze_encoder=.*impossible"):
        MAKERS["plain"](freeze_encoder=value)
