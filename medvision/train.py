"""`python -m medvision.train model=unetv2 data=isic2017`: from an archive to an evaluated run."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from medvision import cli, sweep
from medvision.configs import changes, load_config, prepare, save_config
from medvision.errors import MedvisionError
from medvision.files import locked
from medvision.runs import RunFolder

if TYPE_CHECKING:
    from medvision.build import Run, Training

log = logging.getLogger("medvision.train")  # __name__ is __main__ here


def start(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Trains a new run in `folder`, or goes on with the one that `resume` names."""
    if cfg.resume is not None:
        resume(Path(cfg.resume), overrides)
        return
    made = not folder.exists()
    place = prepare(cfg, folder, overrides)
    try:
        begun = _begun(place)
    except BaseException:
        shutil.rmtree(place.path if made else place.config.parent)  # refused: as if nothing had been asked
        raise
    execute(*begun)


def resume(folder: Path, overrides: list[str]) -> None:
    """Begins a prepared run, or goes on with one after any stop; a finished one is shown again.

    Raises:
        MedvisionError: If the folder holds no run, or the config is to be changed.
    """
    place = RunFolder(folder.expanduser().resolve())
    load_config(place)
    stored = [str(o) for o in OmegaConf.load(place.overrides)] if place.overrides.exists() else []
    typed = [o for o in overrides if not o.startswith(("resume=", "hydra.")) and o != cli.TRACEBACK]
    if typed and (changed := changes(_composed(stored), _composed([*stored, *typed]))):
        raise MedvisionError(
            f"resume={folder} goes on with the config of that run, but other values were asked for:\n  "
            + "\n  ".join(changed)
            + "\nLeave them out; or start a new run from its weights and optimizer with "
            f"ckpt_path={place.last} and the new values"
        )
    execute(*_begun(place))


def _begun(place: RunFolder) -> "tuple[Run, Training]":
    """Everything that can be refused, before any long work; the last of it is decoding the images.

    What the config left to the data, as which files a list excludes, is then part of it.
    """
    from medvision.build import build

    cfg = load_config(place)
    run = build(cfg, pretrained=not place.last.exists())
    run.folder = place
    if cfg.ckpt_path is not None and not place.last.exists():
        run.load_weights(Path(cfg.ckpt_path))  # Lightning loads them again; here they are refused early
    training = run.training()
    run.check_monitor()
    run.data.prepare_data()
    before = cfg.copy()
    if "positive_weights" in cfg.loss:
        cfg.loss.positive_weights = run.config.loss.positive_weights  # what was `auto`, as numbers
    cfg.data.exclude = sorted(run.data.exclude)  # what a file listed, by name
    if cfg != before:
        save_config(cfg, place)
    return run, training


def execute(run: "Run", training: "Training") -> None:
    """Trains from the last checkpoint that is there, evaluates, and ends with a table."""
    from medvision.report import finish, show

    place = run.folder
    if place is None:
        raise MedvisionError("a run needs a folder")
    with locked(place.lock, busy=f"{place.path} is being trained by another process; wait for it or stop it"):
        if place.metrics.exists():
            log.info("%s is finished", place.path)
        elif place.pruned.exists():
            raise MedvisionError(
                f"{place.path} is a trial that its search stopped early, as {place.pruned.name} tells, and does not go "
                "on; type its values for a new run"
            )
        else:
            _log_to(place.path / "train.log")
            log.info("run folder: %s", place.path)
            _fit(run, training, place)
            if place.pruned.exists():
                return
            finish(place)
        show(place, run)


def _fit(run: "Run", training: "Training", place: "RunFolder") -> None:
    place.record_data(run.data)
    place.record_start(run.config.seed, [str(p) for p in run.data.findings if p.grade == "warning"])
    trainer, lines = training
    path = str(place.last) if place.last.exists() else run.config.ckpt_path
    if path is not None:
        log.info("going on from %s", path)
    log.info("%s", run.describe())
    trainer.fit(run.task, datamodule=run.data, ckpt_path=path, weights_only=True)
    if trainer.interrupted:
        raise MedvisionError(f"interrupted; go on with python -m medvision.train resume={place.path}")
    place.record_end(lines.seconds)


def _composed(overrides: Sequence[str]) -> object:
    return OmegaConf.to_container(cli.compose("train", overrides))


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


if __name__ == "__main__":
    cli.main("train", start, sweep=sweep.start)
