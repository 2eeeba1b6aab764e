"""`python -m medvision.train model=unetv2 data=isic2017`: from an archive to an evaluated run."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from medvision import cli, sweep
from medvision.configs import COUNTED, changes, flat, load_config, prepare, save_config
from medvision.errors import MedvisionError
from medvision.files import end_with_parent, locked, read_json
from medvision.launchers.jobs import resume_command
from medvision.runs import RunFolder
from medvision.terminal import command, print_rows

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from medvision.build import Run, Training

SAME = "same"
log = logging.getLogger("medvision.train")  # __name__ is __main__ here


def start(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Trains a new run in `folder`, or goes on with the one that `resume` names."""
    if cli.RANK:
        end_with_parent()
    if cfg.resume is not None:
        resume(Path(cfg.resume), overrides)
        return
    if cfg.repeat is not None:
        repeat(Path(cfg.repeat), folder, overrides, cfg.check)
        return
    if cfg.check:
        raise MedvisionError("check=true goes with repeat=<folder>, of which it says what has changed since")
    with _prepared(cfg, folder, overrides) as place:
        begun = _begun(place, load_config(place))
    execute(*begun)


def resume(folder: Path, overrides: list[str]) -> None:
    """Begins a prepared run, or goes on with one after any stop; a finished one is shown again.

    Raises:
        MedvisionError: If the folder holds no run, or the config is to be changed.
    """
    place = RunFolder(folder.expanduser().resolve())
    cfg = load_config(place)
    stored = _typed(place)
    typed = [o for o in overrides if not o.startswith(("resume=", "hydra.")) and o != cli.TRACEBACK]
    if typed and (changed := changes(_composed(stored), _composed([*stored, *typed]))):
        raise MedvisionError(
            f"resume={folder} goes on with the config of that run, but other values were asked for:\n  "
            + "\n  ".join(changed)
            + "\nLeave them out; or start a new run from its weights and optimizer with "
            f"ckpt_path={place.last} and the new values"
        )
    execute(*_begun(place, cfg))


def repeat(folder: Path, again: Path, overrides: list[str], check: bool) -> None:
    """Says what has changed since a run, trains it again in a new folder, and compares the two bit for bit.

    Args:
        folder: The finished run.
        again: The new folder; where none was typed, the name of the run is put before its time.
        overrides: As typed.
        check: Whether to stop before the training.

    Raises:
        MedvisionError: If there is no finished run, other values were asked for, or nothing has changed that is known
            to matter, and the results still differ.
    """
    from medvision.report import require_finished

    place = RunFolder(folder.expanduser().resolve())
    cfg = load_config(place)
    require_finished(place)
    ours = ("repeat=", "check=", "hydra.")
    if typed := [o for o in overrides if not o.startswith(ours) and o != cli.TRACEBACK]:
        raise MedvisionError(f"repeat={folder} has the config of that run; leave out {' '.join(typed)}")
    if not any(o.startswith("hydra.run.dir=") for o in overrides):
        again = again.parent / f"{place.path.name}-again-{datetime.now():%Y%m%d-%H%M%S-%f}"
    with _prepared(cfg, again, _typed(place), keep=not check) as new:
        begun = _begun(new, load_config(new))
        changed = _changed_since(place, begun[0])
        if not (begun[1][0].strategy.root_device.type == "cpu" or cfg.trainer.deterministic):
            changed.append("trainer.deterministic is not set: a GPU does not repeat every operation bit for bit")
        for text in changed:
            log.info("%s", text)
        log.info("%s", "it may come out differently" if changed else "nothing has changed: it will be the same run")
    if check:
        return
    execute(*begun)
    rows = _compared(place, new)
    print_rows(f"{place.path}\n{new.path}", ["file", "bit for bit"], rows, words=(0, 1))
    if not changed and (differing := [name for name, answer in rows if answer != SAME]):
        raise MedvisionError(
            f"code, versions, machine and data are as they were, but {', '.join(differing)} came out differently: this "
            "training does not repeat itself, or depends on what is not recorded"
        )


def _changed_since(place: RunFolder, run: "Run") -> list[str]:
    """What has changed since a run that can move its numbers."""
    from medvision.provenance import differences, environment
    from medvision.runs import facts

    then = read_json(place.environment)
    found = differences(then, environment(run.config.seed))
    found += [f"when it was resumed: {text}" for start in then["starts"] for text in start.get("changed", [])]
    before, now = read_json(place.splits), facts(run.data)
    for name in sorted((before.keys() | now.keys()) - {"hashes"}):  # these are part of the fingerprint
        if (old := before.get(name)) != (new := now.get(name)):
            of_ids = name not in ("fingerprint", "mean", "std")
            said = f"{len({*(old or ())} ^ {*(new or ())})} images differ" if of_ids else f"{old} -> {new}"
            found.append(f"data, {name}: {said}")
    return found


def _compared(place: RunFolder, new: RunFolder) -> list[tuple[str, str]]:
    """Each file of results of a run, and how that of another differs."""
    from medvision.provenance import compare_values, compare_weights

    rows = []
    values = (place.metrics, place.results("val"), place.results("test"), place.history)
    for path in (place.best, place.last, place.paper, *values):
        if path.exists():
            compare = compare_values if path in values else compare_weights
            other = new.path / path.relative_to(place.path)
            rows.append((path.name, (compare(path, other) or SAME) if other.exists() else "missing"))
    return rows


