"""Every schedule against its closed form, with and without warm-up and a resumption; optimizers against formulas."""

import copy
import inspect
import io
from functools import partial
from math import cos, pi

import numpy as np
import pytest
import pytorch_lightning as pl
import timm.optim
import torch
from torch import nn
from torch.utils.data import DataLoader

from medvision import optim
from medvision.callbacks import Checkpoint, PlainCheckpointIO, Thaw
from medvision.errors import MedvisionError
from medvision.logger import HistoryLogger, read_history
from medvision.losses import SegmentationLoss
from medvision.models import SMP, EncoderModel, UNetFamily, UNetPP, UNetV2
from medvision.spec import DataSpec
from medvision.tasks import SegmentationTask

EPOCHS, LR = 20, 0.5

SCHEDULES = {  # what makes it, and the part of the learning rate e epochs after a warm-up of w
    "none": (optim.constant, lambda e, w: 1),
    "cosine": (
        partial(optim.cosine, epochs=EPOCHS, eta_min=0.01),
        lambda e, w: 0.02 + 0.98 * (1 + cos(pi * e / (EPOCHS - w))) / 2,
    ),
    "cosine_restarts": (
        partial(optim.cosine_restarts, first=4, growth=1, eta_min=0.01),
        lambda e, w: 0.02 + 0.98 * (1 + cos(pi * (e % 4) / 4)) / 2,
    ),
    "cosine_restarts that grow": (
        partial(optim.cosine_restarts, first=4, growth=2),
        lambda e, w: (1 + cos(pi * e / 4 if e < 4 else pi * (e - 4) / 8 if e < 12 else pi * (e - 12) / 16)) / 2,
    ),
    "step": (partial(optim.step, every=6, gamma=0.3), lambda e, w: 0.3 ** (e // 6)),
    "multistep": (
        partial(optim.multistep, milestones=[8, 15], gamma=0.1),
        lambda e, w: 0.1 ** ((e + w >= 8) + (e + w >= 15)),
    ),
    "exponential": (partial(optim.exponential, gamma=0.9), lambda e, w: 0.9**e),
    "poly": (partial(optim.poly, epochs=EPOCHS, power=0.9), lambda e, w: (1 - e / (EPOCHS - w)) ** 0.9),
}


class Course:
    """A made-up training, of which only the learning rates matter."""

    def __init__(self, make):
        weights = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
        self.optimizer = optim.from_torch(weights, "SGD", no_decay_on_norms=True, lr=LR, weight_decay=0.1)
        self.schedule = make(self.optimizer)

    def run(self, steps, metrics=None):
        """The learning rate of each step."""
        rates = []
        for metric in metrics or [None] * steps:
            one, other = (group["lr"] for group in self.optimizer.param_groups)
            assert one == other
            rates.append(one)
            self.optimizer.step()
            self.schedule.step(*([] if metric is None else [metric]))
        return rates

    def resumed(self, make):
        """New objects from what a checkpoint holds."""
        file = io.BytesIO()
        torch.save([self.optimizer.state_dict(), self.schedule.state_dict()], file)
        file.seek(0)
        other = Course(make)
        optimizer, schedule = torch.load(file, weights_only=True)
        other.optimizer.load_state_dict(optimizer)
        other.schedule.load_state_dict(schedule)
        return other


def warmed(share, w):
    """The closed form with a warm-up of w epochs: from a tenth in a straight line."""
    return [LR * (0.1 + 0.9 * e / w if e < w else share(e - w, w)) for e in range(EPOCHS)]


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_closed_form(name, warmup):
    make, share = SCHEDULES[name]
    rates = Course(partial(make, warmup_epochs=warmup)).run(EPOCHS)
    np.testing.assert_allclose(rates, warmed(share, warmup), rtol=1e-12)


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 13])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_goes_on_as_if_it_had_not_stopped(name, warmup, stop):
    make = partial(SCHEDULES[name][0], warmup_epochs=warmup)
    course = Course(make)
    rates = course.run(stop)
    assert rates + course.resumed(make).run(EPOCHS - stop) == Course(make).run(EPOCHS)


