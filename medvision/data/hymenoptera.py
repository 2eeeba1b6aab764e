"""Ants and bees: photos in class folders (PyTorch's transfer learning tutorial)."""

from medvision.data.base import Splits
from medvision.data.drawing import insects
from medvision.data.folder import ClassFolders
from medvision.data.phantom import Drawing, thirds


class Hymenoptera(ClassFolders):
    """The official training and validation images; results are reported on the validation split."""

    page = "https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html"
    drawing = Drawing(insects.VERSION, insects.write_hymenoptera, thirds("train", "val"))

    def index(self) -> Splits:
        """Labels each image by its folder."""
        splits = self.class_folders(self.source("hymenoptera_data").members())
        for split, official in (("train", 244), ("val", 153)):
            self.expect(split, official, len(splits.get(split, [])))
        return splits
