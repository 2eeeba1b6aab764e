"""One U-Net whose encoder, blocks, skips and upsampling are options.

- U-Net: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
  https://arxiv.org/abs/1505.04597.
- residual blocks: Zhang, Liu, Wang, "Road Extraction by Deep Residual U-Net", 2018, https://arxiv.org/abs/1711.10684.
- attention gates: Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018,
  https://arxiv.org/abs/1804.03999. Here the finest skip is gated as well.

Encoders besides the own one come from segmentation_models_pytorch and timm, such as ConvNeXt
(https://arxiv.org/abs/2201.03545).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as library
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models.cpu import channels_last
from medvision.models.encoder import EncoderModel, fix_unused
from medvision.models.options import one_of, share, whole_number
from medvision.models.padding import crop_like, pad_to_multiple
from medvision.models.smp import encoder_name
from medvision.models.weights import BUILD_ERRORS, chosen, imagenet_download, load_encoder_weights

Make = Callable[..., nn.Module]

NORMS: dict[str, Make] = {
    "batch": nn.BatchNorm2d,
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
}

# A convolution before a normalisation needs no bias.
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each normalised and rectified: (N, in, H, W) -> (N, out, H/stride, W/stride).

    A stride is taken by max pooling. Dropout is of whole feature maps, between the convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Make, dropout: float, stride: int = 1) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(stride) if stride > 1 else nn.Identity()
        self.conv1, self.norm1 = conv3x3(in_channels, out_channels), norm(out_channels)
        self.conv2, self.norm2 = conv3x3(out_channels, out_channels), norm(out_channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Refine one feature map."""
        x = self.dropout(F.relu(self.norm1(self.conv1(self.pool(x))), inplace=True))
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class ResidualBlock(nn.Module):
    """Pre-activated residual unit (arXiv:1711.10684): (N, in, H, W) -> (N, out, H/stride, W/stride).

    Twice normalise, rectify, convolve; the input is added, through a 1x1 convolution where shapes differ. An
    image is convolved as it is. Dropout is of whole feature maps, between the convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Make, dropout: float, stride: int = 1, of_image: bool = False
    ) -> None:
        super().__init__()
        self.before = nn.Identity() if of_image else nn.Sequential(norm(in_channels), nn.ReLU())
        self.conv1, self.norm = conv3x3(in_channels, out_channels, stride=stride), norm(out_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.stride = stride
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Refine one feature map."""
        inner = self.dropout(F.relu(self.norm(self.conv1(self.before(x))), inplace=True))
        # Not a strided 1x1 convolution: with channels last and fewer than 16 of them, oneDNN 3.13 writes
        # beyond the end of its gradient.
        refined: Tensor = self.conv2(inner) + self.shortcut(x[..., :: self.stride, :: self.stride])
        return refined


BLOCKS: dict[str, Make] = {"plain": PlainBlock, "residual": ResidualBlock}


class AttentionGate(nn.Module):
    """Additive attention gate (arXiv:1804.03999): scale each pixel of a skip by what the level below sees there.

    The skip is (N, channels, H, W), the signal from below (N, signal_channels, H/2, W/2).
    """

    def __init__(self, channels: int, signal_channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.of_skip = nn.Conv2d(channels, hidden, 2, stride=2, bias=False)
        self.of_signal = nn.Conv2d(signal_channels, hidden, 1)
        self.score = nn.Conv2d(hidden, 1, 1)

    def coefficients(self, skip: Tensor, signal: Tensor) -> Tensor:
        """Attention (N, 1, H, W), in 0 to 1."""
        attention = torch.sigmoid(self.score(F.relu(self.of_skip(skip) + self.of_signal(signal))))
        return F.interpolate(attention, scale_factor=2, mode="bilinear")

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The skip, weighed."""
        return skip * self.coefficients(skip, signal)


class Level(nn.Module):
    """One step up of the decoder: (N, below, H, W) and a skip (N, skip, 2H, 2W) -> (N, out, 2H, 2W).

    Either upsampling brings `below` to `out` channels. With skip = 0 what is given as the skip is not used.
    """

    def __init__(self, below: int, skip: int, out: int, block: Make, attention: bool, transposed: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if transposed:
            self.up = nn.ConvTranspose2d(below, out, 2, stride=2, bias=False)
        else:
            # The two commute, and this order is cheaper.
            self.up = nn.Sequential(nn.Conv2d(below, out, 1, bias=False), nn.Upsample(scale_factor=2, mode="bilinear"))
        self.gate = AttentionGate(skip, below) if attention and skip else None
        self.block = block(out + skip, out)
        self.has_skip = skip > 0

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Go up one level."""
        parts = [self.up(x)]
        if self.has_skip:
            parts.append(skip if self.gate is None else self.gate(skip, x))
        decoded: Tensor = self.block(torch.cat(parts, dim=1))
        return decoded


class PlainEncoder(nn.Module):
    """Blocks one after the other: an image (N, C, H, W) -> features (N, width_i, H/2^i, W/2^i), finest first."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of every block."""
        features = [image]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]


