"""ISIC 2017: dermoscopic images with lesion masks and diagnoses (Codella et al. 2018, arXiv:1710.05006)."""

from collections.abc import Mapping
from typing import ClassVar

from medvision.data.base import Splits
from medvision.data.cache import Sample
from medvision.data.drawing import lesions
from medvision.data.isic import ISIC
from medvision.data.phantom import Drawing, thirds


class ISIC2017(ISIC):
    """Part 1, lesion masks, in the official splits: 2000 training, 150 validation and 600 test images.

    Where the test truth is absent, results are reported on the validation split.
    """

    page = "https://challenge.isic-archive.com/data/#2017"
    official: Mapping[str, tuple[str, int]] = {
        "train": ("Training", 2000),
        "val": ("Validation", 150),
        "test": ("Test_v2", 600),
    }
    part: ClassVar[int] = 1
    drawing = Drawing(
        lesions.VERSION,
        lambda folder, seed, **counts: lesions.write_isic2017(folder, seed, counts),
        thirds("train", "val", "test"),
    )

    def index(self) -> Splits:
        """Pairs images and truth by id; each file belongs to the split of its archive."""
        splits: dict[str, list[Sample]] = {}
        for split, (name, count) in self.official.items():
            truth = f"ISIC-2017_{name}_Part{self.part}_GroundTruth"
            if split == "test" and not self.has(truth):
                self.problem(
                    "warning",
                    "no test split",
                    text=f"No {truth} in {self.root}: results are reported on the validation split, which also chooses "
                    f"the epoch and the threshold; get the test truth from {self.page}",
                )
            else:
                splits[split] = self.samples_of(split, f"ISIC-2017_{name}_Data", truth, count)
        return splits

    def samples_of(self, split: str, data: str, truth: str, official: int) -> list[Sample]:
        """The images of a split with their masks."""
        return self.pair(split, self.images_of(data), self.masks_of(truth, "segmentation"), official=official)


class ISIC2017Diagnosis(ISIC2017):
    """Part 3, melanoma and seborrheic keratosis against all else: two labels, never both."""

    part = 3

    def samples_of(self, split: str, data: str, truth: str, official: int) -> list[Sample]:
        """The images of a split with their labels."""
        rows = self.diagnoses(truth)
        if both := sorted(i for i, labels in rows.items() if len(labels) > 1):
            self.problem("error", f"{split}: conflicting labels", both, "A lesion is one or the other, never both")
        return self.labelled(split, self.images_of(data), rows, official)
