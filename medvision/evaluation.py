"""A trained model measured on a split, summarised with a decision, which another split has chosen."""

import logging
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from medvision import figures, label_figures
from medvision.data import ImageDataModule
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.files import as_csv, write_text
from medvision.label_figures import confusion
from medvision.metrics import (
    BOUNDARY,
    COUNTS,
    EMPTY,
    GRID,
    OF_LABELS,
    OF_MASKS,
    YOUDEN,
    Bootstrap,
    best_decision,
    best_threshold,
    decide,
    delong,
    image_scores,
    interval,
    one_hot,
    scores,
    summarise,
    summarise_intervals,
    summarise_label_intervals,
    summarise_labels,
    undefined_labels,
    unetpp_iou,
)
from medvision.metrics.calibration import CERTAIN, Calibration, fit_temperature
from medvision.postprocess import Cleaning, best_option
from medvision.tasks import ClassificationTask, ImageCounts, SegmentationTask, Task, resize_probability

log = logging.getLogger(__name__)

TILES = 24  # images of a sheet of labels


class Evaluation(ABC):
    """A split, measured.

    Attributes:
        split: Name of the split.
        classes: The K names.
    """

    split: str
    classes: tuple[str, ...]

    @abstractmethod
    def choose(self, by: str, temperature: Sequence[float] = ()) -> Decision:
        """The best threshold of each class at a temperature, in the sense of the task's `chosen_by`."""

    @abstractmethod
    def summary(self, decision: Decision) -> dict[str, float]:
        """Metrics of the whole split with a decision."""

    @abstractmethod
    def temperatures(self) -> tuple[float, ...]:
        """The best temperature of each class, or of all that exclude each other; 1, with a warning, where none is."""

    @abstractmethod
    def calibrated(self, temperature: Sequence[float]) -> dict[str, float]:
        """Expected calibration error and Brier score at a temperature, the entries of `summary`."""

    @abstractmethod
    def intervals(self, decision: Decision) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals over images of the entries of `summary`, over groups of them where there are any.

        What less than two images or groups have a value of has no interval.
        """

    @abstractmethod
    def challenge(self, name: str, decision: Decision) -> dict[str, float]:
        """The scores of a challenge, as its organisers compute them (see `metrics.challenge`)."""

    def details(self, decision: Decision) -> dict[str, Any]:
        """What else is known, for `metrics.json`; of masks nothing."""
        return {}

    @abstractmethod
    def rows(self, decision: Decision) -> Iterator[list[object]]:
        """A header, then a row for each image and class, from which summaries and intervals can be recomputed."""

    @abstractmethod
    def draw(self, path: Path, task: Task, data: ImageDataModule, decision: Decision) -> None:
        """Draws images from the worst to the best, evenly spaced, so that a sheet shows no choice of ours."""

    def beside(self, decision: Decision) -> dict[str, dict[str, float]]:
        """What to compare the summary with: that without the cleaning, calibration without the temperature."""
        uncleaned = {"without cleaning": self.summary(replace(decision, cleaning=()))} if decision.cleaning else {}
        return uncleaned | ({"without temperature": self.calibrated(())} if decision.temperature else {})

    def table(self, decision: Decision) -> str:
        """`rows` as CSV."""
        return as_csv(self.rows(decision))


@dataclass(frozen=True)
class MaskEvaluation(Evaluation):
    """Every image of a split, counted at its own size.

    Attributes:
        split: Name of the split.
        classes: The K names.
        images: One entry for each image, in the order of their ids.
        thresholds: The T thresholds at which they were counted, ascending.
        groups: What each image belongs to, as a sequence or a patient; None where that is not known.
        decision: With which it was measured; None: at thresholds alone.
        empty: As for `scores`.
        calibration: Of all pixels, before any temperature.
    """

    split: str
    classes: tuple[str, ...]
    images: tuple[ImageCounts, ...]
    thresholds: NDArray[np.float32]
    groups: tuple[str, ...] | None = None
    decision: Decision | None = None
    empty: float = EMPTY
    calibration: Calibration | None = None

    def counts(self, decision: Decision) -> NDArray[np.int64]:
        """Counts (N, K, 4) of the masks that a decision makes.

        Raises:
            MedvisionError: If nothing was counted at one of its thresholds, at its temperature or after its cleaning.
        """
        cleaned = [image.cleaned for image in self.images if image.cleaned is not None]
        if decision == self.decision and cleaned:
            return np.stack(cleaned)
        measured = self.decision or Decision(())
        if decision.cleaning or decision.temperature != measured.temperature:
            raise MedvisionError(f"{decision} was not counted; hand the decision to evaluate()")
        threshold = decision.threshold
        if missing := [value for value in threshold if np.float32(value) not in self.thresholds]:
            raise MedvisionError(f"threshold {missing[0]} was not counted; hand the decision to evaluate()")
        at = np.searchsorted(self.thresholds, np.asarray(threshold, np.float32))
        return np.stack([image.counts[at, np.arange(len(self.classes))] for image in self.images])

    def choose(self, by: str, temperature: Sequence[float] = ()) -> Decision:
        """For each class the threshold with the highest value of a metric, one of `metrics.CHOICES`.

        It is one of the grid, for probabilities as they are, moved to the temperature.
        """
        metric, pooled = by.removesuffix("_image"), not by.endswith("_image")
        chosen = [
            best_threshold(counts, GRID, metric, pooled, self.empty) for counts in np.moveaxis(self._swept(), 2, 0)
        ]
        found = Decision(tuple(_or_half(*each, self.split) for each in zip(chosen, self.classes, strict=True)))
        return found.at(temperature)

    def draw_choice(self, path: Path, by: str, decision: Decision) -> None:
        """Draws what thresholds were chosen by over the grid, with its 95 % interval, and where they are."""
        counts, metric = self._swept(), by.removesuffix("_image")
        flat, bootstrap = counts.reshape(len(counts), -1, len(COUNTS)), Bootstrap(len(counts), self.groups)
        if by.endswith("_image"):
            images = scores(flat, self.empty)[metric]
            known = ~np.isnan(images)
            total = np.where(known, images, 0).sum(0)
            values = np.divide(total, known.sum(0), out=np.full(len(total), np.nan), where=known.any(0))
            drawn = bootstrap.means(images)
        else:
            values, drawn = scores(flat.sum(0), self.empty)[metric], bootstrap.pooled(flat, self.empty)[metric]
        bands = np.stack([values, *interval(drawn)]).reshape(3, *counts.shape[1:3])
        title = f"{self.split}: {by} of {len(counts)} images at each threshold, with its 95 % interval"
        curves = dict(zip(self.classes, np.moveaxis(bands, 2, 0), strict=True))
        figures.sweep(path, GRID, curves, decision.threshold, by, title)

    def _swept(self) -> NDArray[np.int64]:
        """Counts (N, 99, K, 4) at the thresholds of the grid."""
        grid = np.searchsorted(self.thresholds, GRID)
        return np.stack([image.counts[grid] for image in self.images])

    def surface(self, decision: Decision) -> dict[str, NDArray[np.float64]]:
        """Boundary metrics (N, K), `metrics.BOUNDARY`; none where they were not measured with this decision."""
        if decision != self.decision or not self.images[0].surface:
            return {}
        return {name: np.stack([image.surface[name] for image in self.images]) for name in BOUNDARY}

    def summary(self, decision: Decision) -> dict[str, float]:
        """Pooled metrics and means over images.

        `distances` is how many masks have a value of `hd95` and `assd`: none has where one of truth and prediction is
        empty.
        """
        surface = self.surface(decision)
        result = summarise(self.counts(decision), self.classes, self.empty, surface)
        if surface:
            there = (~np.isnan(surface["hd95"])).sum(0).astype(float).tolist()
            result["distances"] = sum(there)
            if len(there) > 1:
                result |= {f"distances/{name}": number for name, number in zip(self.classes, there, strict=True)}
        return result | self.calibrated(decision.temperature)

    def draw_calibration(self, path: Path, decision: Decision) -> None:
        """Draws the reliability diagram of each class, and that without a temperature; writes both as CSV beside it."""
        if self.calibration is None:
            raise MedvisionError(f"no probabilities of {self.split} were kept; measure it by evaluate()")
        named = {"as they are": ()} | ({"with temperature": decision.temperature} if decision.temperature else {})
        found = {name: self.calibration.compute(temperature) for name, temperature in named.items()}
        panels = {c: {name: of[k] for name, of in found.items()} for k, c in enumerate(self.classes)}
        figures.reliability(path, panels, f"{self.split}: probabilities of all pixels of {len(self.images)} images")
        rows = [
            [c, name, *("" if np.isnan(value) else value for value in bin_)]
            for c, drawn in panels.items()
            for name, of in drawn.items()
            for bin_ in zip(of.count.tolist(), of.confidence.tolist(), of.frequency.tolist(), strict=True)
        ]
        write_text(
            path.with_suffix(".csv"), as_csv([["class", "probabilities", "count", "confidence", "frequency"], *rows])
        )

    def calibrated(self, temperature: Sequence[float]) -> dict[str, float]:
        """Expected calibration error and Brier score of the probabilities of all pixels."""
        found = self.calibration.compute(temperature) if self.calibration else []
        result: dict[str, float] = {}
        for metric, values in (
            ("ece", [one.expected_error for one in found]),
            ("brier", [one.brier for one in found]),
        ):
            result |= {metric: statistics.fmean(values)} if values else {}
            if len(values) > 1:
                result |= {f"{metric}/{name}": value for name, value in zip(self.classes, values, strict=True)}
        return result

    def temperatures(self) -> tuple[float, ...]:
        """The temperature of each class with the highest likelihood of the truth of all pixels."""
        if self.calibration is None:
            raise MedvisionError(f"no probabilities of {self.split} were kept; measure it by evaluate()")
        return tuple(_or_one(name, self.calibration.temperature, k) for k, name in enumerate(self.classes))

    def best_cleaning(self, by: str) -> tuple[Cleaning, ...]:
        """For each class the best post-processing, measured by `evaluate(..., choosing=True)`, as for `choose`."""
        counts = [image.options for image in self.images if image.options is not None]
        return best_option(np.stack(counts), by, self.empty)

    def intervals(self, decision: Decision) -> dict[str, tuple[float, float]]:
        """95 % intervals of the entries of `summary`."""
        bootstrap, also = Bootstrap(len(self.images), self.groups), self.surface(decision)
        return _known(summarise_intervals(self.counts(decision), self.classes, bootstrap, self.empty, also=also))

    def at_network_size(self, batch_size: int = 16) -> dict[str, float]:
        """Metrics at network size and a probability of one half, where papers often have theirs.

        Args:
            batch_size: Of `unetpp_iou`, an IoU of batches; that of the published ones.
        """
        counts = np.stack([image.network for image in self.images])
        return summarise(counts, self.classes, self.empty) | {"unetpp_iou": unetpp_iou(counts, batch_size)}

    def challenge(self, name: str, decision: Decision) -> dict[str, float]:
        """The scores of a challenge of masks, one of `metrics.OF_MASKS`."""
        return OF_MASKS[name](self.counts(decision), self.classes)

    def rows(self, decision: Decision) -> Iterator[list[object]]:
        """A header, then counts, areas in pixels and metrics of each image and class."""
        counts = self.counts(decision)
        metrics = image_scores(counts, self.empty) | self.surface(decision)
        areas = ["area_truth", "area_predicted"]
        yield ["id", "group", "height", "width", "class", "threshold", *COUNTS, *areas, *metrics]
        groups = self.groups or [""] * len(self.images)
        for n, image in enumerate(self.images):
            for k, name in enumerate(self.classes):
                tp, fp, fn, tn = counts[n, k].tolist()
                values = [float(column[n, k]) for column in metrics.values()]
                shown = ["" if np.isnan(value) else value for value in values]
                facts = [image.id, groups[n], *image.size, name, decision.threshold[k]]
                yield [*facts, tp, fp, fn, tn, tp + fn, tp + fp, *shown]

    def draw(self, path: Path, task: Task, data: ImageDataModule, decision: Decision) -> None:
        """Draws images with truth, prediction and errors, from the worst to the best per-image Jaccard."""
        title = f"{self.split}: from the worst to the best of {len(self.images)} images, {decision}"
        figures.sheet(path, self.examples(task, data, decision), self.classes, title)

    def examples(self, task: Task, data: ImageDataModule, decision: Decision, number: int = 6) -> list[figures.Example]:
        """Images from the worst to the best per-image Jaccard, evenly spaced."""
        jaccard = scores(self.counts(decision))["jaccard"].mean(1)  # one of nothing is right, whatever it counts
        order = np.argsort(jaccard, kind="stable")
        dataset, result = data.dataset(self.split, full=True), []
        positions = {str(name): position for position, name in enumerate(dataset.ids)}
        task.eval()
        for n in _spaced(order, number):
            image = self.images[n]
            item: dict[str, Any] = dataset[positions[image.id]]
            with torch.inference_mode():
                probability = task.probability(item["image"][None].to(task.device))[0]
            full = resize_probability(probability, image.size)
            prediction = decision.masks(decision.calibrated(full).cpu().numpy())
            rank = int(np.flatnonzero(order == n)[0]) + 1
            caption = f"{image.id}   jaccard {jaccard[n]:.3f}   (rank {rank} of {len(order)})"
            picture, _ = data.splits[self.split][positions[image.id]].read(data.spec.in_channels)
            result.append(figures.Example(caption, picture, item["mask"].numpy() > 0, prediction))
        return result


@dataclass(frozen=True)
class LabelEvaluation(Evaluation):
    """The probabilities of every image of a split.

    Attributes:
        split: Name of the split.
        classes: The K names.
        exclusive: Whether each image has exactly one of them: the most probable is decided for, without a threshold.
        ids: N images, sorted.
        probability: float32 (N, K).
        truth: bool (N, K).
        groups: What each image belongs to, as a patient; None where that is not known.
        raw: The probabilities before a temperature was applied; None: those that there are.
        operating_point: What thresholds are chosen for, see `metrics.best_decision`.
    """

    split: str
    classes: tuple[str, ...]
    exclusive: bool
    ids: tuple[str, ...]
    probability: NDArray[np.float32]
    truth: NDArray[np.bool_]
    groups: tuple[str, ...] | None = None
    raw: NDArray[np.float32] | None = None
    operating_point: str | Mapping[str, float] = YOUDEN

    def temperatures(self) -> tuple[float, ...]:
        """The temperature of each class, or of all exclusive ones, with the highest likelihood of the truth."""
        probability = np.clip(self.at(()).probability.astype(np.float64), CERTAIN, 1 - CERTAIN)
        if self.exclusive:
            return (_or_one("all classes", fit_temperature, np.log(probability), self.truth.argmax(1)),)
        logits = np.log(probability) - np.log1p(-probability)
        each = zip(self.classes, logits.T, self.truth.T, strict=True)
        return tuple(_or_one(name, fit_temperature, *both) for name, *both in each)

    def calibrated(self, temperature: Sequence[float]) -> dict[str, float]:
        """Expected calibration error and Brier score of the images' probabilities."""
        found = self.at(temperature).summary(self._half)
        return {name: value for name, value in found.items() if name.split("/")[0] in ("ece", "brier")}

    def at(self, temperature: Sequence[float]) -> "LabelEvaluation":
        """The same with its probabilities at a temperature."""
        raw = self.probability if self.raw is None else self.raw
        decision = replace(self._half, temperature=tuple(temperature))
        return replace(self, probability=decision.calibrated(torch.from_numpy(raw), dim=1).numpy(), raw=raw)

    @property
    def _half(self) -> Decision:
        return Decision(() if self.exclusive else (0.5,) * len(self.classes))

    def choose(self, by: str, temperature: Sequence[float] = ()) -> Decision:
        """For each class the threshold of the operating point."""
        if self.exclusive:
            return Decision((), tuple(temperature))
        each = zip(self.at(temperature).probability.T, self.truth.T, self.classes, strict=True)
        chosen = [(best_decision(p, t, self.operating_point), name) for p, t, name in each]
        return Decision(tuple(_or_half(*best, self.split) for best in chosen), tuple(temperature))

    def summary(self, decision: Decision) -> dict[str, float]:
        """Metrics of the ranking, and of the decision."""
        return summarise_labels(self.probability, self.truth, self.classes, decision.threshold)

    def intervals(self, decision: Decision) -> dict[str, tuple[float, float]]:
        """95 % intervals of the entries of `summary`."""
        bootstrap = Bootstrap(len(self.ids), self.groups)
        found = summarise_label_intervals(self.probability, self.truth, self.classes, decision.threshold, bootstrap)
        return _known(found)

    def challenge(self, name: str, decision: Decision) -> dict[str, float]:
        """The scores of a challenge of labels, one of `metrics.OF_LABELS`; none where nothing can be ranked."""
        both = self.truth.any() and not self.truth.all()
        return OF_LABELS[name](self.probability, self.truth) if both else {}

    def details(self, decision: Decision) -> dict[str, Any]:
        """What is no number with a bootstrap interval.

        Returns:
            `not_defined`, the reason for each metric without a value; `delong`, the AUROC's interval by DeLong, for
            images without groups, which it takes for independent; `confusion`: of exclusive classes the images that
            show class i (rows) and are decided for class j (columns), else for each class that of its absence and it.
        """
        decided = decide(self.probability, decision.threshold)
        missing = undefined_labels(self.probability, self.truth, self.classes, decision.threshold)
        delongs: dict[str, tuple[float, float]] = {}
        for k, name in enumerate(self.classes if self.groups is None else ()):
            bounds = delong(self.probability[:, k], self.truth[:, k])
            delongs |= {} if bounds is None else {"auroc" if len(self.classes) == 1 else f"auroc/{name}": bounds}
        each = {name: confusion(self.truth[:, k], decided[:, k]).tolist() for k, name in enumerate(self.classes)}
        found = {"delong": delongs, "not_defined": missing}
        matrix = confusion(self.truth, decided).tolist() if self.exclusive else each
        return {name: value for name, value in found.items() if value} | {"confusion": matrix}

    def rows(self, decision: Decision) -> Iterator[list[object]]:
        """A header, then truth, probability and decision of each image and class."""
        decided = decide(self.probability, decision.threshold)
        yield ["id", "group", "class", "threshold", "truth", "probability", "decision"]
        groups = self.groups or [""] * len(self.ids)
        for n, image in enumerate(self.ids):
            for k, name in enumerate(self.classes):
                at = decision.threshold[k] if decision.threshold else ""
                facts = [image, groups[n], name, at, int(self.truth[n, k])]
                yield [*facts, float(self.probability[n, k]), int(decided[n, k])]

    def draw(self, path: Path, task: Task, data: ImageDataModule, decision: Decision) -> None:
        """Draws images from the one to whose truth the least probability is given to that with the most.

        Beside it, as `<name>_curves.png` and `<name>_mistakes.png`, the page of `label_figures` and the mistakes with
        the least.
        """
        given = np.where(self.truth, self.probability, 1 - self.probability).min(1)
        decided, order = decide(self.probability, decision.threshold), np.argsort(given, kind="stable")
        samples = {sample.id: sample for sample in data.splits[self.split]}

        def tiles(numbers: Sequence[int]) -> list[figures.Tile]:
            result = []
            for n in numbers:
                picture, masks = samples[self.ids[n]].read(data.spec.in_channels)
                caption = f"{given[n]:.2f} {figures.verdict(self.classes, self.truth[n], decided[n])}"
                result.append(figures.Tile(caption, picture, masks.transpose(2, 0, 1) > 0))
            return result

        spaced = _spaced(order, TILES)
        title = f"{self.split}: {len(spaced)} of {len(order)} images, by the probability that their truth was given"
        figures.gallery(path, tiles(spaced), [], title)
        wrong = [int(n) for n in order if (decided[n] != self.truth[n]).any()]
        shown = f"{min(len(wrong), TILES)} of {len(wrong)} mistakes among {len(order)} images, the surest first"
        title = f"{self.split}: {shown}, with the probability that their truth was given"
        figures.gallery(path.with_stem(f"{path.stem}_mistakes"), tiles(wrong[:TILES]), [], title)
        label_figures.page(
            path.with_stem(f"{path.stem}_curves"), self.probability, self.truth, decided, self.classes,
            decision.threshold, Bootstrap(len(self.ids), self.groups, resamples=500), self.summary(decision),
            f"{self.split}, {len(order)} images" + (f", {decision}" if str(decision) else ""),
        )  # fmt: skip


