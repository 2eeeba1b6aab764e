"""Full gradients (https://arxiv.org/abs/1905.00780): what the image and each bias of a network add to its answer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.explanation.maps import from_0_to_1, padded_size


def full_grad(model: nn.Module, image: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradients times image and biases, each channel as absolute values from 0 to 1, all added and from 0 to 1 again.

    Biases are those of convolutions and of batch norms, also of those in which timm has an activation.

    Args:
        model: The network, in evaluation mode, gradients enabled.
        image: (N, C, H, W), normalised.
        score: Of logits, summed over images.

    Returns:
        (N, H, W), one map of the network as a whole.

    Raises:
        MedvisionError: If it has no such biases, or parts of images instead of images in a batch.
    """
    found: list[Tensor] = []

    def add(share: Tensor, size: Sequence[int]) -> None:
        channels = from_0_to_1(share.abs().nan_to_num(0, 0, 0).flatten(0, 1)).view_as(share)
        whole = F.interpolate(channels.sum(1, keepdim=True), tuple(size), mode="bilinear", align_corners=False)
        found.append(whole[:, 0, : image.shape[2], : image.shape[3]])

    def note(bias: Tensor, _: nn.Module, __: object, answer: Tensor) -> None:
        if answer.requires_grad:
            answer.register_hook(lambda gradient: add(bias[:, None, None] * gradient, padded))  # type: ignore[no-untyped-call]

    with ExitStack() as hooks, padded_size(model, image) as padded:
        for layer in model.modules():
            if (bias := _bias(layer)) is not None:
                before = getattr(layer, "drop", layer)  # a drop-out in norms of timm, which an activation follows
                hooks.callback(before.register_forward_hook(partial(note, bias)).remove)
        seen = image.clone().requires_grad_()
        [gradient] = torch.autograd.grad(score(model.forward(seen)), seen)
    if not found or {len(one) for one in found} != {len(image)}:
        what = "has parts of images in a batch" if found else "has no biases of convolutions or batch norms"
        raise MedvisionError(f"full_grad: {type(model).__name__} {what}; choose another method")
    add(seen.detach() * gradient, image.shape[2:])
    return from_0_to_1(torch.stack(found).sum(0))


def _bias(layer: nn.Module) -> Tensor | None:
    """What a convolution or a batch norm adds to each channel, (C,)."""
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:  # what it makes of 0
        nothing, moments = torch.zeros_like(layer.running_mean)[None], (layer.running_mean, layer.running_var)
        return F.batch_norm(nothing, *moments, layer.weight, layer.bias, eps=layer.eps)[0].detach()
    return layer.bias if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else None
