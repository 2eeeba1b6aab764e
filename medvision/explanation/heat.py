"""Where in an image a network finds what it answers: heat maps of layers from one forward and one backward pass."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from medvision.data.images import Pixels
from medvision.errors import MedvisionError
from medvision.explanation.full_grad import full_grad
from medvision.explanation.maps import as_maps, evaluating, from_0_to_1, padded_size
from medvision.figures import Tile, heated
from medvision.models import recording
from medvision.spec import DataSpec

DIMS = (2, 3)  # of a map's rows and columns


def _principal(values: Tensor) -> Tensor:
    """Projection of (N, C, h, w) to the first principal component over places; what is largest is positive."""
    places = values.flatten(2).transpose(1, 2)
    places = places - places.mean(1, keepdim=True)
    heat: Tensor = (places @ torch.linalg.svd(places, full_matrices=False).Vh[:, 0, :, None])[..., 0]
    heat = heat * heat.gather(1, heat.abs().argmax(1, keepdim=True)).sign()
    return heat.view(-1, *values.shape[2:])


def _grad_cam(a: Tensor, g: Tensor) -> Tensor:
    return (g.mean(DIMS, keepdim=True) * a).sum(1)


def _plus_plus(a: Tensor, g: Tensor) -> Tensor:
    alpha = g**2 / (2 * g**2 + a.sum(DIMS, keepdim=True) * g**3 + 1e-6)
    return ((g.clamp(min=0) * torch.where(g != 0, alpha, 0)).sum(DIMS, keepdim=True) * a).sum(1)


def _x_grad(a: Tensor, g: Tensor) -> Tensor:
    return ((g * a / (a.sum(DIMS, keepdim=True) + 1e-7)).sum(DIMS, keepdim=True) * a).sum(1)


def _random(a: Tensor, g: Tensor) -> Tensor:
    """By a weight for each channel that is drawn, the same for all images and each time: what any heat must excel."""
    weights = torch.rand(a.shape[1], generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (weights.to(a.device)[:, None, None] * a).sum(1)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": _grad_cam,  # arXiv:1610.02391
    "grad_cam_plus_plus": _plus_plus,  # arXiv:1710.11063
    "hires_cam": lambda a, g: (g * a).sum(1),  # arXiv:2011.08891
    "element_wise": lambda a, g: (g * a).clamp(min=0).sum(1),  # as hires_cam, without what speaks against the class
    "layer_cam": lambda a, g: (g.clamp(min=0) * a).sum(1),  # doi:10.1109/TIP.2021.3089943
    "x_grad_cam": _x_grad,  # arXiv:2008.02312
    "eigen_cam": lambda a, g: _principal(a),  # arXiv:2008.00299
    "eigen_grad_cam": lambda a, g: _principal(g * a),
    "seg_eigen_cam": lambda a, g: _principal(g.abs() * a),  # doi:10.3390/app15137562
    "random_cam": _random,
    "finer_cam": _grad_cam,  # arXiv:2501.11309, of `_finer`
    "shapley_cam": _grad_cam,  # arXiv:2501.06261, of `_of_second_order`
}
"""Heat (N, h, w) of what a layer answers and of its gradient, both (N, C, h, w)."""
SIMILAR = 3
"""Classes that `finer_cam` tells the one that is explained from."""
OF_LIBRARY = {"score_cam": "ScoreCAM", "ablation_cam": "AblationCAM", "kpca_cam": "KPCA_CAM", "fem": "FEM"}
"""Methods of pytorch_grad_cam that need a pass, or very many, for each layer."""
METHODS = [*RULES, "full_grad", *OF_LIBRARY]


@dataclass(frozen=True)
class Choice:
    """What is explained of one image: a class, or that it is not there; of masks in a part of the image.

    Attributes:
        index: Number of the class.
        name: What it is called.
        sign: 1, or -1 where its absence is explained.
        where: (H, W), how much of each place belongs to the part of the image, 0 to 1; None for labels.
    """

    index: int
    name: str
    sign: int = 1
    where: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Score of logits (K, ...): the logit, of masks its sum over the part."""
        score = self.sign * logits[self.index].float()
        return score if self.where is None else (score * self.where).sum()

    def probability(self, values: Tensor) -> float:
        """The probability in (K, ...), of masks its mean over the part."""
        value = values[self.index] if self.where is None else values[self.index][self.where > 0].mean()
        return float(value if self.sign > 0 else 1 - value)


