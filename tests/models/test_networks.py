"""What every network keeps: shapes, gradients, modes, round trips."""

import io
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import SMP, UNetPP, UNetV2
from medvision.models.padding import pad_to_multiple

Make = Callable[..., nn.Module]
UNETPP: Make = partial(UNetPP, channels=(4, 8, 8, 16, 16))
UNETV2: Make = partial(UNetV2, encoder="pvt_v2_b0", channels=8)
MAKERS = {
    "unetpp": UNETPP,
    "unetpp_ds": partial(UNETPP, deep_supervision=True),
    "unetv2": UNETV2,
    "unetv2_ds": partial(UNETV2, deep_supervision=True),
    "unetv2_convnext": partial(UNETV2, encoder="convnext_atto", drop_path_rate=0.0),
    "smp_unet": partial(SMP, "Unet", "resnet18"),
    "smp_fpn_timm": partial(SMP, "FPN", "convnext_atto"),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    torch.manual_seed(0)
    return MAKERS[request.param]


def as_list(logits: Tensor | list[Tensor]) -> list[Tensor]:
    return logits if isinstance(logits, list) else [logits]


@pytest.mark.parametrize(("in_channels", "num_outputs"), [(1, 1), (3, 5), (4, 1)])
@pytest.mark.parametrize("size", [(33, 50), (96, 64)])
def test_every_parameter_learns(make: Make, in_channels: int, num_outputs: int, size: tuple[int, int]) -> None:
    model = make(in_channels=in_channels, num_outputs=num_outputs).train()
    outputs = as_list(model(torch.randn(2, in_channels, *size)))
    assert all(logits.shape == (2, num_outputs, *size) for logits in outputs)
    # Random weights, so that no gradient cancels by symmetry.
    torch.stack([(logits * torch.randn_like(logits)).mean() for logits in outputs]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    dead = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    # Attention over a single position (deepest PVT stage at 64 x 64 or less) does not depend on its query.
    assert not [name for name in dead if "attn" not in name]


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (100, 37), (96, 64)])
def test_any_size_in_evaluation(make: Make, size: tuple[int, int]) -> None:
    model = make().eval()
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        first, second = model(image), model(image)
    assert isinstance(first, Tensor)
    assert first.shape == (1, 1, *size)
    assert first.isfinite().all()
    assert torch.equal(first, second)


def test_padding_repeats_edges_and_is_cropped(make: Make) -> None:
    model = make().eval()
    image = torch.randn(1, 3, 50, 70)
    by_hand = nn.functional.pad(image, (0, 26, 0, 14), mode="replicate")
    with torch.inference_mode():
        torch.testing.assert_close(model(image), model(by_hand)[..., :50, :70], rtol=0, atol=1e-5)


def test_an_image_that_fits_is_not_copied() -> None:
    image = torch.randn(1, 3, 64, 96)
    assert pad_to_multiple(image, 32) is image
    assert pad_to_multiple(image, 32, minimum=96).shape == (1, 3, 96, 96)
    assert pad_to_multiple(image, 16, minimum=100).shape == (1, 3, 112, 112)


def test_state_dict_round_trip(make: Make) -> None:
    model = make()
    image = torch.randn(2, 3, 64, 64)
    model.train()(image)  # moves the batch statistics off their initial values
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        assert torch.equal(model.eval()(image), other.eval()(image))


@pytest.mark.parametrize("build", [UNETPP, UNETV2])
def test_deep_supervision(build: Make) -> None:
    torch.manual_seed(0)
    model = build(deep_supervision=True, num_outputs=2)
    image = torch.randn(2, 3, 50, 70)
    trained = model.train()(image)
    assert isinstance(trained, list)
    assert [logits.shape for logits in trained] == [(2, 2, 50, 70)] * 4
    with torch.inference_mode():
        main = model.eval()(image)
        heads = model.heads(image)
    assert isinstance(main, Tensor)
    assert len(heads) == 4
    torch.testing.assert_close(main, heads[0][..., :50, :70], rtol=0, atol=1e-6)
    assert not any(torch.equal(a, b) for a, b in pairwise(trained))
    assert isinstance(build().train()(image), Tensor)


def test_unetv2_heads_are_native_and_resized_for_training() -> None:
    torch.manual_seed(0)
    model = UNETV2(deep_supervision=True, drop_path_rate=0.0)
    model.eval()
    model.training = True  # batch statistics frozen, so that both calls agree
    image = torch.randn(1, 3, 64, 96)
    native, resized = model.heads(image), model(image)
    assert [logits.shape[-2:] for logits in native] == [(64, 96), (32, 48), (16, 24), (8, 12)]
    for small, full in zip(native, resized, strict=True):
        expected = nn.functional.interpolate(small, size=(64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(full, expected)


def test_main_output_comes_first_in_training() -> None:
    """The deepest node alone depends on the last layer of nodes; so must the first output alone."""
    model = UNETPP(deep_supervision=True).train()
    main, *shallow = model(torch.randn(2, 3, 32, 32))
    last = model.nodes["x0_4"].conv1.weight
    assert torch.autograd.grad(main.sum(), last, retain_graph=True, allow_unused=True)[0] is not None
    for logits in shallow:
        assert torch.autograd.grad(logits.sum(), last, retain_graph=True, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (UNetPP, 9_163_329),
        (partial(UNetPP, deep_supervision=True), 9_163_428),
        (partial(UNetV2, deep_supervision=True), 25_145_036 - 16_384),  # published, less what it never uses
    ],
)
def test_parameter_counts(build: Make, count: int) -> None:
    assert sum(parameter.numel() for parameter in build().parameters()) == count


def test_unetpp_depth_follows_channels() -> None:
    model = UNetPP(channels=(4, 8), deep_supervision=True).eval()
    assert sorted(model.nodes) == ["x0_0", "x0_1", "x1_0"]
    assert model(torch.randn(1, 3, 5, 7)).shape == (1, 1, 5, 7)
    with pytest.raises(MedvisionError, match="two channel widths"):
        UNetPP(channels=(4,))


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ("pvt_v2_b9", r"model\.encoder='pvt_v2_b9'.*pvt_v2_b2"),
        ("resnet18", r"'resnet18' gives \[\(64, 32, 48\).*model\.encoder=pvt_v2_b0"),
        ("vit_tiny_patch16_224", r"any input size.*model\.encoder=pvt_v2_b0"),
        ("vgg11", r"drop_path_rate.*model\.encoder=pvt_v2_b0"),
    ],
)
def test_unetv2_refuses_encoders(encoder: str, said: str) -> None:
    with pytest.raises(MedvisionError, match=said):
        UNetV2(encoder)


def test_drop_path_reaches_the_encoder() -> None:
    def rates(rate: float) -> list[float]:
        encoder = UNETV2(drop_path_rate=rate).encoder
        return [module.drop_prob for module in encoder.modules() if hasattr(module, "drop_prob")]

    assert max(rates(0.3)) == pytest.approx(0.3)
    assert not any(rates(0.0))
