"""Agreement with the published implementations' outputs, and what `load_published` refuses."""

import importlib.util
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from medvision import cli
from medvision.errors import MedvisionError
from medvision.models import SMP, UNetFamily, UNetPP, UNetV2, load_published

REFERENCE = Path(
    os.environ.get("MEDVISION_REFERENCE", Path(__file__).resolve().parents[2].parent / "shared" / "reference")
)
pytestmark = pytest.mark.skipif(
    not (REFERENCE / "fill.py").is_file(),
    reason=f"no reference outputs in {REFERENCE} (set MEDVISION_REFERENCE)",
)


def fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_fill", REFERENCE / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def published(name: str) -> dict[str, Tensor]:
    return fill().fill_state_dict(json.loads((REFERENCE / f"{name}.keys.json").read_text()), seed=0)


def check_outputs(name: str, outputs: list[Tensor], atol: float = 2e-5) -> None:
    with np.load(REFERENCE / f"{name}.npz") as stored:
        wanted = [torch.from_numpy(stored[f"out{i}"]) for i in range(len(outputs))]
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda text, i=i: f"out{i}: {text}")


@pytest.mark.parametrize(
    ("name", "build", "shape"),
    [
        ("unetv2_256", lambda: UNetV2(deep_supervision=True), (1, 3, 256, 256)),
        ("unetpp_ds_96", lambda: UNetPP(deep_supervision=True), (2, 3, 96, 96)),
        ("unetpp_96", lambda: UNetPP(), (2, 3, 96, 96)),
    ],
)
def test_outputs_equal_the_published(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = build().eval()
    report = load_published(model, published(name))
    assert report.missing == ()
    assert report.unexpected == (("deconv5.weight",) if name == "unetv2_256" else ())
    image = fill().rand_input(shape, seed=1)
    with torch.inference_mode():
        main, heads = model(image), model.heads(image)
    # U-Net++ publishes its shallowest node first.
    check_outputs(name, heads[::-1] if name == "unetpp_ds_96" else heads)
    torch.testing.assert_close(main, heads[0], rtol=0, atol=1e-6)


def test_a_file_and_a_model_without_deep_supervision(tmp_path: Path) -> None:
    file = tmp_path / "published.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in published("unetv2_256").items()}}, file)
    model = UNetV2().eval()
    report = load_published(model, file)
    assert report.missing == ()
    assert set(report.unexpected) == {"deconv5.weight"} | {
        f"seg_outs.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    }
    with torch.inference_mode():
        check_outputs("unetv2_256", [model(fill().rand_input((1, 3, 256, 256), seed=1))])


def test_a_published_pvt_fills_the_encoder_alone() -> None:
    start = "encoder.backbone."
    state = {k.removeprefix(start): v for k, v in published("unetv2_256").items() if k.startswith(start)}
    state |= {"head.weight": torch.zeros(1000, 512), "head.bias": torch.zeros(1000)}
    model = UNetV2()
    before = model.out[0].weight.clone()
    report = load_published(model, state)
    assert len(report.matched) == len(model.encoder.state_dict())
    assert not [key for key in report.missing if key.startswith("encoder.")]
    assert set(report.unexpected) == {start + "head.weight", start + "head.bias"}
    assert torch.equal(model.out[0].weight, before)
    block = model.encoder.state_dict()["stages_2.blocks.3.attn.kv.weight"]
    assert torch.equal(block, state["block3.3.attn.kv.weight"])


@pytest.mark.parametrize(
    ("name", "overrides", "shape"),
    [
        ("unetv2_256", ["model=unetv2", "model.encoder=pvt_v2_b2"], (1, 3, 256, 256)),
        ("unetpp_ds_96", ["model=unetpp", "model.deep_supervision=true"], (2, 3, 96, 96)),
        ("unetpp_96", ["model=unetpp"], (2, 3, 96, 96)),
    ],
)
def test_one_override_begins_with_a_published_file(
    tmp_path: Path, name: str, overrides: list[str], shape: tuple[int, ...]
) -> None:
    file = tmp_path / "published.pth"
    torch.save(published(name), file)
    cfg = cli.compose("train", [*overrides, f"model.published_weights={file}", "model.init=normal", "data=phantom"])
    model = instantiate(cfg.model, _convert_="all").eval()
    with torch.inference_mode():
        heads = model.heads(fill().rand_input(shape, seed=1))
    check_outputs(name, heads[::-1] if name == "unetpp_ds_96" else heads)


def test_a_missing_published_file() -> None:
    with pytest.raises(
        MedvisionError, match=r"nowhere\.pth': no such file\. Give model\.published_weights=null, a file"
    ):
        UNetPP(published_weights="nowhere.pth")


@pytest.mark.parametrize(
    "build",
    [
        lambda weights: UNetV2("pvt_v2_b2", encoder_weights=weights),
        lambda weights: SMP("FPN", "pvt_v2_b2", encoder_weights=weights),
        lambda weights: UNetFamily("pvt_v2_b2", encoder_weights=weights, width=4),
    ],
    ids=["unetv2", "smp", "family"],
)
def test_a_published_pvt_is_an_encoder_file(tmp_path: Path, build: Callable[[Path], nn.Module]) -> None:
    start, file = "encoder.backbone.", tmp_path / "pvt_v2_b2.pth"
    state = {k.removeprefix(start): v for k, v in published("unetv2_256").items() if k.startswith(start)}
    torch.save(state | {"head.weight": torch.zeros(1000, 512), "head.bias": torch.zeros(1000)}, file)
    model, whole = build(file).eval(), UNetV2().eval()
    load_published(whole, published("unetv2_256"))
    image = fill().rand_input((1, 3, 64, 96), seed=1)
    with torch.inference_mode():
        got, wanted = model.get_submodule(model.encoder_at)(image)[-4:], whole.encoder(image)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("build", "name", "said"),
    [
        (
            lambda: UNetPP(),
            "unetpp_ds_96",
            r"8 are unknown \(final1\.weight.*2 of .*out\.0\.weight.*deep_supervision",
        ),
        (
            lambda: UNetPP(deep_supervision=True),
            "unetpp_96",
            r"2 are unknown \(final\.weight.*deep_supervision",
        ),
        (
            lambda: UNetPP(num_outputs=2),
            "unetpp_96",
            r"final\.weight \(1, 32, 1, 1\) in the file, \(2, 32, 1, 1\)",
        ),
        (
            lambda: UNetPP(in_channels=1),
            "unetpp_96",
            "made for 3 input channels, the model has in_channels=1",
        ),
        (lambda: UNetPP(), "unetv2_256", "412 are unknown"),
        (lambda: UNetV2("pvt_v2_b0"), "unetv2_256", "have another shape"),
        (lambda: UNetV2("pvt_v2_b0"), "unetpp_96", "212 are unknown"),
        (lambda: SMP(encoder="resnet18"), "unetpp_96", "UNetV2 or UNetPP, not into SMP"),
    ],
)
def test_a_wrong_file_is_refused_whole(build: Callable[[], nn.Module], name: str, said: str) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MedvisionError, match=said):
        load_published(model, published(name))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_missing_key_is_refused() -> None:
    state = dict(published("unetpp_96"))
    del state["conv2_1.bn1.running_mean"]
    with pytest.raises(MedvisionError, match=r"1 of 212 expected ones are missing \(nodes\.x2_1\.bn1\.running_mean\)"):
        load_published(UNetPP(), state)