def evaluate(
    trainer: pl.Trainer,
    task: SegmentationTask | ClassificationTask,
    data: ImageDataModule,
    split: str,
    decision: Decision | None = None,
    choosing: bool = False,
) -> Evaluation:
    """Measures a split: masks at their original sizes, labels by the probabilities of each image.

    Masks are counted at each threshold of the grid. They are cleaned and their boundaries measured with one decision
    only, which has to be known before: where it is chosen on the very split, that takes a second pass, and no
    probabilities are kept.

    Args:
        trainer: Decides device and precision.
        task: The trained task.
        data: The data set.
        split: `train`, `val` or `test`.
        decision: At whose thresholds masks are counted besides the grid, and with which the rest is measured; None:
            the grid alone, of probabilities as they are.
        choosing: Measure, instead of boundaries, what each post-processing would do, for `best_cleaning`.

    Raises:
        MedvisionError: If a threshold is not between 0 and 1, or the split is not there.
    """
    also = () if decision is None else decision.threshold
    if wrong := [value for value in also if not 0 < value < 1]:
        raise MedvisionError(f"threshold is {wrong[0]}; expected a probability above 0 and below 1")
    if isinstance(task, SegmentationTask):
        task.thresholds = np.unique(np.append(GRID, np.asarray(also, np.float32)))
        task.decision, task.choosing = decision, choosing
    with trainer.precision_plugin.forward_context():  # around all batches: weights are cast to 16 bits once
        trainer.test(task, dataloaders=data.evaluation_dataloader(split), verbose=False)
    classes = data.spec.classes
    group = {sample.id: sample.group for sample in data.splits[split] if sample.group is not None}
    if isinstance(task, SegmentationTask):
        images = tuple(sorted(task.counted, key=lambda image: image.id))
        groups = tuple(group.get(image.id, image.id) for image in images) if group else None
        return MaskEvaluation(split, classes, images, task.thresholds, groups, decision, task.empty, task.calibration)
    scored = sorted(task.scored, key=lambda image: image.id)
    truth = one_hot(torch.stack([image.target for image in scored]), len(classes))
    probability = torch.stack([image.probability for image in scored]).numpy()
    ids = tuple(image.id for image in scored)
    groups = tuple(group.get(name, name) for name in ids) if group else None
    found = LabelEvaluation(
        split, classes, task.exclusive, ids, probability, truth, groups, operating_point=task.operating_point
    )
    return found if decision is None else found.at(decision.temperature)


