"""What trained models answer to images of any size, and why: one model, or the mean of several."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor

from medvision.data.images import Normalise, Pixels, resize_image, to_channels
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.explanation import Choice, Explanation, Target, explain, require_methods
from medvision.explanation.maps import default_layers
from medvision.models import Network
from medvision.tasks import ClassificationTask, SegmentationTask, require_numbers, resize_probability
from medvision.tta import TestTimeAugmentation
from medvision.windows import SlidingWindow


@dataclass(frozen=True)
class Trained:
    """A trained task with all that its answers depend on; `Run.predicting` makes one.

    Attributes:
        name: What messages call it.
        task: With its weights.
        mean: Of each channel over the training split, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        device: Where it answers.
        precision: In which arithmetic.
        decision: Whose temperature its probabilities have.
    """

    name: str
    task: SegmentationTask | ClassificationTask
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot be changed
    precision: Precision = field(default_factory=Precision)
    decision: Decision = Decision(())  # noqa: RUF009  # it cannot be changed

    def see(self, image: Pixels, size: tuple[int, int] | None) -> Tensor:
        """What the network is given of an image uint8 (H, W, 1 or 3): (C, *size), normalised; None keeps its size."""
        seen = to_channels(image, self.task.spec.in_channels)
        seen = seen if size is None else resize_image(seen, size)
        return torch.from_numpy(Normalise(self.mean, self.std)(seen)).to(self.device)


class Predictor:
    """Brings an image to what models saw in training, and their answer back to the image's own size.

    Args:
        models: One, or several with the same classes, whose probabilities are averaged; moved to their devices.
        tta: Views of an image, whose answers are averaged: a key of `medvision.tta.VIEWS`; None: those of each task.
        window: Sees an image part by part at its own resolution; None: as a whole, resized to the network's size.

    Attributes:
        target: `mask` or `label`.
        classes: The K names.
        exclusive: Whether each image has exactly one of them.
        channels: Of the images to be read: 3 if any model sees colours, else 1.
        tta: The views, of models that differ in them one name each.

    Raises:
        MedvisionError: If the models do not agree, or cannot be asked so.
    """

    def __init__(self, models: Sequence[Trained], tta: str | None = None, window: SlidingWindow | None = None) -> None:
        self.models, self.window = models, window
        self.views = [model.task.tta if tta is None else TestTimeAugmentation(tta) for model in models]
        names = [views.name for views in self.views]
        self.tta = names[0] if len({*names}) == 1 else ", ".join(names)
        spec = models[0].task.spec
        for other in models[1:]:
            for fact in ("target", "kind", "classes"):
                one, another = getattr(spec, fact), getattr(other.task.spec, fact)
                if one != another:
                    raise MedvisionError(
                        f"the mean of two models that differ in {fact} has no sense: {models[0].name} has {one}, "
                        f"{other.name} has {another}; leave one of them out"
                    )
        self.target, self.classes, self.exclusive = spec.target, spec.classes, spec.kind == "multiclass"
        self.channels = max(model.task.spec.in_channels for model in models)
        for model in models:
            if window is not None:
                _check_window(model, window.size)
            model.precision.convert_module(model.task.to(model.device)).eval()

    def __call__(self, image: Pixels, name: str = "the image") -> NDArray[np.float32]:
        """Probabilities of an image, of each model at its temperature.

        Args:
            image: uint8 (H, W, 1 or 3), RGB or grey, as `read_image` reads it.
            name: What messages call it.

        Returns:
            float32 (K, H, W) for masks, (K,) for labels.

        Raises:
            MedvisionError: If a model answers NaN.
        """
        answers = (
            self._answer(model, views, image, name) for model, views in zip(self.models, self.views, strict=True)
        )
        total = next(answers)
        for answer in answers:
            total += answer
        return total / np.float32(len(self.models))

    def _answer(self, model: Trained, views: TestTimeAugmentation, image: Pixels, name: str) -> NDArray[np.float32]:
        task = model.task
        batch = model.see(image, task.spec.image_size if self.window is None else None)[None]

        def probability(images: Tensor) -> Tensor:
            return views(task, task.activate, images)

        with torch.inference_mode(), model.precision.forward_context():
            batch = model.precision.convert_input(batch)
            answer = (probability(batch) if self.window is None else self.window(probability, batch))[0]
            require_numbers(answer, name)
            full = resize_probability(answer, image.shape[:2]) if self.target == "mask" else answer
            return np.array(model.decision.calibrated(full).cpu())


class Explainer:
    """Explains what a trained network answers to an image as a whole; in float32, whatever it was trained in.

    Args:
        model: The trained network; moved to its device.
        layers: Those that are explained, named as in `layer_names`; or a number: so many of `default_layers`.

    Attributes:
        network: The network alone.

    Raises:
        MedvisionError: If it has no layers to be chosen by default.
    """

    def __init__(self, model: Trained, layers: Sequence[str] | int = 4) -> None:
        self.model, self.spec = model, model.task.spec
        network = model.task.to(model.device).eval().model
        single = all(weight.dtype == torch.float32 for weight in network.parameters())
        self.network = network if single else copy.deepcopy(network).float()
        if isinstance(layers, int):
            shape, draw = (1, self.spec.in_channels, *self.spec.image_size), torch.Generator().manual_seed(0)
            layers = default_layers(self.network, torch.randn(shape, generator=draw).to(model.device), layers)
        self.layers = [*dict.fromkeys(layers)]

    def see(self, image: Pixels) -> Tensor:
        """What the network is given of an image uint8 (H, W, 1 or 3): (1, C, h, w), normalised."""
        return self.model.see(image, self.spec.image_size)[None]

    def probability(self, logits: Tensor) -> Tensor:
        """Of logits (N, K, ...), at the temperature of the run."""
        return self.model.decision.calibrated(self.model.task.activate(logits), 1)

    def target(self, word: str = "predicted", point: tuple[float, float] | None = None) -> Target:
        """What is chosen with the run's own threshold; see `Target`."""
        return Target(self.spec, self.probability, word, self.model.decision.threshold, point)

    def __call__(
        self,
        image: Pixels,
        methods: Sequence[str],
        target: Target,
        choice: Choice | None = None,
        name: str = "the image",
    ) -> Explanation:
        """Explains an image; see `explain`.

        Args:
            image: uint8 (H, W, 1 or 3), RGB or grey.
            methods: Of `METHODS`.
            target: Chooses what is explained.
            choice: What is explained instead.
            name: What messages call it.

        Raises:
            MedvisionError: If it cannot be explained so, or the network answers NaN.
        """
        chosen = None if choice is None else [self._at_network_size(choice)]
        found = explain(self.network, self.see(image), self.layers, methods, target, chosen)
        require_numbers(torch.tensor(found.probability), name)
        return found

    def _at_network_size(self, choice: Choice) -> Choice:
        if choice.where is None:
            return choice
        where = F.interpolate(choice.where[None, None].to(self.model.device), self.spec.image_size, mode="area")[0, 0]
        return dataclasses.replace(choice, where=where)


