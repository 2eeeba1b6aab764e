"""Averages of weights: their formulas, what validation and a checkpoint have of them, and a resumption."""

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import open_dict
from torch.utils.data import DataLoader

from medvision import cli, train
from medvision.build import build, load_run
from medvision.callbacks import EMA, SWA, Checkpoint, PlainCheckpointIO, Thaw
from medvision.errors import MedvisionError
from medvision.losses import SegmentationLoss
from medvision.models import UNetFamily
from medvision.optim import OneCycle, from_torch
from medvision.runs import RunFolder
from medvision.spec import DataSpec
from medvision.tasks import SegmentationTask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Record(pl.Callback):
    """The weights after each optimizer step and at each epoch's end, and what validation measured with."""

    def __init__(self):
        self.steps, self.epochs, self.validated = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.steps):
            self.steps.append(copied(pl_module.model))
        if trainer.is_last_batch:
            self.epochs.append(copied(pl_module.model))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(copied(pl_module.model))


class Stop(pl.Callback):
    """Ends a training in the middle of an epoch, counted from 0, as a signal would."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            raise Killed


class Killed(BaseException):
    """No exception that anybody catches."""


def copied(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def fit(folder, average, epochs=4, stop=None, resume=False, **options):
    """A training of 5 images in batches of 2; the trainer, the task and the record."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 8, 8, generator=draw)
    items = [{"image": image, "target": (image[:1] > 0).float()} for image in images]
    torch.manual_seed(0)
    model = UNetFamily(width=4, depth=1, freeze_encoder=options.pop("freeze", False), dropout=0.1)
    spec = DataSpec("dots", ("dot",), "binary", in_channels=3, num_outputs=1, image_size=(8, 8))
    optimizer = partial(from_torch, name="AdamW", lr=0.02, layer_decay=0.75)
    task = SegmentationTask(model, SegmentationLoss({"bce": 1}), optimizer, OneCycle(epochs), spec)
    if options.pop("compile", False):
        task.model.compile(backend="eager")
    record = Record()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[record, average, Thaw(), Checkpoint(folder, "val/jaccard_image", "max"), Stop(stop)],
        plugins=[PlainCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    train_loader, val_loader = DataLoader(items, batch_size=2), DataLoader(items, batch_size=5)
    path = folder / "last.ckpt" if resume else None
    with contextlib.suppress(Killed):
        trainer.fit(task, train_loader, val_loader, ckpt_path=path, weights_only=True)
    return trainer, task, record


def saved(folder, name="last"):
    """The average and the weights themselves in a checkpoint."""
    checkpoint = torch.load(folder / f"{name}.ckpt", weights_only=True)
    parts = (checkpoint["state_dict"], checkpoint["current_model_state"])
    return tuple({key.removeprefix("model."): value for key, value in part.items()} for part in parts)


def close(found, expected):
    """In floating point; whole numbers, the batches that a norm has seen, are of no use."""
    for key, value in expected.items():
        if found[key].is_floating_point():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def naive(weights, decays):
    """w_avg = d * w_avg + (1 - d) * w over the steps, in double precision, after each."""
    average = {key: value.double().numpy() for key, value in weights[0].items()}
    averages = [average]
    for now, decay in zip(weights[1:], decays, strict=False):
        average = {key: decay * value + (1 - decay) * now[key].double().numpy() for key, value in average.items()}
        averages.append(average)
    return averages


WARM = [(1 + n) / (10 + n) for n in range(1, 100)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"decay": 0.8, "warmup": False}, [0.8] * 100),
        ({"decay": 0.999}, WARM),
        ({"decay": 0.3}, [min(d, 0.3) for d in WARM]),
    ],
)
def test_ema_is_its_formula(tmp_path, options, decays, accumulate):
    _, task, record = fit(tmp_path, EMA(**options), accumulate_grad_batches=accumulate)
    each = 3 if accumulate == 1 else 2  # optimizer steps of an epoch
    assert len(record.steps) == 4 * each
    averages = naive(record.steps, decays)
    assert "encoder.stages.0.norm1.running_mean" in averages[0]
    for validated, expected in zip(record.validated, averages[each - 1 :: each], strict=True):
        close(validated, expected)
    average, weights = saved(tmp_path)
    assert equal(average, record.validated[-1]) and equal(weights, record.steps[-1])
    assert equal(average, copied(task.model)) and not equal(average, weights)


@pytest.mark.parametrize(("share", "first"), [(0.25, 3), (0.5, 2), (0.6, 2), (1, 0), (0.01, 3)])
def test_swa_is_the_mean_of_the_ends_of_the_last_epochs(tmp_path, share, first):
    _, task, record = fit(tmp_path, SWA(share))
    for epoch, validated in enumerate(record.validated):
        if epoch <= first:  # one alone is its own mean
            assert equal(validated, record.epochs[epoch])
        else:
            ends = record.epochs[first : epoch + 1]
            close(validated, {key: np.mean([end[key].double().numpy() for end in ends], 0) for key in ends[0]})
    average, weights = saved(tmp_path)
    assert equal(average, record.validated[-1]) and equal(weights, record.epochs[-1])
    assert equal(average, copied(task.model)) and equal(average, weights) == (first == 3)


AVERAGES = {"ema": partial(EMA, 0.8), "swa": partial(SWA, 0.75)}