@dataclass(frozen=True)
class Target:
    """Chooses what is explained.

    Attributes:
        spec: The facts of the data set.
        activate: Probabilities of logits.
        word: `predicted`, of labels the most probable class of those decided for; `positive`, where there is one class;
            or the name of a class.
        threshold: Of each class; none where the most probable is decided for.
        point: Row and column of a pixel, as shares of height and width; None is the whole region of the class.
    """

    spec: DataSpec
    activate: Callable[[Tensor], Tensor]
    word: str = "predicted"
    threshold: Sequence[float] = ()
    point: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be chosen."""
        classes, single = self.spec.classes, self.spec.kind == "binary"
        if self.word not in ("predicted", *classes) and not (self.word == "positive" and single):
            known = ["predicted", *(["positive"] if single else []), *classes]
            raise MedvisionError(f"target={self.word}: expected one of {', '.join(known)}")
        if self.point is not None and self.spec.target == "label":
            raise MedvisionError(f"a point is of masks; {self.spec.name} has labels: leave it out")
        if self.point is not None and not all(0 <= share < 1 for share in self.point):
            raise MedvisionError(f"the point at {list(self.point)} of height and width lies outside of the image")

    def choose(self, logits: Tensor) -> list[Choice]:
        """One choice for each image of logits (N, K, ...)."""
        return [self._of_mask(p) if p.ndim > 1 else self._of_label(p) for p in self.activate(logits.detach())]

    def _of_label(self, probability: Tensor) -> Choice:
        classes = self.spec.classes
        if self.word != "predicted":
            name = classes[0] if self.word == "positive" else self.word
            return Choice(classes.index(name), name)
        if self.spec.kind == "binary" and float(probability[0]) < (self.threshold or [0.5])[0]:
            return Choice(0, f"not {classes[0]}", -1)
        there = probability >= probability.new_tensor(self.threshold or [0] * len(classes))
        index = int((torch.where(there, probability, -1) if there.any() else probability).argmax())
        return Choice(index, classes[index] if there.any() else f"{classes[index]}, not decided for")

    def _of_mask(self, probability: Tensor) -> Choice:
        """The region that is predicted; where there is none, the whole image."""
        classes, where = self.spec.classes, torch.zeros_like(probability[0])
        threshold = probability.new_tensor(self.threshold or [0.5] * len(classes))
        masks = probability >= threshold[:, None, None]
        if self.word in classes:
            index = classes.index(self.word)
        elif self.point is not None:
            index = int(probability[(slice(None), *self._pixel(where))].argmax())
        else:  # the largest
            index = int((masks.sum((1, 2)) if masks.any() else probability.sum((1, 2))).argmax())
        if self.point is not None:
            where[self._pixel(where)] = 1
            return Choice(index, f"{classes[index]} at a point", where=where)
        if not masks[index].any():
            return Choice(index, f"{classes[index]}, nowhere predicted", where=where + 1)
        return Choice(index, classes[index], where=masks[index].to(where.dtype))

    def _pixel(self, where: Tensor) -> tuple[int, int]:
        assert self.point is not None
        return int(self.point[0] * where.shape[0]), int(self.point[1] * where.shape[1])


@dataclass(frozen=True)
class Explanation:
    """Heat maps of N images.

    Attributes:
        choices: What is explained of each image.
        probability: Of it; NaN where the weights are broken.
        heat: For each method (N, L, H, W), a map for each of `maps_of`, in [0, 1] from the least to the greatest heat;
            0 all over where there is none, as of NaN.
    """

    choices: list[Choice]
    probability: list[float]
    heat: dict[str, Tensor]


def maps_of(method: str, layers: Sequence[str]) -> list[str]:
    """What the maps of a method are of: each layer, or, of `full_grad`, the network as a whole."""
    return ["network"] if method == "full_grad" else [*layers]


def explain(
    model: nn.Module,
    image: Tensor,
    layers: Sequence[str],
    methods: Sequence[str],
    target: Target,
    choices: Sequence[Choice] | None = None,
) -> Explanation:
    """Explains what a network answers.

    All layers, and all methods of `RULES`, share one forward and one backward pass, which stops at the first of the
    layers and computes no gradient of a weight; `finer_cam` has a backward pass of its own, `shapley_cam` one for each
    layer, `full_grad` a pass of each kind through the whole network. Frozen networks are explained like others. Modes,
    gradients and weights are left as they are.

    Args:
        model: The network, in float32.
        image: (N, C, H, W), normalised.
        layers: Names in `layer_names`.
        methods: Of `METHODS`.
        target: Chooses what is explained.
        choices: What is explained instead, one for each image.

    Raises:
        MedvisionError: If there is no such method or layer, a layer has no map that the answer depends on, or the
            method is not for such classes.
    """
    require_methods(methods)
    if "finer_cam" in methods and (target.spec.target, target.spec.kind) != ("label", "multiclass"):
        raise MedvisionError(f"finer_cam tells exclusive labels apart, which {target.spec.name} has not; leave it out")
    with evaluating(model):
        with torch.inference_mode(False), torch.enable_grad():
            seen = image.clone().requires_grad_()  # a frozen network has gradients too
            # the attention of two gradients; fused ones have but one
            attention = sdpa_kernel(SDPBackend.MATH) if "shapley_cam" in methods else contextlib.nullcontext()
            with attention, recording(model, layers) as answers, padded_size(model, image) as padded:
                logits = model.forward(seen)
            choices = list(choices or target.choose(logits))
            raw = {name: _single(name, answer, len(image)) for name, answer in answers.items()}
            gradient, others = _gradients(methods, raw, logits, choices)
            full = [full_grad(model, image, partial(_score, choices))] if "full_grad" in methods else []
        with torch.no_grad():
            size = image.shape[-2:]
            maps = partial(_maps_of_layers, raw, size=padded)
            a, g, of_others = maps(raw.values()), maps(gradient), {name: maps(of) for name, of in others.items()}
            heat: dict[str, Tensor] = {}
            for method in methods:
                if method in RULES:
                    pairs = zip(a, of_others.get(method, g), strict=True)
                    of_layers = [scale(RULES[method](*pair), padded, size) for pair in pairs]
                elif method == "full_grad":
                    of_layers = full
                else:
                    whole = _pad(image, padded, "replicate")
                    found = [_by_library(method, model, whole, name, answer, choices) for name, answer in raw.items()]
                    of_layers = [from_0_to_1(one[:, : size[0], : size[1]]) for one in found]
                heat[method] = torch.stack(of_layers, 1)
            values = target.activate(logits.detach())
    probability = [choice.probability(value) for choice, value in zip(choices, values, strict=True)]
    return Explanation(choices, probability, heat)


def _gradients(
    methods: Sequence[str], answers: Mapping[str, Tensor], logits: Tensor, choices: Sequence[Choice]
) -> tuple[Sequence[Tensor], dict[str, Sequence[Tensor]]]:
    """The gradient of the score for what each layer answers, and those of the methods that have another."""
    values, others = [*answers.values()], dict[str, Sequence[Tensor]]()
    finer, second = "finer_cam" in methods, "shapley_cam" in methods
    score = _score(choices, logits)
    found = torch.autograd.grad(score, values, allow_unused=True, retain_graph=finer or second, create_graph=second)
    if silent := [name for name, gradient in zip(answers, found, strict=True) if gradient is None]:
        raise MedvisionError(f"the answer does not depend on what {silent} answer; choose other layers")
    if finer:
        others["finer_cam"] = torch.autograd.grad(_finer(logits, choices), values, retain_graph=True)
    if second:
        others["shapley_cam"] = [_of_second_order(*pair) for pair in zip(values, found, strict=True)]
    return found, others


def _score(choices: Sequence[Choice], logits: Tensor) -> Tensor:
    return torch.stack([choice(one) for choice, one in zip(choices, logits, strict=True)]).sum()


def _maps_of_layers(layers: Iterable[str], values: Iterable[Tensor], size: Sequence[int]) -> list[Tensor]:
    """What layers answer, or its gradient, as numbers (N, C, h, w)."""
    return [
        as_maps(one.detach().float(), name, size=size).nan_to_num(0, 0, 0)
        for name, one in zip(layers, values, strict=True)
    ]


def _finer(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """How far classes are before those of the nearest logits (N, K), weighed by the probabilities of these."""
    score = logits.new_zeros(())
    for of, probability, choice in zip(logits, logits.softmax(1), choices, strict=True):
        near = (of.detach() - of[choice.index].detach()).abs()
        near[choice.index] = -1
        others = near.argsort(stable=True)[1 : 1 + SIMILAR]
        weights = probability[others]
        score = score + (weights * (of[choice.index] - of[others])).sum() / (weights.sum() + 1e-9)
    return score


def _of_second_order(answer: Tensor, gradient: Tensor) -> Tensor:
    """The gradient less half the product of the layer's own Hessian with what it answers."""
    if not gradient.requires_grad:
        return gradient
    (bent,) = torch.autograd.grad(gradient, answer, answer.detach(), retain_graph=True, allow_unused=True)
    return gradient if bent is None else gradient - bent / 2


