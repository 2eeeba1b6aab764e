import json
import os
import signal
import time
import zipfile

import pytest
from omegaconf import OmegaConf


@pytest.fixture(scope="module")
def place(cli, tmp_path_factory):
    """The command line with data, cache and runs of this module."""
    return type(cli)(tmp_path_factory.mktemp("prepare"))


@pytest.fixture(scope="module")
def downloads(place, fake_isic2017, fake_isic2016, fake_cvc_clinicdb):
    """Fakes of three data sets where the command line looks for them."""
    data = place.root / "data"
    fake_isic2017(data / "isic2017")
    fake_isic2016(data / "isic2016")
    fake_cvc_clinicdb(data / "cvc_clinicdb")
    return data


@pytest.mark.parametrize("listed", ["data=isic2017,isic2016", "data=[isic2017,isic2016]"])
def test_several_sets_are_prepared_and_the_second_time_nothing_is_done(place, downloads, listed):
    first = place("prepare", listed, "data.image_size=32").stdout
    reports = [place.root / f"cache/{name}/report/report.json" for name in ("isic2017", "isic2016")]
    for report in reports:
        assert f"report: {report.parent}" in first
        assert json.loads(report.read_text())["images"]["train"] > 0
        assert (report.parent / "samples.png").stat().st_size > 1000
    before = [report.stat().st_mtime_ns for report in reports]
    again = place("prepare", listed, "data.image_size=32").stdout
    assert [report.stat().st_mtime_ns for report in reports] == before
    assert again.splitlines()[-8:] == first.splitlines()[-8:]


def test_a_sweep_prepares_as_well(place, downloads):
    place("prepare", "-m", "data=isic2017,cvc_clinicdb", "data.image_size=32")
    assert (place.root / "cache/cvc_clinicdb/report/report.json").exists()


def test_errors_end_with_a_list_to_exclude_that_training_accepts(place, downloads, tiny):
    archive = downloads / "isic2017/ISIC-2017_Training_Part1_GroundTruth.zip"
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in files.items():
            if "ISIC_0000002" not in name:
                new.writestr(name, content[:20] if "ISIC_0000004" in name else content)
    options = [o for o in tiny if not o.startswith("data.images")]
    try:
        done = place("prepare", "data=isic2017", "data.image_size=32", code=1)
        listed = place.root / "cache/isic2017/report/exclude.txt"
        assert listed.read_text().split() == ["ISIC_0000002", "ISIC_0000004"]
        assert f"data.exclude={listed}" in done.stdout + done.stderr
        refused = place("train", "data=isic2017", *options, code=1)
        text = refused.stdout + refused.stderr
        assert "ISIC_0000002" in text and "data.exclude" in text and "Traceback" not in text
        run = place.root / "excluding"
        place("train", "data=isic2017", *options, f"data.exclude={listed}", f"hydra.run.dir={run}")
        ids = json.loads((run / "splits.json").read_text())["train"]
        assert len(ids) == 4 and not {"ISIC_0000002", "ISIC_0000004"} & set(ids)
        config = OmegaConf.load(run / ".hydra" / "config.yaml")  # by name: the run does not need the list any more
        assert config.data.exclude == ["ISIC_0000002", "ISIC_0000004"]
        warnings = json.loads((run / "environment.json").read_text())["starts"][0]["data_warnings"]
        assert any("not the official number" in warning for warning in warnings)
    finally:
        archive.write_bytes(whole)


def test_folds_of_a_cross_validation_hold_out_every_image_once(place, downloads, tiny):
    options = [o for o in tiny if not o.startswith(("data.images", "trainer.max_epochs"))]
    held = []
    for fold in range(3):
        run = place.root / f"fold{fold}"
        place(
            "train",
            *("data=cvc_clinicdb", "data.folds=3", f"data.fold={fold}", *options),
            *("trainer.max_epochs=1", f"hydra.run.dir={run}"),
        )
        splits = json.loads((run / "splits.json").read_text())
        held += splits["test"]
        assert len(splits["mean"]) == 3 and not set(splits["train"]) & set(splits["test"])
    assert len(held) == len(set(held)) == 14


def test_preparing_goes_on_after_a_kill(place, downloads):
    """Killed at some moment while it decodes, it ends with the report of an undisturbed one."""
    place("prepare", "data=phantom", "data.images={train:40,val:4,test:4}", "data.image_size=64")
    report = place.root / "cache/phantom/report/report.json"
    wanted = json.loads(report.read_text())
    place("prepare", "data=phantom", "remove=true")
    assert not report.exists()
    process = place.start("prepare", "data=phantom", "data.images={train:40,val:4,test:4}", "data.image_size=64")
    time.sleep(4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    place("prepare", "data=phantom", "data.images={train:40,val:4,test:4}", "data.image_size=64")
    assert json.loads(report.read_text())["fingerprint"] == wanted["fingerprint"]
    assert [name for name in os.listdir(place.root / "cache/phantom") if name.endswith(".building")] == []
