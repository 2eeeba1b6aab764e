"""What the archives of all ISIC challenges have in common: names of images, masks and tables."""

import re

from medvision.data.base import ImageDataModule
from medvision.data.source import Member

IMAGE = re.compile(r"(?:^|/)(ISIC_\d+)\.jpe?g$", re.IGNORECASE)
BESIDE = re.compile(r"_superpixels\.png$|_metadata\.csv$", re.IGNORECASE)


class ISIC(ImageDataModule):
    """Images `ISIC_<number>.jpg`, masks `ISIC_<number>_<what>.png`; ids are in upper case."""

    def images_of(self, stem: str) -> dict[str, Member]:
        """Images of an archive by id."""
        return self.by_id(self.source(stem).members(), IMAGE, BESIDE, key=str.upper)

    def masks_of(self, stem: str, what: str, ignore: str = r"(?!)") -> dict[str, Member]:
        """Masks of an archive by id; names that `ignore` finds are of others."""
        pattern = re.compile(rf"(?:^|/)(ISIC_\d+)_{what}\.png$", re.IGNORECASE)
        return self.by_id(self.source(stem).members(), pattern, re.compile(ignore, re.IGNORECASE), key=str.upper)

    def diagnoses(self, stem: str) -> dict[str, tuple[int, ...]]:
        """Classes of each id in the table `<stem>.csv`."""
        return self.flags(self.file(f"{stem}.csv"), key=str.upper)

    def has(self, stem: str) -> bool:
        """Whether an archive or a table is there."""
        return self.find(stem) is not None or self.find_file(f"{stem}.csv") is not None