def require_methods(methods: Sequence[str], option: str = "method", *also: str) -> None:
    """Refuses what is not among `METHODS`, given by an option, nor among what it may be also."""
    if unknown := [method for method in methods if method not in (*METHODS, *also)]:
        raise MedvisionError(f"{option}={unknown[0]}: expected some of {', '.join([*METHODS, *also])}")


def _pad(values: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Pads (..., H, W) at the bottom and at the right."""
    height, width = values.shape[-2:]
    return F.pad(values, (0, size[1] - width, 0, size[0] - height), mode=mode)


def scale(heat: Tensor, whole: Sequence[int], size: Sequence[int]) -> Tensor:
    """Heat (N, h, w) without what is negative, resized to (N, *whole), of which the top left *size is kept; 0 to 1."""
    heat = from_0_to_1(heat.clamp(min=0))
    heat = F.interpolate(heat[:, None], tuple(whole), mode="bilinear", align_corners=False)[:, 0]
    return from_0_to_1(heat[:, : size[0], : size[1]])


def _single(name: str, answer: Any, images: int) -> Tensor:
    """The one tensor that a layer answers."""
    if isinstance(answer, Tensor) and len(answer) == images:
        return answer
    what = "its tokens folded into the batch" if isinstance(answer, Tensor) else f"{len(answer)} tensors"
    raise MedvisionError(f"layer {name} answers {what}, or is used so often; choose another, such as one inside of it")


def _by_library(
    method: str, model: nn.Module, image: Tensor, layer: str, answer: Tensor, choices: Sequence[Choice]
) -> Tensor:
    import pytorch_grad_cam

    parts = [None if c.where is None else _pad(c.where, image.shape[-2:], "constant") for c in choices]
    targets = [dataclasses.replace(choice, where=where) for choice, where in zip(choices, parts, strict=True)]
    maps = partial(as_maps, layer=layer, size=image.shape[-2:])
    options: dict[str, Any] = {}
    if method == "ablation_cam" and maps(answer) is not answer:
        options["ablation_layer"] = pytorch_grad_cam.AblationLayerVit()  # it looks for channels at the end

    def kept(answer: Tensor) -> Tensor:
        return maps(answer).clone()  # which later layers may change in place

    module = model.get_submodule(layer)
    cam = getattr(pytorch_grad_cam, OF_LIBRARY[method])(model, [module], reshape_transform=kept, **options)
    try:  # its own `with` swallows an IndexError
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return torch.from_numpy(cam(image, targets)).to(image.device)
    finally:
        cam.activations_and_grads.release()
        model.set_submodule(layer, module)  # ablation puts its own there, and leaves it after an error


def row(image: Pixels, heat: Mapping[str, NDArray[np.float32]], caption: str, masks: NDArray[np.bool_]) -> list[Tile]:
    """A row of a sheet: the image, and the heat of each layer over it; where there is none, the caption says so.

    Args:
        image: uint8 (H, W, C).
        heat: For each layer (h, w), in [0, 1].
        caption: Of the image.
        masks: (K, H, W), painted over the image; K may be 0.
    """
    none = np.zeros((0, *image.shape[:2]), bool)
    said = {name: _end(name) if one.any() else f"{_end(name, 20)}: no heat" for name, one in heat.items()}
    return [Tile(caption, image, masks), *(Tile(said[name], heated(image, one), none) for name, one in heat.items())]


def _end(name: str, length: int = 30) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"