def library_encoder(name: str, in_channels: int, depth: int, weights: str | Path | None) -> tuple[nn.Module, list[int]]:
    """An encoder that answers maps (N, width_i, H/2^i, W/2^i), i = 0 ... depth, and the widths.

    Args:
        name: of segmentation_models_pytorch or timm.
        in_channels: channels of the image.
        depth: how often the sides are halved.
        weights: None, ``"imagenet"`` or a file.

    Returns:
        The encoder, and a width for each level: 0 where the encoder has no features of that size.

    Raises:
        MedvisionError: unknown, no such levels, or no weights.
    """
    name = encoder_name(name)
    imagenet = weights == "imagenet"
    try:
        with imagenet_download(name) if imagenet else nullcontext():
            encoder: nn.Module = library.encoders.get_encoder(
                name,
                in_channels=in_channels,
                depth=depth,
                # timm encoders have one set of weights each, which the library wants as a switch.
                weights=(True if name.startswith("tu-") else "imagenet") if imagenet else None,
            ).eval()
        # Tried rather than asked: the libraries do not say which encoders are tied to one size.
        image = torch.zeros(1, in_channels, 2 << depth, 3 << depth)
        with torch.no_grad():
            features = encoder(image)
    except MedvisionError:
        raise
    except BUILD_ERRORS as error:
        raise MedvisionError(
            f"Encoder {name!r} cannot serve UNetFamily with model.depth={depth}, in_channels={in_channels}, "
            f"encoder_weights={weights}: {type(error).__name__}: {error}; choose an encoder whose features halve "
            "from level to level at any input size, such as resnet34 or convnext_tiny, and a depth of 1 to 5."
        ) from error
    # The library calls the image itself the features at full size.
    widths = [0 if feature is image else feature.shape[1] for feature in features]
    sides = [tuple(feature.shape[-2:]) for feature in features]
    if sides != [(2 << i, 3 << i) for i in range(depth, -1, -1)] or not widths[-1]:
        raise MedvisionError(
            f"Encoder {name!r} with model.depth={depth} gives widths {widths} at sizes {sides}; expected features "
            f"that halve {depth} times, the last not empty. Choose another model.encoder or a greater model.depth."
        )
    fix_unused(encoder, image)
    if weights is not None and not imagenet:
        load_encoder_weights(encoder, weights, name)
    return encoder.train(), widths


