"""`python -m medvision.explain run=<folder> input=<images>`: where in an image a run finds what it answers."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_text

if TYPE_CHECKING:
    from medvision.build import Run
    from medvision.data.source import Member

log = logging.getLogger("medvision.explain")  # __name__ is __main__ here


def start(cfg: DictConfig, _: Path, __: list[str]) -> None:
    """Explains images; writes heat maps, overlays and a figure for each.

    Raises:
        MedvisionError: If anything is refused, or, after all others are explained, if images are broken.
    """
    if cfg.run is None:
        raise MedvisionError("which run? run=<folder>, as train printed it")
    if (cfg.input is None) == (cfg.index is None) and cfg.layers != "list":
        raise MedvisionError("which images? input=<image or folder>, or those of the run's data: split=val index=[0,1]")
    if empty := [option for option in ("index", "layers", "method") if cfg[option] == []]:
        raise MedvisionError(f"{empty[0]}=[] chooses nothing; leave it out, or name some")
    if cfg.point is not None and not _is_pixel(cfg.point):
        raise MedvisionError(f"point={cfg.point}: expected [row,column] of a pixel, counted from 0")
    from tqdm import tqdm

    from medvision.build import load_run
    from medvision.data.images import read_image, resize_mask
    from medvision.explanation import require_methods
    from medvision.explanation.folder import SCORES, ExplanationFolder, MaskFiles, Scores
    from medvision.explanation.maps import activations
    from medvision.inputs import require_whole
    from medvision.models import layer_names
    from medvision.prediction import Explainer
    from medvision.report import require_finished
    from medvision.runs import RunFolder
    from medvision.terminal import print_rows

    methods = _words(cfg.method)
    require_methods(methods, "method", "activation")
    heats = [method for method in methods if method != "activation"]
    if cfg.score and not heats:
        raise MedvisionError(f"score=true is of heat, of which method={cfg.method} has none; add grad_cam, or another")
    place = RunFolder(Path(str(cfg.run)).expanduser().resolve())
    require_finished(place)
    run = load_run(place.path)
    spec = run.data.spec
    if cfg.layers == "list":
        print("\n".join(layer_names(run.task.model)))
        return
    output = place.path / "explanations" if cfg.output is None else Path(str(cfg.output)).expanduser().resolve()
    members = _images(cfg, run, output)
    masks = None if cfg.masks is None else MaskFiles(Path(str(cfg.masks)).expanduser(), members)
    of_data = cfg.score and masks is None and cfg.input is None and spec.target == "mask"
    truth = run.data.dataset(cfg.split, full=True) if of_data else None
    explainer = Explainer(run.predicting(), 4 if cfg.layers is None else _words(cfg.layers))
    wanted = explainer.target(
        str(cfg.target), None if cfg.point is None else (0, 0)
    )  # where it is depends on the image
    if cfg.layers is None:
        log.info("layers: %s (layers=list names them all)", ", ".join(explainer.layers))
    folder = ExplanationFolder(writable_folder(output, "output=<folder>"), explainer.layers)
    scores = Scores(explainer.network, explainer.layers) if cfg.score else None
    broken: dict[str, str] = {}
    for name, (member, number) in tqdm(members.items(), "explaining", disable=None, delay=2, leave=False):
        try:
            image = read_image(member, spec.in_channels)
            mask = None if masks is None else masks.of(name, spec.image_size)
            target = wanted if cfg.point is None else replace(wanted, point=_shares(cfg.point, image.shape))
        except MedvisionError as error:
            broken[name] = str(error)
            continue
        if len(heats) < len(methods):
            folder.activations(name, activations(explainer.network, explainer.see(image), explainer.layers))
        if not heats:
            continue
        found = explainer(image, heats, target, name=name)
        if truth is not None:
            mask = resize_mask(truth[number]["mask"][found.choices[0].index].numpy() > 0, spec.image_size)
        folder.heat(name, image, found, mask)
        if scores is not None:
            scores.add(name, explainer.see(image), found, target, mask)
    if scores is not None and scores.rows:
        write_text(output / "scores.csv", scores.table())
        title = (
            f"means over {len(members) - len(broken)} images, or of so many as have heat and a mask; better: less "
            "deletion, more insertion, no likeness to random weights, more inside"
        )
        print_rows(title, ["method", "layer", *SCORES], scores.means(), (0, 1))
    print(f"{len(members) - len(broken)} of {len(members)} images explained: {output}")
    require_whole(broken, len(members))


def _words(value: Any) -> list[str]:
    return [] if value is None else [str(word) for word in (value if isinstance(value, ListConfig) else [value])]


def _is_pixel(value: Any) -> bool:
    return isinstance(value, ListConfig) and len(value) == 2 and all(isinstance(one, int | float) for one in value)


def _shares(point: Sequence[float], shape: Sequence[int]) -> tuple[float, float]:
    """Row and column of a pixel as shares of an image's height and width."""
    if not (0 <= point[0] < shape[0] and 0 <= point[1] < shape[1]):
        raise MedvisionError(
            f"point={list(point)} lies outside of the image, which has rows 0 to {shape[0] - 1} and columns 0 to "
            f"{shape[1] - 1}"
        )
    return point[0] / shape[0], point[1] / shape[1]


def _images(cfg: DictConfig, run: "Run", output: Path) -> "dict[str, tuple[Member, int]]":
    """The images by name, with their numbers."""
    if cfg.input is not None:
        from medvision.explanation.folder import without_ending
        from medvision.inputs import Inputs

        images = Inputs.find(str(cfg.input), output).images
        last = {without_ending(member.name): member.name for member in images}
        if twice := [member.name for member in images if last[without_ending(member.name)] != member.name]:
            stem = without_ending(twice[0])
            raise MedvisionError(
                f"{twice[0]} and {last[stem]} would both be written to {stem}_*; rename one, or explain them into "
                "different folders"
            )
        return {member.name: (member, n) for n, member in enumerate(images)}
    from medvision.selection import at

    numbers = cfg.index if isinstance(cfg.index, ListConfig) else [cfg.index]
    found = [(at(run, cfg.split, number), number) for number in numbers]
    return {sample.id: (sample.image, number) for sample, number in found}


if __name__ == "__main__":
    cli.main("explain", start)
