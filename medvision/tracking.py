"""Trackers beside the run folder's own record: told the config, the numbers and the results, and ended properly.

Nothing of a run depends on them. A sweep tells its jobs in the environment what they are: MEDVISION_SWEEP is its name,
MEDVISION_JOB the number of the job, MEDVISION_TAGS what was chosen for it, as a JSON list or divided by commas.
"""

import json
import netrc
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import Logger, MLFlowLogger, WandbLogger

from medvision.errors import MedvisionError
from medvision.files import locked, read_json, write_json
from medvision.runs import RunFolder


def wandb(save_dir: str, project: str, offline: bool | None = None, **options: Any) -> WandbLogger:
    """A run of Weights & Biases, the same one when the training is resumed.

    Args:
        save_dir: The run folder.
        project: Where it belongs.
        offline: Whether it stays on this machine; None: unless there is a key, in WANDB_API_KEY or a netrc file, or
            WANDB_MODE says what to do.
        **options: Others of `wandb.init`, as `entity`.
    """
    if offline is None:
        offline = "WANDB_MODE" not in os.environ and not _has_key()
    folder = RunFolder(Path(save_dir))
    name, sweep, _, tags = _job(folder)
    about: dict[str, Any] = {
        "id": _known(folder).get("wandb") or secrets.token_hex(4),
        "name": name,
        "group": sweep,
        "job_type": "train",
        "tags": [tag[:64] for tag in tags] or None,  # longer ones are refused
    }
    return WandbLogger(save_dir=save_dir, project=project, offline=offline, **(about | options))


def mlflow(save_dir: str, experiment_name: str, tracking_uri: str) -> MLFlowLogger:
    """A run of MLflow, the same one when the training is resumed.

    Args:
        save_dir: The run folder.
        experiment_name: Where it belongs.
        tracking_uri: The store, a server or `sqlite:///<file>`.

    Raises:
        MedvisionError: If mlflow is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    folder = RunFolder(Path(save_dir))
    name, sweep, job, words = _job(folder)
    about = {"folder": str(folder.path), "sweep": sweep, "job": job, "tags": ", ".join(words)}
    try:
        with _one_at_a_time():
            return MLFlowLogger(
                experiment_name=experiment_name,
                tracking_uri=tracking_uri,
                run_name=name,
                tags={key: value for key, value in about.items() if value},
                run_id=_known(folder).get("mlflow"),
            )
    except ModuleNotFoundError as error:
        raise MedvisionError(f"logger=mlflow: {error}; install it with pip install medvision[mlflow]") from error


@contextmanager
def tracking(loggers: Sequence[Logger], folder: RunFolder, config: Mapping[str, object]) -> Iterator[None]:
    """Tells trackers the config; after the block, the results, and that the run has ended, well or not.

    Args:
        loggers: Those of the trainer.
        folder: Of the run; it keeps what the trackers call it.
        config: By dotted names.

    Raises:
        MedvisionError: If a resumed run is no longer in the store of MLflow.
    """
    known, new = _known(folder), list[Logger]()
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            _begin_mlflow(logger, folder)
            if logger.run_id == known.get("mlflow"):  # its config cannot be told twice
                logger.experiment.update_run(logger.run_id, "RUNNING")
                continue
            known["mlflow"] = logger.run_id
        elif isinstance(logger, WandbLogger):
            known["wandb"] = logger.version
        new.append(logger)
    if known:
        write_json(folder.trackers, known)  # before wandb begins: after a stop in between there would be two runs
    for logger in new:
        logger.log_hyperparams(dict(config))
    status = "failed"
    try:
        yield
        if folder.metrics.exists():  # not of a trial that its search stopped early
            _tell_results(loggers, read_json(folder.metrics))
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(status == "failed"))


def _begin_mlflow(logger: MLFlowLogger, folder: RunFolder) -> None:
    from mlflow.exceptions import MlflowException

    try:
        with _one_at_a_time():
            _ = logger.experiment
    except MlflowException as error:
        raise MedvisionError(
            f"logger=mlflow: {error}; bring the store back, or remove {folder.trackers} to begin new ones there"
        ) from error


def _tell_results(loggers: Sequence[Logger], metrics: Mapping[str, Any]) -> None:
    """Tells `final/<split>/<metric>` at the stored threshold, and the best epoch."""
    final = {f"final/{s}/{name}": value for s in ("val", "test") for name, value in metrics.get(s, {}).items()}
    final["final/epoch"] = metrics["epoch"]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(final)
        else:
            logger.log_metrics(final)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keeps the jobs of this machine that begin at once from all making the tables of a store, or its experiment."""
    with locked(Path(tempfile.gettempdir()) / f"medvision-mlflow-{os.getuid()}.lock"):
        yield


def _known(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder.trackers) if folder.trackers.exists() else {}
    return found


def _job(folder: RunFolder) -> tuple[str, str | None, str | None, list[str]]:
    """Name of the run, of its sweep, number of the job, and what was chosen for it."""
    sweep, job = os.environ.get("MEDVISION_SWEEP"), os.environ.get("MEDVISION_JOB")
    words = os.environ.get("MEDVISION_TAGS", "")
    tags = json.loads(words) if words.startswith("[") else [word for word in words.split(",") if word]
    return f"{sweep}/{job}" if sweep else folder.path.name, sweep, job, tags


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False
