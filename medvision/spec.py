"""The facts of a data set that models, losses and metrics read; frozen and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from medvision.errors import MedvisionError

Kind = Literal["binary", "multilabel", "multiclass"]
Target = Literal["mask", "label"]


def as_size(size: int | Sequence[int], option: str = "data.image_size") -> tuple[int, int]:
    """Height and width in pixels from one number (square) or a pair `[h, w]`, as `option` gives it.

    Raises:
        MedvisionError: If it is neither, or not positive.
    """
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise MedvisionError(
            f"image size is {size!r}; expected a positive int or [height, width], e.g. {option}=[192,256]"
        )
    return pair[0], pair[1]


@dataclass(frozen=True)
class DataSpec:
    """What a data set is.

    Attributes:
        name: Its word on the command line.
        classes: Names of the classes, one per output channel; what is none of them has no name.
        kind: `binary` (one class) or `multilabel` (classes that may overlap), both with a sigmoid per channel, or
            `multiclass` (each image has exactly one of them), with a softmax.
        in_channels: Channels of an image as read: 3 (RGB) or 1 (grey).
        num_outputs: Channels of the logits, as the configs hand them to the models.
        mean: Mean of each channel that images are normalised by, in [0, 1]; None is that of the training split.
        std: Standard deviation of each channel, in [0, 1]; None is that of the training split.
        image_size: Height and width in pixels at which the network sees an image.
        target: Whether classes have a `mask` in each image or are a `label` of it.
        challenge: What of `metrics.OF_MASKS` or `OF_LABELS` scores results as its organisers do; None is nothing.
    """

    name: str
    classes: tuple[str, ...]
    kind: Kind
    in_channels: int
    num_outputs: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] = (256, 256)
    target: Target = "mask"
    challenge: str | None = None

    def __post_init__(self) -> None:
        """Accepts lists, as configs have them, and checks that the facts agree."""
        for field in ("classes", "mean", "std"):
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else tuple(value))
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))  # a config takes 0 for a number
        object.__setattr__(self, "image_size", as_size(self.image_size))
        if self.kind not in (kinds := get_args(Kind)):
            raise MedvisionError(f"data.spec.kind is {self.kind!r}; expected one of {', '.join(kinds)}")
        if self.target not in get_args(Target):
            raise MedvisionError(f"data.spec.target is {self.target!r}; expected 'mask' or 'label'")
        if self.kind == "multiclass" and (self.target == "mask" or len(self.classes) < 2):
            raise MedvisionError(
                f"a multiclass data set has labels of two classes or more; data.spec.target is {self.target!r}, "
                f"data.spec.classes is {list(self.classes)}; masks are binary or multilabel"
            )
        if self.kind == "binary" and len(self.classes) != 1:
            raise MedvisionError(f"a binary data set has one class, data.spec.classes has {list(self.classes)}")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise MedvisionError(f"data.spec.classes is {list(self.classes)}; expected names that differ")
        if self.num_outputs != len(self.classes):
            raise MedvisionError(
                f"data.spec.num_outputs is {self.num_outputs}, but data.spec.classes names "
                f"{len(self.classes)}: {list(self.classes)}; make them agree"
            )
        if self.in_channels not in (1, 3):
            raise MedvisionError(f"data.spec.in_channels is {self.in_channels}; expected 1 (grey) or 3 (RGB)")
        if (self.mean is None) != (self.std is None):
            raise MedvisionError("data.spec.mean and data.spec.std belong together; give both or neither")
        if self.mean is None or self.std is None:
            return
        if not len(self.mean) == len(self.std) == self.in_channels or min(self.std, default=0) <= 0:
            raise MedvisionError(
                f"data.spec.mean {self.mean} and data.spec.std {self.std} need {self.in_channels} numbers each, "
                "std above 0"
            )
