"""Damage of any kind is read as if it were whole, or refused with a message: never another error."""

import csv
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvision.errors import MedvisionError

SETS = {
    "isic2016": ("fake_isic2016", {"counts": {"train": 12, "test": 4}}),
    "isic2017": ("fake_isic2017", {}),
    "isic2017_diagnosis": ("fake_isic2017_diagnosis", {"counts": {"train": 6, "val": 3, "test": 3}}),
    "isic2018_lesion": ("fake_isic2018_lesion", {"counts": {"train": 12}}),
    "isic2018_attributes": ("fake_isic2018_attributes", {"counts": {"train": 12}}),
    "cvc_clinicdb": ("fake_cvc_clinicdb", {}),
    "dsb2018": ("fake_dsb2018", {"images": 13}),
    "hymenoptera": ("fake_hymenoptera", {}),
    "folder": ("fake_folder", {}),
    "folder_labels": ("fake_folder_labels", {}),
}
ROUNDS = 30


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """The bytes cut off, flipped, zeroed, doubled, exchanged, or none at all."""
    data = bytearray(content or b"?")
    at = int(rng.integers(0, max(len(data), 1)))
    length = int(rng.integers(1, max(len(data) // 4, 2)))
    kind = rng.choice(["cut", "flip", "flip head", "flip tail", "zero", "double", "drop", "noise", "empty"])
    if kind == "cut":
        del data[at:]
    elif kind.startswith("flip"):
        low, high = {"flip": (0, len(data)), "flip head": (0, 64), "flip tail": (len(data) - 80, len(data))}[kind]
        for _ in range(int(rng.integers(1, 6))):
            position = int(np.clip(rng.integers(low, max(high, low + 1)), 0, len(data) - 1))
            data[position] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "double":
        data[at:at] = data[at : at + length]
    elif kind == "drop":
        del data[at : at + length]
    elif kind == "noise":
        data[at : at + length] = rng.bytes(len(data[at : at + length]))
    else:
        data.clear()
    return bytes(data)


def damage_a_member(rng: np.random.Generator, archive: Path) -> None:
    """One file inside, packed anew: the archive is whole. Or its name."""
    with zipfile.ZipFile(archive) as handle:
        files = {name: handle.read(name) for name in handle.namelist()}
    victim = str(rng.choice(sorted(files)))
    renamed = bool(rng.random() < 0.2)
    with zipfile.ZipFile(archive, "w") as handle:
        for name, content in files.items():
            if name == victim and renamed:
                stem = bytearray(name.encode())
                stem[int(rng.integers(len(stem)))] = int(rng.integers(33, 127))
                name = stem.decode()
            elif name == victim:
                content = damage(rng, content)
            handle.writestr(name, content)


def damage_a_table(rng: np.random.Generator, table: Path) -> None:
    """Cells gone, exchanged, or of other words."""
    rows = [*csv.reader(table.read_text().splitlines())]
    row = rows[int(rng.integers(len(rows)))]
    word = ["", "2", "nan", "maybe", "1e999", "\u0661", '"', "malignant", "a;b", "x" * 5000][int(rng.integers(10))]
    if rng.random() < 0.3:
        del row[int(rng.integers(len(row)))]
    else:
        row[int(rng.integers(len(row)))] = word
    table.write_text("\n".join(",".join(cells) for cells in rows), encoding="utf-8")


def use(data: Any) -> None:
    """Everything that training does with the data, and the findings."""
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    assert bool(np.isfinite(batch["image"].numpy()).all())
    for split in data.splits:
        next(iter(data.evaluation_dataloader(split)))
    for problem in data.findings:
        assert str(problem)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("as_folder", [False, True], ids=["zip", "folder"])
def test_damaged_data_is_read_or_refused(
    request: pytest.FixtureRequest, dataset: Callable[..., Any], tmp_path: Path, name: str, as_folder: bool
) -> None:
    fixture, options = SETS[name]
    whole: Path = tmp_path / "whole" / name
    fake = request.getfixturevalue(fixture)
    if name.startswith("folder"):
        fake(whole, **options)
        if not as_folder:
            shutil.make_archive(str(whole / "mine"), "zip", whole)
            for path in whole.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
    else:
        fake(whole, as_folder=as_folder, **options)
    below = "mine.zip" if name.startswith("folder") and not as_folder else ""
    use(dataset(name, whole / below, batch_size=2, cache=tmp_path / "cache/whole"))
    refused = 0
    for number in range(ROUNDS):
        rng = np.random.default_rng([number, as_folder, *name.encode()])
        root = tmp_path / f"{number}" / name
        shutil.copytree(whole, root)
        for _ in range(int(rng.integers(1, 3))):
            victim = sorted(path for path in root.rglob("*") if path.is_file())
            path = victim[int(rng.integers(len(victim)))]
            tables = [path for path in victim if path.suffix == ".csv"]
            how = rng.random()
            if tables and how < 0.3:
                path = tables[int(rng.integers(len(tables)))]
                damage_a_table(rng, path) if how < 0.2 else path.write_bytes(damage(rng, path.read_bytes()))
            elif path.suffix == ".zip" and how < 0.7:
                try:
                    damage_a_member(rng, path)
                except Exception:  # it was damaged before
                    path.write_bytes(damage(rng, path.read_bytes()))
            else:
                path.write_bytes(damage(rng, path.read_bytes()))
        try:
            use(dataset(name, root / below, batch_size=2, cache=tmp_path / f"cache/{number}"))
        except MedvisionError as error:
            refused += 1
            assert str(error) and "Traceback" not in str(error)
        except Exception as error:
            raise AssertionError(f"round {number}: {type(error).__name__}: {error}") from error
        shutil.rmtree(root.parent)
        shutil.rmtree(tmp_path / f"cache/{number}", ignore_errors=True)
    assert refused >= ROUNDS // 4
