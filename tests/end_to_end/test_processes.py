"""A training by two processes of a CPU: as a job of a sweep, and killed in every way and resumed."""

import csv
import re
import signal
import time

import psutil
import pytest
import torch

OPTIONS = [
    *["trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=5", "trainer.log_every_n_steps=1"],
    *["data.images={train:16,val:5,test:3}", "data.image_size=32", "data.batch_size=2", "data.num_workers=1"],
    *["model=unet_plain", "model.width=4", "model.depth=2", "callbacks=ema"],
]
SAME = ["metrics.json", "metrics.csv", "results_val.csv", "results_test.csv", "splits.json"]


@pytest.fixture(scope="module")
def swept(cli):
    """The folder of a sweep over two seeds, and what was printed."""
    folder = cli.root / "processes"
    done = cli("train", "-m", *OPTIONS, "seed=1,2", f"hydra.sweep.dir={folder}")
    return folder, done.stdout


def wait_for(condition, seconds=390):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_jobs_of_a_sweep_train_by_two_processes(cli, swept):
    folder, _ = swept
    for job in ("0", "1"):
        epochs = re.findall(
            r"^\S+ \S+ INFO medvision.callbacks.course: epoch (\d)/5", (folder / job / "train.log").read_text(), re.M
        )
        assert epochs == list("12345")  # by the first process alone
        history = list(csv.DictReader((folder / job / "metrics.csv").open()))
        assert [row["epoch"] for row in history if row["metric"] == "val/dice"] == list("12345")
        assert [int(row["step"]) for row in history if row["metric"] == "train/loss_step"] == list(range(20))
        assert len(lines(folder / job / "results_val.csv")) == 6 and len(lines(folder / job / "results_test.csv")) == 4
    assert sorted(path.name for path in folder.iterdir() if (path / "checkpoints").exists()) == ["0", "1"]
    assert not list((cli.root / "runs").glob("*unet_plain*"))


@pytest.mark.parametrize("victim", ["first", "second"])
def test_one_of_them_killed_ends_both_and_the_run_can_go_on(cli, swept, victim):
    folder = cli.root / f"without-{victim}"
    process = cli.start("train", *OPTIONS, "seed=1", f"hydra.run.dir={folder}")
    parent = psutil.Process(process.pid)

    def second():
        return [p for p in parent.children() if f"resume={folder}" in p.cmdline()]

    try:
        wait_for(lambda: (folder / "checkpoints" / "last.ckpt").exists() or process.poll() is not None)
        (other,) = second()
        (other if victim == "second" else process).send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
        wait_for(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, 60)
    finally:
        process.kill()
    assert not (folder / "metrics.json").exists()

    done = cli("train", f"resume={folder}")
    assert "going on from" in done.stdout and done.stdout.count("epoch 5/5") == 1
    whole = swept[0] / "0"
    for name in SAME:
        assert (folder / name).read_text() == (whole / name).read_text(), name
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, folder))
    for part in ("state_dict", "current_model_state"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
