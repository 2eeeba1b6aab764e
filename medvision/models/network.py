"""What the house asks of each of its networks, and the data sets that it cannot take, refused before training."""

import math

import timm
import torch
from torch import nn

from medvision.errors import MedvisionError
from medvision.models.weights import BUILD_ERRORS
from medvision.spec import DataSpec, Target

_ANSWERS = {"mask": "a mask of each class", "label": "a label of the image"}


class Network(nn.Module):
    """A network that knows what it answers and which images it takes.

    Attributes:
        target: what its logits are of: ``"mask"`` (N, K, H, W) or ``"label"`` (N, K).
        stride: by how much the sides of an image are divided at the deepest level.
        depth: the value of ``model.depth``, for networks that have this option.
        backbone: name of the encoder, for networks that take one by name.
    """

    target: Target = "mask"
    stride: int = 1
    depth: int | None = None
    backbone: str | None = None

    def check(self, spec: DataSpec) -> None:
        """Refuse a data set that this network cannot learn from.

        Args:
            spec: the facts of the data set.

        Raises:
            MedvisionError: its target is another, or its images are smaller than one pixel of the deepest level.
        """
        if spec.target != self.target:
            raise MedvisionError(
                f"{self.title} answers {_ANSWERS[self.target]}, but data={spec.name} has {spec.target}s: choose "
                f"{self.counterpart()}."
            )
        height, width = spec.image_size
        if min(height, width) >= self.stride:
            return
        possible = [f"data.image_size=[{max(height, self.stride)},{max(width, self.stride)}]"]
        if self.depth is not None and (depth := int(math.log2(min(height, width)))) > 0:
            possible.insert(0, f"model.depth={depth}")
        raise MedvisionError(
            f"{self.title} divides the sides of an image by {self.stride}, but those of data={spec.name} have "
            f"{height}x{width} pixels, less than one at the deepest level: choose {' or '.join(possible)}."
        )

    def _try(self, spec: DataSpec, made_for: int, other: str) -> None:
        """Answer one image: libraries do not say which networks are tied to one size.

        Args:
            spec: the facts of the data set.
            made_for: side of the images that the network was made for.
            other: override of a network that takes any size.

        Raises:
            MedvisionError: it fails.
        """
        mode = self.training
        try:
            with torch.inference_mode():
                self.eval()(torch.zeros(1, spec.in_channels, *spec.image_size))
        except BUILD_ERRORS as error:
            height, width = spec.image_size
            raise MedvisionError(
                f"{self.title} cannot take the images of data={spec.name}, {spec.in_channels}x{height}x{width} "
                f"({type(error).__name__}: {error}): choose data.image_size={made_for}, for which it was made, or "
                f"{other}, which takes any size."
            ) from error
        finally:
            self.train(mode)

    @property
    def title(self) -> str:
        """What messages call it."""
        return type(self).__name__ + (f" {self.backbone}" if self.backbone else "")

    def counterpart(self) -> str:
        """Overrides of the nearest network for the other target."""
        name = (self.backbone or "").removeprefix("tu-").replace("-", "_")
        return f"model=classifier model.name={name if timm.is_model(name) else 'resnet18'}"
