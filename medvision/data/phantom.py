"""Phantoms: images drawn from a seed in the layout of a data set, so that its own reader reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medvision.errors import MedvisionError
from medvision.files import locked, writable_folder
from medvision.spec import DataSpec

PREFIX = "phantom"  # of the names of data sets that are drawn


@dataclass(frozen=True)
class Drawing:
    """What draws in the layout of a data set.

    Attributes:
        version: Raised when the same seed draws other pictures.
        write: `write(folder, seed, **numbers)` writes what there would be to download.
        divide: About so many images in the numbers that `write` takes.
    """

    version: int
    write: Callable[..., None]
    divide: Callable[[int], Mapping[str, int]]

    def numbers(self, images: int | Mapping[str, int]) -> dict[str, int]:
        """How much is drawn.

        Raises:
            MedvisionError: If a number is not one of those that `write` takes.
        """
        numbers = dict(images if isinstance(images, Mapping) else self.divide(images))
        expected = [*self.divide(1)]
        if numbers.keys() != set(expected) or not all(isinstance(n, int) and n >= 0 for n in numbers.values()):
            raise MedvisionError(f"data.images is {images}; expected a number, or one of each of {', '.join(expected)}")
        return numbers


class Phantoms:
    """What is drawn once into a folder.

    Args:
        spec: The facts of the data set.
        drawing: What draws; None where nothing does.
        images: How many, altogether or in the words of the drawing.
        seed: Of the drawing.

    Raises:
        MedvisionError: If there is no drawing or no number, or the spec has the name or the challenge of real images.
    """

    def __init__(self, spec: DataSpec, drawing: Drawing | None, images: int | Mapping[str, int] | None, seed: int):
        real = spec.name.removeprefix(f"{PREFIX}_")
        if drawing is None:
            raise MedvisionError(f"data.phantom=true: nothing draws in the layout of {real}; leave it out")
        if images is None:
            raise MedvisionError("data.phantom=true: how many images? data.images=<number>")
        if not spec.name.startswith(PREFIX):
            raise MedvisionError(f"phantoms are no images of {spec.name}: expected data.spec.name={PREFIX}_{spec.name}")
        if spec.challenge is not None:
            raise MedvisionError(f"data.spec.challenge={spec.challenge}: no challenge scores phantoms; leave it out")
        self.drawing, self.numbers, self.seed = drawing, drawing.numbers(images), seed

    @property
    def folder(self) -> str:
        """The name of the folder, which tells seed, numbers and version."""
        counts = "-".join(f"{key}{number}" for key, number in sorted(self.numbers.items()))
        return f"v{self.drawing.version}-seed{self.seed}-{counts}"

    def draw(self, root: Path) -> None:
        """Draws what is not there yet."""
        writable_folder(root, "MEDVISION_CACHE")
        with locked(root / ".lock"):
            done = root / "complete"
            if not done.exists():
                self.drawing.write(root, self.seed, **self.numbers)
                done.touch()


def thirds(*words: str) -> Callable[[int], dict[str, int]]:
    """Divides a number of images: a third for each word but the first, which gets the rest."""

    def divide(images: int) -> dict[str, int]:
        part = images // 3
        return {words[0]: images - part * (len(words) - 1), **dict.fromkeys(words[1:], part)}

    return divide
