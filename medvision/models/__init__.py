"""Networks for segmentation and classification: torch modules that answer logits for images of any size."""

from medvision.models.classifier import Classifier
from medvision.models.encoder import EncoderModel
from medvision.models.features import feature_maps, layer_names, recording
from medvision.models.initialise import initialise
from medvision.models.network import Network
from medvision.models.smp import SMP
from medvision.models.unet_family import UNetFamily
from medvision.models.unet_isensee import UNetIsensee
from medvision.models.unetpp import UNetPP
from medvision.models.unetv2 import UNetV2
from medvision.models.weights import WeightReport, load_encoder_weights, load_published

__all__ = [
    "SMP",
    "Classifier",
    "EncoderModel",
    "Network",
    "UNetFamily",
    "UNetIsensee",
    "UNetPP",
    "UNetV2",
    "WeightReport",
    "feature_maps",
    "initialise",
    "layer_names",
    "load_encoder_weights",
    "load_published",
    "recording",
]
