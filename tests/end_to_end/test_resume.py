"""A run that is killed and resumed ends as one that was not: same weights, bit for bit, same numbers, same files."""

import random
import signal
import time

import pytest
import torch

VARIANTS = {
    "cosine": ["scheduler=cosine", "data.num_workers=2"],
    "plateau": [
        *["scheduler=plateau", "scheduler.patience=0", "data.num_workers=0", "optimizer=sgd", "callbacks=ema"],
        "protocol=paper",
        *["trainer.accumulate_grad_batches=2", "model.freeze_encoder=2", "optimizer.layer_decay=0.75"],
    ],
}
PARTS = ["state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"]
SAME = ["metrics.json", "metrics.csv", "results_val.csv", "results_test.csv", "splits.json"]


def wait_for(condition, process):
    """Waits until a file speaks of the wanted moment; a process that ends first was too fast to be killed there."""
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return
        time.sleep(0.005)


def epochs_saved(folder):
    try:
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"]
    except FileNotFoundError:
        return 0


def rows(folder):
    path = folder / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def kill_when(condition, process, jitter):
    wait_for(condition, process)
    time.sleep(jitter)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_equals_uninterrupted(cli, tiny, variant):
    chance = random.Random(variant)
    options = [*tiny, *VARIANTS[variant], "trainer.max_epochs=4"]
    whole, broken = cli.root / f"whole-{variant}", cli.root / f"broken-{variant}"
    cli("train", *options, f"hydra.run.dir={whole}")

    process = cli.start("train", *options, f"hydra.run.dir={broken}")
    kill_when(lambda: rows(broken) > 4, process, chance.uniform(0, 0.2))  # in the first epoch
    seen = rows(broken)
    process = cli.start("train", f"resume={broken}")
    kill_when(lambda: epochs_saved(broken) >= 2, process, chance.uniform(0, 0.5))  # in a later one
    assert not (broken / "metrics.json").exists()
    process = cli.start("train", f"resume={broken}")
    kill_when(lambda: (broken / "results_val.csv").exists(), process, 0)  # while it evaluates
    assert not (broken / "metrics.json").exists()
    cli("train", f"resume={broken}")

    assert seen > 4
    for name in SAME:
        assert (broken / name).read_text() == (whole / name).read_text(), name
    for name in ("best", "last", *(["paper"] if "protocol=paper" in options else [])):
        one, other = (torch.load(f / "checkpoints" / f"{name}.ckpt", weights_only=True) for f in (whole, broken))
        assert one.keys() == other.keys() and ("averaging_state" in one) == (variant == "plateau")
        for part in [part for part in PARTS if part in one]:
            assert flat(one[part]).keys() == flat(other[part]).keys()
            for key, value in flat(one[part]).items():
                twin = flat(other[part])[key]
                assert torch.equal(value, twin) if isinstance(value, torch.Tensor) else value == twin, (name, key)


def flat(node, prefix=""):
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(node, list | tuple):
        return {k: v for i, value in enumerate(node) for k, v in flat(value, f"{prefix}.{i}").items()}
    return {prefix: node}


def test_two_processes_do_not_train_one_folder(cli, tiny):
    folder = cli.root / "twice"
    process = cli.start("train", *tiny, "trainer.max_epochs=200", f"hydra.run.dir={folder}")
    try:
        wait_for(lambda: rows(folder) > 4, process)
        assert "being trained by another process" in cli("train", f"resume={folder}", code=1).stderr
    finally:
        process.kill()
        process.wait()


def test_resuming_on_changed_data_is_refused(cli, tiny):
    folder = cli.root / "changed"
    process = cli.start("train", *tiny, "trainer.max_epochs=200", f"hydra.run.dir={folder}")
    wait_for(lambda: rows(folder) > 4, process)
    process.kill()
    process.wait()
    splits = folder / "splits.json"
    splits.write_text(splits.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    error = cli("train", f"resume={folder}", code=1).stderr
    assert "is not what" in error and "fingerprint" in error
