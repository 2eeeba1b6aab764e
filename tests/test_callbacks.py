"""Checkpoints: which epochs the two files hold, whatever the course of the metric."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.trainer.states import TrainerFn

from medvision.callbacks import Checkpoint, PlainCheckpointIO


def trainer_at(epoch, value):
    """What `Checkpoint` asks of a trainer."""

    def save_checkpoint(path):
        content = {"epoch": epoch, "weights": torch.full((1000 - epoch,), float(epoch))}  # smaller each time
        PlainCheckpointIO().save_checkpoint(content, path)

    return SimpleNamespace(
        current_epoch=epoch,
        callback_metrics={"val/dice_image": value, "train/loss": 0.5},
        fit_loop=SimpleNamespace(restarting=False),
        is_global_zero=True,
        sanity_checking=False,
        save_checkpoint=save_checkpoint,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )


def content(path):
    found = torch.load(path, weights_only=True)
    assert found["weights"].tolist() == [float(found["epoch"])] * (1000 - found["epoch"])
    return found["epoch"]


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.sampled_from([0.1, 0.2, 0.3, float("nan")]), min_size=1, max_size=8), stopped=st.booleans())
def test_last_and_best_hold_their_epochs(tmp_path_factory, values, stopped):
    folder = tmp_path_factory.mktemp("checkpoints")
    if stopped:  # what a kill in the middle of writing leaves
        (folder / ".0.slot").write_bytes(b"half a file, longer than a whole one" * 1000)
    callback = Checkpoint(folder, "val/dice_image", "max")
    for epoch, value in enumerate(values):
        trainer = trainer_at(epoch, value)
        callback.on_validation_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
        callback.on_train_epoch_start(trainer, None)
        known = [v for v in values[: epoch + 1] if v == v]
        assert content(folder / "last.ckpt") == epoch
        assert not known or content(folder / "best.ckpt") == values.index(max(known))
        assert len(list(folder.glob(".*.slot"))) <= 3
    callback.on_train_end(trainer_at(len(values) - 1, values[-1]), None)
    assert {file.name for file in folder.iterdir()} <= {"last.ckpt", "best.ckpt"}
    assert content(folder / "last.ckpt") == len(values) - 1


def test_a_kill_between_the_two_files_leaves_no_older_best(tmp_path, monkeypatch):
    callback, link = Checkpoint(tmp_path, "val/dice_image", "max"), os.link
    callback.on_validation_end(trainer_at(0, 0.1), None)
    callback.on_train_end(trainer_at(0, 0.1), None)

    def killed(*_):
        raise KeyboardInterrupt

    def once(*paths):
        link(*paths)
        monkeypatch.setattr(os, "link", killed)

    monkeypatch.setattr(os, "link", once)
    callback.on_validation_end(trainer_at(1, 0.2), None)
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(trainer_at(1, 0.2), None)
    assert (content(tmp_path / "best.ckpt"), content(tmp_path / "last.ckpt")) == (1, 0)