@pytest.mark.parametrize("stop", [None, 2, 9])
@pytest.mark.parametrize("warmup", [0, 3])
def test_plateau(warmup, stop):
    make = partial(optim.plateau, mode="max", factor=0.5, patience=2, min_lr=0.1, warmup_epochs=warmup)
    better, worse = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]
    course, metrics = Course(make), [0.9] * warmup + better + worse + worse + [0.4] + worse * 3
    rates = course.run(0, metrics[:stop])
    if stop is not None:
        rates += course.resumed(make).run(0, metrics[stop:])
    # the metric of a warm-up, better than any later, does not count: patience begins after the third epoch
    expected = [1] * 6 + [0.5] * 3 + [0.25] * 4 + [0.2] * 6  # max(1 / 8, 0.1 / LR)
    warm = [0.1 + 0.9 * e / warmup for e in range(warmup)]
    np.testing.assert_allclose(rates, [LR * part for part in (warm + expected)], rtol=1e-12)


def onecycle(step, steps, rise):
    """Half a cosine from a 25th to the learning rate, then half a cosine down to a 10000th of the 25th."""

    def between(a, b, part):
        return b + (a - b) * (1 + cos(pi * part)) / 2

    peak, last = rise * steps - 1, steps - 1
    if step <= peak:
        return LR * between(1 / 25, 1, step / peak)
    return LR * between(1, 1 / 25e4, (step - peak) / (last - peak))


@pytest.mark.parametrize("stop", [None, 10, 70])
@pytest.mark.parametrize(("warmup", "rise"), [(0, 0.3), (5, 0.25)])
def test_onecycle_with_each_batch(warmup, rise, stop):
    steps = 7 * EPOCHS
    make = partial(optim.OneCycle(EPOCHS, warmup_epochs=warmup), steps=steps)
    course = Course(make)
    rates = course.run(steps if stop is None else stop)
    if stop is not None:
        rates += course.resumed(make).run(steps - stop)
    np.testing.assert_allclose(rates, [onecycle(i, steps, rise) for i in range(steps)], rtol=1e-9)
    assert warmup == 0 or max(rates) == rates[7 * warmup - 1] == LR


@pytest.mark.parametrize("steps", [10, 140])
def test_onecycle_is_torchs_own(steps):
    rates = Course(partial(optim.OneCycle(EPOCHS), steps=steps)).run(steps)
    library = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=LR, total_steps=steps, cycle_momentum=False)
    np.testing.assert_allclose(rates, Course(library).run(steps), rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_onecycle_of_few_steps(steps):
    rates = Course(partial(optim.OneCycle(4, warmup_epochs=1), steps=steps)).run(steps + 2)
    assert rates[0] == LR and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(LR / 25e4)


def test_cosine_is_torchs_own_bit_for_bit():
    course = Course(partial(optim.cosine, epochs=EPOCHS, eta_min=1e-6))
    other = Course(partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS, eta_min=1e-6))
    assert course.run(EPOCHS) == other.run(EPOCHS)
    assert course.schedule.state_dict() == other.schedule.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(optim.cosine, epochs=5, warmup_epochs=5), "warmup_epochs is 5; expected fewer than the 5 epochs"),
        (partial(optim.poly, epochs=5, warmup_epochs=-1), "warmup_epochs is -1; expected 0 or a positive int"),
        (partial(optim.step, every=5, gamma=0.1, warmup_epochs=1.5), "warmup_epochs is 1.5; expected 0 or a positive"),
        (partial(optim.multistep, milestones=[3, 9], gamma=0.1, warmup_epochs=3), r"milestones is \[3, 9\]; expected"),
        (partial(optim.cosine, epochs=-1), "scheduler.epochs is -1; expected .*: set trainer.max_epochs, or choose a"),
        (partial(optim.poly, epochs=None), "scheduler.epochs is None; expected the number of epochs, 1 or more"),
        (lambda _: optim.OneCycle(epochs=-1), "scheduler.epochs is -1; expected the number of epochs, 1 or more"),
        (lambda _: optim.OneCycle(epochs=5, rise=1), "rise is 1; expected 0 or more and below 1"),
        (lambda _: optim.OneCycle(epochs=5, warmup_epochs=7), "warmup_epochs is 7; expected fewer than the 5 epochs"),
    ],
)
def test_a_warm_up_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(MedvisionError, match=message):
        Course(make)


