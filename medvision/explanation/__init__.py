"""Where in an image a network finds what it answers, what its layers answer, and whether to trust it."""

from medvision.explanation.heat import METHODS, RULES, Choice, Explanation, Target, explain, require_methods, row
from medvision.explanation.maps import activations, default_layers

__all__ = [
    "METHODS",
    "RULES",
    "Choice",
    "Explanation",
    "Target",
    "activations",
    "default_layers",
    "explain",
    "require_methods",
    "row",
]
