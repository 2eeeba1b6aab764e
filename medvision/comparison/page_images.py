"""Images of a comparison with what each variant answers, small enough to be held by a page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medvision import figures
from medvision.build import load_run
from medvision.comparison.found import Comparison
from medvision.comparison.variants import Measured, repetitions, together
from medvision.data.cache import Sample
from medvision.data.images import Pixels, resize_image, resize_mask
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.files import read_json
from medvision.metrics import LabelRows, MaskRows, Rows, lower_is_better
from medvision.prediction import Predictor
from medvision.runs import RunFolder
from medvision.selection import samples
from medvision.spec import DataSpec

SIDE = 192  # pixels of a picture's longer side
LEVELS = 200  # steps of probability: every threshold of two digits is one
SIDE_BY_SIDE = 6  # images that are shown without being looked for
DIGITS = 6
OF_TRUTH = "probability of the truth"
WHITE = np.uint8(255)

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shown:
    """A variant as one of its seeds measured it.

    Attributes:
        rows: The results of the N images that are compared.
        run_of: The run that has measured each: one, or of a cross-validation several.
    """

    rows: Rows
    run_of: Mapping[str, Measured]

    @classmethod
    def by(cls, runs: Sequence[Measured], ids: Sequence[str]) -> Self:
        """Of the runs of one repetition."""
        return cls(together(runs).of(ids), {image: run for run in runs for image in run.rows.ids})


def pictured(found: Comparison, runs: Sequence[Measured], number: int) -> dict[str, Any]:
    """Images with truth and the answers of each variant, and what to sort them by, as JSON takes it.

    Pictures are at most `SIDE` pixels long; those of images that are not longer have the very masks that were measured.
    Probabilities are those of each run at its temperature, in `LEVELS` steps.

    Args:
        found: The comparison.
        runs: The runs that it compares.
        number: Of images, as for `chosen`.

    Raises:
        MedvisionError: If the data or the weights of a run are not there, or not what they were.
    """
    by_folder = {str(run.folder): run for run in runs}
    repeated = [repetitions([by_folder[of["folder"]] for of in v.runs], v.name) for v in found.variants]
    variants = [[Shown.by(of_seed, found.ids) for of_seed in of.values()] for of in repeated]
    every = [shown for of in variants for shown in of]
    most, others = chosen(found, number)
    ids = [found.ids[n] for n in (*most, *others)]
    used = [*dict.fromkeys(shown.run_of[image] for shown in every for image in found.ids)]
    rows = every[0].rows
    pictures, answers = _seen(used, every, ids, found.split)
    metrics = _metrics([shown.rows for shown in every])
    values = [[_values(shown.rows, metrics) for shown in of] for of in variants]
    apart = disagreement(found).round(DIGITS)
    result: dict[str, Any] = {
        "target": "mask",
        "classes": rows.classes,
        "levels": LEVELS,
        "side": SIDE,
        "by": found.each_is[found.metrics[0]],
        "colours": {"truth": figures.TRUTH, "missed": figures.MISSED, "false": figures.FALSE}
        | {"classes": figures.CLASSES},
        "metrics": metrics,
        "variants": [variant.name for variant in found.variants],
        "seeds": [[*of] for of in repeated],
        "runs": [_described(run) for run in used],
        "images": [
            {
                "id": image,
                "apart": float(apart[n]),
                **pictures[image],
                "values": [[_plain(of_seed[:, n]) for of_seed in of] for of in values],
                "runs": [[used.index(shown.run_of[image]) for shown in of] for of in variants],
                "answers": [[answers.get((shown.run_of[image].folder, image)) for shown in of] for of in variants],
            }
            for n, image in zip((*most, *others), ids, strict=True)
        ],
        "most": sum(bool(apart[n] > 0) for n in most[:SIDE_BY_SIDE]),
        "of": found.images,
    }
    if isinstance(rows, MaskRows):
        return result | {"empty": _plain(np.array(rows.empty))}
    result["target"] = "label"
    result["every"] = {
        "ids": found.ids,
        "truth": rows.truth.astype(int).tolist(),
        "probability": [[s.rows.probability.tolist() for s in of if isinstance(s.rows, LabelRows)] for of in variants],
        "runs": [[[used.index(shown.run_of[image]) for image in found.ids] for shown in of] for of in variants],
    }
    return result


def disagreement(found: Comparison) -> Floats:
    """The range over variants of `each` of the first metric (N,), 0 where none has a value."""
    values = np.stack([*found.each[found.metrics[0]].values()])
    known = ~np.isnan(values)
    span = np.where(known, values, -np.inf).max(0) - np.where(known, values, np.inf).min(0)
    return np.asarray(np.maximum(span, 0))


def chosen(found: Comparison, number: int) -> tuple[list[int], list[int]]:
    """The places of images to be shown: half where variants disagree most, half evenly from the worst to the best.

    Args:
        found: The comparison; with one variant there is nothing to disagree on, and all are of the second kind.
        number: Of images; more than there are is all.
    """
    metric, number = found.metrics[0], min(number, len(found.ids))
    values = np.stack([*found.each[metric].values()])
    known = ~np.isnan(values)
    half = number // 2 if len(values) > 1 else 0
    most = np.argsort(-disagreement(found), kind="stable").tolist()[:half]
    mean = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
    goodness = np.where(known.any(0), -mean if lower_is_better(found.each_is[metric]) else mean, np.inf)
    rest = [n for n in np.argsort(goodness, kind="stable").tolist() if n not in {*most}]
    evenly = np.linspace(0, len(rest) - 1, number - half).round().astype(int).tolist() if rest else []
    return most, [rest[n] for n in evenly]


def resized(probability: Floats32, size: Sequence[int]) -> Floats32:
    """Probabilities (K, H, W) at the size (height, width) of a picture."""
    height, width = size
    smaller = height <= probability.shape[1] and width <= probability.shape[2]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.stack([cv2.resize(plane, (width, height), interpolation=method) for plane in probability])


def levels(probability: Floats32) -> Pixels:
    """Probabilities in `LEVELS` steps.

    They are rounded down, as float32: a probability is at least a threshold of two digits where its step is.
    """
    steps = np.linspace(0, 1, LEVELS + 1).astype(np.float32)
    return np.asarray(np.searchsorted(steps, probability, side="right") - 1, np.uint8)


def _seen(
    used: Sequence[Measured], variants: Sequence[Shown], ids: Sequence[str], split: str
) -> tuple[dict[str, dict[str, Any]], dict[tuple[Path, str], str]]:
    """The picture of each image, and what each run answers to its images; labels have that among the results.

    An answer to an image of masks is the steps of probability of each class, then the mask that the run decides for.
    """
    work = [(run, [i for i in ids if any(of.run_of[i] is run for of in variants)]) for run in used]
    reader, answers = _Reader(), {}
    with tqdm(total=sum(len(of) for _, of in work), desc="images of the page", disable=None, leave=False) as progress:
        for run, wanted in work:
            labels = isinstance(run.rows, LabelRows)
            if not wanted or (labels and reader.pictures.keys() >= {*wanted}):
                continue
            loaded = load_run(run.folder)
            there = {sample.id: sample for sample in samples(loaded, split)}
            if missing := [image for image in wanted if image not in there]:
                raise MedvisionError(f"{run.folder} has measured {missing[0]}, which is not in {split} of the data now")
            predictor = None if labels else Predictor([loaded.predicting()])
            for image in wanted:
                pixels = reader(there[image], loaded.data.spec)
                if predictor is not None:
                    probability = resized(predictor(pixels, image), reader.pictures[image]["size"])
                    decided = loaded.decision.masks(probability)
                    answers[run.folder, image] = _encoded(_stacked([*levels(probability), *decided * WHITE]), "PNG")
                progress.update()
    return reader.pictures, answers


class _Reader:
    """Reads each image once for all runs that see it at one size, and keeps its picture."""

    def __init__(self) -> None:
        self.pictures: dict[str, dict[str, Any]] = {}
        self._read: dict[tuple[str, int, tuple[int, int]], Pixels] = {}

    def __call__(self, sample: Sample, spec: DataSpec) -> Pixels:
        """The image at network size, or where its picture is as large as itself, as it is."""
        key = sample.id, spec.in_channels, spec.image_size
        if key not in self._read:
            image, masks = sample.read(spec.in_channels)
            if sample.id not in self.pictures:
                self.pictures[sample.id] = _picture(sample, image, masks, spec)
            whole = max(image.shape[:2]) <= SIDE
            self._read[key] = image if whole else resize_image(image, spec.image_size)
        return self._read[key]


def _picture(sample: Sample, image: Pixels, masks: Pixels, spec: DataSpec) -> dict[str, Any]:
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    shown = {"size": [*size], "original": [height, width], "image": _encoded(resize_image(image, size), "JPEG")}
    if spec.target == "label":
        return shown | {"truth": [k in sample.labels for k in range(len(spec.classes))]}
    truth = [resize_mask(masks[..., k] > 0, size) * WHITE for k in range(masks.shape[2])]
    return shown | {"truth": _encoded(_stacked(truth), "PNG")}


def _stacked(planes: Sequence[Pixels]) -> Pixels:
    """Planes (H, W) as one picture, one below the other."""
    return np.concatenate(planes)[..., None]


def _encoded(pixels: Pixels, kind: str) -> str:
    """An image (H, W, 1 or 3) as an address that holds all of it."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 85} if kind == "JPEG" else {"optimize": True}
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _metrics(rows: Sequence[Rows]) -> list[str]:
    """What images can be sorted by: the metrics of images that all have, of labels first that of the truth."""
    known = [of.summary() for of in rows]
    of_truth = [OF_TRUTH] if isinstance(rows[0], LabelRows) else []
    names = [name for name in known[0] if all(name in of for of in known)]
    return of_truth + [name for name in names if rows[0].each(name) is not None]


def _values(rows: Rows, metrics: Sequence[str]) -> Floats:
    """These metrics of each image, (M, N)."""
    of_truth = []
    if isinstance(rows, LabelRows):
        of_truth = [np.where(rows.there, rows.probability, 1 - rows.probability).min(1)]
    return np.array([*of_truth, *(rows.each(name) for name in metrics if name != OF_TRUTH)], np.float64)


def _plain(values: Floats) -> Any:
    """Numbers as JSON takes them: None for what there is none of."""
    return np.where(np.isnan(values), None, values.round(DIGITS).astype(object)).tolist()  # type: ignore[call-overload]


def _described(run: Measured) -> dict[str, Any]:
    decision = Decision.read(read_json(RunFolder(run.folder).metrics))
    return {
        "name": run.folder.name,
        "seed": run.repetition["seed"],
        "threshold": decision.threshold,
        "temperature": bool(decision.temperature),
        "cleaned": bool(decision.cleaning),
    }
