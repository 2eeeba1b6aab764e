"""Images of a split chosen by place, name or metric, and drawn with truth and prediction."""

import csv
import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medvision import figures
from medvision.build import Run
from medvision.data.cache import Sample
from medvision.data.images import Pixels
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation import Evaluation, LabelEvaluation, MaskEvaluation, evaluate
from medvision.metrics import COUNTS, count, decide, lower_is_better, scores
from medvision.prediction import Predictor
from medvision.runs import RunFolder

log = logging.getLogger(__name__)

NO_METRICS = ("id", "group", "height", "width", "class", "threshold", "area_truth", "area_predicted", *COUNTS)
Bools = NDArray[np.bool_]
Result = Mapping[str, str]


def results(run: Run, place: RunFolder, split: str) -> Sequence[Result]:
    """The rows of `results_<split>.csv`; where the run has none of these images, the split is measured."""
    ids = {sample.id for sample in samples(run, split)}
    if (path := place.results(split)).exists():
        with path.open(newline="", encoding="utf-8") as handle:
            rows = [*csv.DictReader(handle)]
        if {row["id"] for row in rows} == ids:
            return rows
        log.warning("%s is of other images than %s has now", path, split)
    log.info("measuring %d images of %s", len(ids), split)
    found = evaluate(run.evaluating(), run.task, run.data, split, run.decision)
    return [*csv.DictReader(found.table(run.decision).splitlines())]


def samples(run: Run, split: str) -> Sequence[Sample]:
    """The images of a split, sorted by id.

    Raises:
        MedvisionError: If there is no such split.
    """
    return [run.data.samples[row] for row in run.data.rows(split)]


def values(rows: Sequence[Result], metric: str) -> dict[str, float]:
    """A metric of each image that has a value of it.

    Args:
        rows: For each image and class, from `results`.
        metric: A column, of which the mean over classes is taken, or `<column>/<class>`. Of labels `probability`, that
            given to the truth, of which the least over classes is taken.

    Raises:
        MedvisionError: If there is no such metric or class.
    """
    labels = "truth" in rows[0]
    known = ["probability"] if labels else [name for name in rows[0] if name not in NO_METRICS]
    classes = dict.fromkeys(row["class"] for row in rows)
    name, _, of = metric.partition("/")
    if name not in known or (of and of not in classes):
        each = f"; of one class <metric>/<class>: {', '.join(classes)}" if len(classes) > 1 else ""
        raise MedvisionError(f"metric={metric}: expected one of {', '.join(known)}{each}")
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["class"] == of or not of:
            of_image = found.setdefault(row["id"], [])
            if row[name]:  # else it has no value
                value = float(row[name])
                of_image.append(1 - value if labels and row["truth"] == "0" else value)
    return {image: min(v) if labels else sum(v) / len(v) for image, v in found.items() if v}


def from_the_worst(found: Mapping[str, float], metric: str) -> list[str]:
    """Ids by their values of a metric; of equal ones by name."""
    sign = -1 if lower_is_better(metric) else 1
    return sorted(found, key=lambda image: (sign * found[image], image))


def at(run: Run, split: str, index: int) -> Sample:
    """The image at a place in a split, from 0.

    Raises:
        MedvisionError: If there is none.
    """
    there = samples(run, split)
    if not isinstance(index, int) or not 0 <= index < len(there):
        raise MedvisionError(f"index={index}: {split} has {len(there)} images; expected 0 to {len(there) - 1}")
    return there[index]


def named(run: Run, split: str, name: str) -> Sample:
    """The image of a name in a split.

    Raises:
        MedvisionError: If there is none, with the split that has it, or else the nearest name.
    """
    there = {sample.id: sample for sample in samples(run, split)}
    if name in there:
        return there[name]
    elsewhere = [other for other, of in run.data.dealt.items() if name in {sample.id for sample in of}]
    if elsewhere:
        raise MedvisionError(f"id={name} is not in {split} but in {elsewhere[0]}; choose split={elsewhere[0]}")
    near = difflib.get_close_matches(name, there, n=1, cutoff=0)
    raise MedvisionError(f"id={name}: {split} has no such image; the nearest is {near[0]!r}")


