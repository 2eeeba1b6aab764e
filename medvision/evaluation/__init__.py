"""A trained model measured on a split, summarised with a decision, which another split has chosen."""

from medvision.evaluation.base import Evaluation
from medvision.evaluation.labels import LabelEvaluation
from medvision.evaluation.masks import MaskEvaluation
from medvision.evaluation.measure import choose_decision, evaluate

__all__ = ["Evaluation", "LabelEvaluation", "MaskEvaluation", "choose_decision", "evaluate"]
