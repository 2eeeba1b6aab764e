"""Optimizers by name, and learning-rate schedules, each with a warm-up."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from medvision.errors import MedvisionError

FIRST = 0.1
"""What of the learning rate a warm-up begins with."""


@dataclass(frozen=True)
class Parameters(Iterable[nn.Parameter]):
    """What a model trains, and for whom asks, in layers.

    Attributes:
        all: Its parameters, in order.
        layers: Gives the same ones in a list for each layer, from the image to the head; None where the model has no
            layers.
    """

    all: list[nn.Parameter]
    layers: Callable[[], list[list[nn.Parameter]]] | None = None

    def __iter__(self) -> Iterator[nn.Parameter]:
        """The parameters, as every optimizer takes them."""
        return iter(self.all)


def from_torch(
    parameters: Iterable[nn.Parameter],
    name: str,
    no_decay_on_norms: bool = False,
    layer_decay: float | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer of torch.

    Args:
        parameters: What to train.
        name: A class of `torch.optim`.
        no_decay_on_norms: Whether norms and biases, all with at most one dimension, go without weight decay.
        layer_decay: Each layer of an encoder learns at this share of the learning rate of the next one, the head at
            `lr` (ELECTRA, https://arxiv.org/abs/2003.10555); None is one learning rate for all.
        **options: Its own: `lr`, `weight_decay`, ...

    Raises:
        MedvisionError: If there is no such optimizer, `layer_decay` is no share or `parameters` have no layers.
    """
    known = {key: value for key, value in vars(torch.optim).items() if isinstance(value, type) and key != "Optimizer"}
    _require(name, known, "torch.optim")
    return _grouped(known[name], parameters, no_decay_on_norms, layer_decay, options)


