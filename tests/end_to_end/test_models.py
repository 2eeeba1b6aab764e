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


def test_models_are_measured_and_one_that_does_not_fit_says_so(cli, own):
    words = ["image_size=[32,64]", "batch_size=2", "steps=1", "threads=1", "device=cpu", "output=costs.csv"]
    done = cli("models", "--config-dir", str(own), "model=wrong,broad,point", *words, code=1)
    order = [
        "measuring wrong (1 of 3)",
        "measuring point (3 of 3)",
        "| point",
        "| broad",
        "| wrong",
        "numbers: costs.csv",
    ]
    assert sorted(order, key=done.stdout.index) == order
    with (cli.root / "costs.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    point, broad, wrong = rows["point"], rows["broad"], rows["wrong"]
    assert (point["parameters"], point["multiply_adds"]) == ("4", str(32 * 64 * 3))
    weights = 512 * 3 * 31**2
    assert (broad["parameters"], broad["multiply_adds"]) == (str(weights), str(32 * 64 * weights))
    output = 2 * 512 * 32 * 64 * 4
    training, inference = int(broad["training_bytes"]), int(broad["inference_bytes"])
    assert 4 * weights + output < inference < training < 20 * (4 * weights + output)
    assert training > 4 * 4 * weights + output  # with gradients and AdamW's two moments
    assert 0 <= int(point["inference_bytes"]) <= int(point["training_bytes"]) < 5e6
    assert all(float(row[f"{step}_seconds"]) > 0 for row in (point, broad) for step in ("training", "inference"))
    assert "shapes cannot be multiplied" in wrong["error"] and wrong["parameters"] == ""
    assert wrong["error"] in done.stdout and point["error"] == ""
    assert "error: not measured: wrong; the table says why" in done.stderr and "Traceback" not in done.stderr


def test_help_and_misspellings(cli):
    shown = cli("models", "--help").stdout
    assert "model: " in shown and "unetv2" in shown and "image_size: 256" in shown
    assert "steps: 3" in cli("models", "--cfg", "job").stdout
    refused = cli("models", "image_sise=64", code=1).stderr
    assert "did you mean 'image_size'?" in refused and "Traceback" not in refused
