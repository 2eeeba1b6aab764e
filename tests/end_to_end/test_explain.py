import csv

import numpy as np
from PIL import Image

LAYERS = [f"encoder.stages_{n}" for n in (1, 2)]


def test_heat_scores_and_activations_of_a_split(cli, finished, tmp_path):
    out = tmp_path / "out"
    words = [f"layers=[{','.join([*LAYERS, LAYERS[0]])}]", "method=[layer_cam,eigen_cam,activation]", "score=true"]
    done = cli("explain", f"run={finished[0]}", "split=val", "index=[0,5]", f"output={out}", *words)
    assert f"2 of 2 images explained: {out}" in done.stdout and "random heat" in done.stdout
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert len(rows) == 2 * (2 * 2 + 1) and {row["class"].partition(",")[0] for row in rows} == {"lesion"}
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in ("deletion", "insertion", "inside") if row[key])
    assert [(row["method"], row["layer"]) for row in rows[:5]] == [
        *((method, layer) for method in ("layer_cam", "eigen_cam") for layer in LAYERS),
        ("random heat", ""),
    ]
    assert all(abs(float(row["likeness"])) < 0.1 for row in rows if row["method"] == "random heat")
    for name in {row["file"] for row in rows}:
        heat = np.load(out / f"{name}_layer_cam.npy")
        assert heat.shape == (2, 32, 48) and heat.min() >= 0 and heat.max() <= 1
        sizes = {
            Image.open(out / f"{name}_layer_cam_{layer}_{kind}.png").size
            for layer in LAYERS
            for kind in ("heat", "overlay")
        }
        [(width, height)] = sizes  # that of the image
        grey = np.asarray(Image.open(out / f"{name}_layer_cam_{LAYERS[0]}_heat.png"))
        assert grey.shape == (height, width) and grey.max() == (255 if heat[0].max() else 0)
        assert Image.open(out / f"{name}_layer_cam.png").size[0] == 3 * 230
        assert np.load(out / f"{name}_activation_{LAYERS[0]}.npy").shape == (
            64,
            4,
            8,
        )  # of 32x64, a multiple of the stride
        assert Image.open(out / f"{name}_activation_{LAYERS[0]}.png").size[0] > 224


def test_images_of_ones_own(cli, finished, tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in/a.png")
    Image.fromarray(pixels[:20]).save(tmp_path / "in/c.png")
    (tmp_path / "in/b.png").write_bytes(b"no image")
    words = [f"run={finished[0]}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "point=[20,35]"]
    nowhere = {"MEDVISION_DATA": "/proc/nowhere", "MEDVISION_CACHE": "/proc/nowhere"}
    done = cli("explain", *words, code=1, **nowhere)
    assert "1 of 3 images explained" in done.stdout and "broken are 2 of 3 images:\n  b.png: " in done.stderr
    outside = "c.png: point=[20, 35] lies outside of the image, which has rows 0 to 19 and columns 0 to 69"
    assert outside in done.stderr
    assert np.load(tmp_path / "out/a_grad_cam.npy").shape == (4, 32, 48)
    assert Image.open(tmp_path / "out/a_grad_cam_encoder.stages_2_overlay.png").size == (70, 40)
    assert "which images? input=" in cli("explain", f"run={finished[0]}", code=1).stderr
