"""From a config to plain objects: besides `configs` and the entry points the one room that knows OmegaConf."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from medvision.callbacks import Average, Checkpoint, EpochLines, PlainCheckpointIO, Thaw
from medvision.configs import COUNTED, load_config
from medvision.data import ImageDataModule
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.files import read_json
from medvision.logger import HistoryLogger, Row, read_history
from medvision.metrics import COUNTS, OF_LABELS, OF_MASKS, undefined_labels
from medvision.models import Network
from medvision.prediction import Trained
from medvision.pruning import Pruning
from medvision.runs import RunFolder
from medvision.spec import DataSpec
from medvision.tasks import ClassificationTask, SegmentationTask
from medvision.tta import TestTimeAugmentation

PROTOCOLS = ("clean", "paper")
Training = tuple[pl.Trainer, EpochLines]


@dataclass
class Run:
    """A config made into objects.

    Attributes:
        config: The resolved config.
        data: The data set.
        task: Model, loss and optimizer.
        folder: The run folder, None before it is made.
        best: `best_epoch`, counted from 1, and `best`, its monitored value, once weights are loaded.
    """

    config: DictConfig
    data: ImageDataModule
    task: SegmentationTask | ClassificationTask
    folder: RunFolder | None = None
    best: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The results in `metrics.json`."""
        result: dict[str, Any] = read_json(self._folder.metrics)
        return result

    @cached_property
    def history(self) -> list[Row]:
        """The rows of `metrics.csv`: epoch, step, metric, value."""
        return read_history(self._folder.history)

    @property
    def decision(self) -> Decision:
        """What makes masks and labels of probabilities, as stored; nothing before the run is finished."""
        return Decision.read(self.metrics if self._folder.metrics.exists() else {})

    def fixed(self, threshold: float) -> Decision:
        """The same threshold for each class, and nothing else.

        Raises:
            MedvisionError: If the task has none.
        """
        if isinstance(self.task, ClassificationTask) and self.task.exclusive:
            raise MedvisionError(
                f"threshold={threshold}: {self.data.spec.name} has exclusive classes, of which the most probable is "
                "decided for; leave the threshold out"
            )
        return Decision((float(threshold),) * len(self.data.spec.classes))

    @property
    def _folder(self) -> RunFolder:
        if self.folder is None:
            raise MedvisionError("this run has no folder; load one with load_run(folder)")
        return self.folder

    @property
    def _progress_bar(self) -> bool:
        return bool(self.config.trainer.enable_progress_bar) and sys.stdout.isatty()

    def training(self) -> Training:
        """The trainer with all callbacks and loggers, writing to the run folder."""
        keep_freed_memory()
        folder, cfg = self._folder, self.config
        others = {}
        if cfg.get("protocol") == "paper":  # an older run has no protocol
            self.data.watched, others = self.data.reported_split, {folder.paper.stem: "paper/dice"}
        checkpoint = Checkpoint(folder.best.parent, self.task.monitor, self.task.mode, **others)
        lines = EpochLines()
        callbacks: list[pl.Callback] = [_make(c, f"callbacks.{n}") for n, c in cfg.callbacks.items() if c]
        if folder.trial.exists():
            callbacks.append(Pruning(folder.trial, folder.pruned, self.task.monitor))
        loggers = [_make(c, f"logger.{n}", save_dir=str(folder.path)) for n, c in cfg.logger.items()]
        trainer = _make(
            cfg.trainer,
            "trainer",
            callbacks=[*callbacks, Thaw(), lines, checkpoint],
            logger=[HistoryLogger(folder.history), *loggers],
            # the environment: it starts its processes itself, in a job of Slurm too
            plugins=[PlainCheckpointIO(), LightningEnvironment()],
            default_root_dir=str(folder.path),
            enable_progress_bar=self._progress_bar,
        )
        for callback in callbacks:
            if isinstance(callback, Average):
                callback.check(trainer)
        return trainer, lines

    def check_monitor(self) -> None:
        """Refuses to choose the epoch by a metric that labels of validation cannot have: none would be the best.

        Raises:
            MedvisionError: With the reason.
        """
        metric = self.task.monitor.removeprefix("val/")
        if isinstance(self.task, ClassificationTask) and metric != "loss":
            classes = range(len(self.data.spec.classes))
            truth = np.array([[k in sample.labels for k in classes] for sample in self.data.splits["val"]])
            threshold = [] if self.task.exclusive else [0.5] * len(classes)
            missing = undefined_labels(truth.astype(float), truth, self.data.spec.classes, threshold)
            if metric in missing:
                raise MedvisionError(
                    f"task.monitor={self.task.monitor} is not defined where {missing[metric]}, as in the "
                    f"{len(truth)} of val; choose task.monitor=val/loss task.mode=min, or another split"
                )

    def check_shares(self, processes: int) -> None:
        """Refuses a training by so many processes that cannot go well.

        Raises:
            MedvisionError: If one of them would have nothing to train on or to measure, or would wait for the gradients
                of an encoder that is frozen.
        """
        frozen = self.config.model.get("freeze_encoder", False)
        if processes > 1 and not isinstance(frozen, bool) and "unused" not in str(self.config.trainer.get("strategy")):
            raise MedvisionError(
                f"model.freeze_encoder={frozen} thaws the encoder while {processes} processes train; set "
                "trainer.strategy=ddp_find_unused_parameters_true, which tells them to wait for no gradient of it"
            )
        for split in ("train", "val", self.data.watched):
            if split is not None and (images := len(self.data.splits[split])) < processes:
                raise MedvisionError(
                    f"trainer.devices asks for {processes} processes, but {split} has only {images} images to share"
                )

    def load_weights(self, path: Path) -> dict[str, Any]:
        """Loads the weights of a Lightning checkpoint into the task and returns the checkpoint.

        Raises:
            MedvisionError: If there is no such file, it is no checkpoint, or the weights are of another model.
        """
        if not path.is_file():
            raise MedvisionError(f"{path} is no file; expected a Lightning checkpoint (.ckpt)")
        checkpoint: dict[str, Any] = _checked(
            f"{path} as a Lightning checkpoint", lambda: torch.load(path, map_location="cpu", weights_only=True)
        )
        _checked(f"{self._title} from {path}", lambda: self.task.load_state_dict(checkpoint["state_dict"]))
        return checkpoint

    def predicting(self) -> Trained:
        """What prediction needs, on the device and with the precision of `evaluating`; asks for no data."""
        trainer = self.evaluating()
        name = str(self.folder.path) if self.folder else self.data.spec.name
        device, precision = trainer.strategy.root_device, trainer.precision_plugin
        decision = self.decision if self.folder else Decision(())
        return Trained(name, self.task, *self.data.normalisation, device, precision, decision)

    def describe(self) -> str:
        """One line of what is trained on what."""
        spec, cfg = self.data.spec, self.config
        parameters = sum(p.numel() for p in self.task.model.parameters())
        sizes = ", ".join(f"{len(samples)} {name}" for name, samples in self.data.splits.items())
        return (
            f"{self._title} ({parameters / 1e6:.2f} M parameters) on {spec.name} ({sizes}) at "
            f"{spec.image_size[0]}x{spec.image_size[1]}, batch {self.data.batch_size}, {cfg.trainer.precision}, "
            f"seed {cfg.seed}"
        )

    @property
    def _title(self) -> str:
        network = self.task.model
        return network.title if isinstance(network, Network) else type(network).__name__

    def evaluating(self) -> pl.Trainer:
        """A trainer that only measures, on one device with the same precision."""
        cfg = self.config.trainer
        return pl.Trainer(
            accelerator="cpu" if cfg.accelerator == "cpu" else "auto",  # trained on a GPU, measured on a laptop
            devices=1,
            precision=cfg.precision,
            deterministic=cfg.deterministic,
            enable_progress_bar=self._progress_bar,
            enable_model_summary=False,
            logger=False,
            enable_checkpointing=False,
            inference_mode=False,  # no_grad: autocast keeps weights in 16 bits there
        )