class Heat:
    """Where models find what they decide together: the mean of the heat that each has for it in its last layer.

    It is of the image as a whole and as it is, whatever views of it the probabilities are a mean of.

    Args:
        models: One, or several with the same classes.
        method: One of `METHODS`.
        threshold: Of each class; none where the most probable is decided for.

    Raises:
        MedvisionError: If there is no such method, or a model has no layer that answers maps.
    """

    def __init__(self, models: Sequence[Trained], method: str, threshold: Sequence[float]) -> None:
        require_methods([method], "heat")
        self.explainers, self.method = [Explainer(model, 1) for model in models], method
        self.target = Target(models[0].task.spec, lambda probability: probability, threshold=threshold)

    def __call__(self, image: Pixels, probability: NDArray[np.float32], name: str = "the image") -> NDArray[np.float32]:
        """Heat of the predicted class, of masks of the largest predicted region.

        Args:
            image: uint8 (H, W, 1 or 3).
            probability: Of the models together, (K, H, W) for masks, (K,) for labels.
            name: What messages call it.

        Returns:
            float32 (H, W), in [0, 1].
        """
        [choice] = self.target.choose(torch.from_numpy(probability)[None])
        found = [explainer(image, [self.method], explainer.target(), choice, name) for explainer in self.explainers]
        maps = [cv2.resize(one.heat[self.method][0, -1].cpu().numpy(), image.shape[1::-1]) for one in found]
        mean: NDArray[np.float32] = np.mean(maps, 0, dtype=np.float32)
        return mean


def _check_window(model: Trained, size: tuple[int, int]) -> None:
    """Refuses windows that a model cannot answer."""
    spec = model.task.spec
    shown = f"window=[{size[0]},{size[1]}]"
    if spec.target == "label":
        raise MedvisionError(
            f"{shown} is for masks, which are put together window by window, but {model.name} answers labels of "
            "whole images; leave it out"
        )
    if isinstance(model.task.model, Network):
        try:
            model.task.model.check(dataclasses.replace(spec, image_size=size))
        except MedvisionError as error:
            raise MedvisionError(
                f"{shown} does not fit {model.name}, for which it takes the place of {error}"
            ) from None
