import csv
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.inputs import Inputs
from medvision.prediction.folder import PredictionFolder, predict

SIZE = (30, 40)


@pytest.fixture
def images(tmp_path):
    """A folder of images, one below another, with files beside them that are none."""
    root = tmp_path / "images"
    for n, name in enumerate(["b.png", "a.jpg", "deep/er/c.TIF", "deep/a.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)
    for name in ("notes.txt", "deep/more.txt", "._b.png", "README"):
        (root / name).write_text("words")
    return root


NAMES = ["a.jpg", "b.png", "deep/a.png", "deep/er/c.TIF"]


class Bright:
    """Answers that a pixel is what it is bright; counts what it is asked, and stops where it is told to."""

    channels = 3

    def __init__(self, classes=1, stop=None):
        self.classes, self.stop, self.asked = classes, stop, []

    def __call__(self, image, name):
        if name == self.stop:
            raise KeyboardInterrupt
        self.asked.append(name)
        return np.stack([image[..., k] / np.float32(255) for k in range(self.classes)])


def masks(path, classes=("lesion",), threshold=(0.5,), **options):
    return PredictionFolder(path, "mask", classes, Decision(threshold), **options)


def answers(images, output, predictor=None, overwrite=False, **options):
    """Predicts a folder of images: the predictor, and what is broken."""
    predictor = predictor or Bright()
    broken = predict(predictor, Inputs.find(str(images), output), masks(output, **options), overwrite)
    return predictor, broken


def rows(path):
    return list(csv.DictReader((path / "predictions.csv").open()))


def files(path):
    """Each file with its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def names(inputs):
    return [member.name for member in inputs.images]


def test_a_folder_with_all_below_it(images, tmp_path):
    inputs = Inputs.find(str(images), tmp_path / "out")
    assert names(inputs) == NAMES and inputs.root == images
    assert inputs.skipped == Counter({".txt": 2, "hidden": 1, "no ending": 1})
    assert inputs.summary == f"4 images in {images}; skipped, no images: 2 .txt, 1 hidden, 1 no ending"


@pytest.mark.parametrize(
    ("asked", "root", "found"),
    [
        ("images/b.png", "images", ["b.png"]),
        ("images/*.*", "images", ["a.jpg", "b.png"]),
        ("images/**/a.*", "images", ["a.jpg", "deep/a.png"]),
        ("images/d*", "images", ["deep/a.png", "deep/er/c.TIF"]),
        ("im*/[ab].*", ".", ["images/a.jpg", "images/b.png"]),
    ],
)
def test_a_file_or_a_glob(images, tmp_path, monkeypatch, asked, root, found):
    monkeypatch.chdir(tmp_path)
    for text in (asked, str(tmp_path / asked)):
        inputs = Inputs.find(text, tmp_path / "out")
        assert (names(inputs), inputs.root) == (found, tmp_path / root)
        assert all(member.read() == (inputs.root / member.name).read_bytes() for member in inputs.images)


def test_a_name_with_brackets_is_a_name_first(images, tmp_path):
    (images / "b.png").rename(images / "b[1].png")
    assert names(Inputs.find(str(images / "b[1].png"), tmp_path)) == ["b[1].png"]


def test_a_zip_archive_is_read_in_place(images, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as handle:
        for name in NAMES:
            handle.write(images / name, name)
    inputs = Inputs.find(str(archive), tmp_path / "zipped")
    assert names(inputs) == NAMES and inputs.root == archive
    assert predict(Bright(), inputs, masks(tmp_path / "zipped")) == {}
    answers(images, tmp_path / "plain")
    assert files(tmp_path / "zipped").keys() == files(tmp_path / "plain").keys()
    assert rows(tmp_path / "zipped") == rows(tmp_path / "plain")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("nowhere", r"nowhere is not there; expected an image, a folder, a zip archive or a glob"),
        ("images/*.gif", r"\*\.gif holds no image; expected \.png"),
        ("images/notes.txt", r"notes\.txt holds no image \(1 \.txt\); expected \.png"),
    ],
)
def test_what_holds_no_image_is_refused(images, tmp_path, asked, words):
    with pytest.raises(MedvisionError, match=words):
        Inputs.find(str(tmp_path / asked), tmp_path / "out")


def test_what_was_written_is_no_input(images):
    answers(images, images / "out")
    assert names(Inputs.find(str(images), images / "out")) == NAMES
    for asked in (images, images / "b.png", f"{images}/*.png"):
        with pytest.raises(MedvisionError, match=r"output=.*images is the folder of the images"):
            Inputs.find(str(asked), images)


@pytest.mark.parametrize(
    ("classes", "probabilities", "endings"),
    [
        (["lesion"], False, ["mask", "overlay"]),
        (["lesion"], True, ["mask", "overlay", "probability"]),
        (["ring", "a/b c"], False, ["a_b_c_mask", "overlay", "ring_mask"]),
        (["ring", "dot"], True, ["dot_mask", "dot_probability", "overlay", "ring_mask", "ring_probability"]),
    ],
)
def test_names_mirror_the_folders_of_the_images(images, tmp_path, classes, probabilities, endings):
    options = {"classes": classes, "threshold": [0.5] * len(classes), "probabilities": probabilities}
    answers(images, tmp_path / "out", Bright(len(classes)), **options)
    stems = ["a", "b", "deep/a", "deep/er/c"]
    expected = {f"{stem}_{ending}.png" for stem in stems for ending in endings}
    assert files(tmp_path / "out").keys() == expected | {"prediction.json", "predictions.csv", ".lock"}
    assert [(row["file"], row["class"]) for row in rows(tmp_path / "out")] == [(n, c) for n in NAMES for c in classes]


@pytest.mark.parametrize(
    ("first", "second", "classes", "where"),
    [
        ("a.jpg", "a.png", ["lesion"], "a_mask.png"),
        ("deep/x.png", "deep/x.tif", ["lesion"], "deep/x_mask.png"),
        ("x.png", "x_b.png", ["b_c", "c"], "x_b_c_mask.png"),
    ],
)
def test_images_that_would_be_written_to_one_file_are_refused(tmp_path, first, second, classes, where):
    folder = masks(tmp_path / "out", classes, [0.5] * len(classes))
    words = rf"{first} and {second} would both be written to {where}"
    with pytest.raises(MedvisionError, match=words), folder.open([first, second]):
        pass
    assert not (tmp_path / "out").exists()
    labels = PredictionFolder(tmp_path / "out", "label", classes, Decision(()))
    with labels.open([first, second]):  # a table has no such names
        pass


def test_masks_and_what_is_measured_of_them(tmp_path):
    plane = np.zeros((9, 12), np.float32)
    plane[0, 0] = plane[1, 1] = 0.5  # one component by a corner; a probability that is the threshold counts
    plane[4:6, 5:9] = 0.75
    plane[8, 11] = 1
    image = np.full((9, 12, 1), 100, np.uint8)
    folder = masks(tmp_path, ["round", "square"], [0.5, 0.25], probabilities=True)
    with folder.open(["x.png"]):
        folder.add("x.png", image, np.stack([plane, plane * 0 + 0.2]))
    assert rows(tmp_path) == [
        {
            "file": "x.png",
            "class": "round",
            "threshold": "0.5",
            "area": "11",
            "share": str(11 / 108),
            "components": "3",
        },
        {"file": "x.png", "class": "square", "threshold": "0.25", "area": "0", "share": "0.0", "components": "0"},
    ]
    mask, probability = (np.asarray(Image.open(tmp_path / f"x_round_{kind}.png")) for kind in ("mask", "probability"))
    np.testing.assert_array_equal(mask, np.where(plane >= 0.5, 255, 0))
    assert (mask.dtype, probability.dtype) == (np.uint8, np.uint16)
    np.testing.assert_allclose(probability / 65535, plane, atol=1e-5)
    overlay = np.asarray(Image.open(tmp_path / "x_overlay.png"))
    assert overlay.shape == (9, 12, 3)
    assert (overlay[:3, 6:] == 100).all()
    assert overlay[4, 5, 0] > 200 and overlay[4, 5, 2] < 70  # the outline is orange


def test_labels_are_rows(tmp_path):
    image = np.zeros((3, 3, 3), np.uint8)
    for name, threshold in (("sigmoid", [0.25, 0.5]), ("softmax", [])):
        folder = PredictionFolder(tmp_path / name, "label", ["ants", "bees"], Decision(tuple(threshold)))
        with folder.open(["x/1.png"]):
            folder.add("x/1.png", image, np.array([0.375, 0.375 if threshold else 0.625], np.float32))
        assert files(tmp_path / name).keys() == {".lock", "prediction.json", "predictions.csv"}
    header = "file,class,threshold,probability,decision\n"
    assert (tmp_path / "sigmoid" / "predictions.csv").read_text() == (
        f"{header}x/1.png,ants,0.25,0.375,1\nx/1.png,bees,0.5,0.375,0\n"
    )
    assert (tmp_path / "softmax" / "predictions.csv").read_text() == (
        f"{header}x/1.png,ants,,0.375,0\nx/1.png,bees,,0.625,1\n"
    )


def test_a_finished_prediction_is_not_touched(images, tmp_path):
    first, _ = answers(images, tmp_path / "out")
    before = files(tmp_path / "out")
    again, _ = answers(images, tmp_path / "out")
    assert (first.asked, again.asked) == (NAMES, [])
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("stop", NAMES)
def test_an_interrupted_prediction_goes_on_and_ends_alike(images, tmp_path, stop):
    answers(images, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        answers(images, tmp_path / "out", Bright(stop=stop))
    again, _ = answers(images, tmp_path / "out")
    assert again.asked == NAMES[NAMES.index(stop) :]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("left", range(1, 50, 6))
def test_a_line_that_a_kill_has_cut_is_written_again(images, tmp_path, left):
    options = {"classes": ["round", "square"], "threshold": [0.5, 0.5]}
    answers(images, tmp_path / "out", Bright(2), **options)
    before, table = files(tmp_path / "out"), tmp_path / "out" / "predictions.csv"
    for picture in tmp_path.glob("out/deep/er/*.png"):
        picture.unlink()
    table.write_bytes(table.read_bytes()[:-left])
    again, _ = answers(images, tmp_path / "out", Bright(2), **options)
    assert again.asked == ["deep/er/c.TIF"]
    assert files(tmp_path / "out") == before


def test_a_kill_between_the_rows_and_the_pictures_of_an_image(images, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("medvision.prediction.folder.overlay", stop)
        answers(images, tmp_path / "out")
    assert [row["file"] for row in rows(tmp_path / "out")] == ["a.jpg"]
    (tmp_path / "out" / ".a_mask.png.123.tmp").write_text("half of a picture")
    again, _ = answers(images, tmp_path / "out")
    answers(images, tmp_path / "whole")
    assert again.asked == NAMES and files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_picture_that_was_removed_is_made_again(images, tmp_path):
    answers(images, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "out" / "deep" / "a_overlay.png").unlink()
    again, _ = answers(images, tmp_path / "out")
    assert again.asked == ["deep/a.png"] and files(tmp_path / "out") == before


def test_new_images_join_and_a_part_of_them_may_be_asked_for(images, tmp_path):
    answers(images / "b.png", tmp_path / "out")
    assert [row["file"] for row in rows(tmp_path / "out")] == ["b.png"]
    joined, _ = answers(images, tmp_path / "out")
    assert joined.asked == ["a.jpg", "deep/a.png", "deep/er/c.TIF"]
    answers(images / "a.jpg", tmp_path / "out")
    assert [row["file"] for row in rows(tmp_path / "out")] == NAMES


def test_other_settings_are_refused_by_name(images, tmp_path):
    answers(images, tmp_path / "out", tta="none", runs=["a"])
    before = files(tmp_path / "out")
    with pytest.raises(MedvisionError) as caught:
        answers(images, tmp_path / "out", tta="d4", runs=["a"], threshold=[0.25])
    said = str(caught.value)
    assert "tta: none -> d4\n" in said and "threshold: [0.5] -> [0.25]\n" in said and "overwrite=true" in said
    assert "runs" not in said and "classes" not in said
    assert files(tmp_path / "out") == before
    settings = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert settings["tta"] == "none" and settings["threshold"] == [0.5]


def test_overwrite_begins_anew_and_leaves_nothing_behind(images, tmp_path):
    answers(images, tmp_path / "out", probabilities=True)
    (tmp_path / "out" / "mine.txt").write_text("kept")
    again, _ = answers(images, tmp_path / "out", overwrite=True, threshold=[0.25])
    answers(images, tmp_path / "whole", threshold=[0.25])
    assert again.asked == NAMES
    assert files(tmp_path / "out") == files(tmp_path / "whole") | {"mine.txt": b"kept"}


@pytest.mark.parametrize("name", ["deep/a_mask.png", "b_overlay.png", "predictions.csv"])
def test_files_of_others_are_not_written_over(images, tmp_path, name):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(MedvisionError, match=rf"{name}; choose another output, or write over them with overwrite=true"):
        answers(images, out)
    assert {n: c for n, c in files(out).items() if n != ".lock"} == {name: b"mine"}
    answers(images, out, overwrite=True)
    assert (out / name).read_bytes() != b"mine" and len(rows(out)) == 4


def test_files_of_others_are_not_written_over_later(images, tmp_path):
    answers(images / "b.png", tmp_path / "out")
    (tmp_path / "out" / "a_mask.png").write_text("mine")
    with pytest.raises(MedvisionError, match=r"of no prediction that is known here: .*out/a_mask\.png; choose"):
        answers(images, tmp_path / "out")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"target": "mask"}'])
def test_a_record_of_something_else_is_refused(images, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prediction.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(MedvisionError, match=r"prediction\.json is no record of a prediction"):
            answers(images, tmp_path / "out", overwrite=overwrite)


def test_a_table_with_other_columns_is_refused(images, tmp_path):
    answers(images, tmp_path / "out")
    (tmp_path / "out" / "predictions.csv").write_text("id,class\n")
    with pytest.raises(MedvisionError, match=r"has the columns \['id', 'class'\], expected \['file', 'class'"):
        answers(images, tmp_path / "out")
    (tmp_path / "out" / "predictions.csv").unlink()
    assert len(answers(images, tmp_path / "out", overwrite=True)[0].asked) == 4


def test_broken_images_are_named_and_the_others_done(images, tmp_path):
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:500])
    (images / "deep" / "a.png").write_text("no image")
    predictor, broken = answers(images, tmp_path / "out")
    assert [*broken] == ["b.png", "deep/a.png"] and "cannot be decoded" in broken["b.png"]
    assert predictor.asked == ["a.jpg", "deep/er/c.TIF"] == [row["file"] for row in rows(tmp_path / "out")]
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(images / "b.png")
    again, broken = answers(images, tmp_path / "out")
    assert again.asked == ["b.png"] and [*broken] == ["deep/a.png"]


def test_a_turned_photo_is_answered_upright(tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "white").save(tmp_path / "in" / "x.jpg", exif=exif)
    answers(tmp_path / "in", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "x_mask.png").size == (30, 40)
    assert rows(tmp_path / "out")[0]["area"] == "1200"


def test_a_folder_in_use_is_refused(images, tmp_path, in_processes):
    folder = masks(tmp_path / "out")
    with folder.open(NAMES):
        assert in_processes(1, lambda _: _refusal(tmp_path / "out")) == [
            f"another process predicts into {tmp_path / 'out'}; wait for it or stop it"
        ]


def _refusal(path: Path) -> str:
    try:
        with masks(path).open(NAMES):
            return "opened"
    except MedvisionError as error:
        return str(error)


def test_progress_is_lines_where_there_is_no_terminal(images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("medvision.prediction.folder.LINE_EVERY", 0)
    caplog.set_level("INFO", "medvision")
    answers(images / "b.png", tmp_path / "out")
    answers(images, tmp_path / "out")
    assert caplog.messages == ["0 of 1 images", "1 of 4 images are already there"] + [
        f"{n} of 3 images" for n in range(3)
    ]
