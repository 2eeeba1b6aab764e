"""Labels of a split, with the probabilities of each image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvision import figures
from medvision.data import ImageDataModule
from medvision.decision import Decision
from medvision.evaluation.base import Evaluation, known, or_half, or_one, spaced
from medvision.figures.labels import confusion, page
from medvision.metrics import (
    OF_LABELS,
    YOUDEN,
    Bootstrap,
    best_decision,
    decide,
    delong,
    summarise_label_intervals,
    summarise_labels,
    undefined_labels,
)
from medvision.metrics.calibration import CERTAIN, fit_temperature

TILES = 24  # images of a sheet


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
            return (or_one("all classes", fit_temperature, np.log(probability), self.truth.argmax(1)),)
        logits = np.log(probability) - np.log1p(-probability)
        each = zip(self.classes, logits.T, self.truth.T, strict=True)
        return tuple(or_one(name, fit_temperature, *both) for name, *both in each)

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
        return Decision(tuple(or_half(*best, self.split) for best in chosen), tuple(temperature))

    def summary(self, decision: Decision) -> dict[str, float]:
        """Metrics of the ranking, and of the decision."""
        return summarise_labels(self.probability, self.truth, self.classes, decision.threshold)

    def intervals(self, decision: Decision) -> dict[str, tuple[float, float]]:
        """95 % intervals of the entries of `summary`."""
        bootstrap = Bootstrap(len(self.ids), self.groups)
        found = summarise_label_intervals(self.probability, self.truth, self.classes, decision.threshold, bootstrap)
        return known(found)

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

    def draw(self, path: Path, data: ImageDataModule, decision: Decision) -> None:
        """Draws images from the one to whose truth the least probability is given to that with the most.

        Beside it, as `<name>_curves.png` and `<name>_mistakes.png`, the page of `figures.labels` and the surest
        mistakes: those with the least, in the classes that are mistaken.
        """
        decided, images = decide(self.probability, decision.threshold), len(self.ids)
        given, wrong = np.where(self.truth, self.probability, 1 - self.probability), decided != self.truth
        samples = {sample.id: sample for sample in data.splits[self.split]}

        def gallery(path: Path, chosen: Sequence[int], share: NDArray[np.float32], title: str) -> None:
            tiles = []
            for n in chosen:
                picture, masks = samples[self.ids[n]].read(data.spec.in_channels)
                caption = f"{self.ids[n]}\n{share[n]:.2f} {figures.verdict(self.classes, self.truth[n], decided[n])}"
                tiles.append(figures.Tile(caption, picture, masks.transpose(2, 0, 1) > 0))
            figures.gallery(path, tiles, [], f"{self.split}: {title} the probability that their truth was given")

        least = given.min(1)
        shown = spaced(np.argsort(least, kind="stable"), TILES)
        gallery(path, shown, least, f"{len(shown)} of {images} images, by")
        least = np.where(wrong, given, 1).min(1)
        mistakes = [int(n) for n in np.argsort(least, kind="stable") if wrong[n].any()]
        title = f"{min(len(mistakes), TILES)} of {len(mistakes)} mistakes among {images} images, the surest first, with"
        gallery(path.with_stem(f"{path.stem}_mistakes"), mistakes[:TILES], least, title)
        page(
            path.with_stem(f"{path.stem}_curves"), self.probability, self.truth, decided, self.classes,
            decision.threshold, Bootstrap(images, self.groups, resamples=500), self.summary(decision),
            f"{self.split}, {images} images" + (f", {decision}" if str(decision) else ""),
        )  # fmt: skip
