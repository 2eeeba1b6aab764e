"""`python -m medvision.compare run=<sweep>`: what differs between runs, and whether the difference can be believed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_json, write_text

if TYPE_CHECKING:
    from medvision.comparison import Comparison
    from medvision.comparison.variants import Measured

log = logging.getLogger("medvision.compare")  # __name__ is __main__ here


def start(configs: list[DictConfig], _folder: Path, _overrides: list[str]) -> None:
    """Compares the runs that the configs name, which are else the same; prints tables and writes them with figures.

    Raises:
        MedvisionError: If the runs cannot be compared.
    """
    cfg = configs[0]
    if cfg.run is None:
        raise MedvisionError("which runs? run=<folders>, of runs or of sweeps: run=a,b")
    compare_folders(
        [Path(str(config.run)) for config in configs],
        split=cfg.split,
        metrics=[cfg.metric] if isinstance(cfg.metric, str) else [*(cfg.metric or ())],
        baseline=None if cfg.baseline is None else str(cfg.baseline),  # a job of a sweep is a number
        common=cfg.common,
        resamples=cfg.resamples,
        images=cfg.images,
        output=None if cfg.output is None else Path(str(cfg.output)),
    )


def compare_folders(
    folders: Sequence[Path],
    *,
    split: str | None = None,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    common: bool = False,
    resamples: int = 10000,
    images: int = 60,
    output: Path | None = None,
) -> Path:
    """Compares finished runs, prints tables and writes them with figures: all that the verb does.

    Args:
        folders: Of runs, and of folders of runs, as sweeps.
        split: `test` or `val`; None: test, or val where not all runs have a test.
        metrics: As for `compare`.
        baseline: As for `compare`.
        common: As for `compare`.
        resamples: As for `compare`, 100 or more.
        images: How many are pictured in the page; with 0 no data and no weights are asked for.
        output: Where to write; None: `comparison` in the sweep's folder, or beside the first run.

    Returns:
        The folder that was written to.

    Raises:
        MedvisionError: If the runs cannot be compared.
    """
    if split not in (None, "test", "val"):
        raise MedvisionError(f"split={split}: expected test or val")
    if not isinstance(resamples, int) or resamples < 100:
        raise MedvisionError(f"resamples={resamples}: expected a number of 100 or more")
    if not isinstance(images, int) or images < 0:
        raise MedvisionError(f"images={images}: expected a number of images, or 0 for none")
    from medvision.comparison import compare
    from medvision.comparison.variants import find_runs, read_run
    from medvision.configs import load_config

    folders = [folder.expanduser().resolve() for folder in folders]
    there = [find_runs(folder) for folder in folders]
    places, unfinished = (
        [*dict.fromkeys(place for of in several for place in of)] for several in zip(*there, strict=True)
    )
    split = split or ("test" if all(place.results("test").exists() for place in places) else "val")
    runs = []
    for place in places:
        config: Any = OmegaConf.to_container(load_config(place), resolve=False)
        typed = [str(word) for word in OmegaConf.load(place.overrides)] if place.overrides.exists() else []
        runs.append(read_run(place, config, typed, split))
    log.info("comparing %d runs", len(runs))
    found = compare(runs, split, metrics, baseline, common, resamples, [place.path for place in unfinished])
    beside = folders[0].parent if folders[0] == places[0].path else folders[0]
    output = writable_folder((output or beside / "comparison").expanduser().resolve(), "output=<folder>")
    write(found, output)
    show(found)
    write_text(output / "report.html", page(found, runs, images))
    print(f"results: {output / 'comparison.json'}")
    print(f"page:    {output / 'report.html'}")
    return output


def write(found: "Comparison", folder: Path) -> None:
    """Writes `comparison.json`, `.csv` and `.tex`; as far as there are any `effects.csv` and `.tex`, and figures."""
    from medvision import figures
    from medvision.comparison import tables

    for name in ("effects.csv", "effects.tex", "ranks.png", "differences.png"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "comparison.json", found.plain())
    write_text(folder / "comparison.csv", tables.spreadsheet(found))
    write_text(folder / "comparison.tex", tables.latex(found))
    if found.effects:
        write_text(folder / "effects.csv", tables.spreadsheet_of_effects(found))
        write_text(folder / "effects.tex", tables.latex_of_effects(found))
    where = f"{found.data}, {found.split}, {found.images} images"
    ranks = {m: {name: of for name, of in values.items() if of} for m, values in found.ranks.items()}
    if panels := {f"{m}: probability of each rank ({where})": of for m, of in ranks.items() if of}:
        figures.ranks(folder / "ranks.png", panels)
    forest: dict[str, dict[str, tuple[float, float | None, float | None, bool]]] = {}
    for d in found.differences:
        title = f"{d.metric}: difference to {d.baseline}, 95 %, black where shown ({where})"
        forest.setdefault(title, {})[d.variant] = d.value, d.low, d.high, d.verdict != "not shown"
    if forest:
        figures.forest(folder / "differences.png", forest)


def page(found: "Comparison", runs: Sequence["Measured"], images: int) -> str:
    """The page with pictures of so many images; if there can be none, it says why."""
    from medvision.comparison.page import render
    from medvision.comparison.page_images import pictured
    from medvision.logger import read_history
    from medvision.runs import RunFolder

    histories = {str(run.folder): read_history(RunFolder(run.folder).history) for run in runs}
    try:
        return render(found, histories, pictured(found, runs, images) if images else None)
    except MedvisionError as error:
        warning = f"there are no pictures of images: {error}"
        log.warning("%s", warning)
        return render(found, histories, None, [warning])


def show(found: "Comparison") -> None:
    """Prints variants, differences, effects of factors, and what a reader has to know."""
    from medvision.comparison.tables import tables
    from medvision.terminal import print_rows

    for of_metric in tables(found).values():
        for table in of_metric:
            print_rows(table.title, table.header, table.rows, table.words)
    for warning in found.warnings:
        log.warning("%s", warning)


if __name__ == "__main__":
    cli.main("compare", start, several="run")