def keep_freed_memory() -> None:
    """Has this process keep the memory that tensors free, for the next step, where the C library is glibc.

    By default glibc hands it back, and each step on a CPU pays thousands of page faults to get it again (mallopt(3)).
    """
    m_trim_threshold, m_mmap_max = -1, -4
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(m_trim_threshold, -1)  # never
        mallopt(m_mmap_max, 0)  # large tensors come from the heap as well


def build(cfg: DictConfig, pretrained: bool = True) -> Run:
    """Makes data set and task of a composed config.

    Args:
        cfg: The config.
        pretrained: Whether the encoder begins with the weights that the config asks for; not where a checkpoint
            follows, which holds them all: a run folder does not need the file that it began with.

    Raises:
        MedvisionError: If anything in it is refused, naming the part.
    """
    if "task" not in cfg:
        raise MedvisionError(
            f"data={cfg.data.spec.name} chooses no task; expected /task@_global_: segmentation or classification "
            "among the defaults of its yaml"
        )
    cfg = _resolved(cfg)
    if not pretrained:
        _leave_out_weights(cfg)
    data: ImageDataModule = _make(cfg.data, "data")
    pl.seed_everything(cfg.seed, verbose=False)  # the weights that the model begins with
    model: nn.Module = _make(cfg.model, "model")
    if isinstance(model, Network):
        model.check(data.spec)
    for name in COUNTED:
        if cfg.loss.get(name) == "auto":
            cfg.loss[name] = getattr(data, name)()
    loss = _make(cfg.loss, "loss")
    if getattr(loss, "target", data.spec.target) != data.spec.target:
        fitting = "cross_entropy" if data.spec.target == "label" else "bce_dice"
        raise MedvisionError(
            f"{type(loss).__name__} is a loss of {loss.target}s, data={data.spec.name} has {data.spec.target}s; "
            f"choose loss={fitting}"
        )
    _check_challenge(data.spec)
    loss(*_blank(data.spec))  # refuses weights that do not fit the classes
    task: SegmentationTask | ClassificationTask = _make(
        cfg.task,
        "task",
        model=model,
        loss=loss,
        optimizer=_make(cfg.optimizer, "optimizer"),
        scheduler=_make(cfg.scheduler, "scheduler") if cfg.scheduler else None,
        spec=data.spec,
        channels_last=channels_last(cfg),
    )
    training = _checked(
        f"optimizer {dict(cfg.optimizer)} with scheduler {dict(cfg.scheduler or {})}", task.configure_optimizers
    )
    every = cfg.trainer.check_val_every_n_epoch
    if isinstance(training, dict) and training["lr_scheduler"].get("reduce_on_plateau") and every != 1:
        raise MedvisionError(
            f"scheduler=plateau steps after each epoch by the validation of that epoch, but "
            f"trainer.check_val_every_n_epoch is {every}; set it to 1, or choose another schedule"
        )
    if cfg.compile:
        task.model.compile()  # in place: the names of the weights stay
    if cfg.get("protocol", "clean") not in PROTOCOLS:
        raise MedvisionError(f"protocol={cfg.protocol}: expected one of {', '.join(PROTOCOLS)}")
    if cfg.get("protocol") == "paper" and data.spec.target == "label":
        raise MedvisionError(f"protocol=paper chooses by the Dice of masks, data={data.spec.name} has labels")
    if cfg.get("protocol") == "paper" and not cfg.get("test", True):
        raise MedvisionError("protocol=paper watches the test split, test=false keeps it for later; leave one out")
    for choice in ("temperature", "cleaning"):
        if cfg.get(choice, "none") not in ("none", "validation"):
            raise MedvisionError(f"{choice}={cfg[choice]}: expected none or validation")
    if cfg.get("cleaning") == "validation" and data.spec.target == "label":
        raise MedvisionError(f"cleaning=validation is of masks, data={data.spec.name} has labels; leave it out")
    task.tta = TestTimeAugmentation(cfg.get("tta", "none"))  # an older run has none
    run = Run(cfg, data, task)
    if cfg.threshold != "validation":
        run.fixed(cfg.threshold)
    return run


