"""U-Net v2: features of all levels meet at every level through a semantics-and-detail infusion (SDI).

Peng, Sonka, Chen: "U-Net v2: Rethinking the Skip Connections of U-Net for Medical Image Segmentation", 2023,
https://arxiv.org/abs/2311.17791. Attention as in CBAM (https://arxiv.org/abs/1807.06521), encoder PVTv2
(https://arxiv.org/abs/2106.13797) through timm. Weights of the published implementation load through
`load_published`.
"""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models.encoder import EncoderModel
from medvision.models.padding import crop_like, pad_to_multiple
from medvision.models.weights import (
    BUILD_ERRORS,
    chosen,
    imagenet_download,
    load_encoder_weights,
    load_published,
    unknown_encoder,
)

STRIDES = (4, 8, 16, 32)


def pyramid_encoder(
    name: str, in_channels: int, weights: str | Path | None, drop_path_rate: float
) -> tuple[nn.Module, list[int]]:
    """A timm model that answers four feature maps (N, width, H / stride, W / stride), and their widths.

    Args:
        name: timm model, with or without the tag of its weights (``pvt_v2_b2.in1k``).
        in_channels: channels of the image.
        weights: None, ``"imagenet"`` or a file.
        drop_path_rate: stochastic depth.

    Raises:
        MedvisionError: unknown, not built by these options, or other levels than `STRIDES` at any input size.
    """
    if not timm.is_model(name):
        raise unknown_encoder(name, timm.list_models())
    cure = "Choose model.encoder=pvt_v2_b0 ... pvt_v2_b5, or a timm model like them, such as convnext_tiny."

    def build(pretrained: bool) -> nn.Module:
        # timm drops options that are None; not every model knows stochastic depth.
        return timm.create_model(
            name,
            pretrained=pretrained,
            in_chans=in_channels,
            features_only=True,
            drop_path_rate=drop_path_rate or None,
        )

    try:
        encoder = build(pretrained=False).eval()
        # Tried rather than asked: timm does not say which models are tied to one size or put channels last.
        with torch.no_grad():
            shapes = [tuple(feature.shape[1:]) for feature in encoder(torch.zeros(1, in_channels, 64, 96))]
    except BUILD_ERRORS as error:
        raise MedvisionError(
            f"Encoder {name!r} cannot serve UNetV2, which needs feature maps for any input size and "
            f"drop_path_rate={drop_path_rate}: {type(error).__name__}: {error}. {cure}"
        ) from error
    if [shape[1:] for shape in shapes] != [(64 // stride, 96 // stride) for stride in STRIDES]:
        raise MedvisionError(
            f"UNetV2 needs an encoder with four feature maps (C, H, W) at strides {STRIDES}; {name!r} gives "
            f"{shapes} for an image of 64 x 96. {cure}"
        )
    if weights == "imagenet":
        with imagenet_download(name):
            encoder = build(pretrained=True)
    elif weights is not None:
        load_encoder_weights(encoder, weights, name)
    return encoder.train(), [shape[0] for shape in shapes]


class ChannelAttention(nn.Module):
    """Scale each channel of (N, C, H, W) by a sigmoid of its pooled values."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // ratio)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh channels."""
        mean, peak = x.mean((2, 3), keepdim=True), F.adaptive_max_pool2d(x, 1)
        # The second layer is linear and has no bias, so the two branches are added before it.
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(mean)) + F.relu(self.fc1(peak))))


class SpatialAttention(nn.Module):
    """Scale each pixel of (N, C, H, W) by a sigmoid of a 7x7 convolution over channel mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh pixels."""
        return x * torch.sigmoid(self.conv1(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)))


class SDI(nn.Module):
    """Product over the four levels, each brought to the size of level ``target`` and convolved (3x3)."""

    def __init__(self, channels: int, target: int) -> None:
        super().__init__()
        self.target = target
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in STRIDES)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Fuse levels (N, C, H/4, W/4) ... (N, C, H/32, W/32) into one map of the target's size."""
        size = levels[self.target].shape[-2:]
        fused: Tensor = self.convs[self.target](levels[self.target])
        for i, (level, conv) in enumerate(zip(levels, self.convs, strict=True)):
            if i < self.target:
                # Sides are exact multiples here, so this is the adaptive pooling of the paper.
                fused = fused * conv(F.avg_pool2d(level, 2 ** (self.target - i)))
            elif i > self.target:
                fused = fused * conv(F.interpolate(level, size=size, mode="bilinear", align_corners=True))
        return fused