def choose_decision(
    trainer: pl.Trainer,
    task: SegmentationTask | ClassificationTask,
    data: ImageDataModule,
    threshold: Decision | Sequence[float] | None = None,
    temperature: Sequence[float] | None = (),
    cleaning: Sequence[Cleaning] | None = (),
) -> tuple[Decision, Evaluation | None]:
    """Chooses on validation what is not given: first the temperature, with it the threshold, then the cleaning.

    Args:
        trainer: Decides device and precision.
        task: The trained task.
        data: The data set.
        threshold: Of each class; or a decision, to decide the same at any temperature; None: chosen.
        temperature: Of each class; None: chosen.
        cleaning: Of each class; None: chosen.

    Returns:
        The decision; validation as it was measured for temperature or threshold, if it was.
    """
    measured = None
    if threshold is None or temperature is None:
        measured = evaluate(trainer, task, data, "val")
        temperature = measured.temperatures() if temperature is None else temperature
        threshold = measured.choose(task.chosen_by, temperature) if threshold is None else threshold
    if isinstance(threshold, Decision):
        decision = threshold.at(temperature)
    else:
        decision = Decision(tuple(threshold), tuple(temperature))
    if cleaning is None:
        found = evaluate(trainer, task, data, "val", decision, choosing=True)
        if not isinstance(found, MaskEvaluation):
            raise MedvisionError("only masks can be cleaned; expected cleaning=none")
        cleaning = found.best_cleaning(task.chosen_by)
        for name, of_class in zip(data.spec.classes, cleaning, strict=True):
            log.info("cleaning of %s: %s", name, of_class)
    return replace(decision, cleaning=tuple(cleaning)), measured


