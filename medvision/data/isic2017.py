"""ISIC 2017 Part 1: lesion masks of dermoscopic images (Codella et al. 2018, arXiv:1710.05006)."""

import logging
import re
from collections.abc import Mapping

from medvision.data.base import ImageDataModule, Splits
from medvision.data.cache import Sample
from medvision.data.source import Member
from medvision.errors import MedvisionError

log = logging.getLogger(__name__)

IMAGE = re.compile(r"(?:^|/)(ISIC_\d+)\.jpe?g$", re.IGNORECASE)  # beside them: metadata, _superpixels.png
MASK = re.compile(r"(?:^|/)(ISIC_\d+)_segmentation\.png$", re.IGNORECASE)


class ISIC2017(ImageDataModule):
    """The official splits: 2000 training, 150 validation and 600 test images.

    Where the test masks are absent, results are reported on the validation split.
    """

    page = "https://challenge.isic-archive.com/data/#2017"
    official: Mapping[str, tuple[str, int]] = {
        "train": ("Training", 2000),
        "val": ("Validation", 150),
        "test": ("Test_v2", 600),
    }

    def index(self) -> Splits:
        """Pairs images and masks by id; each file belongs to the split of its archive."""
        splits: dict[str, list[Sample]] = {}
        for split, (part, count) in self.official.items():
            stem = f"ISIC-2017_{part}_Part1_GroundTruth"
            if split == "test" and self.find(stem) is None:
                log.warning(
                    "%s: no %s in %s: results are reported on the validation split, which also chooses the epoch "
                    "and the threshold; get the test masks from %s",
                    *(self.spec.name, stem, self.root, self.page),
                )
                continue
            images = self._by_id(f"ISIC-2017_{part}_Data", IMAGE)
            masks = self._by_id(stem, MASK)
            splits[split] = [Sample(i, images[i], ((masks[i],),)) for i in sorted(images.keys() & masks.keys())]
            if lone := sorted(images.keys() ^ masks.keys()):
                raise MedvisionError(
                    f"{self.spec.name}: {len(lone)} of the {split} split have an image or a mask but not both: "
                    f"{', '.join(lone[:10])}; the archives belong to different years or are damaged: fetch both again"
                )
            self.expect(split, count, len(splits[split]))
        return splits

    def _by_id(self, stem: str, pattern: re.Pattern[str]) -> dict[str, Member]:
        return {
            match[1].upper(): member for member in self.source(stem).members() if (match := pattern.search(member.name))
        }