def build_model(cfg: DictConfig) -> nn.Module:
    """Makes the model of a composed config alone, as `build` makes it, with no weights from elsewhere.

    Raises:
        MedvisionError: If anything in it is refused.
    """
    cfg = _resolved(cfg)
    _leave_out_weights(cfg)
    model: nn.Module = _make(cfg.model, "model")
    return model


def build_data(cfg: DictConfig) -> ImageDataModule:
    """Makes the data set of a composed config.

    Raises:
        MedvisionError: If anything in it is refused, naming the part.
    """
    data: ImageDataModule = _make(_resolved(cfg).data, "data")
    return data


def _resolved(cfg: DictConfig) -> DictConfig:
    cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise MedvisionError(f"the config does not resolve: {error}") from error
    return cfg


def load_run(folder: Path | str, **task: Any) -> Run:
    """Rebuilds a run from its folder, with the weights of the best epoch.

    Args:
        folder: The run folder.
        **task: Options of the task in the place of those that it was trained with.

    Raises:
        MedvisionError: If the folder holds no run, or no finished epoch.
    """
    place = RunFolder(Path(folder).expanduser().resolve())
    cfg = load_config(place)
    for name in COUNTED:  # an older run may not have them as numbers: only training needs these, and they the data
        if cfg.loss.get(name) == "auto":
            cfg.loss[name] = None
    stored = read_json(place.splits) if place.splits.exists() else {}
    if "mean" in stored:  # what it was trained with, whatever data is there now, if any
        cfg.data.spec.mean, cfg.data.spec.std = stored["mean"], stored["std"]
    cfg.task.update(task)
    run = build(cfg, pretrained=False)
    run.folder = place
    checkpoint = run.load_weights(place.require_checkpoint())
    run.best = checkpoint["callbacks"]["Checkpoint"]
    run.task.eval()
    return run


