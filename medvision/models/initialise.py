"""Initial weights by a named rule."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from medvision.models.options import one_of

_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_STD = 0.02


def _kaiming(weight: Tensor, fan_in: float) -> None:
    nn.init.normal_(weight, std=math.sqrt(2 / fan_in))


# Each fills a weight in place, given how many inputs one output sums over.
RULES: dict[str, Callable[[Tensor, float], object]] = {
    "xavier": lambda weight, fan_in: nn.init.xavier_uniform_(weight),
    "kaiming": _kaiming,
    "orthogonal": lambda weight, fan_in: nn.init.orthogonal_(weight),
    "normal": lambda weight, fan_in: nn.init.normal_(weight, std=_STD),
}


@torch.no_grad()
def initialise(model: nn.Module, how: str, skip: nn.Module | None = None) -> None:
    """Draw the weights of convolutions and linear layers anew and set their biases to zero, in place.

    Variances: xavier (uniform, https://proceedings.mlr.press/v9/glorot10a.html) 2 / (fan in + fan out); kaiming
    (normal, https://arxiv.org/abs/1502.01852) 2 / fan in, that of a transposed convolution divided by its stride's
    area; orthogonal (https://arxiv.org/abs/1312.6120) has orthonormal rows or columns; normal 0.02^2.

    Args:
        model: the network.
        how: ``"none"`` (draws nothing: layers keep what they were made with), or a name in `RULES`.
        skip: a part of the network that keeps its weights, such as a pretrained encoder.

    Raises:
        MedvisionError: an unknown rule.
    """
    one_of("init", how, ("none", *RULES))
    if how == "none":
        return
    kept = set() if skip is None else set(skip.modules())
    for layer in model.modules():
        if layer in kept or not isinstance(layer, _LAYERS):
            continue
        fan_in: float = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):
            fan_in = layer.weight.numel() / layer.out_channels / math.prod(layer.stride)
        RULES[how](layer.weight, fan_in)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
