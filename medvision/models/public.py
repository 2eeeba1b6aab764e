"""What `medvision.models` offers; the package itself imports it when a name is first asked for."""

from medvision.models.encoder import EncoderModel
from medvision.models.smp import SMP
from medvision.models.unet_family import UNetFamily
from medvision.models.unet_isensee import UNetIsensee
from medvision.models.unetpp import UNetPP
from medvision.models.unetv2 import UNetV2
from medvision.models.weights import WeightReport, load_encoder_weights, load_published

__all__ = [
    "SMP",
    "EncoderModel",
    "UNetFamily",
    "UNetIsensee",
    "UNetPP",
    "UNetV2",
    "WeightReport",
    "load_encoder_weights",
    "load_published",
]