def draw(path: Path, run: Run, found: Evaluation, decision: Decision) -> None:
    """Draws images of a split from the worst to the best, evenly spaced, so that a sheet shows no choice of ours."""
    if isinstance(found, LabelEvaluation):
        found.draw(path, run.data, decision)
    elif isinstance(found, MaskEvaluation):
        there, number = {sample.id: sample for sample in samples(run, found.split)}, len(found.images)
        chosen = [(there[name], f"   rank {rank} of {number}") for name, rank in found.spread(decision).items()]
        title = f"{found.split}: from the worst to the best of {number} images by jaccard, {decision}"
        Artist(run, decision).several(path, chosen, title)


class Artist:
    """Draws images with what a run predicts of them.

    Args:
        run: With its weights.
        decision: None: the stored one.
    """

    def __init__(self, run: Run, decision: Decision | None = None) -> None:
        self.decision, self.spec = decision or run.decision, run.data.spec
        self.predictor = Predictor([replace(run.predicting(), decision=self.decision)])

    def one(self, path: Path, sample: Sample, title: str) -> None:
        """Draws one image: with masks at its own size, and with a row for each class where there are several."""
        classes = self.spec.classes
        if self.spec.target == "label":
            image, _ = sample.read(self.spec.in_channels)
            probability = self.predictor(image, sample.id)
            title = f"{title}\n{sample.id}: {self._verdict(sample, probability)}"
            figures.probabilities(
                path, image, classes, probability, self._truth(sample), self.decision.threshold, title
            )
            return
        whole = self._example(sample)
        each = [self._only(whole, name, name) for name in classes] if len(classes) > 1 else []
        figures.sheet(path, [whole, *each], classes, title, height=None)

    def several(self, path: Path, chosen: Sequence[tuple[Sample, str]], title: str, of: str = "") -> None:
        """Draws a sheet of images, each with a note for its caption; of masks those of one class or of all."""
        if self.spec.target == "label":
            tiles = []
            for sample, note in chosen:
                image, masks = sample.read(self.spec.in_channels)
                verdict = self._verdict(sample, self.predictor(image, sample.id))
                caption = "\n".join(line for line in (sample.id, note.strip(), verdict) if line)
                tiles.append(figures.Tile(caption, image, masks.transpose(2, 0, 1) > 0))
            figures.gallery(path, tiles, [], title)
            return
        examples = [self._example(sample, note) for sample, note in chosen]
        if of:
            captions = [f"{sample.id}{note}   {of}" for sample, note in chosen]
            examples = [self._only(e, of, caption) for e, caption in zip(examples, captions, strict=True)]
        figures.sheet(path, examples, [of] if of else self.spec.classes, title)

    def _example(self, sample: Sample, note: str = "") -> figures.Example:
        image, masks = sample.read(self.spec.in_channels)
        prediction = self.decision.masks(self.predictor(image, sample.id))
        return self._captioned(f"{sample.id}{note}", image, masks.transpose(2, 0, 1) > 0, prediction)

    def _only(self, whole: figures.Example, name: str, caption: str) -> figures.Example:
        """One class of an example."""
        k = self.spec.classes.index(name)
        return self._captioned(caption, whole.image, whole.truth[k : k + 1], whole.prediction[k : k + 1])

    def _captioned(self, caption: str, image: Pixels, truth: Bools, prediction: Bools) -> figures.Example:
        """Appends Dice and Jaccard, means over classes, and the Dice of each that is there or predicted."""
        counts = count(torch.from_numpy(prediction)[None], torch.from_numpy(truth)[None])[0].numpy()
        values, there = scores(counts), np.asarray(counts[:, :3].any(1))
        caption += f"   dice {values['dice'].mean():.3f}"
        if len(truth) > 1 and there.any():
            each = zip(self.spec.classes, values["dice"], there.tolist(), strict=True)
            caption += f" ({', '.join(f'{name} {dice:.2f}' for name, dice, flag in each if flag)})"
        caption += f"   jaccard {values['jaccard'].mean():.3f}"
        if len(truth) == 1:
            caption += f"   {truth.sum()} pixels, {prediction.sum()} predicted"
        return figures.Example(caption, image, truth, prediction)

    def _truth(self, sample: Sample) -> Bools:
        return np.array([k in sample.labels for k in range(len(self.spec.classes))])

    def _verdict(self, sample: Sample, probability: NDArray[np.float32]) -> str:
        decided = decide(probability[None], self.decision.threshold)[0]
        return figures.verdict(self.spec.classes, self._truth(sample), decided)
