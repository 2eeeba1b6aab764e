"""Each tracker offline: what it stores of a training that breaks off and is resumed, and that it changes no weight."""

import json
import os
import struct

import pytest
import torch
from pytorch_lightning.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medvision import cli, train
from medvision.callbacks import EpochLines
from medvision.errors import MedvisionError
from medvision.runs import RunFolder
from medvision.tracking import mlflow, tracking, wandb

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = [
    *["data.images={train:8,val:4,test:3}", "data.image_size=32", "data.batch_size=4", "data.num_workers=0"],
    *["model=unet_plain", "model.width=4", "model.depth=2", "trainer.max_epochs=2", "trainer.accelerator=cpu"],
    *["trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"],
]
TAGS = ["model=unet_plain", "data.spec.classes=[a,b]"]


@pytest.fixture(scope="module")
def places(own_places):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", str(own_places / "no-netrc"))
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.chdir(own_places)
        yield own_places


def begin(folder, *overrides):
    typed = [*TINY, *overrides, f"hydra.run.dir={folder}"]
    train.start(cli.compose("train", typed), folder, typed)
    return folder


@pytest.fixture(scope="module")
def tracked(places):
    """A run with all trackers that failed in its second epoch: ids and states then; afterwards it was resumed."""
    folder = places / "runs" / "swept" / "3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVISION_SWEEP", "swept")
        patch.setenv("MEDVISION_JOB", "3")
        patch.setenv("MEDVISION_TAGS", json.dumps(TAGS))

        def fail(self, trainer, task):
            if trainer.current_epoch == 1:
                raise RuntimeError("as it happens")

        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(EpochLines, "on_train_epoch_start", fail)
            with pytest.raises(RuntimeError, match="as it happens"):
                begin(folder, "logger=[tensorboard,wandb,mlflow]")
        ids = json.loads((folder / "trackers.json").read_text())
        before = {"ids": ids, "mlflow": stored(places, ids).info.status, "wandb": records(folder)[0]}
        train.resume(folder, [])
    return folder, before


def stored(places, ids):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{places / 'runs' / 'mlflow.db'}").get_run(ids["mlflow"])


