"""Feature maps of any layers by name, in one forward pass."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from medvision.errors import MedvisionError

Answer = Tensor | list["Answer"]


def layer_names(model: nn.Module) -> list[str]:
    """Names of all layers of a network, as `feature_maps` takes them: those that can be called, outer ones first."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return [name for name, layer in model.named_modules() if name and not isinstance(layer, containers)]


def feature_maps(model: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, Answer]:
    """What layers answer in one forward pass.

    Modes and gradients are the caller's: call it after ``model.eval()``, and in ``torch.inference_mode()`` where no
    gradient is wanted. Answers are copies, so that no later layer changes them in place, and keep their gradient.

    Args:
        model: the network.
        image: (N, C, H, W), normalised.
        layers: names in `layer_names`.

    Returns:
        For each name its answer: a tensor, or a list where the layer answers several, as encoders do. The answers of
        a layer that is used more than once are a list in the order of use.

    Raises:
        MedvisionError: a name is unknown, the layer is not used in this pass, or answers something else.
    """
    with recording(model, layers) as answers:
        model(image)
    return answers


@contextmanager
def recording(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Answer]]:
    """Have the passes within the block keep what layers answer.

    The rest of the network goes on with what is kept: the gradient of an output by a kept answer is that by the layer.

    Args:
        model: the network, to be called in the block.
        layers: names in `layer_names`.

    Yields:
        What `feature_maps` returns, filled as the block ends.

    Raises:
        MedvisionError: as `feature_maps`.
    """
    known = layer_names(model)
    for name in layers:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "layer_names(model) lists them."
            raise MedvisionError(f"{type(model).__name__} has no layer {name!r}: {hint}")
    answers: dict[str, list[Answer]] = {name: [] for name in layers}
    filled: dict[str, Answer] = {}

    def keep(name: str, layer: nn.Module, _: object, answer: object) -> object:
        kept = _copy(answer, name, layer)
        answers[name].append(kept)
        return _as(type(answer), kept)

    with ExitStack() as hooks:
        for name in answers:
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
        yield filled
    if unused := [name for name, found in answers.items() if not found]:
        raise MedvisionError(
            f"Layers {unused} of {type(model).__name__} are not used in this pass: choose others, or call the network "
            "in the mode in which it uses them."
        )
    filled |= {name: found[0] if len(found) == 1 else found for name, found in answers.items()}


def _copy(answer: object, name: str, layer: nn.Module) -> Answer:
    if isinstance(answer, Tensor):
        return answer.clone()
    if isinstance(answer, list | tuple):
        return [_copy(part, name, layer) for part in answer]
    raise MedvisionError(
        f"Layer {name!r} ({type(layer).__name__}) answers {type(answer).__name__}, expected tensors: choose a layer "
        "inside of it."
    )


def _as(kind: type, kept: Answer) -> object:
    """A copy of what is kept, for later layers, which may change it in place; a tuple where the layer answers one."""
    if isinstance(kept, Tensor):
        return kept.clone()
    return (tuple if issubclass(kind, tuple) else list)(_as(list, part) for part in kept)
