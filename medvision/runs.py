"""A run folder: what lies where in it, and the record of the circumstances."""

import os
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvision.errors import MedvisionError
from medvision.files import read_json, write_json
from medvision.terminal import command

if TYPE_CHECKING:
    from medvision.data import ImageDataModule


@dataclass(frozen=True)
class RunFolder:
    """The places in a run folder; it alone is enough to evaluate, resume or look at the run.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The whole config; places on this machine stay references to the environment with a default."""
        return self.path / ".hydra" / "config.yaml"

    @property
    def overrides(self) -> Path:
        """What was typed."""
        return self.path / ".hydra" / "overrides.yaml"

    @property
    def best(self) -> Path:
        """Checkpoint of the epoch that validation chose."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def paper(self) -> Path:
        """Checkpoint of the epoch that was best on the reported split itself, with `protocol=paper`."""
        return self.path / "checkpoints" / "paper.ckpt"

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def metrics(self) -> Path:
        """Results of the finished run."""
        return self.path / "metrics.json"

    @property
    def trial(self) -> Path:
        """Of a trial of a search: where its journal lies, and its number there."""
        return self.path / "trial.json"

    @property
    def pruned(self) -> Path:
        """Of a trial that its search stopped early: after which epoch, with what value. There are no results then."""
        return self.path / "pruned.json"

    @property
    def history(self) -> Path:
        """Every number that was logged while training."""
        return self.path / "metrics.csv"

    @property
    def splits(self) -> Path:
        """The ids of each split, perceptual hashes of them and the fingerprint of the data."""
        return self.path / "splits.json"

    @property
    def environment(self) -> Path:
        """Versions, commit, hardware, and one entry for each time that the run was started."""
        return self.path / "environment.json"

    @property
    def trackers(self) -> Path:
        """What wandb and mlflow call the run, where it is tracked by them."""
        return self.path / "trackers.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains."""
        return self.path / ".lock"

    def results(self, split: str) -> Path:
        """Per-image results of a split."""
        return self.path / f"results_{split}.csv"

    @property
    def choice(self) -> Path:
        """What the threshold was chosen by, over all thresholds."""
        return self.path / "threshold.png"

    def picture(self, split: str) -> Path:
        """Images of a split with truth and prediction, from the worst to the best."""
        return self.path / f"predictions_{split}.png"

    def calibration(self, split: str) -> Path:
        """Reliability diagrams of the probabilities of a split's pixels; the same as CSV beside it."""
        return self.path / f"calibration_{split}.png"

    def require_checkpoint(self) -> Path:
        """The best checkpoint.

        Raises:
            MedvisionError: If there is none yet.
        """
        if not self.best.exists():
            raise MedvisionError(
                f"{self.best} is missing: no epoch of this run was finished. Go on with "
                f"{command('train', 'resume', self.path)}"
            )
        return self.best

    def record_data(self, data: "ImageDataModule") -> None:
        """Writes the split; on a run that has one, checks that the data is still the same.

        Raises:
            MedvisionError: If it is not.
        """
        now = facts(data)
        if not self.splits.exists():
            write_json(self.splits, now)
            return
        then = {"hashes": now["hashes"]} | read_json(self.splits)  # an older run has none
        if differing := [key for key in now.keys() | then.keys() if now.get(key) != then.get(key)]:
            raise MedvisionError(
                f"the data in {data.root} is not what {self.path} was trained on (differing: "
                f"{', '.join(sorted(differing))}); restore it, or start a new run"
            )

    def record_start(self, seed: int, warnings: Sequence[str] = ()) -> None:
        """Writes the environment and adds this start, with the warnings about its data, to the list.

        A later start has what has changed since the first.
        """
        from medvision.provenance import differences, environment

        now = environment(seed)
        record = read_json(self.environment) if self.environment.exists() else now | {"starts": []}
        start = {"time": _now(), "command": sys.argv, "pid": os.getpid(), "host": platform.node()}
        changed = {"changed": differences(record, now)} if record["starts"] else {}
        record["starts"].append(start | changed | {"data_warnings": [*warnings]})
        write_json(self.environment, record)

    def record_end(self, seconds_per_epoch: list[float]) -> None:
        """Adds to the last start how long its epochs took and how much memory."""
        record = read_json(self.environment)
        record["starts"][-1] |= {
            "ended": _now(),
            "seconds_per_epoch": [round(s, 3) for s in seconds_per_epoch],
            "peak_memory_mb": round(peak_memory() / 1e6),
        }
        write_json(self.environment, record)


def facts(data: "ImageDataModule") -> dict[str, Any]:
    """What a run keeps of its data: fingerprint, statistics that images are normalised by, ids and hashes of splits."""
    return {
        "fingerprint": data.cache.digest,
        "mean": data.normalisation[0].tolist(),
        "std": data.normalisation[1].tolist(),
        **{name: [s.id for s in samples] for name, samples in data.splits.items()},
        "hashes": {name: data.hashes(name) for name in data.splits},
    }


def peak_memory() -> int:
    """Largest memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
