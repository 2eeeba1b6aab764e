"""Classifiers of timm: features by the library, a head of ours, weights from where they were asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from medvision.errors import MedvisionError
from medvision.models import SMP, Classifier, EncoderModel, UNetFamily, UNetV2

RUNS: dict[str, Callable[..., EncoderModel]] = {
    "classifier": lambda name, **options: Classifier(name, **options),
    "smp": lambda name, **options: SMP("FPN", name, **options),
    "family": lambda name, **options: UNetFamily(name, width=4, **options),
}


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet18.a1_in1k",
        "convnext_atto",
        "mobilenetv3_small_050",  # a hidden layer between its features and its head
        "regnetx_002",
        "efficientnet_b0",
    ],
)
def test_features_are_the_librarys_and_the_head_is_linear(name: str) -> None:
    torch.manual_seed(0)
    model = Classifier(name, in_channels=1, num_outputs=3, dropout=0.5).eval()
    library = timm.create_model(name, num_classes=0, in_chans=1).eval()
    library.load_state_dict(model.encoder.state_dict())
    image = torch.randn(2, 1, 64, 96)
    with torch.inference_mode():
        by_hand = library(image) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(image), by_hand)


def test_dropout_is_before_the_head() -> None:
    model = Classifier("resnet18", dropout=0.5)
    model.encoder.eval()
    image = torch.randn(2, 3, 64, 64)
    seen: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(image), model.eval()(image)
    dropped, whole = seen
    gone = dropped == 0
    assert 0.3 < gone.float().mean() < 0.7
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone])


def test_stochastic_depth_reaches_the_network() -> None:
    rates = [m.drop_prob for m in Classifier("convnext_atto", drop_path_rate=0.3).modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("classifier", "classifier"),
        ("smp", "classifier"),
        ("family", "classifier"),
        ("classifier", "smp"),
        ("classifier", "family"),
    ],
)
def test_a_run_folder_of_either_task(tmp_path: Path, name: str, first: str, second: str) -> None:
    torch.manual_seed(1)
    donor = RUNS[first](name, num_outputs=2)
    (tmp_path / "checkpoints").mkdir()
    state = {f"model.{key}": value for key, value in donor.state_dict().items()}
    torch.save({"state_dict": state, "optimizer_states": [{}]}, tmp_path / "checkpoints" / "best.ckpt")
    model = RUNS[second](name, num_outputs=5, encoder_weights=tmp_path)
    image = torch.randn(1, 3, 64, 96)

    def deepest(model: EncoderModel) -> torch.Tensor:
        encoder = model.get_submodule(model.encoder_at).eval()
        return encoder.forward_features(image) if isinstance(model, Classifier) else encoder(image)[-1]

    with torch.inference_mode():
        assert torch.equal(deepest(model), deepest(donor))


def test_a_unetv2_run_fills_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(1)
    donor, file = UNetV2("pvt_v2_b0"), tmp_path / "weights.pth"
    torch.save(donor.state_dict(), file)
    own = Classifier("pvt_v2_b0", encoder_weights=file).encoder.state_dict()
    for key, value in donor.encoder.state_dict().items():
        assert torch.equal(own[key.replace("stages_", "stages.")], value), key


def test_a_classifier_file_with_a_head(tmp_path: Path) -> None:
    donor, file = timm.create_model("resnet18"), tmp_path / "weights.pth"
    torch.save(donor.state_dict(), file)
    model = Classifier("resnet18", num_outputs=2, encoder_weights=file)
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.encoder.state_dict().items())


def test_imagenet_weights_are_asked_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], timm.create_model

    def answer(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append((name, pretrained))
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", answer)
    monkeypatch.setattr("medvision.models.weights._reachable", lambda url: True)
    Classifier("resnet18", encoder_weights="imagenet", init="normal")
    assert asked == [("resnet18", True)]


def test_a_pretrained_network_keeps_its_weights_and_the_head_is_drawn(tmp_path: Path) -> None:
    donor, file = timm.create_model("resnet18"), tmp_path / "weights.pth"
    torch.save(donor.state_dict(), file)
    model = Classifier("resnet18", num_outputs=50, encoder_weights=file, init="normal", freeze_encoder=True)
    assert torch.equal(model.encoder.conv1.weight, donor.conv1.weight)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05) and not model.head.bias.any()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet19"}, r"^Unknown model\.name='resnet19': did you mean resnet18"),
        ({"name": "vgg11", "drop_path_rate": 0.1}, r"model\.name=vgg11.*drop_path_rate=0.*or model\.drop_path_rate=0"),
        ({"dropout": 1}, r"model\.dropout=1 is impossible"),
        ({"drop_path_rate": -1}, r"model\.drop_path_rate=-1 is impossible"),
        ({"encoder_weights": "nowhere.pth"}, r"nowhere\.pth.*no such file"),
        ({"init": "uniform"}, r"model\.init='uniform'"),
    ],
)
def test_refuses(options: dict[str, object], said: str) -> None:
    with pytest.raises(MedvisionError, match=said):
        Classifier(**options)
