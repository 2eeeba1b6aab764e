"""A sweep that is killed again and again ends as one that was not; failures, two at once, an experiment."""

import itertools
import json
import random
import re
import signal
import subprocess
import time

import psutil
import pytest
import torch

from medvision.configs import load_config
from medvision.runs import RunFolder

SMALL = [
    "data.images={train:8,val:3,test:3}",
    "data.image_size=32",
    "data.batch_size=4",
    "model=unet",
    "model.encoder=resnet18",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures.every_seconds=0",
    "task.tolerance=null",
    "loss.positive_weights=auto",
]
SWEEP = ["-m", *SMALL, "trainer.max_epochs=2", "seed=1,2,3", "launcher=joblib"]
SAME = ["metrics.json", "metrics.csv", "results_test.csv", "splits.json"]


@pytest.fixture(scope="module")
def whole(cli):
    """An uninterrupted sweep, its folder named as Hydra cannot read it, and what it printed."""
    folder = cli.root / "whole=1"
    return folder, cli("train", *SWEEP, f"hydra.sweep.dir='{folder}'").stdout


def test_the_folder_of_a_sweep(whole):
    folder, said = whole
    assert [p.name for p in sorted(folder.iterdir()) if p.is_dir()] == ["0", "1", "2"]  # seeds are no variants
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert [job["overrides"][-1] for job in jobs.values()] == ["seed=1", "seed=2", "seed=3"]
    assert all("launcher" not in job["config"] for job in jobs.values())
    assert all(job["config"]["loss"]["positive_weights"] == "auto" for job in jobs.values())
    weights = [load_config(RunFolder(folder / n)).loss.positive_weights[0] for n in "012"]
    assert weights[0] > 1 and len({*weights}) == 1  # became a number as the jobs began
    for n in "012":
        assert f"job {n} started: seed={int(n) + 1}" in said
        value = json.loads((folder / n / "metrics.json").read_text())["monitor"]["value"]
        assert re.search(rf"job {n} finished in \d+ s: val/jaccard_image {value:.4f}; \d of 3 are over", said)
        assert "epoch 2/2" in (folder / n / "output.log").read_text()
    assert "epoch 2/2" not in said
    assert re.search(r"\| 2 +\| seed=3 +\| finished +\| val/jaccard_image", said)


def test_a_sweep_over_seeds_is_one_variant(cli, whole):
    folder, _ = whole
    one, other = (torch.load(folder / n / "checkpoints" / "last.ckpt", weights_only=True) for n in "01")
    assert not all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    cli("compare", f"run='{folder}'", "metric=dice", f"output={cli.root / 'compared'}")
    (variant,) = json.loads((cli.root / "compared" / "comparison.json").read_text())["variants"]
    stored = [json.loads((folder / n / "metrics.json").read_text())["test"]["dice"] for n in "012"]
    seeds = {f"seed {n}": value for n, value in enumerate(stored, 1)}
    assert variant["estimates"]["dice"]["seeds"] == pytest.approx(seeds)
    assert [run["folder"] for run in variant["runs"]] == [str(folder / n) for n in "012"]
    assert all("seed=" in run["command"] for run in variant["runs"])


class Sweeping:
    """A sweep in a process of its own, and the moments at which it is killed."""

    def __init__(self, cli, folder):
        self.cli, self.folder = cli, folder
        command = cli.command("train", *SWEEP, f"hydra.sweep.dir={folder}")
        self.process = subprocess.Popen(
            command, env=cli.environment, cwd=cli.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, pattern, count):
        """Waits until so many files of the jobs match."""
        deadline = time.monotonic() + 300
        while len([*self.folder.glob(pattern)]) < count:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.01)

    def tree(self):
        return psutil.Process(self.process.pid).children(recursive=True)


def gone(processes):
    """Whether all end, and so do not go on as orphans."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_killed_again_and_again_ends_as_if_it_was_not(cli, whole):
    folder, chance = cli.root / "broken", random.Random(4)

    sweeping = Sweeping(cli, folder)
    sweeping.wait_for("*/.hydra", 2)  # while it prepares
    sweeping.process.kill()
    sweeping.process.wait()

    sweeping = Sweeping(cli, folder)
    sweeping.wait_for("*/metrics.csv", 1)  # in the first epochs; the sweep alone is killed
    time.sleep(chance.uniform(0, 1))
    children = sweeping.tree()
    assert len(children) >= 2
    sweeping.process.kill()
    assert gone(children)
    assert not [*folder.glob("*/metrics.json")]

    sweeping = Sweeping(cli, folder)
    sweeping.wait_for("*/checkpoints/last.ckpt", 1)
    error = cli("train", *SWEEP, f"hydra.sweep.dir={folder}", code=1).stderr
    assert f"{folder} is being swept by another process; wait for it or stop it" in error
    time.sleep(chance.uniform(0, 1))
    children = sweeping.tree()
    for process in chance.sample([psutil.Process(sweeping.process.pid), *children], len(children) + 1):
        if process.is_running():
            process.kill()
    sweeping.process.wait()
    assert gone(children)

    sweeping = Sweeping(cli, folder)
    sweeping.wait_for("*/metrics.json", 1)  # one is finished, another begins
    time.sleep(chance.uniform(0, 3))
    children = sweeping.tree()
    sweeping.process.send_signal(signal.SIGTERM)
    said, _ = sweeping.process.communicate(timeout=100)
    assert sweeping.process.returncode == 1 and gone(children)
    assert "SIGTERM: ending the jobs that run" in said
    assert re.search(r"error: [12] of 3 jobs are finished\n  go on with: python -m medvision.train -m .*broken", said)

    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.json")}
    said = cli("train", *SWEEP, f"hydra.sweep.dir={folder}").stdout
    assert f"; {len(stamps)} are finished" in said and said.count(" started: ") == 3 - len(stamps)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    table = [re.findall(r"\| (\d) +\| (\S+) +\| (\w+) +\| (\S+) +\| +(\S+)", text) for text in (said, whole[1])]
    assert table[0] == table[1] and len(table[0]) == 3
    for n, name in itertools.product("012", SAME):
        assert (folder / n / name).read_text() == (whole[0] / n / name).read_text(), (n, name)
    for n in "012":
        one, other = (
            torch.load(f / n / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (folder, whole[0])
        )
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_failed_job_stops_no_other_and_is_named(cli, tmp_path):
    folder = cli.root / "failing"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "rates.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      optimizer.lr: -1,0.001,0.01\n"
    )
    command = ["--config-dir", str(tmp_path), "experiment=rates", *SMALL, "trainer.max_epochs=1"]
    done = cli("train", *command, f"hydra.sweep.dir={folder}", code=1)
    reason = r"job 0 \(optimizer.lr=-1\) failed: optimizer .* cannot be made \(ValueError: Invalid learning rate: -1\)"
    assert re.search(
        rf"error: 2 of 3 jobs are finished\n  {reason}; {folder}/0/output.log\n  go on with: ", done.stderr
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.count("epoch 1/1") == 2  # in turn, what they print is shown
    assert "difference to optimizer.lr=0.001" in done.stdout
    assert (folder / "comparison" / "comparison.json").exists()
    log = folder / "0" / "output.log"
    assert log.read_text().count("--- ") == 1

    again = cli("train", *command, f"hydra.sweep.dir={folder}", code=1)
    assert log.read_text().count("--- ") == 2 and again.stdout.count(" started: ") == 1

    error = cli("train", *command, f"hydra.sweep.dir={folder}", "seed=5", code=1).stderr
    assert "job 1 (optimizer.lr=0.001" in error and "seed: 0 -> 5" in error
