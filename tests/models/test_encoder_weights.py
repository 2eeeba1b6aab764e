"""Encoder weights come from where they were asked for, or an error says why not."""

import argparse
import logging
import re
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import SMP, UNetFamily, UNetV2, load_encoder_weights
from medvision.models import weights as room


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    torch.manual_seed(7)
    return timm.create_model("pvt_v2_b0")


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of the PVTv2 authors, the reverse of what the library does."""

    def rename(key: str) -> str:
        key = re.sub(r"^patch_embed\.", "patch_embed1.", key)
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", key)
        key = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", key)
        key = re.sub(r"^stages\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", key)
        return key.replace(".dwconv.", ".dwconv.dwconv.")

    return {rename(key): value for key, value in state.items()}


def assert_encoder_is(encoder: nn.Module, donor: nn.Module) -> None:
    own, given = encoder.state_dict(), donor.state_dict()
    for key, value in own.items():
        assert torch.equal(value, given[re.sub(r"^(model\.)?stages_(\d)", r"stages.\2", key).removeprefix("model.")])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": torch.tensor(3), "state_dict": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"model.encoder.{key}": value for key, value in state.items()}},
        lambda state: {f"model.model.encoder.model.{key}": value for key, value in state.items()},
        lambda state: {f"backbone.{key}": value for key, value in published_names(state).items()},
        published_names,
    ],
    ids=["timm", "state_dict", "module", "lightning", "deep", "backbone_published", "published"],
)
def test_unetv2_reads_files(tmp_path: Path, donor: nn.Module, wrap) -> None:
    file = tmp_path / "weights.pth"
    torch.save(wrap(donor.state_dict()), file)
    assert_encoder_is(UNetV2("pvt_v2_b0", encoder_weights=str(file)).encoder, donor)


def test_safetensors_into_an_smp_timm_encoder(tmp_path: Path, donor: nn.Module) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(donor.state_dict(), file)
    assert_encoder_is(SMP(encoder="pvt_v2_b0", encoder_weights=file).model.encoder, donor)


@pytest.mark.parametrize("name", ["efficientnet-b0", "mobilenet_v2", "mit_b0", "vgg11", "tu-regnetx_002"])
def test_smp_encoders_read_their_own_names(tmp_path: Path, name: str) -> None:
    donor = SMP("FPN", name).model.encoder.state_dict()
    file = tmp_path / "weights.pth"
    torch.save(donor, file)
    own = SMP("FPN", name, encoder_weights=file).model.encoder.state_dict()
    assert all(torch.equal(value, donor[key]) for key, value in own.items())


def test_torchvision_names_without_batch_counts(tmp_path: Path) -> None:
    """timm's and torchvision's ResNet share their names; old files lack num_batches_tracked."""
    donor = timm.create_model("resnet18").state_dict()
    file = tmp_path / "resnet18.pth"
    torch.save({key: value for key, value in donor.items() if "num_batches" not in key}, file)
    model = SMP(encoder="resnet18", encoder_weights=file)
    own = model.model.encoder.state_dict()
    assert all(torch.equal(value, donor[key]) for key, value in own.items() if "num_batches" not in key)


def test_report_and_log(tmp_path: Path, donor: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    state = dict(donor.state_dict())
    del state["stages.0.norm.weight"]
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    encoder = UNetV2("pvt_v2_b0").encoder
    with caplog.at_level(logging.INFO, logger="medvision"):
        report = load_encoder_weights(encoder, file)
    assert report.missing == ("stages_0.norm.weight",)
    assert report.unexpected == ("head.weight", "head.bias")
    assert len(report.matched) == len(encoder.state_dict()) - 1
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "missing stages_0.norm.weight; not used head.weight, head.bias" in record.getMessage()


def test_below_ninety_percent_is_refused_and_changes_nothing(tmp_path: Path, donor: nn.Module) -> None:
    state = {key: value for key, value in donor.state_dict().items() if not key.startswith("stages.3")}
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    encoder = UNetV2("pvt_v2_b0").encoder
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(MedvisionError, match=r"fit \d+ of \d+ .*at least 90%: missing stages_3"):
        load_encoder_weights(encoder, file)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("absent", [10, 11])
def test_ninety_percent_is_the_least(tmp_path: Path, absent: int) -> None:
    torch.manual_seed(0)
    encoder, donor = (nn.Sequential(*(nn.Linear(1, 1) for _ in range(50))) for _ in range(2))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    file = tmp_path / "weights.pth"
    torch.save(dict(list(donor.state_dict().items())[absent:]), file)
    if absent == 10:
        assert len(load_encoder_weights(encoder, file).matched) == 90
        return
    with pytest.raises(
        MedvisionError,
        match=r"weights\.pth' fit 89 of 100 .*\(89\.0%\) of encoder mine, .*missing 0\.weight.*not used none",
    ):
        load_encoder_weights(encoder, file, "mine")
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def save_run(folder: Path, model: nn.Module) -> Path:
    """What a run leaves of its weights."""
    (folder / "checkpoints").mkdir(parents=True)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    content = {"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}], "callbacks": {}}
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    return folder


RUNS = {
    "smp": lambda **options: SMP(encoder="resnet18", **options),
    "smp_other_decoder": lambda **options: SMP("FPN", "resnet18", **options),
    "smp_timm": lambda **options: SMP(encoder="tu-pvt_v2_b0", **options),
    "unetv2": lambda **options: UNetV2("pvt_v2_b0", **options),
    "plain": lambda **options: UNetFamily(width=4, depth=2, **options),
    "library": lambda **options: UNetFamily("resnet18", width=4, **options),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [*((name, name) for name in RUNS), ("smp", "smp_other_decoder"), ("library", "smp"), ("smp_timm", "unetv2")],
)
def test_a_run_folder(tmp_path: Path, first: str, second: str) -> None:
    torch.manual_seed(1)
    donor = RUNS[first](num_outputs=2)
    model = RUNS[second](num_outputs=5, encoder_weights=save_run(tmp_path / "run", donor))
    given, own = (m.get_submodule(m.encoder_at).state_dict() for m in (donor, model))
    assert all(torch.equal(a, b) for a, b in zip(own.values(), given.values(), strict=True))


def test_a_run_folder_that_does_not_fit(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", RUNS["plain"]())
    with pytest.raises(MedvisionError, match=r"run' fit 0 of .* of encoder resnet18, .*not used"):
        RUNS["smp"](encoder_weights=run)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(MedvisionError, match=r"nothing': a folder without checkpoints/best\.ckpt"):
        RUNS["smp"](encoder_weights=tmp_path / "nothing")


@pytest.mark.parametrize("name", ["smp", "unetv2", "plain", "library"])
def test_none_is_no_file(name: str) -> None:
    states = []
    for weights in ("none", None):
        torch.manual_seed(2)
        states.append(RUNS[name](encoder_weights=weights).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvision_files(tmp_path: Path, name: str, suffix: str) -> None:
    torch.manual_seed(5)
    donor = torchvision.models.get_model(name, weights=None).state_dict()
    file = tmp_path / f"weights.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(donor, file)
    encoder = SMP("FPN", name).model.encoder
    report = load_encoder_weights(encoder, file)
    assert report.missing == ()
    assert all(key.startswith(("fc.", "classifier.", "num_batches")) for key in report.unexpected)
    assert all(torch.equal(value, donor[key]) for key, value in encoder.state_dict().items())


def test_weights_of_another_encoder(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), file)
    with pytest.raises(MedvisionError, match=r"fit 0 of .*model\.encoder"):
        UNetV2("pvt_v2_b0", encoder_weights=file)


def test_other_input_channels_are_named(tmp_path: Path, donor: nn.Module, caplog) -> None:
    file = tmp_path / "weights.pth"
    torch.save(donor.state_dict(), file)
    with caplog.at_level(logging.WARNING, logger="medvision"):
        UNetV2("pvt_v2_b0", in_channels=4, encoder_weights=file)
    assert "made for 3 input channels, the model has in_channels=4" in caplog.text


def test_files_that_are_no_weights(tmp_path: Path, donor: nn.Module) -> None:
    def refused(file: Path, said: str) -> None:
        with pytest.raises(MedvisionError, match=said):
            room.read_state_dict(file)

    refused(tmp_path / "absent.pth", "absent.pth.*no such file.*model.encoder_weights")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        refused(tmp_path / name, "cannot be read")
    whole = tmp_path / "whole.pth"
    torch.save(donor.state_dict(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:5000])
    refused(tmp_path / "cut.pth", "cannot be read")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    refused(tmp_path / "empty.pth", "no state dict")
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "pickled.pth")
    refused(tmp_path / "pickled.pth", "pickled Python objects.*state_dict")


BUILDERS = [
    lambda: UNetV2("pvt_v2_b0", encoder_weights="imagenet"),
    lambda: SMP(encoder="resnet18", encoder_weights="imagenet"),
    lambda: SMP(encoder="convnext_atto", encoder_weights="imagenet"),
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine without network and with an empty cache; counts the look-ups."""
    asked: list[str] = []

    def refuse(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("build", BUILDERS)
def test_imagenet_without_network(no_network: list[str], build) -> None:
    with pytest.raises(
        MedvisionError, match=r"ImageNet weights .*could not be downloaded.*model\.encoder_weights=<file>"
    ):
        build()
    assert len(no_network) == 1  # the one short request: the client's slow retries never start
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_imagenet_from_the_cache_without_network(no_network: list[str], tmp_path: Path, donor: nn.Module) -> None:
    name = timm.get_pretrained_cfg("pvt_v2_b0").hf_hub_id.replace("/", "--")
    folder = tmp_path / f"models--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(donor.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    assert_encoder_is(UNetV2("pvt_v2_b0", encoder_weights="imagenet").encoder, donor)


def test_no_weights_exist() -> None:
    with (
        pytest.raises(MedvisionError, match=r"model\.encoder_weights=<file>"),
        room.imagenet_download("convnext_atto_rms"),
    ):
        timm.create_model("convnext_atto_rms", pretrained=True)