class UNetV2(EncoderModel):
    """U-Net v2 (arXiv:2311.17791): hierarchical encoder, attention, SDI at each level, additive decoder.

    Inputs are padded to a multiple of 32 by repeating their edges, and cropped back.

    Args:
        encoder: timm model with feature maps at strides 4, 8, 16, 32, such as ``pvt_v2_b0`` ... ``b5``.
        in_channels: channels of the image.
        num_outputs: channels K of the logits.
        deep_supervision: a head at each of the four decoder levels instead of the finest only.
        encoder_weights: None or ``"none"`` (random), ``"imagenet"`` (download), or a file or run folder (see
            `load_encoder_weights`).
        channels: width of the decoder.
        drop_path_rate: stochastic depth of the encoder; 0 for encoders that have none.
        freeze_encoder: True, False, or the epoch, counted from 1, at which it thaws (see `EncoderModel`).
        init: rule of the initial weights, but for those of a pretrained encoder (see `initialise`).
        published_weights: a state dict of the published implementation, with which to begin (see `load_published`).

    Raises:
        MedvisionError: the encoder is unknown or has other levels; the weights cannot be had or do not fit.
    """

    def __init__(
        self,
        encoder: str = "pvt_v2_b2",
        in_channels: int = 3,
        num_outputs: int = 1,
        deep_supervision: bool = False,
        encoder_weights: str | Path | None = None,
        channels: int = 32,
        drop_path_rate: float = 0.1,
        freeze_encoder: bool | int = False,
        init: str = "none",
        published_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        encoder_weights = chosen(encoder_weights)
        self.deep_supervision = deep_supervision
        self.stride, self.backbone = STRIDES[-1], encoder
        self.encoder, widths = pyramid_encoder(encoder, in_channels, encoder_weights, drop_path_rate)
        self.skips = nn.ModuleList(
            nn.Sequential(
                ChannelAttention(width),
                SpatialAttention(),
                nn.Conv2d(width, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
            for width in widths
        )
        self.sdi = nn.ModuleList(SDI(channels, target) for target in range(len(STRIDES)))
        # up[i] leads from level i + 1 to level i; levels count from the finest.
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False) for _ in STRIDES[1:]
        )
        self.out = nn.ModuleList(
            nn.Conv2d(channels, num_outputs, 1) for _ in (STRIDES if deep_supervision else STRIDES[:1])
        )
        self._begin(init, encoder_weights is not None, freeze_encoder)
        if published_weights is not None:
            load_published(self, published_weights)

    def published_prefixes(self) -> dict[str, str | None]:
        """Prefixes of the published implementation's keys -> what they are called here; None: left out."""
        names: dict[str, str | None] = {"encoder.backbone.": "encoder.", "encoder.backbone.head.": None}
        for i in range(len(STRIDES)):
            names |= {
                f"ca_{i + 1}.": f"skips.{i}.0.",
                f"sa_{i + 1}.": f"skips.{i}.1.",
                f"Translayer_{i + 1}.conv.": f"skips.{i}.2.",
                f"Translayer_{i + 1}.bn.": f"skips.{i}.3.",
                f"sdi_{i + 1}.": f"sdi.{i}.",
                f"seg_outs.{3 - i}.": f"out.{i}." if i < len(self.out) else None,
            }
        names |= {f"deconv{4 - i}.": f"up.{i}." for i in range(len(self.up))}
        names["deconv5."] = None  # a fourth upsampling that no output of the published network depends on
        return names

    def heads(self, image: Tensor) -> list[Tensor]:
        """Logits of every head at its own resolution, main first, in training and in evaluation.

        Args:
            image: (N, C, H, W), normalised; padded to (H', W'), multiples of 32, which the outputs cover.

        Returns:
            Tensors (N, K, H'/2^i, W'/2^i), each upsampled by 4 from its decoder level: i = 0 ... 3 with deep
            supervision, else i = 0 alone.
        """
        features = self.encoder(pad_to_multiple(image, self.stride))
        levels = [skip(feature) for skip, feature in zip(self.skips, features, strict=True)]
        decoded = self.sdi[-1](levels)
        logits = []
        for i in reversed(range(len(STRIDES))):
            if i < len(STRIDES) - 1:
                decoded = self.up[i](decoded) + self.sdi[i](levels)
            if i < len(self.out):
                logits.append(F.interpolate(self.out[i](decoded), scale_factor=STRIDES[0], mode="bilinear"))
        return logits[::-1]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment a batch.

        Args:
            image: (N, C, H, W), normalised; any height and width.

        Returns:
            Logits (N, K, H, W), unbounded; while training with deep supervision a list of four, main first.
        """
        main, *auxiliary = self.heads(image)
        if not (self.training and self.deep_supervision):
            return crop_like(main, image)
        resized = [F.interpolate(logits, size=main.shape[-2:], mode="bilinear") for logits in auxiliary]
        return [crop_like(logits, image) for logits in (main, *resized)]
