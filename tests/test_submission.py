import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medvision.errors import MedvisionError
from medvision.submission import FORMATS, check_submission, require_submittable, write_submission

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"ISIC_0000003": (5, 7), "ISIC_0000001": (9, 4), "ISIC_0012345": (6, 6)}
LESION = "ISIC_0000003_segmentation.png"


def masks_of(format, seed=0):
    generator = np.random.default_rng(seed)
    kinds = len(FORMATS[format].kinds)
    return {image: generator.random((kinds, *size)) < 0.4 for image, size in SIZES.items()}


def png(pixels, mode=None, kind="PNG"):
    data = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(data, kind)
    return data.getvalue()


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            archive.writestr(name, data)


@pytest.mark.parametrize("format", FORMATS)
def test_archive_holds_the_masks_and_passes_the_check(tmp_path, format):
    path, masks = tmp_path / "out.zip", masks_of(format)
    write_submission(path, format, masks.items())
    check_submission(path, format, SIZES)
    files = members(path)
    assert [*files] == sorted(files)
    assert len(files) == len(SIZES) * len(FORMATS[format].kinds)
    for image, mask in masks.items():
        for kind, layer in zip(FORMATS[format].kinds, mask, strict=True):
            decoded = Image.open(io.BytesIO(files[f"{image}_{kind}.png"]))
            assert (decoded.format, decoded.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(decoded), np.where(layer, 255, 0))
    assert [file.name for file in tmp_path.iterdir()] == ["out.zip"]


def test_names_of_the_challenges():
    assert FORMATS["isic2017"].names("ISIC_0000003") == FORMATS["isic2018_task1"].names("ISIC_0000003") == [LESION]
    assert FORMATS["isic2018_task2"].names("ISIC_0000003") == [
        "ISIC_0000003_attribute_pigment_network.png",
        "ISIC_0000003_attribute_negative_network.png",
        "ISIC_0000003_attribute_streaks.png",
        "ISIC_0000003_attribute_milia_like_cyst.png",
        "ISIC_0000003_attribute_globules.png",
    ]


def test_attributes_are_in_the_order_of_the_data_set():
    config = yaml.safe_load((ROOT / "conf/data/isic2018_attributes.yaml").read_text())
    assert FORMATS["isic2018_task2"].kinds == tuple(f"attribute_{name}" for name in config["spec"]["classes"])


