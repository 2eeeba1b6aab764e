import contextlib
import csv
import json
import os
import pty
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from medvision.build import load_run

FILES = [
    ".hydra/config.yaml",
    ".hydra/overrides.yaml",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "curves.png",
    "environment.json",
    "metrics.csv",
    "metrics.json",
    "predictions_test.png",
    "predictions_val.png",
    "results_test.csv",
    "results_val.csv",
    "splits.json",
    "threshold.png",
    "train.log",
    "validation.png",
]


def read(path):
    return json.loads(path.read_text())


def test_run_folder_is_whole(finished):
    folder, _ = finished
    assert [name for name in FILES if not (folder / name).is_file()] == []
    assert list(folder.rglob("*.tmp")) == []
    for picture in folder.glob("*.png"):
        assert min(Image.open(picture).size) > 200


def test_summary_is_a_table_and_names_the_picture(finished):
    folder, printed = finished
    assert "dice_image" in printed
    assert f"pictures: {folder / 'predictions_test.png'}" in printed
    assert "epoch 3/3" in printed
    ours = [line for line in printed.splitlines() if "wandb" not in line]
    assert not any("\x1b" in line for line in ours)  # plain text where the output is no terminal


def test_metrics_can_be_recomputed_from_the_per_image_results(finished):
    folder, _ = finished
    metrics = read(folder / "metrics.json")
    for split, number in (("val", 6), ("test", 7)):
        rows = list(csv.DictReader((folder / f"results_{split}.csv").open()))
        assert len(rows) == number
        assert {float(row["threshold"]) for row in rows} == {metrics["threshold"]}
        tp, fp, fn = (np.array([int(row[key]) for row in rows]) for key in ("tp", "fp", "fn"))
        assert metrics[split]["dice"] == pytest.approx(2 * tp.sum() / (2 * tp + fp + fn).sum(), abs=1e-12)
        assert metrics[split]["jaccard_image"] == pytest.approx((tp / (tp + fp + fn)).mean(), abs=1e-12)
        low, high = metrics["intervals"][split]["jaccard_image"]
        assert low <= metrics[split]["jaccard_image"] <= high


def test_environment_and_splits_are_recorded(finished):
    folder, _ = finished
    record, splits = read(folder / "environment.json"), read(folder / "splits.json")
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(record["starts"]) == 1
    assert len(record["starts"][0]["seconds_per_epoch"]) == 3
    assert [len(splits[name]) for name in ("train", "val", "test")] == [16, 6, 7]
    assert splits["fingerprint"] == read(folder / "metrics.json")["fingerprint"]


def test_checkpoints_hold_plain_values_only(finished):
    folder, _ = finished
    for name in ("best", "last"):
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert any(key.startswith("model.") for key in checkpoint["state_dict"])


def test_several_loggers_at_once(finished):
    folder, _ = finished
    assert list((folder / "tensorboard").glob("events*"))
    assert list((folder / "wandb").glob("offline-run*"))


def test_best_epoch_is_that_of_the_monitored_metric(finished):
    folder, _ = finished
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["metric"] == "val/jaccard_image"]
    values = [float(row["value"]) for row in rows]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    metrics = read(folder / "metrics.json")
    assert metrics["epoch"] == 1 + int(np.argmax(values))
    assert metrics["monitor"]["value"] == pytest.approx(max(values))


def test_evaluate_reproduces_the_numbers_from_the_folder_alone(cli, finished, tmp_path):
    folder = tmp_path / "moved = and spaced"
    shutil.copytree(finished[0], folder)
    for split in ("test", "val"):
        done = cli("evaluate", f"run='{folder}'", f"split={split}")
        assert "equal to the numbers" in done.stdout
        assert read(folder / "evaluations" / f"{split}_stored.json")[split] == read(folder / "metrics.json")[split]
        same = (folder / "evaluations" / f"{split}_stored.csv").read_text()
        assert same == (folder / f"results_{split}.csv").read_text()


