"""How a split is measured, and a decision chosen on validation."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytorch_lightning as pl
import torch

from medvision.data import ImageDataModule
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation.base import Evaluation
from medvision.evaluation.labels import LabelEvaluation
from medvision.evaluation.masks import MaskEvaluation
from medvision.metrics import GRID, one_hot
from medvision.postprocess import Cleaning
from medvision.tasks import ClassificationTask, SegmentationTask

log = logging.getLogger(__name__)


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
