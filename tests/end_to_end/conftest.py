import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = [
    "data.images={train:16,val:6,test:7}",
    "data.image_size=[32,48]",
    "data.batch_size=4",
    "model=unetv2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures.every_seconds=0",
    "augment=heavy",
]


class Cli:
    """Runs verbs in processes of their own, as a user does, below one temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        places = {f"MEDVISION_{name.upper()}": str(root / name) for name in ("data", "cache", "runs")}
        self.environment = {**os.environ, **places, "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
        self.environment.pop("HYDRA_FULL_ERROR", None)

    def command(self, verb: str, *overrides: str) -> list[str]:
        return [sys.executable, "-m", f"medvision.{verb}", *overrides]

    def __call__(self, verb: str, *overrides: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.command(verb, *overrides),
            env=self.environment | environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def start(self, verb: str, *overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(verb, *overrides),
            env=self.environment,
            cwd=self.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.fixture(scope="session")
def cli(tmp_path_factory):
    return Cli(tmp_path_factory.mktemp("medvision"))


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def finished(cli, tiny):
    """A finished run: its folder and what was printed."""
    folder = cli.root / "finished"
    done = cli("train", *tiny, f"hydra.run.dir={folder}", "logger=[tensorboard,wandb]")
    return folder, done.stdout
