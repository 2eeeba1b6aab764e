"""Finished runs as variants: what differs between their configs, and what only repeats a training."""

import csv
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision.configs import COUNTED, OF_A_COMMAND
from medvision.errors import MedvisionError
from medvision.files import read_json
from medvision.metrics import BOUNDARY, COUNTS, EMPTY, LabelRows, MaskRows, Rows
from medvision.runs import RunFolder
from medvision.terminal import command

REPETITIONS = ("seed", "split_seed", "fold")
"""Entries, wherever they stand, that repeat a training and do not make another variant."""
NO_MATTER = (
    *(*OF_A_COMMAND, "paths", "logger", "test", "data.num_workers", "trainer.enable_progress_bar"),
    *("callbacks.pictures", "callbacks.explain"),
)
"""Entries that move no number of a training."""
ABSENT = "-"

Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Measured:
    """A finished run and its results of a split.

    Attributes:
        folder: The run folder.
        config: Its config as plain values.
        typed: Its overrides.
        rows: The results of each image.
        groups: For each image what it belongs to; empty where that is not known.
        stored: The metrics that the run stored.
        again: Names of further evaluations of the split, as far as the folder tells.
        epoch: The epoch that validation chose; None where that is not known.
        code: Commit of the code, and whether it was changed; empty where that is not known.
        fingerprint: Of the data; empty where that is not known.
    """

    folder: Path
    config: Config
    typed: Sequence[str]
    rows: Rows
    groups: Mapping[str, str]
    stored: Mapping[str, float]
    again: tuple[str, ...] = ()
    epoch: int | None = None
    code: str = ""
    fingerprint: str = ""

    @property
    def repetition(self) -> dict[str, Any]:
        """Seed and, where the data was dealt anew, of what."""
        data = self.config["data"]
        found = {"seed": self.config["seed"], "split_seed": data.get("split_seed", 0), "fold": data.get("fold", 0)}
        return {name: value for name, value in found.items() if name == "seed" or value}


def find_runs(folder: Path) -> tuple[list[RunFolder], list[RunFolder]]:
    """The run in a folder, or all below it, as jobs of a sweep, 2 before 10: finished ones and the others.

    Raises:
        MedvisionError: If there is no finished one.
    """
    if RunFolder(folder).config.exists():
        if not RunFolder(folder).metrics.exists():
            raise MedvisionError(f"{folder} is not finished; go on with {command('train', 'resume', folder)}")
        return [RunFolder(folder)], []
    found = [RunFolder(config.parents[1]) for config in folder.rglob(".hydra/config.yaml")]
    found.sort(key=lambda place: [(len(part) * part.isdigit(), part) for part in place.path.parts])
    finished = [place for place in found if place.metrics.exists()]
    if not finished:
        raise MedvisionError(
            f"{folder} holds no finished run; expected a run folder or a folder of them, as of a sweep"
        )
    return finished, [place for place in found if place not in finished]


def read_run(place: RunFolder, config: Config, typed: Sequence[str], split: str) -> Measured:
    """Reads a finished run.

    Raises:
        MedvisionError: If it has no results of the split.
    """
    empty = config["task"].get("empty", EMPTY)
    rows, groups = read_results(place.results(split), math.nan if empty is None else empty)
    again = tuple(sorted(path.stem for path in (place.path / "evaluations").glob(f"{split}_*.json")))
    git = read_json(place.environment).get("git") if place.environment.exists() else None
    code = f"{git['commit'][:10]}{' and changes' if git['dirty'] else ''}" if git else ""
    stored = read_json(place.metrics)
    known = (again, stored.get("epoch"), code, stored.get("fingerprint", ""))
    return Measured(place.path, config, typed, rows, groups, stored[split], *known)