def step_times(
    trainer: pl.Trainer, task: Task, models: Sequence[torch.nn.Module], image: torch.Tensor, rounds: int = 5
) -> list[float]:
    """Seconds that each model takes to answer a batch: medians of rounds in which all take turns.

    Args:
        trainer: Decides device and precision.
        task: Decides the memory order.
        models: The models, which stay on the device in evaluation mode.
        image: Normalised images (N, C, H, W).
        rounds: How many, after one that is not counted.
    """
    device = trainer.strategy.root_device
    image = image.to(device).contiguous(memory_format=task.memory_format)
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for _ in range(1 + rounds):
            for model, times in zip(models, seconds, strict=True):
                model.to(device).eval()
                begin = time.perf_counter()
                model(image)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                times.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in seconds]


def _known(intervals: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {name: bounds for name, bounds in intervals.items() if not np.isnan(bounds).any()}


def _or_half(best: float | None, name: str, split: str) -> float:
    if best is None:
        shown = "is shown by all images of %s or by none: no threshold can be chosen there, it is 0.5"
        log.warning("%s " + shown, name, split)
    return 0.5 if best is None else best


def _or_one(name: str, fit: Callable[..., float], *arguments: Any) -> float:
    try:
        return fit(*arguments)
    except MedvisionError as error:
        log.warning("the temperature of %s stays 1: %s", name, error)
        return 1.0


def _spaced(order: NDArray[np.intp], number: int) -> list[int]:
    """Entries from the first to the last, evenly spaced."""
    places = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))
    return [int(n) for n in order[places]]