def test_a_state_without_warm_up_is_refused():
    state = Course(optim.constant).schedule.state_dict()
    with pytest.raises(MedvisionError, match=r"without warm-up; set scheduler.warmup_epochs=0"):
        Course(partial(optim.constant, warmup_epochs=2)).schedule.load_state_dict(state)


# Lightning steps them: a task on a model of one weight


class Dot(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, 1))

    def forward(self, image):
        return image * self.weight


class Rates(pl.Callback):
    """The learning rate of each step, and what was logged of it."""

    def __init__(self):
        self.steps, self.groups, self.logged = [], [], []

    def on_train_batch_start(self, trainer, *_):
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.steps.append(max(rates))
        self.groups.append([rate / max(rates) for rate in rates])

    def on_train_epoch_end(self, trainer, *_):
        self.logged.append(float(trainer.callback_metrics["lr"]))


def dots(model, optimizer, make=None, monitor="val/loss"):
    spec = DataSpec("dots", ("dot",), "binary", in_channels=1, num_outputs=1, image_size=(4, 4))
    return SegmentationTask(model, SegmentationLoss({"bce": 1}), optimizer, make, spec, monitor, "min")


def fit(folder, make, epochs, stop=None, accumulate=1, every=4, model=Dot, optimizer=None):
    """Rates of a training on 6 batches, stopped after an epoch and resumed if asked for."""
    items = [{"image": torch.ones(1, 4, 4), "target": torch.ones(1, 4, 4)}] * 6
    rates = Rates()
    folder.mkdir(exist_ok=True)
    for limit, path in [(epochs, None)] if stop is None else [(stop, None), (None, folder / "last.ckpt")]:
        task = dots(model(), optimizer or partial(torch.optim.SGD, lr=LR), make)

        class Stop(pl.Callback):
            def on_train_epoch_end(self, trainer, *_, limit=limit):
                trainer.should_stop = limit is not None and trainer.current_epoch + 1 == limit

        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            callbacks=[Thaw(), rates, Stop(), Checkpoint(folder, "val/loss", "min")],
            plugins=[PlainCheckpointIO()],
            logger=HistoryLogger(folder / "metrics.csv"),
            log_every_n_steps=every,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        loader = DataLoader(items)
        trainer.fit(task, loader, loader, ckpt_path=path, weights_only=True)
    return rates


@pytest.mark.parametrize("stop", [None, 1, 3])
@pytest.mark.parametrize("warmup", [0, 2])
def test_lightning_steps_each_epoch(tmp_path, warmup, stop):
    rates = fit(tmp_path, partial(optim.cosine, epochs=5, warmup_epochs=warmup), 5, stop)
    warm = [0.1 + 0.9 * e / warmup for e in range(warmup)]
    expected = [LR * part for part in warm + [(1 + cos(pi * e / (5 - warmup))) / 2 for e in range(5 - warmup)]]
    np.testing.assert_allclose(rates.steps, np.repeat(expected, 6), rtol=1e-12)
    np.testing.assert_allclose(rates.logged, expected, rtol=1e-6)