class UNetFamily(EncoderModel):
    """U-Net, residual U-Net, attention U-Net, and these decoders on any encoder (papers: see the module).

    Inputs are padded to a multiple of 2^depth by repeating their edges, and cropped back. Decoder level i, at
    1/2^i of the image's sides, is width * 2^i wide; so is that of the own encoder.

    Args:
        encoder: ``"plain"`` or None for the own one, made of `block`; else a name of segmentation_models_pytorch
            or timm, whose missing fine levels are decoded without a skip.
        in_channels: channels of the image.
        num_outputs: channels K of the logits.
        deep_supervision: a head at each decoder level instead of the finest only.
        encoder_weights: None or ``"none"`` (random), ``"imagenet"`` (download), or a file or run folder (see
            `load_encoder_weights`).
        block: ``"plain"`` or ``"residual"``, of the decoder and the own encoder; so are norm and dropout.
        skip: ``"concat"``, or ``"attention"`` for gated skips.
        upsampling: ``"bilinear"`` after a 1x1 convolution, or ``"transposed"`` convolution.
        width: channels of the finest level.
        depth: how often the sides are halved; None is 4, or all 5 of a library's encoder.
        norm: ``"batch"``, ``"instance"``, or ``"group"`` (8 groups, fewer where 8 does not divide the channels).
        dropout: share of feature maps dropped inside each block.
        freeze_encoder: True, False, or the epoch, counted from 1, at which it thaws (see `EncoderModel`).
        init: rule of the initial weights, but for those of a pretrained encoder (see `initialise`).

    Raises:
        MedvisionError: an option that is no choice, an unknown or unfit encoder, weights that cannot be had.
    """

    def __init__(
        self,
        encoder: str | None = "plain",
        in_channels: int = 3,
        num_outputs: int = 1,
        deep_supervision: bool = False,
        encoder_weights: str | Path | None = None,
        block: str = "plain",
        skip: str = "concat",
        upsampling: str = "bilinear",
        width: int = 32,
        depth: int | None = None,
        norm: str = "batch",
        dropout: float = 0.0,
        freeze_encoder: bool | int = False,
        init: str = "none",
    ) -> None:
        super().__init__()
        encoder_weights = chosen(encoder_weights)
        one_of("block", block, BLOCKS)
        one_of("skip", skip, ("concat", "attention"))
        one_of("upsampling", upsampling, ("bilinear", "transposed"))
        one_of("norm", norm, NORMS)
        whole_number("width", width)
        plain = encoder is None or encoder == "plain"
        depth = (4 if plain else 5) if depth is None else depth
        whole_number("depth", depth)
        share("dropout", dropout)
        self.deep_supervision = deep_supervision
        self.depth = depth
        self.stride = 2**depth
        self.backbone = str(encoder or "plain")
        make = partial(BLOCKS[block], norm=NORMS[norm], dropout=dropout)
        own = [width * 2**i for i in range(depth + 1)]
        self.encoder: nn.Module
        if plain:
            if encoder_weights == "imagenet":
                raise MedvisionError("model.encoder=plain has no ImageNet weights: give null or a file.")
            first = partial(make, of_image=True) if block == "residual" else make
            stages = [make(own[i], own[i + 1], stride=2) for i in range(depth)]
            self.encoder, widths = PlainEncoder([first(in_channels, width), *stages]), own
            if encoder_weights is not None:
                load_encoder_weights(self.encoder, encoder_weights, "plain")
        else:
            self.encoder, widths = library_encoder(self.backbone, in_channels, depth, encoder_weights)
        # Both lists count levels from the finest.
        self.levels = nn.ModuleList(
            Level(below, beside, out, make, skip == "attention", upsampling == "transposed")
            for below, beside, out in zip([*own[1:depth], widths[-1]], widths[:-1], own[:-1], strict=True)
        )
        self.out = nn.ModuleList(nn.Conv2d(own[i], num_outputs, 1) for i in range(depth if deep_supervision else 1))
        self._begin(init, encoder_weights is not None, freeze_encoder)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment a batch.

        Args:
            image: (N, C, H, W), normalised; any height and width.

        Returns:
            Logits (N, K, H, W), unbounded; while training with deep supervision a list of one for each decoder
            level, main first.
        """
        # Two pixels a side or more at the deepest level: one alone cannot be normalised in training.
        padded = channels_last(pad_to_multiple(image, self.stride, minimum=2 * self.stride))
        *skips, x = self.encoder(padded)
        decoded: list[Tensor] = []
        for level, skip in zip(reversed(self.levels), reversed(skips), strict=True):
            x = level(x, skip)
            decoded.insert(0, x)
        if not (self.training and self.deep_supervision):
            return crop_like(self.out[0](x), image)
        logits = [head(features) for head, features in zip(self.out, decoded, strict=True)]
        return [crop_like(F.interpolate(each, size=padded.shape[-2:], mode="bilinear"), image) for each in logits]
