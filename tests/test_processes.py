"""Training by two processes on the CPU: as one with twice the batch, and each measures all images once."""

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only

from medvision import cli
from medvision.build import build
from medvision.errors import MedvisionError
from medvision.logger import read_history
from medvision.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")
MASKS = ["model=unet_plain", "model.width=4", "model.depth=2", "data.images={train:16,val:5,test:3}"]
LABELS = ["data=phantom_insects", "model=classifier", "model.name=resnet10t", "data.images={train:16,val:5}"]
SMALL = [
    "data.image_size=32",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "scheduler=none",
]
EXACT = ["loss=bce", "model.norm=instance", "augment=none", "optimizer=sgd", "optimizer.lr=0.1"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDVISION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def train(folder, overrides):
    """A training in this process: weights, numbers, and what the checkpoint knows of the best epoch."""
    run = build(cli.compose("train", [*SMALL, *overrides]))
    folder.mkdir(exist_ok=True)
    run.folder = RunFolder(folder)
    trainer, _ = run.training()
    run.data.prepare_data()
    trainer.fit(run.task, datamodule=run.data)
    weights = {name: value.numpy() for name, value in run.task.model.state_dict().items()}
    return weights, {k: float(v) for k, v in trainer.callback_metrics.items()}, trainer.checkpoint_callbacks[0].values


def train_as(rank, port, folder, overrides):
    found = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in found.items()})
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    return train(folder, [*overrides, "trainer=ddp"])


@pytest.fixture
def by_two(tmp_path):
    """`by_two(overrides)`: what `train` answers in each of two processes, and the run folder."""

    def run(overrides):
        folder = tmp_path / "two"
        build(cli.compose("train", [*SMALL, *overrides])).data.prepare_data()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")  # a fork cannot train once its parent has autograd's threads
        with ProcessPoolExecutor(2, context) as pool:
            ranks = [pool.submit(train_as, rank, port, folder, overrides) for rank in range(2)]
            return [rank.result() for rank in ranks], folder

    return run


def test_two_processes_train_as_one_with_twice_the_batch(by_two, tmp_path):
    (first, second), _ = by_two([*MASKS, *EXACT, "data.batch_size=2"])
    alone = train(tmp_path / "one", [*MASKS, *EXACT, "data.batch_size=4"])
    start = build(cli.compose("train", [*SMALL, *MASKS, *EXACT])).task.model.state_dict()
    for name, value in alone[0].items():
        assert value == pytest.approx(first[0][name], abs=1e-5), name
        assert (first[0][name] == second[0][name]).all()
    assert any(abs(value - alone[0][name]).max() > 1e-3 for name, value in start.items())
    assert first[1] == pytest.approx(second[1], abs=0, rel=0, nan_ok=True) and first[2] == second[2]
    assert first[1]["train/loss"] == pytest.approx(alone[1]["train/loss"], abs=1e-5)
    assert first[1]["val/loss"] == pytest.approx(alone[1]["val/loss"], abs=1e-5)


@pytest.mark.parametrize("task", [MASKS, LABELS], ids=["masks", "labels"])
def test_validation_by_two_processes_counts_every_image_once(by_two, task):
    (first, second), folder = by_two([*task, "data.batch_size=2", "optimizer.lr=0.01"])  # 2 batches and 1
    history = {name: value for epoch, _, name, value in read_history(folder / "metrics.csv") if epoch == 2}
    assert len([row for row in read_history(folder / "metrics.csv") if row[2] == "val/loss"]) == 2
    run = build(cli.compose("train", [*SMALL, *task]))
    run.load_weights(folder / "checkpoints" / "last.ckpt")
    trainer = run.evaluating()
    trainer.validate(run.task, datamodule=run.data, verbose=False)
    expected = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert len(expected) > 8 and expected["val/loss"] == pytest.approx(first[1]["val/loss"], abs=1e-6)
    del expected["val/loss"]
    for name, value in expected.items():
        for found in (first[1], second[1], history):
            assert found[name] == pytest.approx(value, abs=1e-7, nan_ok=True), name
    assert first[2] == second[2] and first[2]["best"] is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.images={train:8,val:1,test:1}"], "asks for 2 processes, but val has only 1 images to share"),
        (["model.freeze_encoder=2"], "model.freeze_encoder=2 thaws the encoder while 2 processes train"),
    ],
)
def test_what_processes_cannot_share_is_refused(overrides, message):
    run = build(cli.compose("train", [*SMALL, *MASKS, *overrides, "trainer=ddp"]))
    with pytest.raises(MedvisionError, match=message):
        run.check_shares(2)
