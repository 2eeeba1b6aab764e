"""Names of what is written of an image, and of the masks that lie beside; what `explain` refuses before it begins."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medvision import cli
from medvision.errors import MedvisionError
from medvision.explain import start
from medvision.explanation import Choice, Explanation, Target
from medvision.explanation import explain as heat
from medvision.explanation.folder import ExplanationFolder, MaskFiles, Scores

CLASSES = ["ants", "bees"]


def mask_file(path, filled=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6), 255 * filled, np.uint8)).save(path)


def explain(*overrides):
    start(cli.compose("explain", overrides), None, list(overrides))


def test_ids_with_dots_keep_their_files(tmp_path):
    folder = ExplanationFolder(tmp_path, ["layer"])
    for name, value in (("scan/1.2.3", 0.1), ("scan/1.2.4", 0.2), ("photo.5.JPG", 0.3)):
        found = Explanation([Choice(0, "ants")], [0.5], {"fem": torch.full((1, 1, 4, 6), value)})
        folder.heat(name, np.zeros((8, 12, 3), np.uint8), found)
    written = {str(path.relative_to(tmp_path)): float(np.load(path).max()) for path in tmp_path.rglob("*.npy")}
    assert written == pytest.approx({"scan/1.2.3_fem.npy": 0.1, "scan/1.2.4_fem.npy": 0.2, "photo.5_fem.npy": 0.3})


def test_masks_are_found_by_the_names_of_images(tmp_path):
    mask_file(tmp_path / "a" / "1.2.3_Segmentation.png")
    mask_file(tmp_path / "b" / "1.2.4.png", filled=False)
    (tmp_path / "1.2.4.csv").write_text("no mask")
    masks = MaskFiles(tmp_path, ["scan/1.2.3", "1.2.4.jpg", "1.2"])
    assert masks.of("scan/1.2.3", (2, 3)).all() and not masks.of("1.2.4.jpg", (2, 3)).any()
    assert masks.of("1.2", (2, 3)) is None
    with pytest.raises(MedvisionError, match=r"has 2 images, none named after one .*_mask or _segmentation behind"):
        MaskFiles(tmp_path, ["other"])
    with pytest.raises(MedvisionError, match=r"nowhere is not there; expected a folder or a zip archive"):
        MaskFiles(tmp_path / "nowhere", ["1.2.3"])


def test_means_say_over_how_many_images_they_are():
    """Where some images have no heat, means are not of the same images."""
    scores, nan = Scores(nn.Conv2d(1, 1, 1), ["x"]), float("nan")
    scores.rows = [
        ("a", "ants", "fem", "x", [0.25, 0.5, nan, nan]),
        ("b", "ants", "fem", "x", [0.75, nan, nan, 0.5]),
        ("a", "ants", "random heat", "", [0.5, 0.5, 0.0, 0.125]),
    ]
    assert scores.means() == [
        ["fem", "x", "0.500", "0.500 of 1", "-", "0.500 of 1"],
        ["random heat", "", "0.500", "0.500", "0.000", "0.125"],
    ]
    assert scores.table().splitlines()[2] == "b,ants,fem,x,0.75,,,0.5"


def test_the_map_of_a_network_stands_beside_those_of_layers(spec, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 144, 2)).eval()
    image, layers, methods = torch.randn(1, 3, 16, 16), ["0", "2"], ["full_grad", "layer_cam"]
    target = Target(spec("multiclass", target="label"), partial(torch.softmax, dim=1))
    found, scores = heat(model, image, layers, methods, target), Scores(model, layers)
    ExplanationFolder(tmp_path, layers).heat("a", np.zeros((20, 30, 3), np.uint8), found)
    assert np.load(tmp_path / "a_full_grad.npy").shape == (1, 16, 16)
    assert Image.open(tmp_path / "a_full_grad.png").size[0] == 2 * 230  # image and map
    written = {path.name for path in tmp_path.glob("*_overlay.png")}
    assert written == {f"a_{end}_overlay.png" for end in ("full_grad_network", "layer_cam_0", "layer_cam_2")}
    scores.add("a", image, found, target, None)
    assert [words[:2] for words in scores.means()] == [
        ["full_grad", "network"],
        ["layer_cam", "0"],
        ["layer_cam", "2"],
        ["random heat", ""],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=wasps"], "^target=wasps: expected one of predicted, ants, bees$"),
        (["layers=[encoder.layer9]"], r"^Classifier has no layer 'encoder\.layer9': did you mean encoder\.layer"),
        (["layers=[head]"], "^layer head answers 2 for an image of 32x32: no map; choose another$"),
        (["method=activation", "score=true"], "^score=true is of heat, of which method=activation has none"),
        (["layers=[]"], r"^layers=\[\] chooses nothing; leave it out"),
        (["index=[]"], r"^index=\[\] chooses nothing"),
        (["point=5"], r"^point=5: expected \[row,column\]"),
        (["point=[5]"], r"^point=\[5\]: expected \[row,column\]"),
        (["point=[5,b]"], r"^point=\[5, 'b'\]: expected \[row,column\]"),
        (["point=[1,1]"], "^a point is of masks; phantom_insects has labels: leave it out$"),
        (["index=[0,9]"], "^index=9: val has 6 images"),
    ],
)
def test_refuses_for_all_images_at_once(words, message, trained, tmp_path):
    words = words if words[0].startswith("index") else ["index=[0,1]", *words]
    with pytest.raises(MedvisionError, match=message):
        explain(f"run={trained('insects').path}", f"output={tmp_path / 'out'}", *words)
    assert not [*tmp_path.rglob("*.png")]


def test_refuses_images_whose_files_would_have_the_same_names(trained, tmp_path):
    mask_file(tmp_path / "in" / "1.png")
    shutil.copy(tmp_path / "in" / "1.png", tmp_path / "in" / "1.PNG")
    with pytest.raises(MedvisionError, match=r"^1\.PNG and 1\.png would both be written to 1_\*; rename one"):
        explain(f"run={trained('insects').path}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