@pytest.mark.parametrize("stop", [None, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_lightning_steps_onecycle_each_batch(tmp_path, accumulate, stop):
    rates = fit(tmp_path, optim.OneCycle(5), 5, stop, accumulate)
    each = -(-6 // accumulate)  # optimizer steps of an epoch
    expected = [onecycle(e * each + batch // accumulate, 5 * each, 0.3) for e in range(5) for batch in range(6)]
    np.testing.assert_allclose(rates.steps, expected, rtol=1e-9)
    np.testing.assert_allclose(rates.logged, expected[5::6], rtol=1e-6)


@pytest.mark.parametrize("stop", [None, 1])
@pytest.mark.parametrize(("accumulate", "every"), [(1, 4), (2, 2), (1, 6), (1, 50)])
def test_what_is_logged_of_onecycle_is_its_closed_form(tmp_path, accumulate, every, stop):
    fit(tmp_path, optim.OneCycle(4), 4, stop, accumulate, every)
    steps = 4 * 6 // accumulate
    ends = [(e + 1) * steps // 4 - 1 for e in range(4)]
    found = [
        (epoch, step, value) for epoch, step, name, value in read_history(tmp_path / "metrics.csv") if name == "lr"
    ]
    assert [row[1] for row in found] == sorted({*range(every - 1, steps, every), *ends})
    assert [row[0] for row in found] == [step * 4 // steps + 1 for _, step, _ in found]
    np.testing.assert_allclose([row[2] for row in found], [onecycle(row[1], steps, 0.3) for row in found], rtol=1e-6)


@pytest.mark.parametrize("stop", [None, 1, 3])
def test_lightning_hands_plateau_its_metric(tmp_path, stop):
    never = partial(optim.plateau, mode="max", factor=0.5, patience=0, warmup_epochs=2)  # a loss that falls
    rates = fit(tmp_path, never, 6, stop)
    expected = [0.1, 0.55, 1, 1, 0.5, 0.25]
    np.testing.assert_allclose(rates.logged, [LR * part for part in expected], rtol=1e-6)


# Gradients of several batches


class Blur(nn.Module):
    """No batch statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 1, 1))

    def forward(self, image):
        return self.layers(image)


@pytest.mark.parametrize("scheduler", [None, optim.OneCycle(2)])
def test_two_accumulated_batches_are_one_of_twice_the_size(scheduler):
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 4, 4, generator=draw)
    items = [{"image": image, "target": (image > 0).float()} for image in images]
    ends = []
    for batch, accumulate in ((4, 1), (2, 2), (2, 1)):
        task = dots(Blur(), partial(torch.optim.AdamW, lr=0.01), scheduler)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, DataLoader(items, batch_size=batch))
        assert trainer.global_step == 24 // (batch * accumulate)
        ends.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
    whole, accumulated, halves = ends
    torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-7)
    assert (halves - whole).abs().max() > 1e-3


# Layers that learn at rates of their own


LAYERED = {  # an encoder, and a parameter of each of some layers with the layers between it and the head
    "resnet18": (
        lambda **options: SMP(encoder="resnet18", **options),
        {"conv1.weight": 9, "bn1.bias": 9, "layer1.0.conv1.weight": 8, "layer2.0.downsample.0.weight": 6}
        | {"layer4.1.bn2.weight": 1},
    ),
    "pvt_v2_b0": (
        lambda **options: UNetV2("pvt_v2_b0", channels=8, **options),
        {"patch_embed.proj.weight": 9, "stages_0.blocks.0.attn.q.weight": 8, "stages_0.norm.bias": 6}
        | {"stages_1.downsample.proj.weight": 6, "stages_3.blocks.1.mlp.fc1.weight": 1, "stages_3.norm.weight": 1},
    ),
    "convnext_atto": (
        lambda **options: UNetFamily("convnext_atto", width=4, **options),
        {"model.stem_0.weight": 13, "model.stages_0.blocks.0.gamma": 12, "model.stages_1.downsample.1.weight": 10}
        | {"model.stages_3.blocks.1.mlp.fc2.bias": 1},
    ),
    "plain": (
        lambda **options: UNetFamily(width=4, depth=2, **options),
        {"stages.0.conv1.weight": 3, "stages.1.norm2.bias": 2, "stages.2.conv2.weight": 1},
    ),
}


def task_of(model, **options):
    spec = DataSpec("dots", ("dot",), "binary", in_channels=3, num_outputs=1, image_size=(32, 48))
    optimizer = options.pop("optimizer", None) or partial(optim.from_torch, name="AdamW", lr=1e-3, **options)
    return SegmentationTask(model, SegmentationLoss({"bce": 1}), optimizer, options.pop("scheduler", None), spec)


@pytest.mark.parametrize("no_decay", [False, True])
@pytest.mark.parametrize("name", LAYERED)
def test_each_layer_learns_at_a_share_of_the_next_ones_rate(name, no_decay):
    make, expected = LAYERED[name]
    model = make()
    optimizer = task_of(model, layer_decay=0.75, no_decay_on_norms=no_decay).configure_optimizers()
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for parameter, above in expected.items():
        weight = model.get_submodule(model.encoder_at).get_parameter(parameter)
        assert groups[weight]["lr"] == pytest.approx(1e-3 * 0.75**above, rel=1e-12), parameter
        assert groups[weight]["weight_decay"] == (0 if no_decay and weight.ndim <= 1 else 0.01)
    head = [p for n, p in model.named_parameters() if not n.startswith(f"{model.encoder_at}.")]
    assert {groups[p]["lr"] for p in head} == {1e-3}
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(groups) and groups.keys() == set(model.parameters())
    layers = 1 + max(expected.values())
    assert len(optimizer.param_groups) == layers * (2 if no_decay else 1)


@pytest.mark.parametrize("name", LAYERED)
def test_a_frozen_encoder_leaves_the_head_alone_and_one_that_thaws_is_there_from_the_beginning(name):
    make, expected = LAYERED[name]
    model = make(freeze_encoder=True)
    optimizer = task_of(model, layer_decay=0.5).configure_optimizers()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert {p for group in optimizer.param_groups for p in group["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }
    optimizer = task_of(make(freeze_encoder=2), layer_decay=0.5).configure_optimizers()
    assert min(group["lr"] for group in optimizer.param_groups) == 1e-3 * 0.5 ** max(expected.values())


@pytest.mark.parametrize("decay", [1, 1.0])
def test_a_share_of_one_is_one_rate(decay):
    model = LAYERED["plain"][0]()
    (plain,) = task_of(model).configure_optimizers().param_groups
    layered = task_of(model, layer_decay=decay).configure_optimizers().param_groups
    assert {group["lr"] for group in layered} == {plain["lr"]} and len(layered) == 4
    assert [p for group in layered for p in group["params"]] == plain["params"]


def test_an_optimizer_that_knows_no_layers_gets_all_parameters():
    model = LAYERED["plain"][0]()
    (group,) = task_of(model, optimizer=partial(torch.optim.AdamW, lr=0.1)).configure_optimizers().param_groups
    assert group["params"] == [*model.parameters()]


def test_timm_and_a_rate_of_the_library():
    model = LAYERED["plain"][0]()
    for make in (partial(optim.from_timm, name="lion"), partial(optim.from_torch, name="Adam")):
        lr = make(model.parameters()).defaults["lr"]
        groups = task_of(model, optimizer=partial(make, layer_decay=0.5)).configure_optimizers().param_groups
        assert [group["lr"] for group in groups] == [lr / 8, lr / 4, lr / 2, lr]


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, "0.75", [0.5]])
def test_a_share_that_is_none_is_refused(decay):
    with pytest.raises(
        MedvisionError, match=r"optimizer.layer_decay is .*; expected null or a share above 0, at most 1"
    ):
        task_of(LAYERED["plain"][0](), layer_decay=decay).configure_optimizers()


def test_a_model_without_an_encoder_is_refused():
    message = "optimizer.layer_decay=0.75 counts the layers of an encoder, and this model has none; set"
    with pytest.raises(MedvisionError, match=message):
        task_of(UNetPP(channels=(4, 8)), layer_decay=0.75).configure_optimizers()
    with pytest.raises(MedvisionError, match=message):
        optim.from_torch(nn.Linear(2, 2).parameters(), "SGD", lr=0.1, layer_decay=0.75)


RATIOS = [0.001, 0.01, 0.1, 1]  # the floors of cosine and plateau are above the rates of some layers
ALL = {name: make for name, (make, _) in SCHEDULES.items()} | {
    "plateau": partial(optim.plateau, factor=0.5, patience=0, min_lr=0.01),
    "onecycle": lambda optimizer, warmup_epochs: optim.OneCycle(EPOCHS, warmup_epochs=warmup_epochs)(optimizer, 60),
}


class Layered(Course):
    """One weight in each of four layers; its learning rates are rows."""

    def __init__(self, make):
        weights = [[nn.Parameter(torch.ones(2))] for _ in RATIOS]
        given = optim.Parameters([w for (w,) in weights], lambda: weights)
        self.optimizer = optim.from_torch(given, "SGD", lr=LR, layer_decay=0.1)
        self.schedule = make(self.optimizer)
        self.metric = [0.0] if optim.needs_metric(self.schedule) else []

    def run(self, steps):
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.optimizer.step()
            self.schedule.step(*self.metric)
        return rates


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", ALL)
def test_a_schedule_keeps_the_ratios_of_the_layers(name, warmup, monkeypatch):
    make = partial(ALL[name], warmup_epochs=warmup)
    rates = Layered(make).run(EPOCHS)
    np.testing.assert_allclose(rates, [[row[-1] * ratio for ratio in RATIOS] for row in rates], rtol=1e-9)
    alone = Course(make)
    metrics = [0.0] * EPOCHS if name == "plateau" else None
    np.testing.assert_allclose([row[-1] for row in rates], alone.run(EPOCHS, metrics), rtol=1e-12)
    monkeypatch.setattr(f"{__name__}.Course", Layered)
    for stop in (3, 5, 12):
        course = Layered(make)
        assert course.run(stop) + course.resumed(make).run(EPOCHS - stop) == rates


class Deep(EncoderModel):
    """Two layers of one weight, and a head of one."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
        self.out = nn.Conv2d(1, 1, 1)
        self._begin("none", False, 3)

    def forward(self, image):
        return self.out(self.encoder(image))


@pytest.mark.parametrize("stop", [None, 2])
@pytest.mark.parametrize("make", [optim.OneCycle(4, warmup_epochs=1), partial(optim.plateau, patience=0, mode="max")])
def test_lightning_trains_layers_that_thaw(tmp_path, make, stop):
    optimizer = partial(optim.from_torch, name="SGD", lr=LR, layer_decay=0.25)
    rates = fit(tmp_path, make, 4, stop, model=Deep, optimizer=optimizer)
    np.testing.assert_allclose(rates.groups, [[1 / 16, 1 / 4, 1]] * 24, rtol=1e-9)
    alone = fit(tmp_path / "alone", make, 4, optimizer=partial(optim.from_torch, name="SGD", lr=LR))
    np.testing.assert_allclose(rates.steps, alone.steps, rtol=1e-12)
    np.testing.assert_allclose(rates.logged, rates.steps[5::6], rtol=1e-6)


# Optimizers


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1, bias=False))
    return model, torch.randn(2, 2, 6, 6)


def train(model, image, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()


OWN = {
    "adam": (("torch", "Adam"), torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (("torch", "AdamW"), torch.optim.AdamW, {"weight_decay": 0.1, "betas": [0.8, 0.99]}),
    "sgd": (("torch", "SGD"), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (("torch", "RMSprop"), torch.optim.RMSprop, {"alpha": 0.9}),
    "adagrad": (("torch", "Adagrad"), torch.optim.Adagrad, {}),
    "adabelief": (("timm", "adabelief"), partial(timm.optim.AdaBelief, rectify=False), {"weight_decay": 0.1}),
    "lion": (("timm", "lion"), timm.optim.Lion, {"weight_decay": 0.1, "betas": [0.9, 0.98]}),
    "lamb": (("timm", "lamb"), timm.optim.Lamb, {"weight_decay": 0.1}),
}
MAKE = {"torch": optim.from_torch, "timm": optim.from_timm}


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_is_that_of_its_library(name):
    (source, key), library, options = OWN[name]
    (model, image), (other, _) = small(), small()
    train(model, image, MAKE[source]((p for p in model.parameters()), key, lr=0.01, **options))
    fused = {"fused": True} if source == "torch" and "fused" in inspect.signature(library).parameters else {}
    train(other, image, library(other.parameters(), lr=0.01, **options, **fused))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("no_decay", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_resumes(name, no_decay):
    (source, key), _, options = OWN[name]
    make = partial(MAKE[source], name=key, no_decay_on_norms=no_decay, lr=0.01, **options)
    model, image = small()
    optimizer = make(model.parameters())
    train(model, image, optimizer)
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make(twin.parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    train(model, image, optimizer)
    train(twin, image, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def moments(gradients, beta):
    """The running mean of gradients, from 0."""
    mean, means = np.zeros_like(gradients[0]), []
    for gradient in gradients:
        mean = beta * mean + (1 - beta) * gradient
        means.append(mean)
    return means


def adam(w, gradients):
    first, second = moments(gradients, 0.9), moments([g**2 for g in gradients], 0.999)
    for t, (m, v) in enumerate(zip(first, second, strict=True), start=1):
        w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w


def sgd(w, gradients):
    velocity = 0
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        w = w - 0.01 * velocity
    return w


def lion(w, gradients):
    mean = np.zeros_like(w)
    for gradient in gradients:
        w = w * (1 - 0.01 * 0.1) - 0.01 * np.sign(0.9 * mean + 0.1 * gradient)
        mean = 0.99 * mean + 0.01 * gradient
    return w


@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (partial(optim.from_torch, name="Adam"), adam),
        (partial(optim.from_torch, name="SGD", momentum=0.9), sgd),
        (partial(optim.from_timm, name="lion", weight_decay=0.1), lion),
    ],
)
def test_an_optimizer_is_its_formula(make, formula):
    gradients = np.random.default_rng(0).normal(size=(4, 3, 2))
    weight = nn.Parameter(torch.full((3, 2), 0.5, dtype=torch.float64))
    optimizer = make([weight], lr=0.01)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(weight.detach(), formula(np.full((3, 2), 0.5), gradients), rtol=1e-12)


@pytest.mark.parametrize(("source", "key"), [("torch", "AdamW"), ("timm", "lion")])
def test_norms_and_biases_go_without_weight_decay(source, key):
    model, _ = small()
    named = dict(model.named_parameters())
    optimizer = MAKE[source](named.values(), key, no_decay_on_norms=True, lr=0.1, weight_decay=0.5)
    names = {id(p): name for name, p in named.items()}
    groups = [([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(["0.weight", "2.weight"], 0.5), (["0.bias", "1.weight", "1.bias"], 0.0)]
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in named.items():
        assert torch.allclose(p, before[name] * (1 if p.ndim == 1 else 1 - 0.1 * 0.5)), name


def test_every_parameter_decays_unless_asked():
    model, _ = small()
    (group,) = optim.from_torch(model.parameters(), "AdamW", weight_decay=0.5).param_groups
    assert len(group["params"]) == 5 and group["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("source", "key", "message"),
    [
        ("timm", "lambb", "optimizer.name=lambb: timm has no such optimizer; did you mean lamb"),
        ("timm", "Lion", "optimizer.name=Lion: timm has no such optimizer; did you mean lion"),
        ("timm", "qqq", "expected one of adabelief, "),
        ("timm", "adahessian", "adahessian needs second derivatives"),
        ("torch", "adamw", "optimizer.name=adamw: torch.optim has no such optimizer; did you mean AdamW"),
        ("torch", "Optimizer", "torch.optim has no such optimizer"),
    ],
)
def test_a_name_that_is_none_is_refused(source, key, message):
    with pytest.raises(MedvisionError, match=message):
        MAKE[source](small()[0].parameters(), key, lr=0.1)