def _typed(place: RunFolder) -> list[str]:
    """What was typed for a run."""
    return [str(o) for o in OmegaConf.load(place.overrides)] if place.overrides.exists() else []


@contextmanager
def _prepared(cfg: DictConfig, folder: Path, overrides: Sequence[str], keep: bool = True) -> Iterator[RunFolder]:
    """A prepared run folder; after a refusal, or if it is not to be kept, all is as if nothing had been asked."""
    made = not folder.expanduser().exists()
    place = prepare(cfg, folder, overrides)
    kept = False
    try:
        yield place
        kept = keep
    finally:
        if not kept:
            shutil.rmtree(place.path if made else place.config.parent)


def _begun(place: RunFolder, cfg: DictConfig) -> "tuple[Run, Training]":
    """Everything that can be refused, before any long work; the last of it is decoding the images.

    What the config left to the data, as which files a list excludes, is then part of it.
    """
    from medvision.build import build

    run = build(cfg, pretrained=not place.last.exists())
    run.folder = place
    if cfg.ckpt_path is not None and not place.last.exists():
        run.load_weights(Path(cfg.ckpt_path))  # Lightning loads them again; here they are refused early
    training = run.training()
    run.check_monitor()
    run.check_shares(training[0].world_size)
    run.data.prepare_data()
    before = cfg.copy()
    for name in [name for name in COUNTED if name in cfg.loss]:
        cfg.loss[name] = run.config.loss[name]  # what was `auto`, as numbers
    cfg.data.exclude = sorted(run.data.exclude)  # what a file listed, by name
    if cfg != before:
        save_config(cfg, place)
    return run, training


def execute(run: "Run", training: "Training") -> None:
    """Trains from the last checkpoint that is there, evaluates, and ends with a table."""
    from medvision.data.problems import settle
    from medvision.logger import HistoryLogger
    from medvision.pretraining import seen_before
    from medvision.report import finish, show
    from medvision.tracking import tracking

    place = run.folder
    if place is None:
        raise MedvisionError("a run needs a folder")
    if cli.RANK:
        fit(run, training, place)
        return
    busy = f"{place.path} is being trained by another process; wait for it or stop it"
    with locked(place.lock, busy), _interruptible(place):
        for left in place.path.rglob(".*.tmp"):  # by a process that was killed as it wrote, a whole checkpoint perhaps
            left.unlink()
        if place.metrics.exists():
            log.info("%s is finished", place.path)
        elif place.pruned.exists():
            raise MedvisionError(
                f"{place.path} is a trial that its search stopped early, as {place.pruned.name} tells, and does not go "
                "on; type its values for a new run"
            )
        else:
            with _logged_to(place.path / "train.log"):
                log.info("run folder: %s", place.path)
                place.record_data(run.data)
                seen = seen_before(run.data, _origins(place), place.path)
                settle(run.data.spec.name, seen)
                found = [str(p) for p in [*run.data.findings, *seen] if p.grade == "warning"]
                place.record_start(run.config.seed, found)
                log.info("%s", run.describe())
                trainer, lines = training
                trackers = [logger for logger in trainer.loggers if not isinstance(logger, HistoryLogger)]
                with tracking(trackers, place, flat(OmegaConf.to_container(run.config))):
                    fit(run, training, place)
                    place.record_end(lines.seconds)
                    if not place.pruned.exists():
                        finish(place)
        if place.metrics.exists():
            show(place, run)


def fit(run: "Run", training: "Training", place: "RunFolder") -> None:
    """The part of a training that each of its processes has.

    Raises:
        MedvisionError: If another of its processes has ended.
    """
    from torch import distributed

    trainer, _ = training
    if trainer.world_size > 1:
        sys.argv[1:] = resume_command(place.path)[2:]  # with which Lightning starts the other processes
    path = str(place.last) if place.last.exists() else run.config.ckpt_path
    if path is not None:
        log.info("going on from %s", path)
    try:
        trainer.fit(run.task, datamodule=run.data, ckpt_path=path, weights_only=True)
    except RuntimeError as error:
        _blame(trainer, error)
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()  # the first process measures alone


def _blame(trainer: "Trainer", error: Exception) -> None:
    """Names the process whose end has broken the connection of this one with it."""
    for number, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), 1):
        with suppress(subprocess.TimeoutExpired):
            if code := process.wait(2):
                raise MedvisionError(
                    f"process {number} of this training has ended with code {code}; its reason, if any, stands above"
                ) from error


def _origins(place: "RunFolder") -> "list[RunFolder]":
    """The runs whose weights a run began with, those that these began with, and so on, as far as they are there."""
    from medvision.pretraining import run_of

    found, left = dict[Path, Any](), [place]
    while left:
        cfg = load_config(left.pop())
        for weights in (cfg.model.get("encoder_weights"), cfg.get("ckpt_path")):
            if (origin := run_of(weights)) and origin.path not in found:
                found[origin.path] = origin
                left.append(origin)
    return [*found.values()]


def _composed(overrides: Sequence[str]) -> object:
    return OmegaConf.to_container(cli.compose("train", overrides))


@contextmanager
def _interruptible(place: RunFolder) -> Iterator[None]:
    """Says after an interrupt, which Lightning answers by leaving, how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise MedvisionError(f"interrupted; go on with: {command('train', 'resume', place.path)}") from None


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Adds to a file what is logged, until the run has ended: a notebook may train another one then."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


if __name__ == "__main__":
    cli.main("train", start, sweep=sweep.start)
