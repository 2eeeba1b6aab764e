"""ISIC 2018: lesion masks and masks of five attributes (Codella et al. 2019, arXiv:1902.03368)."""

from collections.abc import Sequence

from medvision.data.base import Splits
from medvision.data.cache import Sample
from medvision.data.drawing import attributes
from medvision.data.isic import ISIC
from medvision.data.phantom import Drawing, thirds
from medvision.data.source import Member

OFFICIAL = {"train": ("Training", 2594), "val": ("Validation", 100), "test": ("Test", 1000)}


class ISIC2018Lesion(ISIC):
    """Task 1: lesion masks. The validation and test sets are used where their masks are there."""

    page = "https://challenge.isic-archive.com/data/#2018"
    truth: Sequence[str] = ("ISIC2018_Task1_{}_GroundTruth",)
    drawing = Drawing(attributes.VERSION, attributes.write_isic2018_attributes, thirds("count"))  # of both tasks

    def index(self) -> Splits:
        """Pairs images and masks by id; each file belongs to the split of its archive."""
        splits: dict[str, list[Sample]] = {}
        for split, (name, official) in OFFICIAL.items():
            stems = [stem.format(name) for stem in self.truth]
            stem = next((stem for stem in stems if self.has(stem)), stems[0])
            if split == "train" or self.has(stem):
                images = self.images_of(f"ISIC2018_Task1-2_{name}_Input")
                splits[split] = self.pair(split, images, *self.class_masks(stem), official=official)
        return splits

    def class_masks(self, stem: str) -> list[dict[str, Member]]:
        """Masks of each class by id."""
        return [self.masks_of(stem, "segmentation")]


class ISIC2018Attributes(ISIC2018Lesion):
    """Task 2: five dermoscopic attributes that may overlap; most are absent from most images."""

    truth = ("ISIC2018_Task2_{}_GroundTruth_v3", "ISIC2018_Task2_{}_GroundTruth")

    def class_masks(self, stem: str) -> list[dict[str, Member]]:
        """Masks of each attribute by id."""
        return [self.masks_of(stem, f"attribute_{name}", ignore="_attribute_") for name in self.spec.classes]
