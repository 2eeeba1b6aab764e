"""The config of a run folder: written before anything runs, read, compared. Imports no torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_text
from medvision.runs import RunFolder

OF_A_COMMAND = ("hydra", "launcher", "resume", "repeat", "check", "traceback")
"""Entries that say how to run and not what."""
COUNTED = ("positive_weights", "class_weights")
"""Entries of a loss that may be `auto`: methods of the data, which count them in its training split."""


def prepare(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> RunFolder:
    """Makes a run folder that `python -m medvision.train resume=<folder>` begins, and goes on with after any stop.

    Args:
        cfg: A composed config of `train`.
        folder: The run folder.
        overrides: What was typed for it.

    Raises:
        MedvisionError: If it holds a run already, cannot be written, or the config does not resolve.
    """
    place = RunFolder(folder.expanduser().resolve())
    if place.config.exists():
        raise MedvisionError(
            f"{place.path} already holds a run; go on with it by resume={folder}, or choose another hydra.run.dir"
        )
    stored = portable(cfg)
    writable_folder(place.config.parent, "hydra.run.dir=<folder> or MEDVISION_RUNS")
    write_text(place.overrides, OmegaConf.to_yaml(OmegaConf.create([*overrides])))
    write_text(place.config, OmegaConf.to_yaml(OmegaConf.create(stored)))
    return place


def require_own(record: Path) -> None:
    """Refuses the folder of a new sweep or search where others' runs lie, which would be taken for its own.

    Args:
        record: The file in the folder by which a sweep or search knows its runs.

    Raises:
        MedvisionError: If there are runs, and no such file.
    """
    folder = record.parent
    if not record.exists() and (runs := sorted(folder.glob("*/.hydra/config.yaml"))):
        raise MedvisionError(
            f"{folder} holds runs ({runs[0].parents[1].name}) but no {record.name}; choose another folder"
        )


def load_config(folder: RunFolder) -> DictConfig:
    """The config of a run folder.

    Raises:
        MedvisionError: If there is none.
    """
    if not folder.config.exists():
        raise MedvisionError(f"{folder.path} holds no run ({folder.config.relative_to(folder.path)} is missing)")
    cfg = OmegaConf.load(folder.config)
    if not isinstance(cfg, DictConfig):
        raise MedvisionError(f"{folder.config} is not a config of a run")
    return cfg


def save_config(cfg: DictConfig, folder: RunFolder) -> None:
    """Writes a config, as `portable` has it."""
    folder.config.parent.mkdir(parents=True, exist_ok=True)
    write_text(folder.config, OmegaConf.to_yaml(OmegaConf.create(portable(cfg))))


def portable(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values; `paths` and what refers to it stay references: a folder can move.

    Each path becomes its environment variable with the present place as the default; what else was typed as a place
    is named from the root.

    Raises:
        MedvisionError: If it does not resolve.
    """
    cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in OF_A_COMMAND])
    for node, key in ((cfg, "ckpt_path"), (cfg.data, "exclude"), (cfg.data, "root")):
        if not OmegaConf.is_interpolation(node, key) and isinstance(place := node.get(key), str):
            node[key] = str(Path(place).expanduser().resolve())
    raw = OmegaConf.to_container(cfg)
    try:
        stored: dict[str, Any] = _merge(raw, OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise MedvisionError(f"the config does not resolve: {error}") from error
    for name, place in cfg.paths.items():
        text = str(Path(place).resolve()).replace("\\", "\\\\").replace("'", "\\'")
        stored["paths"][name] = f"${{oc.env:MEDVISION_{str(name).upper()},'{text}'}}"
    return stored


def _merge(raw: Any, resolved: Any) -> Any:
    if isinstance(raw, dict):
        return {key: _merge(value, resolved[key]) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_merge(value, resolved[i]) for i, value in enumerate(raw)]
    return raw if isinstance(raw, str) and re.search(r"\$\{paths\.", raw) else resolved


def changes(before: object, after: object) -> list[str]:
    """Values that differ between two configs as plain values, as `key: old -> new`; places on this machine are none."""
    old, new = (flat(config) for config in (before, after))
    keys = [key for key in sorted(old.keys() | new.keys()) if key.partition(".")[0] not in (*OF_A_COMMAND, "paths")]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def flat(node: object, prefix: str = "") -> dict[str, object]:
    """The values of a config as plain values, by dotted names."""
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}