def from_timm(
    parameters: Iterable[nn.Parameter],
    name: str,
    no_decay_on_norms: bool = False,
    layer_decay: float | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer of timm.

    Args:
        parameters: What to train.
        name: One of `timm.optim.list_optimizers()`.
        no_decay_on_norms: Whether norms and biases, all with at most one dimension, go without weight decay.
        layer_decay: Each layer of an encoder learns at this share of the learning rate of the next one, the head at
            `lr` (ELECTRA, https://arxiv.org/abs/2003.10555); None is one learning rate for all.
        **options: Its own: `lr`, `weight_decay`, ...

    Raises:
        MedvisionError: If there is no such optimizer, it needs second derivatives, `layer_decay` is no share or
            `parameters` have no layers.
    """
    _require(name, [str(known) for known in list_optimizers()], "timm")
    if get_optimizer_info(name).second_order:
        raise MedvisionError(f"optimizer.name={name} needs second derivatives, which training does not compute")
    make = partial(create_optimizer_v2, opt=name)
    return _grouped(make, parameters, no_decay_on_norms, layer_decay, options)


def _require(name: str, known: Iterable[str], source: str) -> None:
    names = {key.lower(): key for key in sorted(known)}
    if name in names.values():
        return
    near = [names[key] for key in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)]
    meant = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names.values())}"
    raise MedvisionError(f"optimizer.name={name}: {source} has no such optimizer; {meant}")


def _grouped(
    make: Callable[..., Optimizer],
    parameters: Iterable[nn.Parameter],
    no_decay_on_norms: bool,
    layer_decay: float | None,
    options: dict[str, Any],
) -> Optimizer:
    """An optimizer with a group for each learning rate and weight decay, layer by layer."""
    layers = [list(parameters)] if layer_decay is None else _layers(parameters, layer_decay)
    groups: list[dict[str, Any]] = []
    above: list[int] = []  # layers between a group and the head
    for number, layer in enumerate(layers, start=1):
        new = _by_decay(layer) if no_decay_on_norms else [{"params": layer}]
        groups += [group for group in new if group["params"]]
        above += [len(layers) - number for group in new if group["params"]]
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    fused = on_cpu and "fused" in inspect.signature(make).parameters and "foreach" not in options
    optimizer = make(groups, **{"fused": True, **options} if fused else options)
    if fused:  # one pass over the memory, in a third of the time
        # Lightning would not clip gradients: on a GPU a fused step may scale them, on a CPU nothing is scaled
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if layer_decay is not None:
        for group, height in zip(optimizer.param_groups, above, strict=True):
            group["lr"] *= layer_decay**height  # schedules go on from there
    return optimizer


def _by_decay(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Those with weight decay, then those without, each in order."""
    decayed: dict[str, Any] = {"params": [p for p in parameters if p.ndim > 1]}
    return [decayed, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def _layers(parameters: Iterable[nn.Parameter], layer_decay: float) -> list[list[nn.Parameter]]:
    if not isinstance(layer_decay, int | float) or not 0 < layer_decay <= 1:
        raise MedvisionError(f"optimizer.layer_decay is {layer_decay}; expected null or a share above 0, at most 1")
    if not isinstance(parameters, Parameters) or parameters.layers is None:
        raise MedvisionError(
            f"optimizer.layer_decay={layer_decay} counts the layers of an encoder, and this model has none; set "
            "optimizer.layer_decay=null, or choose a model with an encoder, such as model=unet or model=unetv2"
        )
    return parameters.layers()


class WarmUp(LRScheduler):
    """Raises the learning rate in a straight line to what another schedule begins with, which then takes over.

    Epoch e of w warm-up epochs has `FIRST + (1 - FIRST) * e / w` of it. A metric that comes with a step is passed on
    once the other schedule runs; before, it has no influence.

    Args:
        after: The schedule that follows, at its beginning.
        epochs: How many steps the warm-up takes.
    """

    def __init__(self, after: LRScheduler, epochs: int) -> None:
        self.optimizer, self.after, self.epochs = after.optimizer, after, epochs
        self.last_epoch = 0
        self.goals = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._warm()

    def step(self, metrics: Any = None) -> None:
        """One epoch is over."""
        self.last_epoch += 1
        if self.last_epoch <= self.epochs:
            self._warm()
        elif metrics is None:
            self.after.step()
        else:
            self.after.step(metrics)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, those of the other schedule included."""
        return {"last_epoch": self.last_epoch, "goals": self.goals, "after": self.after.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another one was; the optimizer brings its own learning rate.

        Raises:
            MedvisionError: If it is the state of a schedule without warm-up.
        """
        if "after" not in state_dict:
            raise MedvisionError("the checkpoint is of a schedule without warm-up; set scheduler.warmup_epochs=0")
        self.last_epoch, self.goals = state_dict["last_epoch"], state_dict["goals"]
        self.after.load_state_dict(state_dict["after"])

    def _warm(self) -> None:
        for group, goal in zip(self.optimizer.param_groups, self.goals, strict=True):
            group["lr"] = goal * (1 - (1 - FIRST) * (1 - self.last_epoch / self.epochs))


class _InProportion(LRScheduler):
    """Before a schedule of torch with a floor: it is the fastest group's, and the others keep their ratios to that."""

    def get_lr(self) -> list[float | torch.Tensor]:
        """That of the group that learns fastest, and its share for each other one."""
        rates, base = super().get_lr(), self.base_lrs
        first = base.index(max(base))
        return [rates[first] * (each / base[first]) for each in base]


class _Cosine(_InProportion, lr_scheduler.CosineAnnealingLR):
    """In one piece."""


class _CosineRestarts(_InProportion, lr_scheduler.CosineAnnealingWarmRestarts):
    """Again and again."""


def needs_metric(schedule: LRScheduler) -> bool:
    """Whether each step has to bring the monitored metric."""
    return isinstance(schedule.after if isinstance(schedule, WarmUp) else schedule, lr_scheduler.ReduceLROnPlateau)


def constant(optimizer: Optimizer, warmup_epochs: int = 0) -> LRScheduler:
    """The same learning rate all the time."""
    return _warmed(lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0), warmup_epochs)


def cosine(optimizer: Optimizer, epochs: int, eta_min: float = 0.0, warmup_epochs: int = 0) -> LRScheduler:
    """Half a cosine, down to `eta_min` after `epochs`, those of the warm-up included."""
    rest = _rest(epochs, warmup_epochs)
    return _warmed(_Cosine(optimizer, rest, eta_min), warmup_epochs)


def cosine_restarts(
    optimizer: Optimizer, first: int, growth: int = 1, eta_min: float = 0.0, warmup_epochs: int = 0
) -> LRScheduler:
    """Half a cosine over the `first` epochs, then again, each `growth` times as long as the one before."""
    schedule = _CosineRestarts(optimizer, first, growth, eta_min)
    return _warmed(schedule, warmup_epochs)


def step(optimizer: Optimizer, every: int, gamma: float, warmup_epochs: int = 0) -> LRScheduler:
    """Multiplied by `gamma` whenever `every` epochs have passed since the warm-up."""
    return _warmed(lr_scheduler.StepLR(optimizer, every, gamma), warmup_epochs)


def multistep(optimizer: Optimizer, milestones: Sequence[int], gamma: float, warmup_epochs: int = 0) -> LRScheduler:
    """Multiplied by `gamma` after each of `milestones`, epochs of the training, those of the warm-up included.

    Raises:
        MedvisionError: If one of them is within the warm-up.
    """
    if any(milestone <= warmup_epochs for milestone in milestones):
        raise MedvisionError(
            f"scheduler.milestones is {list(milestones)}; expected each to be above scheduler.warmup_epochs, "
            f"{warmup_epochs}"
        )
    after = [milestone - warmup_epochs for milestone in milestones]
    return _warmed(lr_scheduler.MultiStepLR(optimizer, after, gamma), warmup_epochs)


def exponential(optimizer: Optimizer, gamma: float, warmup_epochs: int = 0) -> LRScheduler:
    """Multiplied by `gamma` after each epoch."""
    return _warmed(lr_scheduler.ExponentialLR(optimizer, gamma), warmup_epochs)


def poly(optimizer: Optimizer, epochs: int, power: float = 0.9, warmup_epochs: int = 0) -> LRScheduler:
    """The part of `epochs` that is left, to `power`; those of the warm-up are included and left out of the part."""
    rest = _rest(epochs, warmup_epochs)
    return _warmed(lr_scheduler.PolynomialLR(optimizer, rest, power), warmup_epochs)


def plateau(optimizer: Optimizer, min_lr: float = 0.0, warmup_epochs: int = 0, **options: Any) -> LRScheduler:
    """Smaller when the monitored metric has not improved, by the options of torch's ReduceLROnPlateau.

    `min_lr` is that of the group that learns fastest; the others keep their ratios to it.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    floors = [min_lr * (rate / max(rates)) for rate in rates]
    # eps, the least change of a learning rate, would hold back the groups that learn slowly
    return _warmed(lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=floors, eps=0, **options), warmup_epochs)


class OneCycle:
    """Makes schedules that rise and fall once, a little with each batch (Smith & Topin 2017, arXiv:1708.07120).

    Args:
        epochs: All of the training.
        rise: The part of it that the learning rate of the optimizer is reached after.
        initial_divisor: That over the first learning rate.
        final_divisor: The first learning rate over the last.
        warmup_epochs: Epochs of the rise; 0 leaves it to `rise`.

    Raises:
        MedvisionError: If the training has no epoch left after the warm-up, or `rise` is no part of it.
    """

    def __init__(
        self,
        epochs: int,
        rise: float = 0.3,
        initial_divisor: float = 25.0,
        final_divisor: float = 1e4,
        warmup_epochs: int = 0,
    ) -> None:
        self.epochs, self.initial_divisor, self.final_divisor = epochs, initial_divisor, final_divisor
        if not 0 <= rise < 1:
            raise MedvisionError(f"scheduler.rise is {rise}; expected 0 or more and below 1")
        rest = _rest(epochs, warmup_epochs)
        self.rise = 1 - rest / epochs if warmup_epochs else rise

    def __call__(self, optimizer: Optimizer, steps: int | None = None) -> LRScheduler:
        """The schedule of an optimizer over a number of steps; None is one for each epoch."""
        count = self.epochs if steps is None else steps
        last = count - 1
        peak = max(self.rise * count - 1, 0)

        def share(step: int) -> float:
            if step < peak:
                return _between(1 / self.initial_divisor, 1, step / peak)
            part = min((step - peak) / max(last - peak, 1), 1)
            return _between(1, 1 / (self.initial_divisor * self.final_divisor), part)

        return lr_scheduler.LambdaLR(optimizer, share)


def _between(first: float, last: float, part: float) -> float:
    """Half a cosine from the one value to the other."""
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2


def _rest(epochs: int, warmup_epochs: int) -> int:
    """The epochs after the warm-up."""
    if not isinstance(epochs, int) or epochs < 1:
        raise MedvisionError(
            f"scheduler.epochs is {epochs}; expected the number of epochs, 1 or more: set trainer.max_epochs, or "
            "choose a schedule that needs none, such as scheduler=step or scheduler=none"
        )
    if warmup_epochs >= epochs:
        raise MedvisionError(
            f"scheduler.warmup_epochs is {warmup_epochs}; expected fewer than the {epochs} epochs of the training"
        )
    return epochs - _checked(warmup_epochs)


def _warmed(schedule: LRScheduler, warmup_epochs: int) -> LRScheduler:
    return WarmUp(schedule, warmup_epochs) if _checked(warmup_epochs) else schedule


def _checked(warmup_epochs: int) -> int:
    if not isinstance(warmup_epochs, int) or warmup_epochs < 0:
        raise MedvisionError(f"scheduler.warmup_epochs is {warmup_epochs}; expected 0 or a positive int")
    return warmup_epochs
