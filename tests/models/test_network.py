"""What a network cannot learn from is refused before training, with the nearest choice that works."""

import pytest
import torch

from medvision.errors import MedvisionError
from medvision.models import SMP, Classifier, Network, UNetFamily, UNetIsensee, UNetPP, UNetV2
from medvision.spec import DataSpec


def facts(size: int | tuple[int, int] = 64, target: str = "mask") -> DataSpec:
    return DataSpec("some", ["a"], "binary", 3, 1, image_size=size, target=target)


CHANNELS = (4, 8, 8, 8, 8)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Classifier("resnet18"), "model=unet model.encoder=resnet18"),
        (lambda: Classifier("convnext_atto"), "model=unet model.encoder=convnext_atto"),
        (lambda: Classifier("vit_tiny_patch16_224"), "model=dpt model.encoder=vit_tiny_patch16_224"),
        (lambda: Classifier("mixer_s32_224"), "model=unet model.encoder=resnet34"),
    ],
)
def test_a_classifier_is_refused_for_masks(build, said: str) -> None:
    model = build()
    with pytest.raises(
        MedvisionError, match=f"^Classifier {model.backbone} answers a label.*data=some has masks.*{said}"
    ):
        model.check(facts())


@pytest.mark.parametrize(
    ("build", "title", "name"),
    [
        (lambda: SMP("FPN", "resnet18"), "FPN with encoder resnet18", "resnet18"),
        (lambda: SMP("Unet", "pvt_v2_b0"), "Unet with encoder tu-pvt_v2_b0", "pvt_v2_b0"),
        (lambda: SMP("Unet", "efficientnet-b0"), "Unet with encoder efficientnet-b0", "efficientnet_b0"),
        (lambda: SMP("Segformer", "mit_b0"), "Segformer with encoder mit_b0", "resnet18"),
        (lambda: UNetV2("pvt_v2_b0"), "UNetV2 pvt_v2_b0", "pvt_v2_b0"),
        (lambda: UNetFamily(width=4), "UNetFamily plain", "resnet18"),
        (lambda: UNetPP(channels=CHANNELS), "UNetPP", "resnet18"),
        (lambda: UNetIsensee(width=4), "UNetIsensee", "resnet18"),
    ],
)
def test_a_segmentation_is_refused_for_labels(build, title: str, name: str) -> None:
    cure = f"model=classifier model.name={name}"
    with pytest.raises(MedvisionError, match=f"^{title} answers a mask.*data=some has labels: choose {cure}"):
        build().check(facts(target="label"))
    assert Classifier(name).target == "label"  # the choice is there


@pytest.mark.parametrize(
    ("build", "size", "stride", "cure"),
    [
        (lambda **o: UNetPP(channels=CHANNELS, **o), (8, 40), 16, "model.depth=3 or data.image_size=[16,40]"),
        (lambda **o: UNetFamily(width=4, **o), (40, 7), 16, "model.depth=2 or data.image_size=[40,16]"),
        (lambda **o: UNetFamily("resnet18", width=4, **o), (31, 31), 32, "model.depth=4 or data.image_size=[32,32]"),
        (lambda **o: UNetIsensee(width=4, **o), (15, 15), 16, "model.depth=3 or data.image_size=[16,16]"),
        (lambda **o: UNetIsensee(width=4, **o), (1, 1), 16, "data.image_size=[16,16]"),
        (lambda: UNetV2("pvt_v2_b0"), (31, 32), 32, "data.image_size=[32,32]"),
        (lambda: SMP(encoder="resnet18"), (16, 64), 32, "data.image_size=[32,64]"),
        (lambda: SMP("DPT", "vit_tiny_patch16_224"), (16, 64), 32, "data.image_size=[32,64]"),
    ],
)
def test_images_below_the_stride(build, size: tuple[int, int], stride: int, cure: str) -> None:
    model = build()
    with pytest.raises(MedvisionError) as refused:
        model.check(facts(size))
    height, width = size
    said = f"divides the sides of an image by {stride}, but those of data=some have {height}x{width} pixels"
    assert said in str(refused.value) and str(refused.value).endswith(f": choose {cure}.")
    depth, _, other = cure.rpartition(" or ")
    model.check(facts(tuple(map(int, other[len("data.image_size=[") : -1].split(",")))))
    if depth:
        build(depth=int(depth.removeprefix("model.depth="))).check(facts(size))


def test_what_fits_is_accepted() -> None:
    UNetPP(channels=CHANNELS).check(facts(16))
    UNetV2("pvt_v2_b0").check(facts((32, 33)))
    Classifier("resnet18").check(facts(32, "label"))


@pytest.mark.parametrize(
    ("build", "target", "other"),
    [
        (lambda: Classifier("vit_tiny_patch16_224"), "label", "model.name=resnet18"),
        (lambda: SMP("Unet", "swin_tiny_patch4_window7_224"), "mask", "model.encoder=convnext_tiny"),
    ],
)
def test_a_network_for_one_size(build, target: str, other: str) -> None:
    model = build().train()
    with pytest.raises(MedvisionError) as refused:
        model.check(facts(256, target))
    assert "cannot take the images of data=some, 3x256x256 (AssertionError: Input height" in str(refused.value)
    assert f"choose data.image_size=224, for which it was made, or {other}" in str(refused.value)
    model.check(facts(224, target))
    assert all(module.training for module in model.modules())


def test_trying_changes_nothing() -> None:
    model = Classifier("resnet18", freeze_encoder=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    model.check(facts(target="label"))
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not model.encoder.training


def test_parameters_without_influence_are_not_trained() -> None:
    def fixed(model: Network, part: int) -> set[str]:
        return {name.split(".")[part] for name, p in model.named_parameters() if not p.requires_grad}

    assert fixed(SMP("Unet", "resnet18"), 2) == set()
    assert fixed(SMP("PSPNet", "resnet18"), 2) == {"layer3", "layer4"}  # its decoder sees an eighth of the sides
    assert fixed(SMP("Unet", "resnet18", encoder_depth=4, decoder_channels=(8, 8, 8, 8)), 2) == {"layer4"}
    shallow = UNetFamily("resnet18", width=4, depth=3, freeze_encoder=2)
    for epoch in (1, 2):
        shallow.start_epoch(epoch)
    assert fixed(shallow, 1) == {"layer3", "layer4"}