def read_results(path: Path, empty: float = EMPTY) -> tuple[Rows, dict[str, str]]:
    """Reads `results_<split>.csv`: the results of each image, and what each belongs to where that is known.

    Args:
        path: The file.
        empty: What an image of masks counts that has neither truth nor prediction; NaN leaves it out.

    Raises:
        MedvisionError: If it is not there or broken.
    """
    if not path.exists():
        raise MedvisionError(f"{path} is missing; expected the per-image results of a finished run")
    with path.open(newline="", encoding="utf-8") as handle:
        table = [*csv.DictReader(handle)]
    classes = tuple(dict.fromkeys(row["class"] for row in table))
    ids = tuple(dict.fromkeys(row["id"] for row in table))
    if not table or [(row["id"], row["class"]) for row in table] != [*itertools.product(ids, classes)]:
        raise MedvisionError(f"{path} is broken: expected a row for each image and class, image by image")
    groups = {row["id"]: row["group"] for row in table if row.get("group")}

    def column(name: str) -> NDArray[np.float64]:
        return np.array([row[name] or np.nan for row in table], np.float64).reshape(len(ids), len(classes))

    if "truth" not in table[0]:
        also = {name: column(name) for name in BOUNDARY if name in table[0]}
        counts = np.stack([column(name) for name in COUNTS], -1).astype(np.int64)
        return MaskRows(ids, classes, counts, also, empty), groups
    there, decided = (column(name) > 0 for name in ("truth", "decision"))
    return LabelRows(ids, classes, column("probability"), there, decided, not table[0]["threshold"]), groups


def differences(configs: Sequence[Any]) -> list[list[str]]:
    """What differs between configs of runs, for each in the same order: `model=UNetV2`, `optimizer.lr=0.01`.

    Of `differing` what a config has.
    """
    columns = differing([dict(_leaves(config)) for config in configs])
    return [
        [f"{key}={word(column[n])}" for key, column in columns.items() if column[n] is not ABSENT]
        for n in range(len(configs))
    ]


def differing(flat: Sequence[Config]) -> dict[str, list[Any]]:
    """The entries in which flat configs differ, and the values of each, `ABSENT` where a config has none.

    A part is named by its class, or by what its class is told to make. An entry that not all have, as before and after
    a change of the code, is told where those that have it differ, or where nothing else tells two configs apart. What
    another entry of the same name says already, as `data.seed` after `seed`, is left out, and so are the places of this
    machine.
    """
    keys = dict.fromkeys(key for of in flat for key, value in of.items() if "${" not in str(value))
    columns = {
        key: [repr(of[key]) if key in of else None for of in flat]
        for key in sorted(keys, key=lambda key: key.count("."))
    }
    kept: dict[tuple[str | None, ...], str] = {}
    for key, column in columns.items():
        if len({*column} - {None}) > 1:
            kept.setdefault((key.rpartition(".")[2], *column), key)
    told = [tuple(columns[key][n] for key in kept.values()) for n in range(len(flat))]
    for key, column in columns.items():
        if len({*zip(told, column, strict=True)}) > len({*told}):
            kept.setdefault((key.rpartition(".")[2], *column), key)
    return {key: [of.get(key, ABSENT) for of in flat] for key in kept.values()}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield prefix[:-1], node
        return
    kinds = ("architecture", "name", "_target_") if "_target_" in node else ()
    if kinds:
        yield prefix[:-1], next(str(node[key]) for key in kinds if key in node).rpartition(".")[2]
    for key in [key for key in node if key not in kinds]:
        yield from _leaves(node[key], f"{prefix}{key}.")


def _matters(key: str) -> bool:
    """Whether an entry makes another variant."""
    parts = key.split(".")
    return parts[-1] not in REPETITIONS and not any(key == no or key.startswith(f"{no}.") for no in NO_MATTER)


def settings(config: Config) -> dict[str, Any]:
    """The entries of a config that make a variant."""
    return {key: value for key, value in _leaves(config) if _matters(key)}


def grouped(configs: Sequence[Config]) -> list[list[int]]:
    """Places of configs that differ by repetition alone, by first appearance."""
    flat = [settings(config) for config in configs]
    for weights in [f"loss.{name}" for name in COUNTED]:
        by_fold: dict[Any, set[str]] = {}
        for config, of in zip(configs, flat, strict=True):
            by_fold.setdefault(config["data"].get("fold"), set()).add(repr(of.get(weights)))
        if len(by_fold) > 1 and all(len(found) == 1 for found in by_fold.values()):
            for of in flat:
                of.pop(weights, None)  # counted in the training images of each fold
    groups: dict[str, list[int]] = {}
    for n, of in enumerate(flat):
        groups.setdefault(repr(sorted(of.items())), []).append(n)
    return [*groups.values()]