def test_a_run_does_not_need_the_weights_that_it_began_with(cli, tiny):
    weights, folder = cli.root / "encoder.pth", cli.root / "pretrained"
    encoder = timm.create_model("pvt_v2_b0", features_only=True)
    torch.save(encoder.state_dict(), weights)
    options = [f"model.encoder_weights={weights}", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    cli("train", *tiny, *options, "optimizer.lr=1e-9", f"hydra.run.dir={folder}")
    trained = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    key = "stages_0.blocks.0.attn.q.weight"
    assert torch.allclose(trained[f"model.encoder.{key}"], encoder.state_dict()[key], atol=1e-6)
    weights.unlink()
    assert "equal to the numbers" in cli("evaluate", f"run={folder}").stdout


def test_visualize_from_the_folder_alone(cli, finished):
    folder, _ = finished
    ids = json.loads((folder / "splits.json").read_text())["test"]
    for words, name in (
        (["index=2"], f"test_2_{sorted(ids)[2]}"),
        (["worst=3", "split=val", "metric=dice"], "val_worst3_dice"),
        (["curves=true"], "curves_finished_by_epoch"),
    ):
        path = folder / "visualizations" / f"{name}.png"
        assert cli("visualize", f"run={folder}", *words).stdout.splitlines()[-1] == f"picture: {path}"
        assert min(Image.open(path).size) > 100
    refused = cli("visualize", f"run={folder}", "wrost=3", code=1)
    assert "did you mean 'worst'" in refused.stderr


def test_evaluate_takes_another_threshold_and_split(cli, finished):
    folder, _ = finished
    cli("evaluate", f"run={folder}", "split=train", "threshold=0.123")
    found = read(folder / "evaluations" / "train_0.123.json")
    assert "dice_image" in found["at 0.5"] and found["at 0.5"] != found["train"]
    rows = list(csv.DictReader((folder / "evaluations" / "train_0.123.csv").open()))
    assert len(rows) == 16
    assert {row["threshold"] for row in rows} == {"0.123"}


def test_boundaries_of_the_run_are_those_of_its_table(finished):
    folder, printed = finished
    metrics = read(folder / "metrics.json")
    for split, number in (("val", 6), ("test", 7)):
        rows = list(csv.DictReader((folder / f"results_{split}.csv").open()))
        known = [float(row["hd95"]) for row in rows if row["hd95"]]
        assert len(known) == metrics[split]["distances"]
        assert metrics[split].get("hd95_image", 0) == pytest.approx(np.mean(known) if known else 0)
        assert metrics[split]["nsd_image"] == pytest.approx(np.mean([float(row["nsd"]) for row in rows]))
        assert f"{split}: hd95 and assd (pixels) are means over {len(known)} of {number} masks" in printed
        assert [int(row["area_truth"]) for row in rows] == [int(row["tp"]) + int(row["fn"]) for row in rows]


def test_evaluate_with_another_convention_tolerance_and_choice(cli, finished):
    folder, _ = finished
    options = ["task.empty=null", "task.tolerance=9", "task.threshold_by=dice", "threshold=validation", "split=val"]
    done = cli("evaluate", f"run={folder}", *options)
    name = "val_validation_threshold_by_dice_empty_None_tolerance_9"
    found, stored = read(folder / "evaluations" / f"{name}.json"), read(folder / "metrics.json")
    assert found["val"]["nsd_image"] > stored["val"]["nsd_image"] and "(tolerance 9)" in done.stdout
    assert found["val"]["dice"] >= stored["val"]["dice"]
    assert (folder / "evaluations" / f"{name}_threshold.png").is_file()
    done = cli("evaluate", f"run={folder}", "task.tolerance=null")
    assert "hd95" not in done.stdout and "equal to" not in done.stdout
    error = cli("evaluate", f"run={folder}", "task.empty=2", code=1).stderr
    assert "task.empty=2: expected 1, 0, or null" in error


def test_both_protocols_beside_each_other(cli, tiny, finished):
    folder = cli.root / "paper"
    done = cli("train", *tiny, "protocol=paper", f"hydra.run.dir={folder}")
    clean, paper = (read(f / "metrics.json") for f in (finished[0], folder))
    both = paper.pop("paper")
    assert paper == clean  # what is reported is what it was
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["metric"] == "paper/dice"]
    watched = [float(row["value"]) for row in rows]
    assert both["split"] == "test" and both["paper"]["epoch"] == 1 + watched.index(max(watched))
    assert both["clean"]["epoch"] == clean["epoch"]
    for name in ("clean", "paper"):
        assert both[name]["dice"] == pytest.approx(watched[both[name]["epoch"] - 1], abs=1e-6)
        assert 0 <= both[name]["unetpp_iou"] <= 1
    assert f"paper: epoch {both['paper']['epoch']}, chosen on test itself" in done.stdout and "flatters" in done.stdout
    cli("evaluate", f"run={folder}", "protocol=paper")
    assert read(folder / "evaluations" / "test_stored_paper.json")["paper"] == both
    done = cli("evaluate", f"run={finished[0]}", "protocol=paper")  # a clean run has the one column
    assert read(finished[0] / "evaluations" / "test_stored_paper.json")["paper"] == {
        "split": "test",
        "clean": both["clean"],
    }
    assert "flatters" not in done.stdout and "unetpp_iou" in done.stdout


def test_evaluate_chooses_the_threshold_anew(cli, finished):
    folder, _ = finished
    cli("evaluate", f"run={folder}", "threshold=validation")
    found, metrics = read(folder / "evaluations" / "test_validation.json"), read(folder / "metrics.json")
    assert (found["test"], found["threshold"]) == (metrics["test"], metrics["threshold"])
    error = cli("evaluate", f"run={folder}", "threshold=valid", code=1).stderr
    assert "threshold=valid: expected 'stored', 'validation' or a probability" in error


