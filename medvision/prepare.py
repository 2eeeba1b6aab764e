"""`python -m medvision.prepare data=<name>,...`: finds, verifies and caches data sets, and says what is wrong."""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from medvision import cli
from medvision.errors import MedvisionError


def start(configs: list[DictConfig], _folder: Path, _overrides: list[str]) -> None:
    """Prepares data sets one after the other; what they share is found whatever their order.

    Raises:
        MedvisionError: If data is missing or a data set has errors, after the reports of all others are shown.
    """
    from medvision.build import build_data
    from medvision.data import BrokenFiles
    from medvision.verification import report_folder, show, verify

    sets = [build_data(cfg) for cfg in configs]
    if configs[0].remove:
        for data in sets:
            _remove(data.cache_folder)
        return
    wrong: dict[str, str] = {}
    whole = []  # decoded before any is verified, so that each is compared with all others, once
    for data in sets:
        try:
            _ = data.cache
            whole.append(data)
        except BrokenFiles:
            continue  # the report names them
        except MedvisionError as error:  # not there, or no archive: the other sets are looked at nevertheless
            wrong[data.spec.name] = str(error)
    for data in [data for data in sets if data.spec.name not in wrong]:
        name, folder = data.spec.name, report_folder(data)
        try:
            report = verify(data, whole)
        except MedvisionError as error:  # too few images for the folds, a full disk
            wrong[name] = str(error)
            continue
        show(report, folder)
        if any(problem["grade"] == "error" for problem in report["problems"]):
            wrong[name] = f"{name} has errors: mend them, or leave out data.exclude={folder / 'exclude.txt'}"
    if wrong:
        raise MedvisionError("\n".join(wrong.values()))


def _remove(folder: Path) -> None:
    """Deletes what is derived from a data set."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    shutil.rmtree(folder, ignore_errors=True)
    print(f"removed {folder} ({size / 1e6:.0f} MB)")


if __name__ == "__main__":
    cli.main("prepare", start, several="data")
