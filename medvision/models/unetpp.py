"""U-Net++, the nested U-Net.

Zhou, Siddiquee, Tajbakhsh, Liang: "UNet++: A Nested U-Net Architecture for Medical Image Segmentation", DLMIA
2018, https://arxiv.org/abs/1807.10165. Weights of the published PyTorch implementation load through
`load_published`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError
from medvision.models.cpu import channels_last
from medvision.models.initialise import initialise
from medvision.models.network import Network
from medvision.models.options import whole_number
from medvision.models.padding import crop_like, pad_to_multiple
from medvision.models.weights import load_published


class Node(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation and ReLU: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The biases do nothing before a batch normalisation; published weights have them.
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Refine one feature map."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


class UNetPP(Network):
    """U-Net++ (arXiv:1807.10165): a U-Net whose skip connections are themselves nested decoders.

    Node x(i, j) sits at resolution 1/2^i and sees every earlier node of its row and, upsampled, x(i+1, j-1).
    The main output comes from x(0, L), L = ``len(channels) - 1``; with deep supervision x(0, 1) ... x(0, L-1)
    have heads as well. Inputs are padded to a multiple of 2^L by repeating their edges, and cropped back.

    Args:
        in_channels: channels of the image.
        num_outputs: channels K of the logits.
        deep_supervision: one head for each node x(0, j) instead of the last one only.
        channels: width of each resolution, finest first; at least two.
        depth: L, with the finest L + 1 of `channels`; None takes all of them.
        init: rule of the initial weights (see `initialise`).
        published_weights: a state dict of the published implementation, with which to begin (see `load_published`).

    Raises:
        MedvisionError: fewer than two resolutions, a depth that they do not have, an unknown rule, or a file of
            other weights.
    """

    depth: int

    def __init__(
        self,
        in_channels: int = 3,
        num_outputs: int = 1,
        deep_supervision: bool = False,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        depth: int | None = None,
        init: str = "none",
        published_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise MedvisionError(f"UNetPP needs at least two channel widths, got channels={tuple(channels)}.")
        self.deep_supervision = deep_supervision
        self.depth = len(channels) - 1 if depth is None else depth
        _require_depth(self.depth, len(channels) - 1)
        self.channels = channels = tuple(channels[: self.depth + 1])
        self.stride = 2**self.depth
        self.nodes = nn.ModuleDict()
        for i, width in enumerate(channels):
            self.nodes[f"x{i}_0"] = Node(channels[i - 1] if i else in_channels, width)
            for j in range(1, len(channels) - i):
                self.nodes[f"x{i}_{j}"] = Node(j * width + channels[i + 1], width)
        self.out = nn.ModuleList(
            nn.Conv2d(channels[0], num_outputs, 1) for _ in range(self.depth if deep_supervision else 1)
        )
        initialise(self, init)
        if published_weights is not None:
            load_published(self, published_weights)

    def prune(self, depth: int) -> "UNetPP":
        """The network that answers by the head of x(0, depth), made of the nodes x(i, j) with i + j <= depth alone.

        This is the paper's pruning (section 3.3). Both share their parameters. It pads as the whole network does,
        whose head then answers exactly the same.

        Args:
            depth: 1 to L.

        Raises:
            MedvisionError: there is no such head.
        """
        if not self.deep_supervision:
            raise MedvisionError(
                "This U-Net++ has a head on its deepest node only, so it cannot be pruned: train it with "
                f"model.deep_supervision=true; or train a small one with model.depth={depth}."
            )
        _require_depth(depth, self.depth)
        with torch.device("meta"):  # no weights are drawn: all of them are replaced
            pruned = UNetPP(channels=self.channels, depth=depth)
        pruned.nodes = nn.ModuleDict({name: self.nodes[name] for name in pruned.nodes})
        pruned.out = nn.ModuleList([self.out[self.depth - depth]])
        pruned.stride = self.stride
        return pruned.train(self.training)

    def published_prefixes(self) -> dict[str, str | None]:
        """Prefixes of the published implementation's keys and what they are called here."""
        names: dict[str, str | None] = {f"conv{name[1:]}.": f"nodes.{name}." for name in self.nodes}
        if self.deep_supervision:
            return names | {f"final{self.depth - i}.": f"out.{i}." for i in range(self.depth)}
        return names | {"final.": "out.0."}

    def _top_row(self, image: Tensor) -> list[Tensor]:
        """Features of x(0, 1) ... x(0, L) on the padded image."""
        x = channels_last(pad_to_multiple(image, self.stride))
        rows: list[list[Tensor]] = []
        for i in range(self.depth + 1):
            rows.append([self.nodes[f"x{i}_0"](F.max_pool2d(x, 2) if i else x)])
            x = rows[i][0]
            # A new resolution completes the diagonal of nodes above it.
            for j in range(1, i + 1):
                above, below = rows[i - j], rows[i - j + 1][j - 1]
                up = F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=True)
                above.append(self.nodes[f"x{i - j}_{j}"](torch.cat([*above, up], dim=1)))
        return rows[0][1:]

    def heads(self, image: Tensor) -> list[Tensor]:
        """Logits of every head, main (deepest) first, in training and in evaluation.

        Args:
            image: (N, C, H, W), normalised.

        Returns:
            Tensors (N, K, H, W): L of them with deep supervision, else one.
        """
        row = reversed(self._top_row(image))
        return [crop_like(head(node), image) for head, node in zip(self.out, row, strict=False)]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Segment a batch.

        Args:
            image: (N, C, H, W), normalised; any height and width.

        Returns:
            Logits (N, K, H, W), unbounded; while training with deep supervision the list of `heads`.
        """
        if self.training and self.deep_supervision:
            return self.heads(image)
        return crop_like(self.out[0](self._top_row(image)[-1]), image)


def _require_depth(depth: object, deepest: int) -> None:
    whole_number("depth", depth)
    if not isinstance(depth, int) or depth > deepest:
        raise MedvisionError(f"model.depth={depth} is impossible: this U-Net++ has depths 1 to {deepest}.")
