"""Architectures of segmentation_models_pytorch, for any input size and with errors that name the cure.

https://github.com/qubvel-org/segmentation_models.pytorch (MIT) with encoders of its own and of
https://github.com/huggingface/pytorch-image-models (Apache-2.0). Their documentation cites the papers.
"""

import difflib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as library
import timm
import torch
from torch import Tensor

from medvision.errors import MedvisionError
from medvision.models.encoder import EncoderModel, fix_unused
from medvision.models.padding import crop_like, pad_to_multiple
from medvision.models.weights import (
    BUILD_ERRORS,
    chosen,
    imagenet_download,
    load_encoder_weights,
    unknown_encoder,
)
from medvision.spec import DataSpec

ARCHITECTURES = {
    architecture.__name__: architecture
    for architecture in (
        library.Unet,
        library.UnetPlusPlus,
        library.MAnet,
        library.Linknet,
        library.FPN,
        library.PSPNet,
        library.DeepLabV3,
        library.DeepLabV3Plus,
        library.PAN,
        library.UPerNet,
        library.Segformer,
        library.DPT,
    )
}
# DPT halves the deepest features once more; PAN pools them, at stride 16, three times.
_EXTRA_STRIDE = {"DPT": 2}
_SMALLEST_SIDE = {"PAN": 128}
# Small encoders of different kinds, of which each architecture takes at least one.
_PROVEN = (
    "resnet34",
    "resnet18",
    "efficientnet-b0",
    "mobilenet_v2",
    "mit_b0",
    "convnext_atto",
    "pvt_v2_b0",
    "vit_tiny_patch16_224",
)
_TAKEN = {
    "encoder_name": "encoder",
    "classes": "num_outputs",
    "activation": "nothing: models answer logits",
    "aux_params": "nothing: models answer masks only",
}


class SMP(EncoderModel):
    """Any segmentation_models_pytorch architecture with any of its encoders or any of timm's.

    Inputs are padded to a multiple of the encoder's output stride by repeating their edges, and cropped back.

    Args:
        architecture: a name in `ARCHITECTURES`, such as ``Unet``, ``FPN`` or ``Segformer``.
        encoder: the library's name, ``tu-<timm model>``, or a bare timm name that the library does not know.
        encoder_weights: None or ``"none"`` (random), ``"imagenet"`` (download), or a file or run folder (see
            `load_encoder_weights`).
        in_channels: channels of the image.
        num_outputs: channels K of the logits.
        freeze_encoder: True, False, or the epoch, counted from 1, at which it thaws (see `EncoderModel`).
        init: rule of the initial weights, but for those of a pretrained encoder (see `initialise`).
        **options: passed to the architecture, such as ``encoder_depth`` or ``decoder_channels``.

    Raises:
        MedvisionError: unknown architecture or encoder, a pair or options that do not fit, no weights.
    """

    encoder_at = "model.encoder"

    def __init__(
        self,
        architecture: str = "Unet",
        encoder: str = "resnet34",
        encoder_weights: str | Path | None = None,
        in_channels: int = 3,
        num_outputs: int = 1,
        freeze_encoder: bool | int = False,
        init: str = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            near = difflib.get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose of {', '.join(ARCHITECTURES)}."
            raise MedvisionError(f"Unknown model.architecture={architecture!r}: {hint}")
        for name in options.keys() & _TAKEN.keys():
            raise MedvisionError(f"model.{name} is not an option of SMP; instead of it use {_TAKEN[name]}.")
        encoder = encoder_name(encoder)
        # What an architecture does not know goes to the encoder, and the library's own encoders ignore it.
        unknown = options.keys() - inspect.signature(ARCHITECTURES[architecture]).parameters.keys()
        if architecture == "DPT":
            options.setdefault("dynamic_img_size", True)
        encoder_weights = chosen(encoder_weights)
        imagenet = encoder_weights == "imagenet"

        def build(encoder: str, weights: str | bool | None = None) -> Any:
            if unknown and not encoder.startswith("tu-"):
                raise MedvisionError(f"{architecture} with encoder {encoder!r} has no options {sorted(unknown)}.")
            return ARCHITECTURES[architecture](
                encoder_name=encoder, encoder_weights=weights, in_channels=in_channels, classes=num_outputs, **options
            )

        try:
            with imagenet_download(encoder) if imagenet else nullcontext():
                # timm encoders have one set of weights each, which the library wants as a switch.
                self.model = build(encoder, (encoder.startswith("tu-") or "imagenet") if imagenet else None)
            # The others use the whole encoder.
            if architecture in ("PSPNet", "DPT") or "encoder_depth" in options:
                side = 2 * int(self.model.encoder.output_stride)
                if encoder.startswith("tu-"):  # perhaps tied to its size
                    side = max(self.model.encoder.model.pretrained_cfg["input_size"])
                fix_unused(self.model.eval(), torch.zeros(1, in_channels, side, side))
                self.model.train()
        except MedvisionError:
            raise
        except BUILD_ERRORS as error:
            raise MedvisionError(
                f"segmentation_models_pytorch cannot build {architecture} with encoder {encoder!r} and "
                f"options {options}: {type(error).__name__}: {str(error).rstrip('.!')}. {_cure(encoder, build)}"
            ) from error
        self.backbone = encoder
        self.architecture = architecture
        self.stride = int(self.model.encoder.output_stride) * _EXTRA_STRIDE.get(architecture, 1)
        self._smallest_side = _SMALLEST_SIDE.get(architecture, 0)
        if encoder_weights is not None and not imagenet:
            load_encoder_weights(self.model.encoder, encoder_weights, encoder)
        self._begin(init, encoder_weights is not None, freeze_encoder)

    def check(self, spec: DataSpec) -> None:
        """Refuse a data set that this network cannot learn from (see `Network.check`)."""
        super().check(spec)
        if str(self.backbone).startswith("tu-"):
            made_for = max(self.model.encoder.model.pretrained_cfg["input_size"])
            other = "vit_tiny_patch16_224" if self.architecture == "DPT" else "convnext_tiny"
            self._try(spec, made_for, f"model.encoder={other}")

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.architecture} with encoder {self.backbone}"

    def forward(self, image: Tensor) -> Tensor:
        """Segment a batch.

        Args:
            image: (N, C, H, W), normalised; any height and width.

        Returns:
            Logits (N, K, H, W), unbounded.
        """
        return crop_like(self.model(pad_to_multiple(image, self.stride, self._smallest_side)), image)


def _cure(encoder: str, build: Callable[[str], object]) -> str:
    """The nearest encoder that works with the same options, tried."""
    for name in sorted(_PROVEN, key=lambda name: -difflib.SequenceMatcher(None, name, encoder).ratio()):
        try:
            build(encoder_name(name))
        except (*BUILD_ERRORS, MedvisionError):
            continue
        return f"Nearest encoder that works: model.encoder={name}."
    return "No encoder works with these options: change them."


def encoder_name(name: str) -> str:
    """The library's name of an encoder."""
    own = library.encoders.get_encoder_names()
    if name in own or (name.startswith("tu-") and timm.is_model(name.removeprefix("tu-"))):
        return name
    if timm.is_model(name):
        return f"tu-{name}"
    raise unknown_encoder(name.removeprefix("tu-"), [*own, *timm.list_models()])
