"""Data sets: archives as downloaded in, normalised batches out."""

from medvision.data.augment import Augment
from medvision.data.base import CachedDataset, ImageDataModule
from medvision.data.cache import Cache, Sample
from medvision.data.dsb2018 import DSB2018
from medvision.data.isic2017 import ISIC2017
from medvision.data.phantom import Phantom

__all__ = ["DSB2018", "ISIC2017", "Augment", "Cache", "CachedDataset", "ImageDataModule", "Phantom", "Sample"]
