import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medvision.build import load_run
from medvision.data.images import read_image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/onnx_predict.py"


def test_an_exported_run_masks_as_predict(cli, finished, tmp_path, monkeypatch):
    folder, model = finished[0], tmp_path / "model.onnx"
    done = cli("export", f"run={folder}", f"output={model}", "images=3")
    assert "probabilities of 3 images differ by at most " in done.stdout and f"onnx: {model}" in done.stdout
    for name, value in cli.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "images").mkdir()
    for sample in load_run(folder).data.splits["test"][:3]:
        Image.fromarray(read_image(sample.image, 3)).save(tmp_path / f"images/{sample.id}.png")
    cli("predict", f"run={folder}", f"input={tmp_path / 'images'}", f"output={tmp_path / 'out'}")
    for image in (tmp_path / "images").iterdir():
        subprocess.run([sys.executable, EXAMPLE, model, image, tmp_path / "mask.png"], check=True)
        paths = (tmp_path / "mask.png", tmp_path / f"out/{image.stem}_mask.png")
        found, expected = (np.asarray(Image.open(path)) for path in paths)
        assert found.shape == expected.shape and (found != expected).mean() < 1e-3


def test_a_file_that_is_there_stays_and_any_images_do_for_the_check(cli, finished, tmp_path):
    words = [f"run={finished[0]}", "format=torch_export", f"output={tmp_path / 'model.pt2'}"]
    (tmp_path / "model.pt2").touch()
    error = cli("export", *words, code=1).stderr
    assert f"{tmp_path / 'model.pt2'} is already there" in error and "overwrite=true" in error
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "image.png")
    nowhere = {"MEDVISION_DATA": "/proc/nowhere", "MEDVISION_CACHE": "/proc/nowhere"}
    done = cli("export", *words, "overwrite=true", f"input={tmp_path / 'image.png'}", **nowhere)
    assert "probabilities of 1 images differ by at most " in done.stdout
    assert torch.export.load(tmp_path / "model.pt2").module()(torch.zeros(3, 3, 32, 48)).shape == (3, 1, 32, 48)
