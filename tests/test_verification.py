import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvision.data import ISIC2016, ISIC2017, Cache, ISIC2018Attributes, ISIC2018Lesion
from medvision.verification import report_folder, show, verify

ATTRIBUTES = ["pigment_network", "negative_network", "streaks", "milia_like_cyst", "globules"]


@pytest.fixture
def make(tmp_path: Path, spec: Callable[..., Any]) -> Callable[..., Any]:
    """`make(ISIC2017, "isic2017", kind=..., ...)`: a data set in this test's cache, its files in `<root>`."""

    def build(kind: type, name: str, root: str, facts: dict[str, Any] | None = None, **options: Any) -> Any:
        facts = {"mean": None, "std": None, "image_size": 24, "name": name} | (facts or {})
        return kind(spec(facts.pop("kind", "binary"), **facts), tmp_path / root, tmp_path / "cache", **options)

    return build


def rewrite(archive: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Writes an archive again with other contents; None leaves a member out."""
    with zipfile.ZipFile(archive) as old:
        files = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in files.items():
            if content is not None:
                new.writestr(name, content)


def test_report_of_a_clean_data_set(make: Any, fake_isic2017: Any, tmp_path: Path, capsys: Any) -> None:
    fake_isic2017(tmp_path / "isic2017")
    data = make(ISIC2017, "isic2017", "isic2017")
    report = verify(data)
    folder = report_folder(data)
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["images"] == {"train": 6, "val": 3, "test": 3}
    assert {p["kind"] for p in report["problems"]} == {"not the official number"}
    cache = data.cache
    train = [row for row, s in enumerate(data.samples) if s in data.splits["train"]]
    pixels = cache.images[train].reshape(-1, 3) / 255
    np.testing.assert_allclose(report["splits"]["train"]["mean"], pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(report["splits"]["train"]["std"], pixels.std(0), rtol=1e-9)
    share = np.mean([data.samples[row].read(3)[1].mean() for row in train])
    assert report["splits"]["train"]["pixels_of_class"]["lesion"] == pytest.approx(share)
    assert report["positive_weights"] == [pytest.approx((1 - share) / share)] == data.positive_weights()
    assert sum(report["sizes"].values()) == 12 and report["fingerprint"] == cache.digest
    for name in ("samples.png", "classes.png"):
        assert min(Image.open(folder / name).size) > 200
    assert not (folder / "exclude.txt").exists()
    show(report, folder)
    printed = capsys.readouterr().out
    assert "isic2017" in printed and "6 (" in printed and f"report: {folder}" in printed and "\x1b" not in printed


def test_the_distribution_of_classes_in_each_split(
    make: Any, fake_isic2018_attributes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_isic2018_attributes(tmp_path / "isic2018")
    facts = {"kind": "multilabel", "classes": ATTRIBUTES}
    data = make(ISIC2018Attributes, "isic2018_attributes", "isic2018", facts)
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("medvision.verification.bars", lambda path, panels: drawn.update({path.name: panels}))
    report = verify(data)
    images, pixels = drawn["classes.png"].values()
    assert [*images] == [*pixels] == [*report["splits"]] == ["train", "val", "test"]
    for name, of_split in report["splits"].items():
        masks = [sample.read(3)[1] for sample in data.splits[name]]
        shown = np.array([mask.any((0, 1)) for mask in masks])
        number = dict(zip(ATTRIBUTES, sum(mask.sum((0, 1), dtype=int) for mask in masks).tolist(), strict=True))
        assert of_split["images_of_class"] == dict(zip(ATTRIBUTES, shown.sum(0).tolist(), strict=True))
        assert of_split["images_without_class"] == (~shown.any(1)).sum()
        assert of_split["number_of_pixels"] == number
        share = 100 * np.mean([mask[..., 0].mean() for mask in masks])
        assert pixels[name]["pigment_network"] == (
            pytest.approx(share),
            f"{share:.3g} ({number['pigment_network']:,})",
        )
        share = 100 * shown[:, 2].mean()
        assert images[name]["streaks"] == (pytest.approx(share), f"{share:.3g} ({shown[:, 2].sum()})")
        none = (~shown.any(1)).sum()
        assert images[name].get("none", (0,))[0] == pytest.approx(100 * none / len(masks))
    assert sum(of_split["images_without_class"] for of_split in report["splits"].values()) > 0


def test_a_second_time_nothing_is_done(make: Any, fake_isic2017: Any, tmp_path: Path) -> None:
    fake_isic2017(tmp_path / "isic2017")
    first = verify(make(ISIC2017, "isic2017", "isic2017"))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert verify(make(ISIC2017, "isic2017", "isic2017")) == first
    assert {path: path.stat().st_mtime_ns for path in files} == before
    other = verify(make(ISIC2017, "isic2017", "isic2017", folds=2))
    assert other["images"] != first["images"] and other["dealing"]["folds"] == 2
    with zipfile.ZipFile(tmp_path / "isic2017/ISIC-2017_Test_v2_Data.zip", "a") as archive:
        archive.writestr("notes.docx", b"?")
    later = verify(make(ISIC2017, "isic2017", "isic2017"))
    assert "stray files" in [p["kind"] for p in later["problems"]]


def test_all_that_is_wrong_with_one_archive(make: Any, fake_isic2017: Any, tmp_path: Path, encode: Any) -> None:
    root = fake_isic2017(tmp_path / "isic2017", {"train": 14, "val": 3, "test": 3})
    images, masks = root / "ISIC-2017_Training_Data.zip", root / "ISIC-2017_Training_Part1_GroundTruth.zip"
    content: dict[str, bytes] = {}
    with zipfile.ZipFile(images) as archive:
        content |= {name: archive.read(name) for name in archive.namelist()}

    def change_image(name: str, data: bytes) -> bytes | None:
        if "ISIC_0000001." in name:
            return data[: len(data) // 2]
        if "ISIC_0000002." in name:  # stretched, brighter and compressed again
            picture = Image.open(io.BytesIO(content[name.replace("002.", "003.")]))
            picture = picture.resize(Image.open(io.BytesIO(data)).size)
            return bytes(encode(np.asarray(picture.point(lambda v: min(255, v + 4))), "JPEG", quality=80))
        if "ISIC_0000005." in name:
            return content[name.replace("005.", "008.")]  # identical, the mask is another
        return None if "ISIC_0000004." in name else data

    def change_mask(name: str, data: bytes) -> bytes | None:
        mask = np.array(Image.open(io.BytesIO(data)))
        if "ISIC_0000006_" in name:
            mask[:] = 0
        if "ISIC_0000007_" in name:
            mask[mask > 0] = np.linspace(100, 255, (mask > 0).sum())
        if "ISIC_0000009_" in name:
            return None
        if "ISIC_0000010_" in name:
            mask = mask[:-3]
        if "ISIC_0000005_" in name:
            mask = np.array(Image.fromarray(mask).resize((38, 32)))
        return bytes(encode(mask))

    rewrite(images, change_image)
    rewrite(masks, change_mask)
    with zipfile.ZipFile(images, "a") as archive:
        archive.writestr("ISIC-2017_Training_Data/notes.docx", b"?")
    size = Image.open(io.BytesIO(content["ISIC-2017_Training_Data/ISIC_0000008.jpg"])).size
    rewrite(
        masks,
        lambda name, data: (
            bytes(encode(np.array(Image.open(io.BytesIO(data)).resize(size)))) if "0005_" in name else data
        ),
    )
    data = make(ISIC2017, "isic2017", "isic2017")
    report = verify(data)
    found = {p["kind"]: p for p in report["problems"]}
    assert found["train: images without masks"]["items"] == ["ISIC_0000009"]
    assert found["train: masks without images"]["items"] == ["ISIC_0000004"]
    assert found["stray files"]["grade"] == "warning" and "notes.docx" in found["stray files"]["items"][0]
    broken = [p for p in report["problems"] if p["kind"] == "broken files"]
    assert [p["items"] for p in broken] == [["ISIC_0000001"], ["ISIC_0000010"]]
    assert "cannot be decoded" in broken[0]["text"] and "expected equal sizes" in broken[1]["text"]
    listed = (report_folder(data) / "exclude.txt").read_text().split()
    assert listed == ["ISIC_0000001", "ISIC_0000009", "ISIC_0000010"]

    data = make(ISIC2017, "isic2017", "isic2017", exclude=str(report_folder(data) / "exclude.txt"))
    data.prepare_data()  # training goes on
    found = {p["kind"]: p for p in verify(data)["problems"]}
    assert not [p for p in found.values() if p["grade"] == "error"]
    assert found["near-duplicates inside a split"]["items"] == ["ISIC_0000002~ISIC_0000003"]
    assert found["identical images inside a split"]["items"] == ["ISIC_0000005=ISIC_0000008"]
    assert found["identical images with different masks"]["items"] == ["ISIC_0000005=ISIC_0000008"]
    assert found["empty masks of lesion"]["items"] == ["ISIC_0000006"]
    assert "ISIC_0000007" in found["masks with more than two values"]["items"]
    assert min(Image.open(report_folder(data) / "duplicates.png").size) > 200


def test_images_shared_between_data_sets_are_found_from_both_sides(
    make: Any, fake_isic2017: Any, fake_isic2018_lesion: Any, fake_isic2018_attributes: Any, tmp_path: Path
) -> None:
    fake_isic2017(tmp_path / "isic2017", {"train": 12, "val": 3, "test": 3})
    fake_isic2018_attributes(tmp_path / "isic2018")
    fake_isic2018_lesion(tmp_path / "isic2018")
    stem, target = "ISIC-2017_Training_Data", tmp_path / "isic2018/ISIC2018_Task1-2_Training_Input.zip"
    with zipfile.ZipFile(tmp_path / f"isic2017/{stem}.zip") as archive:
        picture = Image.open(io.BytesIO(archive.read(f"{stem}/ISIC_0000007.jpg")))
    truth = tmp_path / "isic2018/ISIC2018_Task1_Training_GroundTruth.zip"
    with zipfile.ZipFile(target) as archive:
        name = sorted(n for n in archive.namelist() if n.lower().endswith(".jpg"))[0]
    shared = Path(name).stem
    with zipfile.ZipFile(truth) as archive:
        mask = Image.open(io.BytesIO(archive.read(next(n for n in archive.namelist() if shared in n))))
    buffer = io.BytesIO()
    picture.resize(mask.size).save(buffer, "JPEG", quality=85)
    rewrite(target, lambda n, data: buffer.getvalue() if n == name else data)
    first = make(ISIC2017, "isic2017", "isic2017")
    second = make(ISIC2018Lesion, "isic2018_lesion", "isic2018")
    attributes = make(
        ISIC2018Attributes, "isic2018_attributes", "isic2018", {"kind": "multilabel", "classes": ATTRIBUTES}
    )
    verify(first)
    verify(second)
    report = verify(attributes)
    kinds = [p["kind"] for p in report["problems"]]
    assert "images shared with isic2018_lesion" not in kinds  # one archive, two tasks
    of_first = {p["kind"]: p for p in verify(first)["problems"]}
    of_second = {p["kind"]: p for p in verify(second)["problems"]}
    assert "ISIC_0000007" in of_first["images shared with isic2018_lesion"]["items"]
    assert shared in of_second["images shared with isic2017"]["items"]
    assert "of train" in of_first["images shared with isic2018_lesion"]["text"]


def test_labels_in_the_report(make: Any, fake_isic2016: Any, tmp_path: Path) -> None:
    fake_isic2016(tmp_path / "isic2016")
    facts = {"classes": ["malignant"], "target": "label"}
    data = make(ISIC2016, "isic2016", "isic2016", facts)
    report = verify(data)
    of_train = [s for s in data.splits["train"] if s.labels]
    assert report["splits"]["train"]["images_of_class"] == {"malignant": len(of_train)}
    n, k = len(data.splits["train"]), len(of_train)
    assert report["positive_weights"] == [pytest.approx((n - k) / k)]
    assert report["balanced_draw"] == {
        "malignant": pytest.approx(n / (2 * k)),
        "none": pytest.approx(n / (2 * (n - k))),
    }


def test_conflicting_labels_of_identical_images_are_an_error(make: Any, fake_isic2016: Any, tmp_path: Path) -> None:
    root = fake_isic2016(tmp_path / "isic2016")
    table = root / "ISBI2016_ISIC_Part3_Training_GroundTruth.csv"
    rows = dict(line.split(",") for line in table.read_text().split())
    good = next(i for i, word in rows.items() if word == "benign")
    bad = next(i for i, word in rows.items() if word == "malignant")
    archive = root / "ISBI2016_ISIC_Part3_Training_Data.zip"
    with zipfile.ZipFile(archive) as old:
        names = {Path(n).stem: n for n in old.namelist()}
        content = old.read(names[good])
    rewrite(archive, lambda n, data: content if n == names[bad] else data)
    facts = {"classes": ["malignant"], "target": "label"}
    data = make(ISIC2016, "isic2016", "isic2016", facts)
    report = verify(data)
    (error,) = [p for p in report["problems"] if p["grade"] == "error"]
    assert error["kind"] == "identical images with different labels" and sorted(error["items"]) == sorted([good, bad])
    with pytest.raises(ValueError, match=r"data\.exclude=\[id,\.\.\.\]"):
        make(ISIC2016, "isic2016", "isic2016", facts).prepare_data()
    make(ISIC2016, "isic2016", "isic2016", facts, exclude=[bad]).prepare_data()


def test_broken_files_of_a_set_that_is_dealt_are_reported(make: Any, fake_isic2016: Any, tmp_path: Path) -> None:
    root = fake_isic2016(tmp_path / "isic2016")
    rewrite(root / "ISBI2016_ISIC_Part3_Training_Data.zip", lambda n, data: data[:99] if "0002." in n else data)
    data = make(ISIC2016, "isic2016", "isic2016", {"classes": ["malignant"], "target": "label"})
    report = verify(data)
    (error,) = [p for p in report["problems"] if p["grade"] == "error"]
    assert error["kind"] == "broken files" and error["items"][0].endswith("0002")
    assert (report_folder(data) / "exclude.txt").read_text().split() == error["items"]
    again = make(
        ISIC2016, "isic2016", "isic2016", {"classes": ["malignant"], "target": "label"}, exclude=error["items"]
    )
    assert "splits" in verify(again) and not (report_folder(again) / "exclude.txt").exists()


def test_a_removed_neighbour_does_not_hurt(make: Any, fake_isic2017: Any, fake_isic2016: Any, tmp_path: Path) -> None:
    fake_isic2017(tmp_path / "isic2017")
    fake_isic2016(tmp_path / "isic2016")
    verify(make(ISIC2017, "isic2017", "isic2017"))
    data = make(ISIC2016, "isic2016", "isic2016", {"classes": ["malignant"], "target": "label"})
    assert [name.split("/")[0] for name in verify(data)["compared_with"]] == ["isic2017"]
    shutil.rmtree(next(p for p in (tmp_path / "cache/isic2017").iterdir() if (p / "ids.json").exists()))
    assert verify(data)["compared_with"] == []
    assert isinstance(data.cache, Cache)