@pytest.mark.parametrize("name", AVERAGES)
def test_best_holds_the_average_of_its_epoch(tmp_path, name):
    trainer, _, record = fit(tmp_path, AVERAGES[name]())
    (checkpoint,) = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoint)]
    epoch = checkpoint.epochs["best"] - 1
    average, weights = saved(tmp_path, "best")
    assert equal(average, record.validated[epoch]) and equal(weights, record.epochs[epoch])


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "freeze": 3}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("name", AVERAGES)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, name, options, stop):
    make = AVERAGES[name]
    _, whole, record = fit(tmp_path / "whole", make(), **options)
    fit(tmp_path / "broken", make(), stop=stop, **options)
    _, resumed, rest = fit(tmp_path / "broken", make(), resume=True, **options)
    assert all(equal(*pair) for pair in zip(record.validated[stop:], rest.validated, strict=True))
    for one, other in zip(saved(tmp_path / "whole"), saved(tmp_path / "broken"), strict=True):
        assert equal(one, other)
    assert equal(*saved(tmp_path / "whole")) is False and equal(copied(whole.model), copied(resumed.model))
    states = [torch.load(tmp_path / f / "last.ckpt", weights_only=True) for f in ("whole", "broken")]
    assert states[0]["averaging_state"] == states[1]["averaging_state"]
    assert states[0]["averaging_state"]["n_averaged"] == {"ema": len(record.steps), "swa": 3}[name]


@pytest.mark.parametrize("name", AVERAGES)
def test_a_frozen_encoder_stays_what_it_is_in_the_average(tmp_path, name):
    *_, record = fit(tmp_path, AVERAGES[name](), freeze=3)
    start = {key: value for key, value in record.steps[0].items() if key.startswith("encoder.")}
    moves = [any(not torch.equal(validated[key], start[key]) for key in start) for validated in record.validated]
    assert moves == [False, False, True, True]
    assert all(not equal(*pair) for pair in itertools.pairwise(record.validated))


@pytest.mark.parametrize("name", AVERAGES)
def test_a_compiled_model_has_the_same_average(tmp_path, name):
    *_, plain = fit(tmp_path / "plain", AVERAGES[name](), epochs=2)
    *_, compiled = fit(tmp_path / "compiled", AVERAGES[name](), epochs=2, compile=True)
    close(compiled.validated[-1], {key: value.numpy() for key, value in plain.validated[-1].items()})
    assert equal(saved(tmp_path / "compiled")[0], compiled.validated[-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1), "callbacks.average.decay is 1; expected a number above 0 and below 1"),
        (lambda: EMA(0), "callbacks.average.decay is 0; expected"),
        (lambda: SWA(0), "callbacks.average.share is 0; expected a number above 0, at most 1"),
        (lambda: SWA(1.1), "callbacks.average.share is 1.1; expected"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(MedvisionError, match=message):
        make()


@pytest.fixture
def compose(tmp_path, monkeypatch):
    """`compose(*overrides)`: the config of a tiny training."""
    for name in ("data", "cache", "runs"):
        monkeypatch.setenv(f"MEDVISION_{name.upper()}", str(tmp_path / name))
    tiny = ["data.images={train:8,val:4,test:4}", "data.image_size=[16,24]", "data.batch_size=4", "data.num_workers=0"]
    tiny += ["model=unet_plain", "model.width=4", "model.depth=2", "trainer.max_epochs=3", "trainer.accelerator=cpu"]

    def make(*overrides):
        cfg = cli.compose("train", [*tiny, *overrides])
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    return make


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks=swa", "trainer.max_epochs=-1", "scheduler=none"], "callbacks=swa averages the last epochs, but"),
        (["callbacks=swa", "+trainer.max_steps=10"], "trainer.max_epochs is 3 and trainer.max_steps 10; set"),
        (["callbacks=ema", "trainer.precision=bf16-true"], "set trainer.precision=bf16-mixed or callbacks=default"),
        (["scheduler=plateau", "trainer.check_val_every_n_epoch=2"], "trainer.check_val_every_n_epoch is 2; set it"),
        (["trainer.max_epochs=-1"], "scheduler.epochs is -1; expected the number of epochs"),
        (["scheduler=onecycle", "trainer.max_epochs=null"], "scheduler.epochs is None; expected the number of epochs"),
    ],
)
def test_what_cannot_go_together_is_refused_before_anything_is_done(compose, tmp_path, overrides, message):
    with pytest.raises(MedvisionError, match=message):
        run = build(compose(*overrides))
        run.folder = RunFolder(tmp_path / "run")
        run.training()
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_a_run_is_measured_with_its_average(compose, tmp_path, name, capsys):
    folder = tmp_path / "run"
    train.start(compose(f"callbacks={name}"), folder, [])
    run = load_run(folder)
    average, weights = saved(folder / "checkpoints", "best")
    assert equal(copied(run.task.model), average) and (name == "swa" or not equal(average, weights))
    trainer = run.evaluating()
    (measured,) = trainer.validate(run.task, run.data, verbose=False)
    assert measured["val/jaccard_image"] == pytest.approx(run.metrics["monitor"]["value"], rel=1e-6)
    logged = {row[0]: row[3] for row in run.history if row[2] == "val/loss"}
    assert measured["val/loss"] == pytest.approx(logged[run.metrics["epoch"]], rel=1e-5)
