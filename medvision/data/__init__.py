"""Data sets: archives as downloaded in, normalised batches out."""

from medvision.data.augment import Augment
from medvision.data.base import ImageDataModule
from medvision.data.cache import BrokenFiles, Cache, Sample
from medvision.data.cvc_clinicdb import CVCClinicDB
from medvision.data.dataset import CachedDataset
from medvision.data.dsb2018 import DSB2018
from medvision.data.folder import Folder
from medvision.data.hymenoptera import Hymenoptera
from medvision.data.isic2016 import ISIC2016
from medvision.data.isic2017 import ISIC2017, ISIC2017Diagnosis
from medvision.data.isic2018 import ISIC2018Attributes, ISIC2018Lesion
from medvision.data.problems import Problem

__all__ = [
    "DSB2018",
    "ISIC2016",
    "ISIC2017",
    "Augment",
    "BrokenFiles",
    "CVCClinicDB",
    "Cache",
    "CachedDataset",
    "Folder",
    "Hymenoptera",
    "ISIC2017Diagnosis",
    "ISIC2018Attributes",
    "ISIC2018Lesion",
    "ImageDataModule",
    "Problem",
    "Sample",
]