def _make(cfg: DictConfig, part: str, **objects: Any) -> Any:
    """Instantiates one part of the config."""
    label = f"{part}: {cfg.get('_target_', '?')}"
    if not objects:
        return _checked(label, lambda: instantiate(cfg, _convert_="all"))
    # a call of our own: instantiate() would turn the objects into configs and dataclasses into dictionaries
    return _checked(label, lambda: instantiate(cfg, _convert_="all", _partial_=True)(**objects))


def _checked(label: str, make: Callable[[], Any]) -> Any:
    """Makes something; whatever it refuses is named with its label."""
    try:
        return make()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, MedvisionError):
            cause = cause.__cause__
        if isinstance(cause, MedvisionError):
            raise cause from error
        raise MedvisionError(f"{label} cannot be made ({type(cause).__name__}: {cause})") from error


def _leave_out_weights(cfg: DictConfig) -> None:
    """Lets a model begin with none of the weights from elsewhere that it asks for."""
    for key in ("encoder_weights", "published_weights"):
        if key in cfg.model:
            cfg.model[key] = None


def _check_challenge(spec: DataSpec) -> None:
    """Refuses scores that the data set cannot have, before there is anything to be scored."""
    if spec.challenge is None:
        return
    known = OF_MASKS if spec.target == "mask" else OF_LABELS
    if spec.challenge not in known:
        raise MedvisionError(f"data.spec.challenge is {spec.challenge}; expected null or one of {', '.join(known)}")
    if spec.target == "mask":
        OF_MASKS[spec.challenge](np.ones((1, len(spec.classes), len(COUNTS))), spec.classes)


def _blank(spec: DataSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and target of one image, all zero."""
    logits = torch.zeros(1, len(spec.classes), *((8, 8) if spec.target == "mask" else ()))
    return logits, torch.zeros(1, dtype=torch.int64) if spec.kind == "multiclass" else logits


def channels_last(cfg: DictConfig) -> bool:
    """Whether tensors are kept in the memory order that 16-bit convolutions are fast in."""
    return "16" in str(cfg.trainer.precision) if cfg.channels_last == "auto" else bool(cfg.channels_last)
