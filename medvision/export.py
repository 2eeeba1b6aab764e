"""`python -m medvision.export run=<folder>`: a trained network as a file for other programs."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder

if TYPE_CHECKING:
    from medvision.build import Run
    from medvision.data.source import Member

log = logging.getLogger("medvision.export")  # __name__ is __main__ here


def start(cfg: DictConfig, _: Path, __: list[str]) -> None:
    """Exports the best epoch of a run.

    Raises:
        MedvisionError: If anything is refused, or the file would answer otherwise than the run.
    """
    if cfg.run is None:
        raise MedvisionError("which run? run=<folder>, as train printed it")
    if not isinstance(cfg.images, int) or cfg.images < 1:
        raise MedvisionError(f"images={cfg.images}: expected 1 or more to check the file on")
    from medvision.build import load_run
    from medvision.data.images import read_image
    from medvision.prediction.exporting import FORMATS, export, require_format
    from medvision.report import require_finished
    from medvision.runs import RunFolder

    require_format(cfg.format)
    place = RunFolder(Path(str(cfg.run)).expanduser().resolve())
    default = place.path / f"model{FORMATS[cfg.format]}"
    path = default if cfg.output is None else Path(str(cfg.output)).expanduser().resolve()
    if path.exists() and not cfg.overwrite:
        raise MedvisionError(f"{path} is already there; choose another output, or write over it with overwrite=true")
    require_finished(place)
    run = load_run(place.path)
    members = _images(run, cfg.input, path)
    members = [members[n * len(members) // cfg.images] for n in range(min(cfg.images, len(members)))]
    images = [read_image(member, run.data.spec.in_channels) for member in members]
    writable_folder(path.parent, "output=<file>")
    log.info("exporting, to be checked on %d images", len(images))
    if (views := run.task.tta.name) != "none":
        log.warning("the file answers a single view; the run's numbers and threshold are of the mean of tta=%s", views)
    trained, form, tolerance = run.predicting(), cfg.format, float(cfg.tolerance)
    difference, own = export(trained, path, form, images, bool(cfg.dynamic_size), tolerance)
    print(f"probabilities of {len(images)} images differ by at most {difference:.2g} (tolerance {tolerance:g})")
    if (precision := trained.precision.precision) != "32-true":
        print(f"the file computes in float32, the run in {precision}: its probabilities differ by at most {own:.2g}")
    print(f"{form}: {path}")


def _images(run: "Run", asked: str | None, path: Path) -> "list[Member]":
    """The images to check on: those asked for, or of the split that results are reported on."""
    from medvision.inputs import Inputs

    if asked is not None:
        return Inputs.find(str(asked), path).images
    try:
        return [sample.image for sample in run.data.splits[run.data.reported_split]]
    except MedvisionError as error:
        raise MedvisionError(
            f"{error}\nWithout the data, give images to check it on: input=<image or folder>"
        ) from None


if __name__ == "__main__":
    cli.main("export", start)
