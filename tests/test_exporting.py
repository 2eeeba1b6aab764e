"""Exported networks: the very probabilities, all that is needed to use them, and no file that answers otherwise."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.losses import CrossEntropy, SegmentationLoss
from medvision.models import SMP, Classifier, UNetPP, UNetV2
from medvision.prediction import Predictor, Trained
from medvision.prediction.exporting import export, metadata
from medvision.tasks import ClassificationTask, SegmentationTask

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/onnx_predict.py"
NETWORKS = {
    "unet": partial(SMP, encoder="resnet18"),
    "unetpp": partial(UNetPP, channels=(4, 8), deep_supervision=True),
    "unetv2": partial(UNetV2, "pvt_v2_b0", deep_supervision=True),
    "classifier": partial(Classifier, "resnet10t"),
}


def trained(spec, model, threshold=(), temperature=(), seed=0):
    torch.manual_seed(seed)
    network = model(in_channels=spec.in_channels, num_outputs=len(spec.classes))
    if spec.target == "mask":
        task = SegmentationTask(network, SegmentationLoss({"bce": 1}), partial(torch.optim.SGD, lr=1), None, spec)
    else:
        task = ClassificationTask(network, CrossEntropy(), partial(torch.optim.SGD, lr=1), None, spec)
    task.eval()
    decision = Decision(threshold, temperature)
    return Trained("run", task, np.array(spec.mean), np.array(spec.std), decision=decision)


def photo(height=70, width=90, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def loaded(path):
    """What a file answers to normalised images, and its facts, by its own library alone."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        facts = session.get_modelmeta().custom_metadata_map["medvision"]
        return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0]), json.loads(facts)
    extra = {"medvision.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["medvision.json"])


@pytest.mark.parametrize(
    ("name", "form", "dynamic"),
    [
        ("unet", "onnx", False),
        ("unetpp", "onnx", True),
        ("unetv2", "onnx", False),
        ("unetv2", "torch_export", False),
        ("classifier", "onnx", False),
        ("classifier", "torch_export", True),
    ],
)
def test_answers_as_the_network(name, form, dynamic, spec, tmp_path):
    label = name == "classifier"
    facts = spec("multiclass" if label else "binary", target="label" if label else "mask", image_size=[64, 96])
    model = trained(facts, NETWORKS[name], () if label else (0.4,))
    path = tmp_path / "model"
    path = path.with_suffix(".onnx" if form == "onnx" else ".pt2")
    difference, own = export(model, path, form, [photo(), photo(50, 120)], dynamic)
    assert difference < 1e-5 and own == difference
    answer, found = loaded(path)
    assert found == metadata(model, dynamic)
    assert found["activation"] == ("softmax" if label else "sigmoid") and found["size"] == [64, 96]
    assert found["threshold"] == ([] if label else [0.4]) and found["mean"] == [0.7, 0.6, 0.5]
    assert (found["size_multiple_of"] is not None) == dynamic
    for batch, size in [(1, (64, 96)), (5, (64, 96)), *([(2, (128, 64))] if dynamic else [])]:
        image = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            torch.testing.assert_close(answer(image), model.task.model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [(), (0.4, 2.5)])
def test_the_example_answers_as_predict(temperature, spec, tmp_path):
    """Several classes, grey, an image that grows: what the end-to-end test does not meet."""
    facts = spec("multilabel", in_channels=1, image_size=[64, 96])
    model = trained(facts, NETWORKS["unetpp"])
    image, size = photo(40, 120, 1), (40, 120)
    Image.fromarray(image[..., 0]).save(tmp_path / "image.png")
    probability = Predictor([model])(image)
    threshold = tuple(float(np.median(plane)) for plane in probability)
    model = dataclasses.replace(model, decision=Decision(threshold).at(temperature))
    probability = Predictor([model])(image)
    export(model, tmp_path / "model.onnx", "onnx", [image])
    masks = [tmp_path / f"{name}.png" for name in facts.classes]
    subprocess.run([sys.executable, EXAMPLE, tmp_path / "model.onnx", tmp_path / "image.png", *masks], check=True)
    for path, plane, at in zip(masks, probability, model.decision.threshold, strict=True):
        mask = np.asarray(Image.open(path))
        assert mask.shape == size and set(np.unique(mask)) == {0, 255}
        assert ((mask > 0) != (plane >= at)).mean() < 1e-3


@pytest.mark.parametrize(
    ("kind", "threshold", "temperature"),
    [("multiclass", (), ()), ("multiclass", (), (2.5,)), ("multilabel", (0.5, 0.5), (0.4, 2.5))],
)
def test_the_example_answers_labels(kind, threshold, temperature, spec, tmp_path):
    facts = spec(kind, target="label", image_size=[64, 96])
    model = trained(facts, NETWORKS["classifier"], threshold, temperature)
    Image.fromarray(photo()).save(tmp_path / "image.png")
    export(model, tmp_path / "model.onnx", "onnx", [photo()])
    command = [sys.executable, EXAMPLE, tmp_path / "model.onnx", tmp_path / "image.png"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    values = Predictor([model])(photo())
    assert [line.split(": ")[0] for line in said[:-1]] == [*facts.classes]
    np.testing.assert_allclose([float(line.split(": ")[1]) for line in said[:-1]], values, atol=2e-6)


class Other(nn.Conv2d):
    """Answers otherwise when it is traced."""

    def __init__(self, in_channels, num_outputs):
        super().__init__(in_channels, num_outputs, 1)

    def forward(self, image):
        return super().forward(image) + torch.compiler.is_exporting()


class Branching(Other):
    """Cannot be traced: what it does depends on what it sees."""

    def forward(self, image):
        return super().forward(image) if image.mean() > 0 else -super().forward(image)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Other, r"differ by up to 0\.\d+ from those of the network itself, more than tolerance=0\.0001; nothing was"),
        (Branching, r"torch\.export refuses this network \(.+\); this network has operations that cannot be traced"),
    ],
)
def test_what_would_answer_otherwise_is_not_written(model, words, spec, tmp_path):
    with pytest.raises(MedvisionError, match=words):
        export(trained(spec(), model), tmp_path / "model.pt2", "torch_export", [photo()])
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_one_size_says_so(spec, tmp_path):
    tied = partial(Classifier, "vit_tiny_patch16_224")
    model = trained(spec("multiclass", target="label", image_size=224), tied)
    with pytest.raises(MedvisionError, match="leave dynamic_size out"):
        export(model, tmp_path / "model.pt2", "torch_export", [photo()], dynamic_size=True)


def test_a_compiled_network_is_exported(spec, tmp_path):
    model = trained(spec(), NETWORKS["unetpp"])
    model.task.model.compile(backend="eager")
    assert export(model, tmp_path / "model.pt2", "torch_export", [photo()])[0] < 1e-5


def test_the_difference_from_a_run_in_16_bits_is_told(spec, tmp_path):
    model = dataclasses.replace(
        trained(spec(), NETWORKS["unetpp"]), precision=MixedPrecision("bf16-mixed", device="cpu")
    )
    difference, own = export(model, tmp_path / "model.pt2", "torch_export", [photo()])
    assert difference < 1e-5 < own < 0.1


def test_missing_packages_are_named_with_their_cure(spec, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else there(name))
    with pytest.raises(MedvisionError, match="pip install onnx onnxruntime onnxscript"):
        export(trained(spec(), Other), tmp_path / "model.onnx", "onnx", [photo()])
    with pytest.raises(MedvisionError, match="format=tensorrt: expected one of onnx, torch_export"):
        export(trained(spec(), Other), tmp_path / "model.plan", "tensorrt", [photo()])
