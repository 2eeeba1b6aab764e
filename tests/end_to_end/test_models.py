import csv

import pytest

POINT = """
_target_: torch.nn.Conv2d
in_channels: ${data.spec.in_channels}
out_channels: ${data.spec.num_outputs}
kernel_size: 1
"""
BROAD = """
_target_: torch.nn.Conv2d
in_channels: ${data.spec.in_channels}
out_channels: 512
kernel_size: 31
padding: 15
bias: false
"""
WRONG = """
_target_: torch.nn.Linear
in_features: 7
out_features: ${data.spec.num_outputs}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of models."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "model").mkdir()
    for name, text in {"point": POINT, "broad": BROAD, "wrong": WRONG}.items():
        (folder / f"model/{name}.yaml").write_text(text)
    return folder


def read(path):
    with path.open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def test_models_are_measured(cli, own):
    words = ["image_size=[32,64]", "batch_size=2", "steps=1", "threads=1", "device=cpu", "output=costs.csv"]
    shown = cli("models", "--config-dir", str(own), "model=broad,point", *words).stdout
    assert shown.index("measuring broad (1 of 2)") < shown.index("| point") < shown.index("| broad")
    assert "resident memory, so not exact" in shown and "numbers: costs.csv" in shown
    rows = read(cli.root / "costs.csv")
    point, broad = rows["point"], rows["broad"]
    assert (point["parameters"], point["multiply_adds"]) == ("4", str(32 * 64 * 3))
    weights = 512 * 3 * 31**2
    assert (broad["parameters"], broad["multiply_adds"]) == (str(weights), str(32 * 64 * weights))
    output = 2 * 512 * 32 * 64 * 4
    training, inference = int(broad["training_bytes"]), int(broad["inference_bytes"])
    assert 4 * weights + output < inference < training < 20 * (4 * weights + output)
    assert training > 4 * 4 * weights + output  # with gradients and AdamW's two moments
    assert 0 <= int(point["inference_bytes"]) <= int(point["training_bytes"]) < 5e6
    assert all(float(row[f"{step}_seconds"]) > 0 for row in rows.values() for step in ("training", "inference"))


def test_a_model_that_does_not_fit_says_so(cli, own):
    words = ["image_size=32", "batch_size=2", "steps=1", "device=cpu", "output=fit.csv"]
    done = cli("models", "--config-dir", str(own), "model=wrong,point", *words, code=1)
    assert "error: not measured: wrong; the table says why" in done.stderr and "Traceback" not in done.stderr
    rows = read(cli.root / "fit.csv")
    assert "shapes cannot be multiplied" in rows["wrong"]["error"] and rows["wrong"]["parameters"] == ""
    assert rows["point"]["parameters"] == "4" and rows["wrong"]["error"] in done.stdout


def test_help_and_misspellings(cli):
    shown = cli("models", "--help").stdout
    assert "model: " in shown and "unetv2" in shown and "image_size: 256" in shown
    assert "steps: 3" in cli("models", "--cfg", "job").stdout
    refused = cli("models", "image_sise=64", code=1).stderr
    assert "did you mean 'image_size'?" in refused and "Traceback" not in refused
