"""Any input size: pad to what a network needs, crop its answer back."""

import math

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(image: Tensor, multiple: int, minimum: int = 0) -> Tensor:
    """Extend the bottom and right edges until both sides are multiples of ``multiple``.

    Edge pixels are repeated: unlike reflection this works for an image smaller than its padding, and unlike
    zeros it draws no artificial border. An image that fits is returned as it is.

    Args:
        image: (N, C, H, W), any values.
        multiple: what both sides of the result are divisible by.
        minimum: smallest side of the result.

    Returns:
        (N, C, H', W') with the image in its top left corner.
    """
    down, right = (math.ceil(max(side, minimum) / multiple) * multiple - side for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, down), mode="replicate") if down or right else image


def crop_like(logits: Tensor, image: Tensor) -> Tensor:
    """Cut (N, K, H', W') back to the (H, W) of the image that was padded."""
    return logits[..., : image.shape[-2], : image.shape[-1]]
