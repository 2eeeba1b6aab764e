"""`python -m medvision.train model=unetv2 data=isic2017`: from an archive to an evaluated run."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import locked, writable_folder, write_text

if TYPE_CHECKING:
    from medvision.build import Run, Training
    from medvision.runs import RunFolder

log = logging.getLogger("medvision.train")  # __name__ is __main__ here


def start(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Trains a new run in `folder`, or goes on with the one that `resume` names."""
    if cfg.resume is not None:
        resume(Path(cfg.resume), overrides)
        return
    from medvision.runs import RunFolder

    if cfg.ckpt_path is not None:
        cfg.ckpt_path = str(Path(cfg.ckpt_path).expanduser().resolve())
    place = RunFolder(folder.resolve())
    if place.config.exists():
        raise MedvisionError(
            f"{place.path} already holds a run; go on with it by resume={folder}, or choose another hydra.run.dir"
        )
    made = not place.path.exists()
    writable_folder(place.path, "hydra.run.dir=<folder> or MEDVISION_RUNS")
    try:
        prepared = _prepared(cfg, place)
        from medvision.build import COUNTED, save_config

        for name in [name for name in COUNTED if name in cfg.loss]:
            cfg.loss[name] = prepared[0].config.loss[name]  # what was `auto`, as numbers
        cfg.data.exclude = sorted(prepared[0].data.exclude)  # what a file listed, by name
        save_config(cfg, place)
        write_text(place.overrides, OmegaConf.to_yaml(OmegaConf.create(overrides)))
    except BaseException:
        if made:
            shutil.rmtree(place.path, ignore_errors=True)  # refused: as if nothing had been asked
        raise
    execute(*prepared)


def resume(folder: Path, overrides: list[str]) -> None:
    """Goes on with a run after any stop; a finished one is shown again.

    Raises:
        MedvisionError: If the folder holds no run, or the config is to be changed.
    """
    from medvision.build import load_config
    from medvision.runs import RunFolder

    place = RunFolder(folder.expanduser().resolve())
    cfg = load_config(place)
    stored = [str(o) for o in OmegaConf.load(place.overrides)] if place.overrides.exists() else []
    typed = [o for o in overrides if not o.startswith(("resume=", "hydra.")) and o != cli.TRACEBACK]
    if typed and (changes := _differences(stored, [*stored, *typed])):
        raise MedvisionError(
            f"resume={folder} goes on with the config of that run, but other values were asked for:\n  "
            + "\n  ".join(changes)
            + "\nLeave them out; or start a new run from its weights and optimizer with "
            f"ckpt_path={place.last} and the new values"
        )
    execute(*_prepared(cfg, place))


def _prepared(cfg: DictConfig, place: "RunFolder") -> "tuple[Run, Training]":
    """Everything that can be refused, before any long work; the last of it is decoding the images."""
    from medvision.build import build

    run = build(cfg, pretrained=not place.last.exists())
    run.folder = place
    if cfg.ckpt_path is not None and not place.last.exists():
        run.load_weights(Path(cfg.ckpt_path))  # Lightning loads them again; here they are refused early
    training = run.training()
    run.check_monitor()
    run.data.prepare_data()
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
        else:
            _log_to(place.path / "train.log")
            log.info("run folder: %s", place.path)
            _fit(run, training, place)
            finish(place)
        show(place, run)


def _fit(run: "Run", training: "Training", place: "RunFolder") -> None:
    from medvision.data.problems import settle
    from medvision.pretraining import seen_before

    place.record_data(run.data)
    seen = seen_before(run.data, _origins(place), place.path)
    settle(run.data.spec.name, seen)
    place.record_start(run.config.seed, [str(p) for p in [*run.data.findings, *seen] if p.grade == "warning"])
    trainer, lines = training
    path = str(place.last) if place.last.exists() else run.config.ckpt_path
    if path is not None:
        log.info("going on from %s", path)
    log.info("%s", run.describe())
    trainer.fit(run.task, datamodule=run.data, ckpt_path=path, weights_only=True)
    if trainer.interrupted:
        raise MedvisionError(f"interrupted; go on with python -m medvision.train resume={place.path}")
    place.record_end(lines.seconds)


def _origins(place: "RunFolder") -> "list[RunFolder]":
    """The runs whose weights a run began with, those that these began with, and so on, as far as they are there."""
    from medvision.build import load_config
    from medvision.pretraining import run_of

    found, left = dict[Path, Any](), [place]
    while left:
        cfg = load_config(left.pop())
        for weights in (cfg.model.get("encoder_weights"), cfg.get("ckpt_path")):
            if (origin := run_of(weights)) and origin.path not in found:
                found[origin.path] = origin
                left.append(origin)
    return [*found.values()]


def _differences(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Values that differ between two compositions, as `key: old -> new`."""
    old, new = (_flat(OmegaConf.to_container(_composed(overrides))) for overrides in (before, after))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _composed(overrides: Sequence[str]) -> DictConfig:
    cfg = cli.compose("train", overrides)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("hydra", "resume", "traceback")])


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


if __name__ == "__main__":
    cli.main("train", start)
