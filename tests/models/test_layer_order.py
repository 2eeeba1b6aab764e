"""Layers of networks with an encoder: in the order of the forward pass, each parameter once."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from medvision.models import SMP, EncoderModel, UNetFamily, UNetV2

MAKERS: dict[str, Callable[..., EncoderModel]] = {
    "resnet18": lambda **options: SMP(encoder="resnet18", **options),
    "vgg11": lambda **options: SMP(encoder="vgg11_bn", **options),
    "mit_b0": lambda **options: SMP("FPN", "mit_b0", **options),
    "dpn68": lambda **options: SMP(encoder="dpn68", **options),
    "convnext_timm": lambda **options: SMP("FPN", "convnext_atto", **options),
    "unetv2": lambda **options: UNetV2("pvt_v2_b0", channels=8, **options),
    "unetv2_convnext": lambda **options: UNetV2("convnext_atto", channels=8, drop_path_rate=0.0, **options),
    "plain": lambda **options: UNetFamily(width=4, depth=2, **options),
    "residual": lambda **options: UNetFamily(block="residual", width=4, depth=2, **options),
    "library": lambda **options: UNetFamily("resnet18", width=4, depth=3, **options),  # the last level is not used
}
IMAGE = torch.zeros(1, 3, 32, 32)


def modules(layer: list[tuple[str, nn.Parameter]]) -> list[str]:
    """What holds the parameters of a layer, in order, without the encoder's own name."""
    names = [name.rpartition(".")[0].removeprefix("model.").removeprefix("encoder.") for name, _ in layer]
    return [*dict.fromkeys(names)]


@pytest.mark.parametrize("name", MAKERS)
def test_each_parameter_is_in_one_layer_and_the_last_is_all_but_the_encoder(name: str) -> None:
    model = MAKERS[name]()
    layers = model.layers(IMAGE)
    listed = [pair for layer in layers for pair in layer]
    assert sorted(n for n, _ in listed) == sorted(n for n, _ in model.named_parameters())
    assert all(p is model.get_parameter(n) for n, p in listed)
    rest = [n for n, _ in model.named_parameters() if not n.startswith(f"{model.encoder_at}.")]
    assert [n for n, _ in layers[-1]] == rest
    assert all(layers) and len(layers) > 2


def test_resnet18() -> None:
    stem, *blocks, _ = MAKERS["resnet18"]().layers(IMAGE)
    assert modules(stem) == ["conv1", "bn1"]
    assert [modules(block)[0] for block in blocks] == [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert {name.split(".")[-2] for name, _ in blocks[2]} == {"conv1", "bn1", "conv2", "bn2", "0", "1"}


def test_pvt() -> None:
    stem, *blocks, _ = MAKERS["unetv2"]().layers(IMAGE)
    assert modules(stem) == ["patch_embed.proj", "patch_embed.norm"]
    assert len(blocks) == 8
    first = ["stages_0.norm", "stages_1.downsample.proj", "stages_1.downsample.norm", "stages_1.blocks.0.norm1"]
    assert modules(blocks[2])[:4] == first
    assert modules(blocks[-1])[-1] == "stages_3.norm"


def test_mit_whose_parts_are_not_declared_in_their_order() -> None:
    stem, *blocks, _ = MAKERS["mit_b0"]().layers(IMAGE)
    assert modules(stem) == ["patch_embed1.proj", "patch_embed1.norm"]
    assert modules(blocks[2])[:3] == ["norm1", "patch_embed2.proj", "patch_embed2.norm"]
    assert [modules(block)[-1].split(".")[0] for block in blocks] == [f"block{i // 2 + 1}" for i in range(7)] + [
        "norm4"
    ]


def test_dpn_whose_blocks_share_an_activation() -> None:
    layers = MAKERS["dpn68"]().layers(IMAGE)
    order = [modules(layer)[0].split(".")[1] for layer in layers[:-1]]
    assert order == ["conv1_1"] + [f"conv{i}_{j + 1}" for i, n in ((2, 3), (3, 4), (4, 12), (5, 3)) for j in range(n)]


def test_a_network_of_single_convolutions_has_each_as_a_layer() -> None:
    layers = MAKERS["vgg11"]().layers(IMAGE)
    assert [sum(p.ndim == 4 for _, p in layer) for layer in layers[:-1]] == [1] * 8


def test_the_own_encoder() -> None:
    *blocks, _ = MAKERS["plain"]().layers(IMAGE)
    assert [{name[: len("encoder.stages.0")] for name, _ in block} for block in blocks] == [
        {f"encoder.stages.{i}"} for i in range(3)
    ]


@pytest.mark.parametrize("name", ["convnext_timm", "unetv2_convnext"])
def test_layers_of_convnext_are_those_of_timm(name: str) -> None:
    """But that a network of masks has another head."""
    net = timm.create_model("convnext_atto")
    groups = group_parameters(net, net.group_matcher(coarse=False))
    expected = [sorted(n for n in group if not n.startswith("head.")) for _, group in sorted(groups.items())]
    found = [
        sorted(n.split("encoder.")[1].removeprefix("model.").replace("_", ".", 1) for n, _ in layer)
        for layer in MAKERS[name]().layers(IMAGE)[:-1]
    ]
    assert found == [group for group in expected if group]


@pytest.mark.parametrize("freeze", [False, True, 2])
@pytest.mark.parametrize("training", [False, True])
def test_asking_changes_nothing(freeze: bool | int, training: bool) -> None:
    model = MAKERS["resnet18"](freeze_encoder=freeze).train(training)
    model.start_epoch(1)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    draws = torch.random.get_rng_state()
    first, again = model.layers(IMAGE), model.layers(torch.ones(2, 3, 64, 32))
    assert [[n for n, _ in layer] for layer in first] == [[n for n, _ in layer] for layer in again]
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(draws, torch.random.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())
