"""Images of a comparison with what each variant answers, small enough to be held by a page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medvision import figures
from medvision.build import load_run
from medvision.comparison import Comparison
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
from medvision.variants import Measured

SIDE = 192  # pixels of a picture's longer side
LEVELS = 200  # steps of probability: every threshold of two digits is one
SIDE_BY_SIDE = 6  # images that are shown without being looked for
DIGITS = 6

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shown:
    """A variant as its first seed measured it.

    Attributes:
        rows: The results of the N images that are compared.
        run_of: The run that has measured each: one, or of a cross-validation several.
    """

    rows: Rows
    run_of: Mapping[str, Measured]


def pictured(found: Comparison, runs: Sequence[Measured], number: int) -> dict[str, Any]:
    """Images with truth and the answers of each variant, and what to sort them by, as JSON takes it.

    Pictures are at most `SIDE` pixels long. Probabilities are those of each run at its temperature, in `LEVELS` steps.

    Args:
        found: The comparison.
        runs: The runs that it compares.
        number: Of images, as for `chosen`.

    Raises:
        MedvisionError: If the data or the weights of a run are not there, or not what they were.
    """
    by_folder = {str(run.folder): run for run in runs}
    variants = [_of_first_seed([by_folder[of["folder"]] for of in v.runs], found.ids) for v in found.variants]
    most, others = chosen(found, number)
    ids = [found.ids[n] for n in (*most, *others)]
    used = [*dict.fromkeys(variant.run_of[image] for variant in variants for image in found.ids)]
    rows = [variant.rows for variant in variants]
    pictures, answers = _seen(used, variants, ids, found.split)
    metrics, table = _values(rows)
    apart = disagreement(found).round(DIGITS)
    result: dict[str, Any] = {
        "target": "mask",
        "classes": rows[0].classes,
        "levels": LEVELS,
        "by": found.each_is[found.metrics[0]],
        "colours": {"truth": figures.TRUTH, "missed": figures.MISSED, "false": figures.FALSE}
        | {"classes": figures.CLASSES},
        "metrics": metrics,
        "variants": [variant.name for variant in found.variants],
        "runs": [_described(run) for run in used],
        "images": [
            {
                "id": image,
                "apart": float(apart[n]),
                **pictures[image],
                "values": _plain(table[:, :, n]),
                "runs": [used.index(variant.run_of[image]) for variant in variants],
                "answers": [answers.get((variant.run_of[image].folder, image)) for variant in variants],
            }
            for n, image in zip((*most, *others), ids, strict=True)
        ],
        "most": sum(bool(apart[n] > 0) for n in most[:SIDE_BY_SIDE]),
        "of": found.images,
    }
    if isinstance(rows[0], MaskRows):
        return result | {"empty": _plain(np.array(rows[0].empty))}
    result["target"] = "label"
    result["every"] = {
        "ids": found.ids,
        "truth": rows[0].truth.astype(int).tolist(),
        "probability": [of.probability.tolist() for of in rows if isinstance(of, LabelRows)],
        "runs": [[used.index(variant.run_of[image]) for image in found.ids] for variant in variants],
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


def levels(probability: NDArray[np.float32], size: Sequence[int]) -> Pixels:
    """Probabilities (K, H, W) as one picture (K * height, width, 1), one below the other, in `LEVELS` steps.

    They are rounded down: where a probability is at least a threshold of two digits, so is its step.
    """
    height, width = size
    smaller = height <= probability.shape[1] and width <= probability.shape[2]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    planes = [cv2.resize(plane, (width, height), interpolation=method) for plane in probability]
    steps = np.floor(np.concatenate(planes).astype(np.float64) * LEVELS + 1e-4)  # 0.29 of 32 bits is a bit less
    return np.asarray(steps.clip(0, LEVELS), np.uint8)[..., None]


def _of_first_seed(runs: Sequence[Measured], ids: Sequence[str]) -> Shown:
    """The results of the runs that differ from the first by fold alone; of each image those of the first that has."""
    run_of: dict[str, Measured] = {}
    parts = []
    for run in runs:
        if {**run.repetition, "fold": None} == {**runs[0].repetition, "fold": None}:
            new = [n for n, image in enumerate(run.rows.ids) if image not in run_of]
            run_of |= dict.fromkeys((run.rows.ids[n] for n in new), run)
            parts.append(run.rows.take(new))
    rows = parts[0].and_of(*parts[1:])
    places = {image: n for n, image in enumerate(rows.ids)}
    return Shown(rows.take([places[image] for image in ids]), run_of)


def _seen(
    used: Sequence[Measured], variants: Sequence[Shown], ids: Sequence[str], split: str
) -> tuple[dict[str, dict[str, Any]], dict[tuple[Path, str], str]]:
    """The picture of each image, and what each run answers to its images; labels have that among the results."""
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
                    size = reader.pictures[image]["size"]
                    answers[run.folder, image] = _encoded(levels(predictor(pixels, image), size), "PNG")
                progress.update()
    return reader.pictures, answers


class _Reader:
    """Reads each image once for all runs that see it at one size, and keeps its picture."""

    def __init__(self) -> None:
        self.pictures: dict[str, dict[str, Any]] = {}
        self._read: dict[tuple[str, int, tuple[int, int]], Pixels] = {}

    def __call__(self, sample: Sample, spec: DataSpec) -> Pixels:
        """The image at network size."""
        key = sample.id, spec.in_channels, spec.image_size
        if key not in self._read:
            image, masks = sample.read(spec.in_channels)
            self._read[key] = resize_image(image, spec.image_size)
            if sample.id not in self.pictures:
                self.pictures[sample.id] = _picture(sample, image, masks, spec)
        return self._read[key]


def _picture(sample: Sample, image: Pixels, masks: Pixels, spec: DataSpec) -> dict[str, Any]:
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    shown = {"size": [*size], "original": [height, width], "image": _encoded(resize_image(image, size), "JPEG")}
    if spec.target == "label":
        return shown | {"truth": [k in sample.labels for k in range(len(spec.classes))]}
    truth = np.concatenate([resize_mask(masks[..., k] > 0, size) for k in range(masks.shape[2])])
    return shown | {"truth": _encoded(truth.astype(np.uint8)[..., None] * np.uint8(255), "PNG")}


def _encoded(pixels: Pixels, kind: str) -> str:
    """An image (H, W, 1 or 3) as an address that holds all of it."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 85} if kind == "JPEG" else {"optimize": True}
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _values(rows: Sequence[Rows]) -> tuple[list[str], Floats]:
    """What images can be sorted by, and the values (V, M, N) of the variants; of labels first that of the truth."""
    known = [of.summary() for of in rows]
    names = [name for name in known[0] if all(name in of for of in known)]
    of_images = [name for name in names if rows[0].each(name) is not None]
    table = [[of.each(name) for name in of_images] for of in rows]
    if isinstance(rows[0], LabelRows):
        of_images = ["probability of the truth", *of_images]
        for of, columns in zip(rows, table, strict=True):
            assert isinstance(of, LabelRows)
            columns.insert(0, np.where(of.there, of.probability, 1 - of.probability).min(1))
    return of_images, np.array(table, np.float64)


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
