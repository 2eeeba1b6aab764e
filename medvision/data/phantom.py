"""Phantom dermoscopy: drawn from a seed, written in the ISIC 2017 layout, read by its reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvision.data.base import Splits
from medvision.data.drawing import VERSION, write_isic2017
from medvision.data.isic2017 import ISIC2017
from medvision.files import locked, writable_folder
from medvision.spec import DataSpec


class Phantom(ISIC2017):
    """Drawn once into the cache folder; needs no download.

    Args:
        spec: The facts of the data set.
        root: Folder below which the archives are drawn, one folder for each seed and number of images.
        cache: Folder for what is derived.
        images: Number of images to draw for `train`, `val` and `test`.
        draw_seed: Seed of the drawing; the seed of a run does not change the data.
        **options: As for every data set.
    """

    def __init__(
        self,
        spec: DataSpec,
        root: Path | str,
        cache: Path | str,
        images: Mapping[str, int],
        draw_seed: int = 0,
        **options: Any,
    ) -> None:
        name = "-".join([f"v{VERSION}-seed{draw_seed}", *(str(images[split]) for split in ISIC2017.official)])
        super().__init__(spec, Path(root) / name, cache, **options)
        self.images, self.draw_seed = images, draw_seed
        self.official = {split: (part, images[split]) for split, (part, _) in ISIC2017.official.items()}

    def index(self) -> Splits:
        """Draws what is not there yet, then reads it as ISIC 2017."""
        writable_folder(self.root, "MEDVISION_CACHE")
        with locked(self.root / ".lock"):
            done = self.root / "complete"
            if not done.exists():
                write_isic2017(self.root, self.draw_seed, self.images)
                done.touch()
        return super().index()