def test_evaluate_prunes_a_unetpp(cli, finished, tiny):
    folder = cli.root / "unetpp"
    network = ["model=unetpp", "model.channels=[4,8,8,8]", "model.deep_supervision=true"]
    cli("train", *tiny, *network, "trainer.max_epochs=1", f"hydra.run.dir={folder}")
    whole = read(folder / "metrics.json")
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    kept = [f"model.nodes.{node}." for node in ("x0_0", "x0_1", "x1_0")] + ["model.out.2."]
    parameters = sum(
        value.numel()
        for key, value in state.items()
        if key.startswith(tuple(kept)) and not key.endswith(("mean", "var", "tracked"))
    )
    said = " ".join(cli("evaluate", f"run={folder}", "model.depth=1").stdout.split())
    assert f"model.depth=1: {parameters} of" in said and "a batch of 4 images: " in said
    assert "threshold was chosen with the whole network" in said and "whole network" in said
    shallow = read(folder / "evaluations" / "test_stored_depth1.json")
    assert shallow["depth"] == 1 and shallow["parameters"] == parameters and shallow["milliseconds_per_batch"] > 0
    assert shallow["threshold"] == whole["threshold"] and shallow["test"] != whole["test"]
    cli("evaluate", f"run={folder}", "model.depth=3", "split=val", "threshold=validation")
    deepest = read(folder / "evaluations" / "val_validation_depth3.json")
    assert (deepest["val"], deepest["threshold"]) == (whole["val"], whole["threshold"])
    error = cli("evaluate", f"run={finished[0]}", "model.depth=2", code=1).stderr
    assert "model.depth=2 prunes a U-Net++ (model=unetpp), but this is a run of UNetV2" in error


def test_evaluate_with_views_beside_without(cli, finished):
    folder, _ = finished
    done = cli("evaluate", f"run={folder}", "tta=flips", "threshold=validation")
    found, stored = read(folder / "evaluations" / "test_validation_flips.json"), read(folder / "metrics.json")
    assert found["without tta"] == stored["test"] and found["test"].keys() >= {"dice_image", "jaccard"}
    assert found["tta"] == "flips" and min(found["seconds_without_tta"], found["seconds"]) > 0
    assert "without tta" in done.stdout and 0 < found["threshold"] < 1
    rows = list(csv.DictReader((folder / "evaluations" / "test_validation_flips.csv").open()))
    assert {float(row["threshold"]) for row in rows} == {found["threshold"]}
    refused = cli("evaluate", f"run={folder}", "tta=flop", code=1)
    assert "tta=flop: expected one of none, flips, d4, d4_scales" in refused.stderr


def test_evaluate_warns_of_changed_data(cli, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    metrics = read(folder / "metrics.json")
    (folder / "metrics.json").write_text(json.dumps(metrics | {"fingerprint": "another"}))
    assert "is not what the run was trained on" in cli("evaluate", f"run={folder}").stdout.replace("\n", " ")


def test_a_finished_run_is_shown_again_and_not_trained(cli, finished):
    folder, _ = finished
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    done = cli("train", f"resume={folder}")
    assert "is finished" in done.stdout and "dice_image" in done.stdout
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_a_folder_that_holds_a_run_is_not_overwritten(cli, finished):
    folder, _ = finished
    assert "already holds a run" in cli("train", f"hydra.run.dir={folder}", code=1).stderr


def test_resuming_with_a_changed_config_names_the_differences(cli, finished):
    folder, _ = finished
    error = cli("train", f"resume={folder}", "optimizer.lr=0.5", "model=unet", code=1).stderr
    assert "optimizer.lr: 0.001 -> 0.5" in error
    assert "model._target_: medvision.models.UNetV2 -> medvision.models.SMP" in error
    cli("train", f"resume={folder}", "optimizer.lr=0.001")  # the same value is no change


def test_ckpt_path_starts_from_a_lightning_checkpoint(cli, finished, tiny):
    folder, last = cli.root / "longer", finished[0] / "checkpoints" / "last.ckpt"
    cli("train", *tiny, f"hydra.run.dir={folder}", f"ckpt_path={last}", "trainer.max_epochs=4")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert {row["epoch"] for row in rows} == {"4"}
    error = cli("train", "model=unet", "model.encoder=resnet18", f"ckpt_path={last}", code=1).stderr
    assert str(last) in error and "Missing key" in error and "Traceback" not in error
    before, after = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (finished[0], folder))
    assert (before["global_step"], after["global_step"]) == (12, 16)


