"""SMP: every architecture at any size, names of both libraries, errors that name the cure."""

import pytest
import torch

from medvision.errors import MedvisionError
from medvision.models import SMP
from medvision.models.smp import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_any_size(architecture: str) -> None:
    encoder = "vit_tiny_patch16_224" if architecture == "DPT" else "resnet18"
    model = SMP(architecture, encoder, in_channels=1, num_outputs=2).eval()
    with torch.inference_mode():
        for size in [(33, 50), (130, 150)]:
            assert model(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize(
    ("encoder", "kept_as"),
    [
        ("resnet18", "ResNetEncoder"),
        ("tu-resnet18", "TimmUniversalEncoder"),
        ("pvt_v2_b0", "TimmUniversalEncoder"),
    ],
)
def test_names_of_both_libraries(encoder: str, kept_as: str) -> None:
    assert type(SMP(encoder=encoder).model.encoder).__name__ == kept_as


def test_options_reach_the_architecture() -> None:
    model = SMP("Unet", "resnet18", encoder_depth=3, decoder_channels=(16, 8, 8)).eval()
    assert model.model.encoder.output_stride == 8
    assert model(torch.randn(1, 3, 20, 30)).shape == (1, 1, 20, 30)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"architecture": "Unett"}, r"model\.architecture='Unett'.*Unet"),
        ({"architecture": "zzz"}, r"choose of Unet, .*Segformer"),
        ({"encoder": "resnet19"}, r"model\.encoder='resnet19'.*resnet18"),
        ({"encoder": "tu-convnext_tyny"}, "convnext_tiny"),
        (
            {"architecture": "Linknet", "encoder": "mit_b0"},
            r"Linknet with encoder 'mit_b0'.*not supported for Linknet.*works: model\.encoder=pvt_v2_b0\.",
        ),
        (
            {"architecture": "DeepLabV3Plus", "encoder": "pvt_v2_b0"},
            r"DeepLabV3Plus with encoder 'tu-pvt_v2_b0'.*output_stride.*works: model\.encoder=mit_b0\.",
        ),
        ({"architecture": "DPT", "encoder": "resnet34"}, r"works: model\.encoder=vit_tiny_patch16_224\."),
        ({"encoder": "resnet18", "encoder_depth": 9}, r"got 9\. No encoder works with these options: change them\."),
        ({"encoder": "resnet18", "decoder_chanels": (1,)}, r"no options \['decoder_chanels'\]"),
        ({"encoder": "tu-resnet18", "decoder_chanels": (1,)}, "decoder_chanels'.*No encoder works with"),
        ({"classes": 3}, "num_outputs"),
        ({"activation": "sigmoid"}, "logits"),
        ({"aux_params": {"classes": 2}}, "masks only"),
    ],
)
def test_errors(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(MedvisionError, match=said):
        SMP(**arguments)
