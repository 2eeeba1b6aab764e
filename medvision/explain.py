"""`python -m medvision.explain run=<folder> input=<images>`: where in an image a run finds what it answers."""

import logging
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
    import torch
    from tqdm import tqdm

    from medvision.build import load_run
    from medvision.data.images import read_image, resize_mask
    from medvision.explanation import METHODS, Target, activations, default_layers, explain
    from medvision.explanation_folder import SCORES, ExplanationFolder, MaskFiles, Scores
    from medvision.models import layer_names
    from medvision.prediction_folder import require_whole
    from medvision.report import print_rows, require_finished
    from medvision.runs import RunFolder
    from medvision.tasks import require_numbers

    methods = _words(cfg.method)
    if unknown := [method for method in methods if method not in (*METHODS, "activation")]:
        raise MedvisionError(f"method={unknown[0]}: expected some of {', '.join(METHODS)}, activation")
    place = RunFolder(Path(str(cfg.run)).expanduser().resolve())
    require_finished(place)
    run = load_run(place.path)
    trained, spec = run.predicting(), run.data.spec
    task = trained.task.to(trained.device).float().eval()
    if cfg.layers == "list":
        print("\n".join(layer_names(task.model)))
        return
    output = place.path / "explanations" if cfg.output is None else Path(str(cfg.output)).expanduser().resolve()
    members, masks = _images(cfg, run, output), None if cfg.masks is None else MaskFiles(Path(str(cfg.masks)))
    truth = run.data.dataset(cfg.split, full=True) if spec.target == "mask" and cfg.input is None else None
    layers = _words(cfg.layers)
    if cfg.layers is None:
        layers = default_layers(task.model, torch.zeros(1, spec.in_channels, *spec.image_size, device=trained.device))
        log.info("layers: %s (layers=list names them all)", ", ".join(layers))
    folder = ExplanationFolder(writable_folder(output, "output=<folder>"), layers)
    scores = Scores(task, layers) if cfg.score else None

    def activate(logits: torch.Tensor) -> torch.Tensor:
        return run.decision.calibrated(task.activate(logits), 1)

    heats = [method for method in methods if method != "activation"]
    broken: dict[str, str] = {}
    for name, (member, number) in tqdm(members.items(), "explaining", disable=None, delay=2, leave=False):
        try:
            image = read_image(member, spec.in_channels)
            point = None if cfg.point is None else (cfg.point[0] / image.shape[0], cfg.point[1] / image.shape[1])
            target = Target(spec, activate, str(cfg.target), run.decision.threshold, point)
            seen = trained.see(image, spec.image_size)[None]
            if len(heats) < len(methods):
                folder.activations(name, activations(task.model, seen, layers))
            if not heats:
                continue
            found = explain(task.model, seen, layers, heats, target)
            require_numbers(torch.tensor(found.probability), name)
            mask = None if masks is None else masks.of(name, spec.image_size)
            if masks is None and truth is not None:
                mask = resize_mask(truth[number]["mask"][found.choices[0].index].numpy() > 0, spec.image_size)
            folder.heat(name, image, found, mask)
            if scores is not None:
                scores.add(name, seen, found, target, mask)
        except MedvisionError as error:
            if len(members) == 1:
                raise
            broken[name] = str(error)
    if scores is not None and scores.rows:
        write_text(output / "scores.csv", scores.table())
        title = "means over images; better: less deletion, more insertion, no likeness to random weights, more inside"
        print_rows(title, ["method", "layer", *SCORES], scores.means(), (0, 1))
    print(f"{len(members) - len(broken)} of {len(members)} images explained: {output}")
    require_whole(broken, len(members))


def _words(value: Any) -> list[str]:
    return [] if value is None else [str(word) for word in (value if isinstance(value, ListConfig) else [value])]


def _images(cfg: DictConfig, run: "Run", output: Path) -> "dict[str, tuple[Member, int]]":
    """The images by name, with their numbers."""
    if cfg.input is not None:
        from medvision.prediction_folder import Inputs

        return {member.name: (member, n) for n, member in enumerate(Inputs.find(str(cfg.input), output).images)}
    _ = run.data.rows(cfg.split)  # refuses what is no split
    samples, indices = run.data.splits[cfg.split], cfg.index if isinstance(cfg.index, ListConfig) else [cfg.index]
    if wrong := [index for index in indices if not isinstance(index, int) or not 0 <= index < len(samples)]:
        raise MedvisionError(f"index={wrong[0]}: {cfg.split} has images 0 to {len(samples) - 1}")
    return {samples[index].id: (samples[index].image, index) for index in indices}


if __name__ == "__main__":
    cli.main("explain", start)
