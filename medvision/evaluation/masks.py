"""Masks of a split, counted."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision import figures
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation.base import Evaluation, known, or_half, or_one, spaced
from medvision.files import as_csv, write_text
from medvision.metrics import (
    BOUNDARY,
    COUNTS,
    EMPTY,
    GRID,
    OF_MASKS,
    Bootstrap,
    best_threshold,
    image_scores,
    interval,
    scores,
    summarise,
    summarise_intervals,
    unetpp_iou,
)
from medvision.metrics.calibration import Calibration
from medvision.postprocess import Cleaning, best_option
from medvision.tasks import ImageCounts


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
        found = Decision(tuple(or_half(*each, self.split) for each in zip(chosen, self.classes, strict=True)))
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
        return tuple(or_one(name, self.calibration.temperature, k) for k, name in enumerate(self.classes))

    def best_cleaning(self, by: str) -> tuple[Cleaning, ...]:
        """For each class the best post-processing, measured by `evaluate(..., choosing=True)`, as for `choose`."""
        counts = [image.options for image in self.images if image.options is not None]
        return best_option(np.stack(counts), by, self.empty)

    def intervals(self, decision: Decision) -> dict[str, tuple[float, float]]:
        """95 % intervals of the entries of `summary`."""
        bootstrap, also = Bootstrap(len(self.images), self.groups), self.surface(decision)
        return known(summarise_intervals(self.counts(decision), self.classes, bootstrap, self.empty, also=also))

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

    def spread(self, decision: Decision, number: int = 6) -> dict[str, int]:
        """Ids from the worst to the best per-image Jaccard, evenly spaced, with their ranks from 1."""
        jaccard = scores(self.counts(decision))["jaccard"].mean(1)  # one of nothing is right, whatever it counts
        order = np.argsort(jaccard, kind="stable")
        ranks = {int(n): rank for rank, n in enumerate(order, 1)}
        return {self.images[n].id: ranks[n] for n in spaced(order, number)}
