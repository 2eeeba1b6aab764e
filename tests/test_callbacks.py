"""Checkpoints: which epochs the two files hold, whatever the course of the metric. Thawing at its epoch."""

import errno
import itertools
import os
import resource
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.trainer.states import TrainerFn

from medvision.callbacks import Checkpoint, PlainCheckpointIO, Thaw
from medvision.models import UNetFamily


def trainer_at(epoch, value, other=0.0):
    """What `Checkpoint` asks of a trainer."""

    def save_checkpoint(path):
        content = {"epoch": epoch, "weights": torch.full((1000 - epoch,), float(epoch))}  # smaller each time
        PlainCheckpointIO().save_checkpoint(content, path)

    return SimpleNamespace(
        current_epoch=epoch,
        callback_metrics={"val/dice_image": value, "paper/dice": other, "train/loss": 0.5},
        fit_loop=SimpleNamespace(restarting=False),
        is_global_zero=True,
        sanity_checking=False,
        save_checkpoint=save_checkpoint,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )


def test_a_full_disk_is_named(tmp_path, in_processes):
    def work(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            PlainCheckpointIO().save_checkpoint({"weights": torch.zeros(50_000)}, tmp_path / "last.ckpt")
        except OSError as error:
            return error.errno
        return None

    assert in_processes(1, work) == [errno.EFBIG]


VALUES = st.sampled_from([0.1, 0.2, 0.3, float("nan")])


def content(path):
    found = torch.load(path, weights_only=True)
    assert found["weights"].tolist() == [float(found["epoch"])] * (1000 - found["epoch"])
    return found["epoch"]


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8), stopped=st.booleans())
def test_each_file_holds_its_epoch(tmp_path_factory, values, stopped):
    folder = tmp_path_factory.mktemp("checkpoints")
    if stopped:  # what a kill in the middle of writing leaves
        (folder / ".0.slot").write_bytes(b"half a file, longer than a whole one" * 1000)
    callback = Checkpoint(folder, "val/dice_image", "max", paper="paper/dice")
    for epoch, both in enumerate(values):
        trainer = trainer_at(epoch, *both)
        callback.on_validation_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
        callback.on_train_epoch_start(trainer, None)
        assert content(folder / "last.ckpt") == epoch
        for name, seen in zip(("best", "paper"), zip(*values[: epoch + 1], strict=True), strict=True):
            if known := [v for v in seen if v == v]:
                first = seen.index(max(known))
                assert content(folder / f"{name}.ckpt") == first
                assert callback.state_dict()[f"{name}_epoch"] == first + 1
        assert len(list(folder.glob(".*.slot"))) <= 4
    callback.on_train_end(trainer_at(len(values) - 1, *values[-1]), None)
    assert {file.name for file in folder.iterdir()} <= {"last.ckpt", "best.ckpt", "paper.ckpt"}
    assert content(folder / "last.ckpt") == len(values) - 1
    resumed = Checkpoint(folder, "val/dice_image", "max", paper="paper/dice")
    resumed.load_state_dict(callback.state_dict())
    assert resumed.state_dict() == callback.state_dict()


def test_a_run_from_the_checkpoint_of_another_has_its_own_best(tmp_path):
    callback = Checkpoint(tmp_path, "val/dice_image", "max")
    callback.load_state_dict({"best": 0.9, "best_epoch": 7})
    assert callback.state_dict() == {"best": None, "best_epoch": 0}


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


class Training(pl.LightningModule):
    """Trains four epochs of two batches and keeps a copy of the encoder after each."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.model = UNetFamily(width=4, depth=1, **options)
        self.images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.encoders = [self.encoder()]

    def encoder(self):
        return torch.cat([value.float().flatten() for value in self.model.encoder.state_dict().values()]).clone()

    def training_step(self, batch, batch_idx):
        return (self.model(batch) - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        self.model(batch)

    def on_train_epoch_end(self):
        self.encoders.append(self.encoder())

    def configure_optimizers(self):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def fit(self, epochs, checkpoint=None):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[Thaw()], enable_checkpointing=False, **quiet
        )
        loaders = [torch.utils.data.DataLoader(self.images, batch_size=2) for _ in range(2)]
        trainer.fit(self, *loaders, ckpt_path=checkpoint, weights_only=True)
        return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("freeze", "first"), [(False, 1), (1, 1), (3, 3), (True, 5)])
def test_the_encoder_thaws_at_the_start_of_its_epoch(freeze, first):
    training = Training(freeze_encoder=freeze)
    training.fit(4)
    moves = [not torch.equal(a, b) for a, b in itertools.pairwise(training.encoders)]
    assert moves == [epoch >= first for epoch in range(1, 5)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_resumed_run_thaws_as_an_undisturbed_one(tmp_path, stopped):
    whole = Training(freeze_encoder=3)
    whole.fit(4)
    Training(freeze_encoder=3).fit(stopped).save_checkpoint(tmp_path / "last.ckpt")
    resumed = Training(freeze_encoder=3)
    resumed.fit(4, tmp_path / "last.ckpt")
    ends = [training.model.state_dict() for training in (whole, resumed)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