def records(folder):
    """For each time that wandb was begun, what it wrote: {kind of record: [records]}."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        kinds = {}
        for data in chunks(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
        found.append(kinds)
    return found


def chunks(log):
    """The records of a log of LevelDB: blocks of 32 KiB of parts (checksum, length, and 1 whole, 2 first, 4 last)."""
    place, data, block = 7, b"", 1 << 15  # after the name of the format
    while place + 7 <= len(log):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", log[place + 4 : place + 7])
        data += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield data
            data = b""


def test_a_failed_run_is_marked_so_and_resumed_under_the_same_name(places, tracked):
    folder, before = tracked
    ids = json.loads((folder / "trackers.json").read_text())
    assert ids == before["ids"]
    assert (before["mlflow"], stored(places, ids).info.status) == ("FAILED", "FINISHED")
    first, second = records(folder)
    assert [kinds["exit"][0].exit.exit_code for kinds in (first, second)] == [1, 0]
    assert {kinds["run"][0].run.run_id for kinds in (first, second)} == {ids["wandb"]}
    assert len(list(places.glob("mlruns"))) == 0


def test_a_run_that_is_stopped_as_wandb_begins_is_known(places, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    logger = wandb(str(tmp_path), "medvision")
    monkeypatch.setattr(WandbLogger, "log_hyperparams", interrupted)
    with pytest.raises(KeyboardInterrupt), tracking([logger], RunFolder(tmp_path), {}):
        pass
    assert wandb(str(tmp_path), "medvision").version == logger.version


def test_mlflow_has_config_course_and_results(places, tracked):
    folder, before = tracked
    run, metrics = stored(places, before["ids"]), json.loads((folder / "metrics.json").read_text())
    assert (run.data.params["model.width"], run.data.params["data.spec.name"]) == ("4", "phantom")
    assert run.data.metrics["final/test/dice"] == metrics["test"]["dice"]
    assert run.data.metrics["final/epoch"] == metrics["epoch"]
    assert run.info.run_name == "swept/3"
    expected = {"sweep": "swept", "job": "3", "folder": str(folder), "tags": ", ".join(TAGS)}
    assert expected.items() <= run.data.tags.items()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{places / 'runs' / 'mlflow.db'}")
    assert len(client.get_metric_history(run.info.run_id, "val/dice")) >= 2
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_wandb_has_group_tags_config_and_results(tracked):
    folder, _ = tracked
    first, second = records(folder)
    run = first["run"][0].run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("medvision", "swept", "train", "swept/3")
    assert list(run.tags) == TAGS
    config = {item.key: json.loads(item.value_json) for record in first["config"] for item in record.config.update}
    assert config["model.width"] == 4
    summary = {i.key or ".".join(i.nested_key): i.value_json for r in second["summary"] for i in r.summary.update}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert json.loads(summary["final/val/dice"]) == metrics["val"]["dice"]


def test_tensorboard_has_course_and_results(tracked):
    folder, _ = tracked
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {event.step for event in events.Scalars("val/dice")} == {1, 3}
    assert events.Scalars("final/test/dice")[-1].value == pytest.approx(metrics["test"]["dice"], abs=1e-6)


def test_trackers_change_no_weight(places, tracked):
    plain = begin(places / "runs" / "plain")
    assert not (plain / "trackers.json").exists()
    one, other = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (plain, tracked[0])
    )
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    for name in ("metrics.json", "metrics.csv", "results_test.csv"):
        assert (plain / name).read_text() == (tracked[0] / name).read_text()


@pytest.mark.parametrize(
    ("environment", "netrc", "asked", "offline"),
    [
        ({}, "", None, True),
        ({"WANDB_API_KEY": "k"}, "", None, False),
        ({}, "machine api.wandb.ai login user password k\n", None, False),
        ({}, "machine elsewhere.org login user password k\n", None, True),
        ({"WANDB_BASE_URL": "https://elsewhere.org"}, "machine elsewhere.org login u password k\n", None, False),
        ({"WANDB_API_KEY": "k"}, "", True, True),
        ({"WANDB_MODE": "disabled"}, "", None, False),
        ({}, "", False, False),
    ],
)
def test_wandb_is_online_where_there_is_a_key(tmp_path, monkeypatch, environment, netrc, asked, offline):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb(str(tmp_path), "medvision", asked)._offline is offline
    assert list(tmp_path.iterdir()) == [tmp_path / "netrc"]  # nothing is begun before the training


@pytest.mark.parametrize(
    ("words", "tags"), [("", None), ("model=unet,seed=1", ["model=unet", "seed=1"]), (json.dumps(TAGS), TAGS)]
)
def test_tags_of_a_job(tmp_path, monkeypatch, words, tags):
    monkeypatch.setenv("MEDVISION_TAGS", words)
    assert wandb(str(tmp_path), "medvision", True)._wandb_init["tags"] == tags


def test_without_a_sweep_a_run_is_called_by_its_folder(places, tracked, tmp_path, monkeypatch):
    monkeypatch.delenv("MEDVISION_SWEEP", raising=False)
    found = mlflow(str(tmp_path / "mine"), "medvision", f"sqlite:///{places / 'runs' / 'mlflow.db'}")
    (tmp_path / "trackers.json").write_text(json.dumps({"mlflow": "a" * 32}))
    lost = mlflow(str(tmp_path), "medvision", f"sqlite:///{places / 'runs' / 'mlflow.db'}")
    gone = r"not found; bring the store back, or remove .*trackers\.json"
    with pytest.raises(MedvisionError, match=gone), tracking([lost], RunFolder(tmp_path), {}):
        pass
    assert (found._run_name, found.tags["folder"]) == ("mine", str(tmp_path / "mine"))
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
