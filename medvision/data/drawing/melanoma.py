"""Phantom dermoscopy with diagnoses, drawn from a seed and stored as task 3 of ISBI 2016 is."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.random import Generator

from medvision.data.drawing.brushes import drawn, jpg, store, whole
from medvision.data.drawing.lesions import SIZES, draw_lesion

VERSION = 1  # raised when the same seed draws other pictures
SALT = 2016  # keeps the streams apart from those of other phantoms
#: For each split, its official name, the number of its first image and its words for benign and malignant.
SPLITS = {"train": ("Training", 0, ("benign", "malignant")), "test": ("Test", 1_000_000, ("0.0", "1.0"))}
#: For each kind of lesion, its chance.
CHANCES = {"melanoma": 0.19, "nevus": 0.58, "keratosis": 0.23}


def write_isic2016(folder: Path, seed: int, train: int, test: int) -> None:
    """Draws a data set and stores it under the names and in the layout of the official ISBI 2016 archives.

    About a fifth of the lesions are malignant; these are more ragged and of more colours than the others.
    The colour of the image does not give them away: a logistic regression on the mean and the deviation of the three
    channels has an area under the ROC curve of 0.55 (600 images, 10 folds). The outline does: the share of its convex
    hull that the true mask fills has one of 0.98 (300 images).

    Args:
        folder: Where the files go; made if absent. They are moved into place after the last image is drawn.
        seed: Any number that is not negative.
        train: Number of training images; an image depends on the seed, its split and its index in the split only.
        test: Number of test images; none leaves the files of the test split out.
    """
    with whole(folder) as scratch:
        for split, count in (("train", train), ("test", test)):
            if count or split == "train":
                _write_split(scratch, seed, split, count)


def _write_split(folder: Path, seed: int, split: str, count: int) -> None:
    """Writes the archive and the table of one split."""
    name, first, words = SPLITS[split]
    stem, rows = f"ISBI2016_ISIC_Part3_{name}", list[str]()
    with zipfile.ZipFile(folder / f"{stem}_Data.zip", "w") as archive:
        for number, (image, malignant) in drawn(
            lambda number: _draw(np.random.default_rng([seed, number, SALT])), range(first, first + count), split
        ):
            store(archive, f"{stem}_Data/ISIC_{number:07d}.jpg", image)
            rows.append(f"ISIC_{number:07d},{words[malignant]}")
    (folder / f"{stem}_GroundTruth.csv").write_text("\n".join([*rows, ""]), newline="")


def _draw(rng: Generator) -> tuple[bytes, bool]:
    """An image as a file, and whether its lesion is malignant."""
    kind = str(rng.choice(list(CHANCES), p=list(CHANCES.values())))
    height, width = rng.choice(SIZES)
    lesion = draw_lesion(rng, height, width, kind)
    return jpg(lesion.image), lesion.malignant
