"""Any network of timm as a classifier.

https://github.com/huggingface/pytorch-image-models (Apache-2.0); its documentation cites the papers.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models.encoder import EncoderModel
from medvision.models.options import share
from medvision.models.padding import pad_to_multiple
from medvision.models.smp import SMP
from medvision.models.weights import BUILD_ERRORS, chosen, imagenet_download, load_encoder_weights, unknown_encoder
from medvision.spec import DataSpec


class Classifier(EncoderModel):
    """A timm network with a linear head of its own.

    An image smaller than its stride is extended by repeating its edges.

    Args:
        name: timm model, with or without the tag of its weights (``resnet18.a1_in1k``).
        in_channels: channels of the image.
        num_outputs: logits K of an image.
        encoder_weights: None or ``"none"`` (random), ``"imagenet"`` (download), or a file or run folder (see
            `load_encoder_weights`), which may be of a segmentation with the same encoder.
        dropout: share of features dropped before the head.
        drop_path_rate: stochastic depth; 0 for networks that have none.
        freeze_encoder: True, False, or the epoch, counted from 1, at which all but the head thaws (see
            `EncoderModel`).
        init: rule of the initial weights, but for those of a pretrained encoder (see `initialise`).

    Raises:
        MedvisionError: the name is unknown, timm cannot build it so, or its weights cannot be had.
    """

    target = "label"

    def __init__(
        self,
        name: str = "resnet18",
        in_channels: int = 3,
        num_outputs: int = 1,
        encoder_weights: str | Path | None = None,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        freeze_encoder: bool | int = False,
        init: str = "none",
    ) -> None:
        super().__init__()
        share("dropout", dropout)
        share("drop_path_rate", drop_path_rate)
        if not timm.is_model(name):
            raise unknown_encoder(name, timm.list_models(), "name")
        encoder_weights = chosen(encoder_weights)
        imagenet = encoder_weights == "imagenet"
        try:
            with imagenet_download(name) if imagenet else nullcontext():
                encoder: Any = timm.create_model(
                    name,
                    pretrained=imagenet,
                    num_classes=0,  # features instead of logits
                    in_chans=in_channels,
                    drop_path_rate=drop_path_rate or None,  # None is dropped: not every model knows it
                )
            # What it answers; num_features are those before its last hidden layer, if it has one.
            features = int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)
        except MedvisionError:
            raise
        except BUILD_ERRORS as error:
            raise MedvisionError(
                f"timm cannot build the classifier model.name={name} with in_channels={in_channels} and "
                f"drop_path_rate={drop_path_rate}: {type(error).__name__}: {error}. Choose another model.name, such "
                "as resnet18, or model.drop_path_rate=0."
            ) from error
        if encoder_weights is not None and not imagenet:
            load_encoder_weights(encoder, encoder_weights, name)
        self.backbone, self.made_for = name, max(encoder.pretrained_cfg["input_size"])
        self.stride = max((int(level["reduction"]) for level in getattr(encoder, "feature_info", ())), default=1)
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, num_outputs)
        self._begin(init, encoder_weights is not None, freeze_encoder)

    def forward(self, image: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            image: (N, C, H, W), normalised; any height and width, but for networks that are tied to one size.

        Returns:
            Logits (N, K), unbounded.
        """
        logits: Tensor = self.head(self.dropout(self.encoder(pad_to_multiple(image, 1, self.stride))))
        return logits

    def check(self, spec: DataSpec) -> None:
        """Refuse a data set that this network cannot learn from (see `Network.check`)."""
        super().check(spec)
        self._try(spec, self.made_for, "model.name=resnet18")

    def counterpart(self) -> str:
        """Overrides of the nearest network for masks: a decoder around the same encoder, where one takes it."""
        for word, architecture in (("unet", "Unet"), ("dpt", "DPT")):
            try:
                SMP(architecture, str(self.backbone))
            except MedvisionError:
                continue
            return f"model={word} model.encoder={self.backbone}"
        return "model=unet model.encoder=resnet34"
