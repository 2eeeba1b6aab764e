"""The context and localisation network of BraTS 2017, in 2D.

Isensee, Kickingereder, Wick, Bendszus, Maier-Hein: "Brain Tumor Segmentation and Radiomics Survival Prediction:
Contribution to the BRATS 2017 Challenge", 2018, https://arxiv.org/abs/1802.10508.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.models.initialise import initialise
from medvision.models.network import Network
from medvision.models.options import share, whole_number
from medvision.models.padding import crop_like, pad_to_multiple

SLOPE = 0.01  # of the leaky ReLU below zero
MAPS = 3  # finest levels whose segmentation maps are summed


class Conv(nn.Sequential):
    """Convolution, instance norm, leaky ReLU: (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.InstanceNorm2d(out_channels, affine=True),
            nn.LeakyReLU(SLOPE),
        )


class Context(nn.Module):
    """Pre-activated residual block of two 3x3 convolutions with dropout between: keeps (N, C, H, W)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.InstanceNorm2d(channels, affine=True) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Refine one feature map."""
        inner = self.dropout(self.conv1(F.leaky_relu(self.norm1(x), SLOPE)))
        refined: Tensor = x + self.conv2(F.leaky_relu(self.norm2(inner), SLOPE))
        return refined


class UNetIsensee(Network):
    """Context and localisation pathways with summed segmentation maps (arXiv:1802.10508).

    Down: 3x3 convolutions of stride 2, each followed by a context block. Up: repeated pixels and a 3x3
    convolution that halves the channels; the skip is joined; a 3x3 and a halving 1x1 convolution localise.
    The finest three levels are segmented by 1x1 convolutions, and the maps are upsampled and summed: that is
    the deep supervision, with one output and one loss. Inputs are padded to a multiple of 2^depth by repeating
    their edges, and cropped back.

    Args:
        in_channels: channels of the image.
        num_outputs: channels K of the logits.
        width: channels of the finest level; each level below has twice as many.
        depth: how often the sides are halved.
        dropout: share of feature maps dropped inside each context block.
        init: rule of the initial weights (see `initialise`).

    Raises:
        MedvisionError: a width or depth below 1, a dropout outside of 0 to 1, or an unknown rule.
    """

    depth: int

    def __init__(
        self,
        in_channels: int = 3,
        num_outputs: int = 1,
        width: int = 16,
        depth: int = 4,
        dropout: float = 0.3,
        init: str = "none",
    ) -> None:
        super().__init__()
        whole_number("width", width)
        whole_number("depth", depth)
        share("dropout", dropout)
        self.depth = depth
        self.stride = 2**depth
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(
            nn.Sequential(
                Conv(widths[i - 1], widths[i], stride=2) if i else Conv(in_channels, width),
                Context(widths[i], dropout),
            )
            for i in range(depth + 1)
        )
        # The lists below count levels from the finest.
        self.up = nn.ModuleList(Conv(2 * wide, wide) for wide in widths[:-1])
        # The finest level is not reduced: it goes nowhere but to its map.
        self.localise = nn.ModuleList(
            nn.Sequential(Conv(2 * wide, 2 * wide), *([Conv(2 * wide, wide, kernel=1)] if i else []))
            for i, wide in enumerate(widths[:-1])
        )
        self.out = nn.ModuleList(
            nn.Conv2d(widths[i] if i else 2 * width, num_outputs, 1) for i in range(min(MAPS, depth))
        )
        initialise(self, init)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Segmentation maps before they are summed, finest first.

        Args:
            image: (N, C, H, W), normalised; padded to (H', W'), which the maps cover.

        Returns:
            Tensors (N, K, H'/2^i, W'/2^i).
        """
        # Two pixels a side or more at the deepest level: one alone cannot be normalised in training.
        x = pad_to_multiple(image, self.stride, minimum=2 * self.stride)
        skips: list[Tensor] = []
        for step in self.down:
            x = step(x)
            skips.append(x)
        found: list[Tensor] = []
        for i in reversed(range(self.depth)):
            up = self.up[i](F.interpolate(x, scale_factor=2, mode="nearest"))
            x = self.localise[i](torch.cat([up, skips[i]], dim=1))
            if i < len(self.out):
                found.insert(0, self.out[i](x))
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Segment a batch.

        Args:
            image: (N, C, H, W), normalised; any height and width.

        Returns:
            Logits (N, K, H, W), unbounded, the same in training and evaluation but for dropout.
        """
        *finer, total = self.maps(image)
        for each in reversed(finer):
            total = each + F.interpolate(total, scale_factor=2, mode="nearest")
        return crop_like(total, image)
