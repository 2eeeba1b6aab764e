"""`python -m medvision.visualize run=<folder> index=78`: images of a run with truth and prediction, or its curves."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder

if TYPE_CHECKING:
    from medvision.runs import RunFolder

CHOICES = ("index", "id", "worst", "best", "random")


def start(configs: list[DictConfig], _folder: Path, _overrides: list[str]) -> None:
    """Draws images of the run of the config, or the curves of the runs of the configs, which are else the same.

    Raises:
        MedvisionError: If what is to be drawn is not clear or not there.
    """
    from medvision.runs import RunFolder

    cfg = configs[0]
    if cfg.run is None:
        raise MedvisionError("which run? run=<folder>, as train printed it")
    given = [name for name in CHOICES if cfg[name] is not None]
    if cfg.curves and given:
        raise MedvisionError(f"curves=true draws no images; leave out {given[0]}=")
    if not cfg.curves and len(given) != 1:
        found = " and ".join(f"{name}={cfg[name]}" for name in given) or "nothing"
        raise MedvisionError(
            f"which images? expected one of index=, id=, worst=, best=, random=, or curves=true; found {found}"
        )
    if not cfg.curves and len(configs) > 1:
        raise MedvisionError(f"images are drawn of one run, not of {len(configs)}; curves=true takes several")
    places = [RunFolder(Path(str(config.run)).expanduser().resolve()) for config in configs]
    output = None if cfg.output is None else Path(str(cfg.output)).expanduser().resolve()
    path = _curves(cfg, places, output) if cfg.curves else _images(cfg, places[0], output, given[0])
    print(f"picture: {path}")


def _images(cfg: DictConfig, place: "RunFolder", output: Path | None, choice: str) -> Path:
    """Draws one image, or a sheet of several."""
    import numpy as np

    from medvision.build import load_run
    from medvision.report import require_finished
    from medvision.selection import Artist, at, from_the_worst, named, results, samples, values

    number = cfg[choice]
    if choice in ("worst", "best", "random") and (not isinstance(number, int) or number < 1):
        raise MedvisionError(f"{choice}={number}: expected a number of images, 1 or more")
    if choice not in ("worst", "best") and cfg.metric is not None:
        raise MedvisionError(f"metric={cfg.metric} is for worst=, best= and curves=true; leave it out with {choice}=")
    require_finished(place)
    run = load_run(place.path)
    split = cfg.split or run.data.reported_split
    there = {sample.id: sample for sample in samples(run, split)}
    title = f"{place.path.name}: {split}"
    if decision := str(run.decision):
        title += f", {decision}"
    if choice in ("index", "id"):
        sample = at(run, split, number) if choice == "index" else named(run, split, str(number))
        path = _path(output, place, f"{split}_{[*there].index(sample.id)}_{sample.id}")
        Artist(run).one(path, sample, title)
        return path
    notes, of, name = dict.fromkeys(there, ""), "", f"{split}_{choice}{number}"
    if choice == "random":
        drawn = np.random.default_rng(cfg.seed).permutation(len(there))[:number]
        chosen = [[*there][n] for n in sorted(drawn.tolist())]
        name, title = f"{name}_seed{cfg.seed}", f"{title}: {len(chosen)} of {len(there)} images at random"
    else:
        metric = cfg.metric or ("jaccard" if run.data.spec.target == "mask" else "probability")
        found, of = values(results(run, place, split), metric), metric.partition("/")[2]
        order = from_the_worst(found, metric)
        column = metric.partition("/")[0]
        notes = {i: f"   rank {rank} of {len(order)}" for rank, i in enumerate(order, 1)}
        if column not in ("dice", "jaccard"):  # which every caption has
            notes = {i: f"{note}   {column} {found[i]:.3f}" for i, note in notes.items()}
        chosen = order[:number] if choice == "worst" else order[::-1][:number]
        name, title = f"{name}_{metric}", f"{title}: the {len(chosen)} {choice} of {len(order)} images by {metric}"
    path = _path(output, place, name)
    Artist(run).several(path, [(there[i], notes[i]) for i in chosen], title, of)
    return path


def _curves(cfg: DictConfig, places: "Sequence[RunFolder]", output: Path | None) -> Path:
    """Draws the curves of runs, over each other where there are several."""
    from medvision.comparison.variants import differences
    from medvision.configs import load_config
    from medvision.figures import curves
    from medvision.logger import read_history

    if cfg.by not in ("epoch", "step"):
        raise MedvisionError(f"by={cfg.by}: expected epoch or step")
    configs = [OmegaConf.to_container(load_config(place), resolve=False) for place in places]
    histories = [read_history(place.history) for place in places]
    for place, rows in zip(places, histories, strict=True):
        if not rows:
            raise MedvisionError(f"{place.history} holds no epoch yet; leave the run out")
    logged = dict.fromkeys(name for rows in histories for _, _, name, _ in rows)
    metric = None if cfg.metric is None else f"val/{cfg.metric}"
    if metric is not None and metric not in logged:
        known = [name.removeprefix("val/") for name in logged if name.startswith("val/")]
        raise MedvisionError(f"metric={cfg.metric}: expected one of {', '.join(known)}")
    words = [", ".join(of_run) for of_run in differences(configs)]
    labels = [word if words.count(word) == 1 else str(place.path) for word, place in zip(words, places, strict=True)]
    shown = "_".join(place.path.name for place in places) if len(places) < 5 else f"{len(places)}_runs"
    path = _path(output, places[0], f"curves_{shown}" + (f"_{cfg.metric}" if cfg.metric else "") + f"_by_{cfg.by}")
    curves(path, dict(zip(labels, histories, strict=True)), metric, cfg.by)
    return path


def _path(output: Path | None, place: "RunFolder", name: str) -> Path:
    """A PNG in a folder that is made."""
    folder = writable_folder(output or place.path / "visualizations", "output=<folder>")
    return folder / (re.sub(r"[^\w.,=-]", "_", name) + ".png")


if __name__ == "__main__":
    cli.main("visualize", start, several="run")
