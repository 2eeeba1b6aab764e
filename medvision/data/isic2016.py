"""ISBI 2016 Part 3: melanoma or not, dermoscopic images (Gutman et al. 2016, arXiv:1605.01397)."""

from medvision.data.base import Splits
from medvision.data.drawing import melanoma
from medvision.data.isic import ISIC
from medvision.data.phantom import Drawing, thirds


class ISIC2016(ISIC):
    """The official 900 training and 379 test images; where the test table is absent, all splits are dealt."""

    page = "https://challenge.isic-archive.com/data/#2016"
    drawing = Drawing(melanoma.VERSION, melanoma.write_isic2016, thirds("train", "test"))

    def index(self) -> Splits:
        """Pairs images with the rows of the tables."""
        splits = {}
        for split, part, official in (("train", "Training", 900), ("test", "Test", 379)):
            stem = f"ISBI2016_ISIC_Part3_{part}"
            if split == "train" or self.has(f"{stem}_GroundTruth"):
                images, rows = self.images_of(f"{stem}_Data"), self.diagnoses(f"{stem}_GroundTruth")
                splits[split] = self.labelled(split, images, rows, official)
        return splits
