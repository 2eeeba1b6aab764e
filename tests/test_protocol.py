"""`protocol=paper`: the reported split is watched beside validation, and changes nothing that validation chooses."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from medvision.callbacks import Checkpoint, Pictures, PlainCheckpointIO
from medvision.data import ISIC2017
from medvision.evaluation import evaluate
from medvision.logger import HistoryLogger, read_history
from medvision.losses import SegmentationLoss
from medvision.tasks import SegmentationTask

EPOCHS = 4


def fit(folder, root, spec, watched, monkeypatch):
    """Trains a 1x1 convolution whose rate is so high that its metrics go up and down."""
    data = ISIC2017(spec(), root, root.parent / "cache", image_size=(12, 20), batch_size=2, num_workers=0)
    data.watched, asked, dataset = watched, [], data.dataset
    monkeypatch.setattr(data, "dataset", lambda split, **options: asked.append(split) or dataset(split, **options))
    folder.mkdir()
    torch.manual_seed(0)
    task = SegmentationTask(
        nn.Conv2d(3, 1, 1), SegmentationLoss({"dice": 1}), partial(torch.optim.SGD, lr=60.0), None, spec()
    )
    checkpoint = Checkpoint(folder, task.monitor, "max", **({"paper": "paper/dice"} if watched else {}))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=[HistoryLogger(folder / "metrics.csv")],
        callbacks=[Pictures(images=9), checkpoint],
        plugins=[PlainCheckpointIO()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        log_every_n_steps=1,
    )
    trainer.fit(task, datamodule=data)
    return data, task, checkpoint, asked, read_history(folder / "metrics.csv")


@pytest.fixture
def both(fake_isic2017, spec, tmp_path, monkeypatch):
    root = fake_isic2017(tmp_path / "isic2017", counts={"train": 4, "val": 3, "test": 5})
    return {
        name: fit(tmp_path / name, root, spec, watched, monkeypatch)
        for name, watched in (("clean", None), ("paper", "test"))
    }


def test_a_clean_training_never_asks_for_test(both):
    _, _, _, asked, history = both["clean"]
    assert set(asked) == {"train", "val"}
    assert not [name for _, _, name, _ in history if name.startswith("paper")]
    assert set(both["paper"][3]) == {"train", "val", "test"}


def test_what_is_watched_changes_nothing_of_the_training(both):
    clean, paper = (both[name] for name in ("clean", "paper"))
    assert all(torch.equal(value, paper[1].state_dict()[key]) for key, value in clean[1].state_dict().items())
    assert clean[4] == [row for row in paper[4] if not row[2].startswith("paper/")]
    assert clean[2].epochs["best"] == paper[2].epochs["best"]
    assert clean[2].values["best"] == paper[2].values["best"]
    pictures = [(both[name][2].folder / "validation.png").read_bytes() for name in ("clean", "paper")]
    assert pictures[0] == pictures[1]  # three images of val, and none of test in the places left


def test_the_epoch_of_the_paper_is_the_best_on_test_and_can_be_measured_again(both):
    data, task, checkpoint, _, history = both["paper"]
    watched = [value for _, _, name, value in history if name == "paper/dice"]
    assert len(watched) == EPOCHS and len(set(watched)) > 1
    assert checkpoint.epochs["paper"] == 1 + watched.index(max(watched))
    assert checkpoint.epochs["paper"] != checkpoint.epochs["best"]
    for name in ("paper", "best"):
        state = torch.load(checkpoint.folder / f"{name}.ckpt", weights_only=True)
        epoch = state["callbacks"]["Checkpoint"][f"{name}_epoch"]
        assert epoch == checkpoint.epochs[name]
        task.load_state_dict(state["state_dict"])
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        found = evaluate(trainer, task, data, "test").at_network_size()
        logged = {row[2].removeprefix("paper/"): row[3] for row in history if row[0] == epoch and "paper/" in row[2]}
        assert found.keys() - {"unetpp_iou"} <= logged.keys()
        assert {key: found[key] for key in ("dice", "jaccard_image")} == pytest.approx(
            {key: logged[key] for key in ("dice", "jaccard_image")}
        )