def factors_of(runs: Sequence[Measured], members: Sequence[Sequence[int]]) -> tuple[list[str], list[dict[str, str]]]:
    """The names of variants, and the factors in which they differ with the level of each variant.

    Factors are the words that were typed, as `model=unetv2`, where these tell all variants apart; else the entries of
    the configs. What only varies together is one factor.
    """
    typed = [dict(word.lstrip("+").split("=", 1) for word in run.typed if "=" in word) for run in runs]
    keys = dict.fromkeys(key for of in typed for key in of if _matters(key))
    said = [{key: _level(run.config, of, key) for key in keys} for run, of in zip(runs, typed, strict=True)]
    flat, short = [said[of[0]] for of in members], [typed[of[0]] for of in members]
    apart = len({json.dumps(of) for of in flat}) == len(flat)
    if not apart or any(said[n] != flat[g] for g, of in enumerate(members) for n in of):
        short = flat = [{key: word(value) for key, value in settings(runs[of[0]].config).items()} for of in members]
    columns = differing(flat)
    factors: dict[tuple[int, ...], list[str]] = {}
    for key, column in columns.items():
        above = next((other for other in columns if key.startswith(f"{other}.")), None)
        if above is None or len({*zip(columns[above], column, strict=True)}) > len({*columns[above]}):
            factors.setdefault(tuple(column.index(value) for value in column), []).append(key)
    names, told = [], [{key: column[g] for key, column in columns.items()} for g in range(len(members))]
    for words in (short, flat, told):  # what was typed is enough where each variant then has a name of its own
        shown = [[f"{key}={of[key]}" for keys in factors.values() for key in keys if key in of] for of in words]
        names = [", ".join(of) for of in shown]
        if all(names) and len({*names}) == len(names):
            break
    return names, [
        {" + ".join(keys): " + ".join(columns[key][g] for key in keys) for keys in factors.values()}
        for g in range(len(members))
    ]


def _level(config: Config, typed: Mapping[str, str], key: str) -> str:
    """The value of an entry; of a part of the config the choice that was typed, if any."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return typed.get(key, ABSENT)
        node = node[part]
    return typed.get(key, "default") if isinstance(node, dict) else word(node)


def word(value: Any) -> str:
    """A value as it is typed."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def repetitions(runs: Sequence[Measured], name: str) -> dict[str, list[Measured]]:
    """The runs of each repetition; folds that share no image are together one.

    Args:
        runs: Those of a variant.
        name: The variant's.

    Raises:
        MedvisionError: If two are the same training, or folds share a part of their images.
    """
    by_repetition: dict[str, Measured] = {}
    for run in runs:
        key = json.dumps(run.repetition)
        if key in by_repetition:
            raise MedvisionError(
                f"{by_repetition[key].folder} and {run.folder} are the same training ({name}, "
                f"{_shown(run.repetition)}) and no repetition of it; leave one out"
            )
        by_repetition[key] = run
    of_seed: dict[str, list[Measured]] = {}
    for run in runs:
        of_seed.setdefault(_shown(run.repetition | {"fold": None}), []).append(run)
    result: dict[str, list[Measured]] = {}
    for seed, folds in of_seed.items():
        images = [set(run.rows.ids) for run in folds]
        if sum(map(len, images)) == len(set().union(*images)):
            result[seed] = folds
        elif all(of == images[0] for of in images):
            result |= {_shown(run.repetition): [run] for run in folds}
        else:
            raise MedvisionError(
                f"{name}, {seed}: its folds ({', '.join(run.folder.name for run in folds)}) have measured some images "
                "in common and others not; leave out what is no fold of one cross-validation"
            )
    return result


def together(runs: Sequence[Measured]) -> Rows:
    """The results of runs that have measured different images, one after the other."""
    return runs[0].rows.and_of(*(run.rows for run in runs[1:]))


def _shown(repetition: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in repetition.items() if value is not None)
