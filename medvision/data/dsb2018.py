"""Data Science Bowl 2018, stage 1: nuclei in microscopy (Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7)."""

import re
from collections import defaultdict

from sklearn.model_selection import train_test_split

from medvision.data.base import ImageDataModule, Splits
from medvision.data.cache import Sample
from medvision.data.source import Member
from medvision.errors import MedvisionError

FILE = re.compile(r"(?:^|/)([^/]+)/(images|masks)/([^/.][^/]*)\.png$", re.IGNORECASE)
PUBLISHED = {"test_size": 0.2, "random_state": 41}  # the split on which U-Net++ was reported


class DSB2018(ImageDataModule):
    """Nucleus against background: the masks of all nuclei of an image are merged.

    The 20 % on which U-Net++ was reported (scikit-learn's `train_test_split` of the sorted ids) are the test
    split, so that numbers compare; a tenth of the rest, the same for every seed of a run, is validation.
    """

    page = "https://www.kaggle.com/c/data-science-bowl-2018/data"

    def index(self) -> Splits:
        """Groups the files of each image folder and splits the sorted ids."""
        images: dict[str, Member] = {}
        nuclei: dict[str, list[Member]] = defaultdict(list)
        for member in self.source("stage1_train").members():
            if match := FILE.search(member.name):
                name, kind = match[1], match[2].lower()
                if kind == "masks":
                    nuclei[name].append(member)
                elif name in images:
                    raise MedvisionError(f"{self.spec.name}: {name} has two images, {images[name]} and {member}")
                else:
                    images[name] = member
        if lone := sorted(images.keys() ^ nuclei.keys()):
            raise MedvisionError(
                f"{self.spec.name}: {len(lone)} image folders lack images/ or masks/: {', '.join(lone[:5])}; "
                "the archive is damaged: fetch it again"
            )
        if len(images) < 10:
            raise MedvisionError(f"{self.spec.name}: {len(images)} images in {self.root}; expected 670: fetch it again")
        self.expect("training", 670, len(images))
        samples = {name: Sample(name, images[name], (tuple(nuclei[name]),)) for name in sorted(images)}
        rest, test = train_test_split(list(samples.values()), **PUBLISHED)
        train, val = train_test_split(sorted(rest, key=lambda s: s.id), test_size=0.1, random_state=0)
        return {"train": train, "val": val, "test": test}
