"""`python -m medvision.predict run=<folder> input=<images> output=<folder>`: masks or labels of any images."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.spec import as_size

if TYPE_CHECKING:
    from medvision.build import Run
    from medvision.decision import Decision
    from medvision.runs import RunFolder

log = logging.getLogger("medvision.predict")  # __name__ is __main__ here


def start(configs: list[DictConfig], _folder: Path, _overrides: list[str]) -> None:
    """Predicts images with the runs of the configs, one each, which are else the same.

    Raises:
        MedvisionError: If anything is refused, or, after all others are predicted, if images are broken.
    """
    cfg = configs[0]
    for word, what in (
        ("run", "folder, as train printed it"),
        ("input", "image, folder or glob"),
        ("output", "folder"),
    ):
        if cfg[word] is None:
            raise MedvisionError(f"which {word}? {word}=<{what}>")
    if cfg.threshold != "stored" and (not isinstance(cfg.threshold, int | float) or not 0 < cfg.threshold < 1):
        raise MedvisionError(f"threshold={cfg.threshold}: expected 'stored' or a probability above 0 and below 1")
    if cfg.cleaning not in ("stored", "none"):
        raise MedvisionError(f"cleaning={cfg.cleaning}: expected 'stored' or 'none'")
    window = cfg.window
    size = None if window is None else as_size([*window] if isinstance(window, ListConfig) else window, "window")
    if cfg.heat is not None and size is not None:
        raise MedvisionError(
            f"heat={cfg.heat} is of an image seen as a whole, with window= the network sees parts; leave one out"
        )
    from medvision.build import keep_freed_memory, load_run
    from medvision.inputs import Inputs, require_whole
    from medvision.prediction import Heat, Predictor
    from medvision.prediction.folder import PredictionFolder, predict
    from medvision.report import require_finished
    from medvision.runs import RunFolder
    from medvision.submission import check_submission, require_submittable, write_submission
    from medvision.windows import SlidingWindow

    output = Path(str(cfg.output)).expanduser().resolve()
    inputs = Inputs.find(str(cfg.input), output)
    places = [RunFolder(Path(str(config.run)).expanduser().resolve()) for config in configs]
    for place in places:
        if cfg.threshold == "stored":
            require_finished(place)
    runs = [load_run(place.path) for place in places]
    sliding = None if size is None else SlidingWindow(size, cfg.overlap)
    predictor = Predictor([run.predicting() for run in runs], None if cfg.tta == "stored" else cfg.tta, sliding)
    decision = _decision(runs, cfg.threshold, cfg.cleaning)
    heat = None if cfg.heat is None else Heat(predictor.models, str(cfg.heat), decision.threshold)
    folder = PredictionFolder(
        output,
        predictor.target,
        predictor.classes,
        decision,
        bool(cfg.probabilities) and predictor.target == "mask",
        cfg.heat,
        runs=[_identity(place, run) for place, run in zip(places, runs, strict=True)],
        input=str(inputs.root),
        tta=predictor.tta,
        window=None if size is None else list(size),
        overlap=None if size is None else cfg.overlap,
    )
    ids = {member.name: Path(member.name).stem for member in inputs.images}
    if cfg.format is not None:
        if predictor.target != "mask":
            raise MedvisionError(f"format={cfg.format} is of masks; these runs answer labels: leave it out")
        require_submittable(cfg.format, predictor.classes, [*ids.values()])
    log.info("%s", inputs.summary)
    keep_freed_memory()
    try:
        broken = predict(predictor, inputs, folder, bool(cfg.overwrite), heat)
    except KeyboardInterrupt:
        raise MedvisionError("interrupted; the same command goes on") from None
    print(f"{len(inputs.images) - len(broken)} of {len(inputs.images)} images predicted: {folder.table}")
    require_whole(broken, len(inputs.images))
    if cfg.format is not None:
        archive = output / f"{cfg.format}.zip"
        write_submission(archive, cfg.format, ((image, folder.masks(name)) for name, image in ids.items()))
        check_submission(archive, cfg.format, {image: folder.masks(name).shape[1:] for name, image in ids.items()})
        print(f"submission, checked: {archive}")


def _decision(runs: "Sequence[Run]", threshold: str | float, cleaning: str) -> "Decision":
    """What is stored, of several runs the mean of their thresholds, or what was asked for; says which.

    Raises:
        MedvisionError: If the masks of the runs are cleaned in different ways.
    """
    from medvision.decision import Decision

    stored = [run.decision for run in runs]
    if isinstance(threshold, str):
        of_class = [*zip(*(decision.threshold for decision in stored), strict=True)]
        decision = Decision(tuple(sum(values) / len(runs) for values in of_class))
        for name, value, own in zip(runs[0].data.spec.classes, decision.threshold, of_class, strict=False):
            those = f", the mean of {', '.join(f'{v:g}' for v in own)}" if len(own) > 1 else ""
            log.info("threshold of %s: %g as stored%s", name, value, those)
    else:
        decision = runs[0].fixed(threshold)
    if cleaning == "none":
        return decision
    if len({found.cleaning for found in stored}) > 1:
        raise MedvisionError(
            "the masks of these runs are cleaned in different ways, as each chose on its own validation split; "
            "cleaning=none leaves them as they are"
        )
    return replace(decision, cleaning=stored[0].cleaning)


def _identity(place: "RunFolder", run: "Run") -> dict[str, Any]:
    """What tells one run from another, also if it was trained anew in the same folder."""
    with place.best.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    known = {"folder": str(place.path), "epoch": run.best["best_epoch"], "checkpoint": digest[:16]}
    temperature = run.decision.temperature  # an older prediction has no entry of it
    return known | ({"temperature": list(temperature)} if temperature else {})


if __name__ == "__main__":
    cli.main("predict", start, several="run")