def test_early_stopping_stops_and_stays_stopped(cli, tiny):
    folder = cli.root / "early"
    never = ["optimizer=sgd", "optimizer.lr=1e-12", "callbacks.early_stopping.patience=1", "trainer.max_epochs=9"]
    cli("train", *tiny, *never, "scheduler=none", f"hydra.run.dir={folder}")
    epochs = {row["epoch"] for row in csv.DictReader((folder / "metrics.csv").open())}
    assert len(epochs) < 9
    (folder / "metrics.json").unlink()  # as if it had been killed while it evaluated
    cli("train", f"resume={folder}")
    assert {row["epoch"] for row in csv.DictReader((folder / "metrics.csv").open())} == epochs


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data=isic2017"],
            ["ISIC-2017_Training_Data", "challenge.isic-archive.com", "data=phantom needs no download"],
        ),
        (["model=unetv3"], ["model=unetv3", "did you mean 'unetv2'"]),
        (["modle=unet"], ["did you mean 'model'"]),
        (["trainer.max_epoch=3"], ["did you mean 'trainer.max_epochs'"]),
        (["model.encoder=pvt_v2_b9"], ["pvt_v2_b9", "pvt_v2_b5"]),
        (["data.image_size=0"], ["image size", "positive"]),
        (["hydra.run.dir=/proc/nowhere"], ["cannot write to /proc/nowhere", "hydra.run.dir"]),
        (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "no file"]),
        (["resume=nowhere"], ["holds no run"]),
        (["optimizer.lr=fast"], ["optimizer", "lr"]),
        (["trainer.precision=12-bit"], ["trainer", "12-bit"]),
        (["callbacks.early_stopping.patience=-1"], ["patience"]),
        (["protocol=papr"], ["protocol=papr: expected one of clean, paper"]),
        (
            ["protocol=paper", "data=phantom_melanoma", "data.images={train:20,test:10}", "model=resnet18"],
            ["protocol=paper chooses by the Dice of masks"],
        ),
        (["data.images={trian:20}"], ["data.images={trian:20}: ", "Key 'trian' is not in struct"]),
        (["task.threshold_by=dise"], ["task.threshold_by=dise: expected null or one of dice, jaccard"]),
        (["task.monitor=val/dise"], ["task.monitor=val/dise", "val/dice_image"]),
    ],
)
def test_refusals_are_one_message_before_training(cli, overrides, said, tmp_path):
    small = [] if any(word.startswith("data=") for word in overrides) else ["data.images={train:4,val:2,test:2}"]
    error = cli("train", "data.image_size=32", *small, *overrides, code=1, MEDVISION_RUNS=str(tmp_path)).stderr
    assert [words for words in said if words not in error] == []
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request(cli):
    assert "Traceback" in cli("train", "resume=nowhere", "traceback=true", code=1).stderr


def test_help_and_config_are_shown(cli):
    assert "unetpp" in cli("train", "--help").stdout
    assert "_target_: medvision.models.UNetPP" in cli("train", "--cfg", "job", "model=unetpp").stdout


def test_own_configs_are_added(cli, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [unetpp]\ndeep_supervision: true\n")
    shown = cli("train", "--config-dir", str(tmp_path), "--cfg", "job", "model=mine").stdout
    assert "deep_supervision: true" in shown


def test_compiled_model_has_the_same_checkpoint(cli, tiny):
    folder = cli.root / "compiled"
    short = [
        "model=unet_plain",
        "model.width=4",
        "model.depth=1",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
    ]
    small = [word for word in tiny if not word.startswith("model")]
    cli("train", *small, *short, "compile=true", f"hydra.run.dir={folder}")
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == load_run(folder).task.state_dict().keys()
    assert not [name for name in stored if "_orig_mod" in name]


def test_bf16_is_one_override(cli, tiny):
    folder = cli.root / "bf16"
    done = cli("train", *tiny, "trainer.precision=bf16-mixed", "trainer.max_epochs=1", f"hydra.run.dir={folder}")
    assert "bf16-mixed" in done.stdout
    assert "can halve the time" not in done.stdout
    assert "equal to the numbers" in cli("evaluate", f"run={folder}").stdout


def test_on_a_terminal_there_is_a_bar_and_a_line_for_each_epoch(cli, tiny):
    own, other = pty.openpty()
    options = [*tiny, "trainer.max_epochs=1", "trainer.limit_train_batches=1", f"hydra.run.dir={cli.root / 'terminal'}"]
    process = subprocess.Popen(
        cli.command("train", *options), env=cli.environment, cwd=cli.root, stdout=other, stderr=other
    )
    os.close(other)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its program has ended
        while part := os.read(own, 65536):
            shown += part
    os.close(own)
    assert process.wait() == 0
    text = shown.decode()
    assert "Epoch 0/0" in text  # Lightning's bar
    assert "epoch 1/1  train/loss" in text
