"""Test-time augmentation: the same image in several views, and the mean of what a model says of each."""

from collections.abc import Callable, Iterable
from itertools import groupby, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medvision.errors import MedvisionError

SCALES = (0.75, 1.0, 1.25)


class View(NamedTuple):
    """One of the eight symmetries of the square, at a scale: transposed, then turned over.

    Attributes:
        transposed: Whether rows become columns.
        dims: The sides along which it is turned over, of -2 (up and down) and -1 (left and right).
        scale: Side of the view over that of the image.
    """

    transposed: bool = False
    dims: tuple[int, ...] = ()
    scale: float = 1.0

    def of(self, image: Tensor) -> Tensor:
        """The view of images (N, C, H, W): exact but for a scale other than 1, which is bilinear."""
        if self.scale != 1:
            size = [max(1, round(side * self.scale)) for side in image.shape[-2:]]
            image = F.interpolate(image, size=size, mode="bilinear", antialias=self.scale < 1)
        return (image.mT if self.transposed else image).flip(self.dims)

    def undo(self, seen: Tensor, size: torch.Size) -> Tensor:
        """Maps (N, K, h, w) of the view as maps of the image, (N, K, *size)."""
        seen = seen.flip(self.dims)
        seen = seen.mT if self.transposed else seen
        return seen if seen.shape[-2:] == size else F.interpolate(seen, size=tuple(size), mode="bilinear")


FLIPS = tuple(View(dims=dims) for dims in ((), (-1,), (-2,), (-2, -1)))
D4 = (*FLIPS, *(view._replace(transposed=True) for view in FLIPS))
VIEWS: dict[str, tuple[View, ...]] = {
    "none": FLIPS[:1],
    "flips": FLIPS,
    "d4": D4,
    "d4_scales": tuple(view._replace(scale=scale) for scale, view in product(SCALES, D4)),
}
"""What can be asked for: the image alone, its four flips, the eight symmetries, and those at three scales."""


class TestTimeAugmentation:
    """The mean over views of what a model answers, of masks or of labels.

    Args:
        views: A key of `VIEWS`.
        mean_of: `probability`, or `logit`: the mean of the logits, made a probability.
        batch: The greatest number of images that a model is given at once; views of one shape are put together.

    Raises:
        MedvisionError: If there are no such views or means.
    """

    __test__ = False  # no test of pytest

    def __init__(self, views: str = "d4", mean_of: str = "probability", batch: int = 32) -> None:
        if views not in VIEWS:
            raise MedvisionError(f"tta={views}: expected one of {', '.join(VIEWS)}")
        if mean_of not in ("probability", "logit"):
            raise MedvisionError(f"tta_mean={mean_of}: expected probability or logit")
        self.name, self.views, self.mean_of, self.batch = views, VIEWS[views], mean_of, batch

    def __call__(
        self, model: Callable[[Tensor], Tensor], activate: Callable[[Tensor], Tensor], image: Tensor
    ) -> Tensor:
        """Probabilities of normalised images.

        Args:
            model: Logits (N, K, H, W) or (N, K) of images (N, C, H, W).
            activate: Probabilities of logits.
            image: (N, C, H, W).

        Returns:
            float32 (N, K, H, W) or (N, K).
        """
        answers = [
            view.undo(seen, image.shape[-2:]) if seen.ndim == 4 else seen for view, seen in self._seen(model, image)
        ]
        if self.mean_of == "logit":
            return activate(torch.stack([answer.float() for answer in answers]).mean(0))
        return torch.stack([activate(answer) for answer in answers]).mean(0)

    def _seen(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Iterable[tuple[View, Tensor]]:
        """Each view with the model's answer to it."""
        square = image.shape[-1] == image.shape[-2]
        together = max(1, self.batch // len(image))

        def shape(view: View) -> tuple[float, bool]:
            return view.scale, view.transposed and not square

        for _, same in groupby(self.views, key=shape):
            views = list(same)
            for start in range(0, len(views), together):
                some = views[start : start + together]
                answers = model(torch.cat([view.of(image) for view in some])).chunk(len(some))
                yield from zip(some, answers, strict=True)
