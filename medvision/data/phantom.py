"""Phantom data: drawn from a seed, written in the layout of an official data set, read by its reader."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from medvision.data.base import ImageDataModule, Splits
from medvision.data.cvc_clinicdb import CVCClinicDB
from medvision.data.drawing import attributes, insects, lesions, melanoma, nuclei, polyps
from medvision.data.dsb2018 import DSB2018
from medvision.data.hymenoptera import Hymenoptera
from medvision.data.isic2016 import ISIC2016
from medvision.data.isic2017 import ISIC2017
from medvision.data.isic2018 import ISIC2018Attributes
from medvision.files import locked, writable_folder
from medvision.spec import DataSpec


class Drawn(ImageDataModule):
    """What is drawn once into the cache folder and needs no download; stands before a reader among the bases.

    Args:
        spec: The facts of the data set.
        root: Folder below which it is drawn, one folder for each seed and number of images.
        cache: Folder for what is derived.
        images: Number of images to draw, by the words of the drawing.
        draw_seed: Seed of the drawing; the seed of a run does not change the data.
        **options: As for every data set.
    """

    version: ClassVar[int]
    """Raised when the same seed draws other pictures."""

    def __init__(
        self,
        spec: DataSpec,
        root: Path | str,
        cache: Path | str,
        images: Mapping[str, int],
        draw_seed: int = 0,
        **options: Any,
    ) -> None:
        counts = "-".join(f"{key}{number}" for key, number in sorted(images.items()))
        super().__init__(spec, Path(root) / f"v{self.version}-seed{draw_seed}-{counts}", cache, **options)
        self.images, self.draw_seed = images, draw_seed

    @abstractmethod
    def draw(self) -> None:
        """Writes the archives to the root."""

    def index(self) -> Splits:
        """Draws what is not there yet, then reads it as the official data set."""
        writable_folder(self.root, "MEDVISION_CACHE")
        with locked(self.root / ".lock"):
            done = self.root / "complete"
            if not done.exists():
                self.draw()
                done.touch()
        return super().index()  # type: ignore[safe-super]  # that of the reader behind this class

    def expect(self, what: str, official: int, found: int) -> None:
        """Any number of images is right."""


class Phantom(Drawn, ISIC2017):
    """Lesions in dermoscopic images, in the ISIC 2017 layout."""

    version = lesions.VERSION

    def draw(self) -> None:
        """Writes the archives to the root."""
        lesions.write_isic2017(self.root, self.draw_seed, self.images)


class PhantomNuclei(Drawn, DSB2018):
    """Nuclei in several kinds of microscopy, in the layout of the Data Science Bowl 2018."""

    version = nuclei.VERSION

    def draw(self) -> None:
        """Writes the archive to the root."""
        nuclei.write_dsb2018(self.root, self.draw_seed, **self.images)


class PhantomPolyps(Drawn, CVCClinicDB):
    """Polyps in sequences of similar frames, in the layout of CVC-ClinicDB."""

    version = polyps.VERSION

    def draw(self) -> None:
        """Writes the archive to the root."""
        polyps.write_cvc_clinicdb(self.root, self.draw_seed, **self.images)


class PhantomAttributes(Drawn, ISIC2018Attributes):
    """Lesions with five attributes as rare as the real ones, in the layout of ISIC 2018 Task 2."""

    version = attributes.VERSION

    def draw(self) -> None:
        """Writes the archives to the root."""
        attributes.write_isic2018_attributes(self.root, self.draw_seed, **self.images)


class PhantomMelanoma(Drawn, ISIC2016):
    """Benign and malignant lesions, in the layout of ISBI 2016 Part 3."""

    version = melanoma.VERSION

    def draw(self) -> None:
        """Writes the archives and tables to the root."""
        melanoma.write_isic2016(self.root, self.draw_seed, **self.images)


class PhantomInsects(Drawn, Hymenoptera):
    """Ants and bees, in folders for each class."""

    version = insects.VERSION

    def draw(self) -> None:
        """Writes the archive to the root."""
        insects.write_hymenoptera(self.root, self.draw_seed, **self.images)
