"""U-Net++ and U-Net v2: padding, deep supervision, pruning, sizes; what every network keeps is in test_every_model."""

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


def test_unetpp_of_a_depth() -> None:
    shallow = UNetPP(channels=(4, 8, 16), depth=1)
    assert shallow.state_dict().keys() == UNetPP(channels=(4, 8)).state_dict().keys()
    assert (shallow.depth, shallow.stride) == (1, 2)
    for depth in (0, 3, 1.5):
        with pytest.raises(MedvisionError, match=rf"model\.depth={depth} is impossible"):
            UNetPP(channels=(4, 8, 16), depth=depth)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", [True, False])
def test_a_pruned_unetpp_answers_as_the_head_of_that_depth(depth: int, mode: bool) -> None:
    torch.manual_seed(0)
    whole = UNETPP(deep_supervision=True, num_outputs=2)
    whole.train()(torch.randn(2, 3, 64, 64))  # moves the batch statistics off their initial values
    state = torch.get_rng_state()
    pruned = whole.train(mode).prune(depth)
    assert torch.equal(torch.get_rng_state(), state) and pruned.training == mode
    image = torch.randn(2, 3, 50, 70)  # padded as by the whole network, so that even the edges agree
    with torch.no_grad():
        heads = whole.heads(image)
        assert torch.equal(pruned(image), heads[4 - depth])
    own = {name: id(parameter) for name, parameter in whole.named_parameters()}
    shared = {name.replace("out.0", f"out.{4 - depth}"): id(p) for name, p in pruned.named_parameters()}
    assert shared.items() <= own.items()
    nodes = {f"x{i}_{j}" for i in range(5) for j in range(5 - i) if i + j <= depth}
    assert set(pruned.nodes) == nodes and len(pruned.out) == 1


@pytest.mark.parametrize(("depth", "count"), [(1, 103_041), (2, 519_105), (3, 2_236_161), (4, 9_163_329)])
def test_parameters_of_a_pruned_unetpp(depth: int, count: int) -> None:
    """Two 3x3 convolutions and norms in each node, by hand."""
    widths, by_hand = (32, 64, 128, 256, 512), 32 + 1
    for i in range(depth + 1):
        for j in range(depth + 1 - i):
            first = (widths[i - 1] if i else 3) if j == 0 else j * widths[i] + widths[i + 1]
            by_hand += 9 * (first + widths[i]) * widths[i] + 6 * widths[i]
    assert by_hand == count
    pruned = UNetPP(deep_supervision=True).prune(depth)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == count
    assert sum(parameter.numel() for parameter in UNetPP(depth=depth).parameters()) == count


def test_what_cannot_be_pruned() -> None:
    with pytest.raises(MedvisionError, match=r"model\.deep_supervision=true; or train a small one with model\.depth=2"):
        UNETPP().prune(2)
    for depth in (0, 5):
        with pytest.raises(MedvisionError, match=rf"model\.depth={depth} is impossible"):
            UNETPP(deep_supervision=True).prune(depth)


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
