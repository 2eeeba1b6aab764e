"""Data Science Bowl 2018, stage 1: nuclei in microscopy (Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7)."""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from medvision.data.base import ImageDataModule, Splits
from medvision.data.cache import Sample
from medvision.data.drawing import nuclei
from medvision.data.phantom import Drawing, thirds
from medvision.data.source import Member
from medvision.errors import MedvisionError

FILE = re.compile(r"(?:^|/)([^/]+)/(images|masks)/([^/.][^/]*)\.png$", re.IGNORECASE)
PUBLISHED = {"test_size": 0.2, "random_state": 41}  # the split on which U-Net++ was reported
IMAGING_TYPES = 4


class DSB2018(ImageDataModule):
    """Nucleus against background: the masks of all nuclei of an image are merged.

    The 20 % on which U-Net++ was reported (scikit-learn's `train_test_split` of the sorted ids) are the test
    split, so that numbers compare; of the rest a tenth is validation, stratified by the type of imaging.
    """

    page = "https://www.kaggle.com/c/data-science-bowl-2018/data"
    dealt_folds = 10
    drawing = Drawing(nuclei.VERSION, nuclei.write_dsb2018, thirds("count"))

    def index(self) -> Splits:
        """Groups the files of each image folder and takes the published split of the sorted ids."""
        from sklearn.model_selection import train_test_split  # slow to import

        images: dict[str, Member] = {}
        nuclei: dict[str, list[Member]] = defaultdict(list)
        stray: list[Member] = []
        twice: dict[str, str] = {}
        for member in self.source("stage1_train").members():
            if not (match := FILE.search(member.name)):
                stray.append(member)
            elif match[2].lower() == "masks":
                nuclei[match[1]].append(member)
            elif match[1] in images:
                twice[match[1]] = f"{images[match[1]]} and {member}"
            else:
                images[match[1]] = member
        self.stray(stray)
        if twice:
            files = "; ".join([*twice.values()][:5])
            self.problem("error", "two images in one folder", twice, f"{files}: remove one of each")
        if lone := sorted(images.keys() - nuclei.keys()):
            self.problem("error", "images without masks", lone, "Fetch the archive again, or exclude the images")
        if lone := sorted(nuclei.keys() - images.keys()):
            self.problem("warning", "masks without images", lone, "They are left out; fetch the archive again")
        both = sorted(images.keys() & nuclei.keys())
        if len(both) < 10:
            raise MedvisionError(f"{self.spec.name}: {len(both)} images in {self.root}; expected 670: fetch it again")
        self.expect("training", 670, len(both))
        rest, test = train_test_split([Sample(i, images[i], (tuple(nuclei[i]),)) for i in both], **PUBLISHED)
        return {"train": rest, "test": test}

    def strata(self) -> Sequence[Hashable]:
        """The type of imaging: k-means of brightness, its deviation, and saturation of each image's mean colour."""
        from sklearn.cluster import KMeans  # slow to import

        sums = self.cache.facts["sums"] / np.prod(self.cache.images.shape[1:3])
        means, squares = sums[:, 0], sums[:, 1]
        deviation = np.sqrt(np.maximum(squares - means**2, 0)).mean(1)
        features = np.stack([means.mean(1), deviation, means.max(1) - means.min(1)], 1)
        clusters: list[int] = KMeans(IMAGING_TYPES, n_init=10, random_state=0).fit_predict(features).tolist()
        return clusters