@given(st.permutations([*SIZES]))
def test_bytes_depend_on_neither_time_nor_order(tmp_path_factory, order):
    folder, masks = tmp_path_factory.mktemp("bytes"), masks_of("isic2018_task2")
    write_submission(folder / "a.zip", "isic2018_task2", masks.items())
    write_submission(folder / "b.zip", "isic2018_task2", ((image, masks[image]) for image in order))
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()
    with zipfile.ZipFile(folder / "a.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}


def test_a_failure_leaves_the_older_archive(tmp_path):
    path = tmp_path / "out.zip"
    path.write_bytes(b"older")

    def broken():
        yield "ISIC_0000001", np.zeros((1, 9, 4), bool)
        raise RuntimeError("out of images")

    with pytest.raises(RuntimeError, match="out of images"):
        write_submission(path, "isic2017", broken())
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["out.zip"]


def test_a_full_disk_leaves_the_older_archive(tmp_path, monkeypatch):
    path = tmp_path / "out.zip"
    write_submission(path, "isic2017", masks_of("isic2017").items())
    older, write = path.read_bytes(), zipfile.ZipFile.writestr

    def full(archive, entry, data):
        if len(archive.namelist()) == 2:
            raise OSError("no space left")
        write(archive, entry, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="no space left"):
        write_submission(path, "isic2017", masks_of("isic2017", seed=1).items())
    assert path.read_bytes() == older
    assert [file.name for file in tmp_path.iterdir()] == ["out.zip"]


GOOD = np.zeros((1, 5, 7), bool)


@pytest.mark.parametrize(
    ("format", "masks", "message"),
    [
        ("isic2019", [], "format is 'isic2019'; expected one of isic2017, isic2018_task1, isic2018_task2"),
        ("isic2017", [], "there is no image to write"),
        ("isic2017", [("ISIC_1", GOOD)], "'ISIC_1' is no image of isic2017; expected an id as ISIC_0000000"),
        ("isic2017", [("ISIC_0000003\n", GOOD)], "is no image of isic2017"),
        ("isic2017", [("ISIC_0000003", GOOD)] * 2, "ISIC_0000003 comes twice"),
        ("isic2017", [("ISIC_0000003", GOOD[0])], "bool (5, 7); isic2017 takes bool (1, H, W): segmentation"),
        ("isic2017", [("ISIC_0000003", GOOD.astype(np.uint8))], "uint8 (1, 5, 7); isic2017 takes bool (1, H, W)"),
        ("isic2018_task2", [("ISIC_0000003", GOOD)], "takes bool (5, H, W): attribute_pigment_network, attribute_neg"),
    ],
)
def test_what_cannot_be_submitted_is_refused(tmp_path, format, masks, message):
    with pytest.raises(MedvisionError, match=re.escape(message)):
        write_submission(tmp_path / "out.zip", format, masks)
    assert not [*tmp_path.iterdir()]


WHITE = np.full((5, 7), 255, np.uint8)
MUTATIONS = {
    "missing": (lambda files: files.pop(LESION), f"1 missing: {LESION}"),
    "superfluous": (
        lambda files: files.update({"ISIC_0000009_segmentation.png": png(WHITE)}),
        "1 superfluous: ISIC_0000009_segmentation.png",
    ),
    "name": (
        lambda files: files.update({"ISIC_0000003_Segmentation.png": files.pop(LESION)}),
        "1 wrongly named or in a folder, expected ISIC_<7 digits>_segmentation.png: ISIC_0000003_Segmentation.png",
    ),
    "digits": (lambda files: files.update({"ISIC_003_segmentation.png": b""}), ".png: ISIC_003_segmentation.png"),
    "other file": (lambda files: files.update({"README.txt": b"ours"}), ".png: README.txt"),
    "folder": (lambda files: files.update({f"masks/{LESION}": files.pop(LESION)}), f".png: masks/{LESION}"),
    "empty file": (lambda files: files.update({LESION: b""}), f"1 that cannot be decoded: {LESION} (Unidentified"),
    "truncated": (
        lambda files: files.update({LESION: files[LESION][:-20]}),
        f"1 that cannot be decoded: {LESION} (",
    ),
    "jpeg": (lambda files: files.update({LESION: png(WHITE, kind="JPEG")}), f"1 that are no PNG: {LESION} (JPEG)"),
    "colour": (
        lambda files: files.update({LESION: png(WHITE, "RGB")}),
        f"1 of another mode than 8 bits and one channel: {LESION} (RGB)",
    ),
    "one bit": (lambda files: files.update({LESION: png(WHITE, "1")}), f"one channel: {LESION} (1)"),
    "palette": (lambda files: files.update({LESION: png(WHITE, "P")}), f"one channel: {LESION} (P)"),
    "alpha": (lambda files: files.update({LESION: png(WHITE, "LA")}), f"one channel: {LESION} (LA)"),
    "16 bit": (
        lambda files: files.update({LESION: png(np.full((5, 7), 65535, np.uint16))}),
        f"one channel: {LESION} (I;16)",
    ),
    "size": (
        lambda files: files.update({LESION: png(WHITE.T.copy())}),
        f"1 of another size than the image: {LESION} (7x5, not 5x7)",
    ),
    "values": (
        lambda files: files.update({LESION: png(np.minimum(WHITE, np.arange(7, dtype=np.uint8)))}),
        f"1 with values other than 0 and 255: {LESION} (1, 2, 3, 4, 5 and 1 more)",
    ),
    "ones": (lambda files: files.update({LESION: png(WHITE // 255)}), f"0 and 255: {LESION} (1)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_broken_rule_is_named_and_no_other(tmp_path, mutation):
    path = tmp_path / "out.zip"
    write_submission(path, "isic2018_task1", masks_of("isic2018_task1").items())
    files = members(path)
    mutate, message = MUTATIONS[mutation]
    mutate(files)
    rewritten(path, files.items())
    with pytest.raises(MedvisionError) as error:
        check_submission(path, "isic2018_task1", SIZES)
    head, *lines, cure = str(error.value).splitlines()
    assert head == (f"{path} is no submission of isic2018_task1 (https://challenge.isic-archive.com/landing/2018/45/):")
    assert cure == "write it anew with write_submission"
    assert message in lines[0]
    if mutation in ("name", "folder"):  # without the right name it is missing too
        assert lines[1:] == [f"  1 missing: {LESION}"]
    else:
        assert len(lines) == 1


def test_a_file_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "out.zip"
    write_submission(path, "isic2017", masks_of("isic2017").items())
    files = members(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewritten(path, [*files.items(), (LESION, files[LESION])])
    with pytest.raises(MedvisionError, match=f"1 there more than once: {LESION}"):
        check_submission(path, "isic2017", SIZES)


def test_all_that_is_wrong_is_in_one_message(tmp_path):
    path = tmp_path / "out.zip"
    write_submission(path, "isic2018_task2", masks_of("isic2018_task2").items())
    files = members(path)
    files["notes.txt"] = files.pop("ISIC_0000001_attribute_streaks.png")
    files["ISIC_0000003_attribute_globules.png"] = png(WHITE, "RGB")
    rewritten(path, files.items())
    with pytest.raises(MedvisionError) as error:
        check_submission(path, "isic2018_task2", SIZES | {"ISIC_0000009": (3, 3), "ISIC_0000008": (3, 3)})
    text = str(error.value)
    assert "notes.txt" in text and "ISIC_0000003_attribute_globules.png (RGB)" in text
    assert "11 missing: ISIC_0000001_attribute_streaks.png, ISIC_0000008_attribute_globules.png" in text
    assert text.count("ISIC_0000008") == 4 and "and 6 more" in text


@pytest.mark.parametrize("content", [b"no zip", None])
def test_what_is_no_zip_is_refused(tmp_path, content):
    path = tmp_path / "out.zip"
    if content:
        path.write_bytes(content)
    with pytest.raises(MedvisionError, match=r"out\.zip cannot be read as a zip \(.*\); expected a submission of isic"):
        check_submission(path, "isic2017", SIZES)


def test_damage_within_the_zip_is_named(tmp_path):
    path = tmp_path / "out.zip"
    write_submission(path, "isic2017", masks_of("isic2017").items())
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    path.write_bytes(data)
    with pytest.raises(MedvisionError, match=r"1 that cannot be decoded: ISIC_0000001_segmentation.png \(BadZipFile"):
        check_submission(path, "isic2017", SIZES)


@pytest.mark.parametrize(
    ("format", "classes", "images", "said"),
    [
        ("isic2019", ["lesion"], ["ISIC_0000001"], "isic2019"),
        ("isic2017", ["a", "b"], ["ISIC_0000001"], "wants masks of segmentation; predicted are a, b"),
        ("isic2018_task2", ["globules"] * 5, ["ISIC_0000001"], "wants masks of pigment_network, negative_network"),
        ("isic2017", ["lesion"], ["ISIC_0000001", "photo"], r"wants images named as ISIC_0000000 .*found photo"),
        ("isic2017", ["lesion"], ["ISIC_0000001"] * 2, "there more than once: ISIC_0000001"),
    ],
)
def test_what_cannot_become_a_submission_is_refused_before(format, classes, images, said):
    require_submittable("isic2017", ["lesion"], ["ISIC_0000001", "ISIC_0000002"])
    with pytest.raises(MedvisionError, match=said):
        require_submittable(format, classes, images)
