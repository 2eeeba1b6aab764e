"""What layers answer, as maps of the image; and which layers of a network are looked at unless others are named."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models import EncoderModel, feature_maps, layer_names

PREFIX = 16  # tokens that are of no place, such as a class token and registers, at most


def as_maps(answer: Tensor, layer: str = "", *, size: Sequence[int]) -> Tensor:
    """What a layer answers, as maps (N, C, h, w).

    Args:
        answer: (N, C, h, w); with channels last (N, h, w, C), as Swin; or tokens (N, T, C), as other transformers have
            them, of which those before the places, as a class token, are left out.
        layer: What messages call it.
        size: Height and width of the image, whose shape a map has.

    Raises:
        MedvisionError: If it is no map.
    """
    if answer.ndim == 4:
        channels_last = _deviation(answer.shape[1:3], size) < _deviation(answer.shape[2:], size)
        return answer.permute(0, 3, 1, 2) if channels_last else answer
    if answer.ndim == 3:
        for prefix in range(min(PREFIX, answer.shape[1])):
            tokens = answer.shape[1] - prefix
            side = math.sqrt(size[0] * size[1] / tokens)
            height, width = round(size[0] / side), round(size[1] / side)
            if height * width == tokens:
                return answer[:, prefix:].mT.reshape(len(answer), -1, height, width)
    shape = "x".join(map(str, answer.shape[1:]))
    raise MedvisionError(f"layer {layer} answers {shape} for an image of {size[0]}x{size[1]}: no map; choose another")


def _deviation(shape: Sequence[int], size: Sequence[int]) -> float:
    """By how much the sides of a map are other than those of the image, made as small; 1 is of rounding."""
    scale = math.sqrt(shape[0] * shape[1] / (size[0] * size[1]))
    return max(abs(side - whole * scale) for side, whole in zip(shape, size, strict=True))


def from_0_to_1(maps: Tensor) -> Tensor:
    """Maps (N, h, w), each from its least value to its greatest."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-7)


def default_layers(model: nn.Module, image: Tensor, count: int = 4) -> list[str]:
    """The last outermost layer at each resolution, the last four: the stages of an encoder, or else of the network.

    Those on whose places the answer does not depend are left out, as what comes after the last attention where only a
    class token counts. A transformer of one resolution has the first norms of its last blocks.

    Args:
        model: The network.
        image: (N, C, H, W), of a size that it takes.
        count: How many.
    """
    inside = f"{model.encoder_at}." if isinstance(model, EncoderModel) else ""
    uses = Counter[str]()
    maps: list[tuple[str, Tensor]] = []  # in the order of use

    def note(name: str, _: nn.Module, __: object, answer: object) -> None:
        uses[name] += 1
        # some transformers fold their tokens into the batch
        if isinstance(answer, Tensor) and answer.ndim in (3, 4) and len(answer) == len(image) and answer.requires_grad:
            with contextlib.suppress(MedvisionError):
                shape = as_maps(answer, name, size=padded).shape[2:]
                if min(shape) > 1 and _deviation(shape, padded) <= 1:
                    maps.append((name, answer))

    with contextlib.ExitStack() as hooks:
        for name in layer_names(model):
            if name.startswith(inside):
                hooks.callback(model.get_submodule(name).register_forward_hook(partial(note, name)).remove)
        with torch.inference_mode(False), torch.enable_grad(), padded_size(model, image) as padded, evaluating(model):
            logits = model.forward(image.clone().requires_grad_())
            answers = [answer for _, answer in maps]
            gradients = torch.autograd.grad(logits.sum(), answers, allow_unused=True) if answers else ()
    found = [
        (name, as_maps(gradient, name, size=padded))
        for (name, _), gradient in zip(maps, gradients, strict=True)
        if gradient is not None and uses[name] == 1
    ]
    found = [(name, gradient) for name, gradient in found if gradient.any()] or found  # all of one that is dead
    last: dict[tuple[int, ...], str] = {}
    for name, gradient in found:
        resolution = (*gradient.shape[2:],)
        outer = resolution not in last or _nesting(name) <= _nesting(last[resolution])
        if outer and (inside or gradient.shape[1] != logits.shape[1]):  # not the logits themselves
            last.pop(resolution, None)
            last[resolution] = name
    outermost = min(map(_nesting, last.values()), default=0)  # what lies deep, such as attention, is no stage
    last = {resolution: name for resolution, name in last.items() if _nesting(name) <= outermost + 1}
    if not last:
        raise MedvisionError(f"no layer of {type(model).__name__} answers maps; name some: layers=[...]")
    norms = [name for name, _ in found if name.endswith(".norm1")]
    return norms[-count:] if len(last) == 1 and norms else list(last.values())[-count:]


def _nesting(name: str) -> int:
    """In how many modules a layer lies, lists of them not counted."""
    return sum(not part.isdigit() for part in name.split("."))


def activations(model: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """What layers answer to images, which networks may pad at the bottom and at the right.

    Args:
        model: The network, in evaluation mode.
        image: (N, C, H, W), normalised.
        layers: Names in `layer_names`.

    Returns:
        For each name (N, ...), maps as (N, C, h, w); several answers by number.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, answer: Any) -> None:
        if isinstance(answer, Tensor):
            with contextlib.suppress(MedvisionError):
                answer = as_maps(answer, name, size=padded)
            found[name] = answer
        else:
            for number, part in enumerate(answer):
                add(f"{name}.{number}", part)

    with torch.inference_mode(), padded_size(model, image) as padded:
        for name, answer in feature_maps(model, image, layers).items():
            add(name, answer)
    return found


@contextlib.contextmanager
def padded_size(model: nn.Module, image: Tensor) -> Iterator[list[int]]:
    """Height and width of the image as the first convolution sees it: networks pad it at the bottom and at the right.

    They are those of the image itself until the network is called.
    """
    size, found = [*image.shape[-2:]], list[torch.Size]()

    def note(_: nn.Module, seen: tuple[Tensor, ...]) -> None:
        if not found:
            found.append(seen[0].shape)
            size[:] = map(max, size, seen[0].shape[-2:])  # less where pixels become channels before it

    with contextlib.ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                hooks.callback(layer.register_forward_pre_hook(note).remove)
        yield size


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
