"""The same results sooner on a CPU: memory layout, and layers of encoders computed another way.

Weights and their names stay.
"""

import timm.models.pvt_v2 as pvt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ONEDNN_OVER_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
SMALL = 20480  # values of an image up to which PyTorch convolves without oneDNN


def channels_last(image: Tensor) -> Tensor:
    """An image (N, C, H, W) with its channels last in memory if it is on a CPU, else as it is.

    Convolution, batch normalisation, pooling and upsampling keep that layout, and are faster with it in float32 too.
    """
    return image.contiguous(memory_format=torch.channels_last) if image.device.type == "cpu" else image


class Linear(nn.Linear):
    """`nn.Linear`, (..., in) -> (..., out), whose float32 product on a CPU is oneDNN's instead of MKL's.

    On an AMD EPYC with AVX-512 that is twice as fast. Weights, and results but for rounding, are those of `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply weight and bias."""
        if (
            not ONEDNN_OVER_MKL
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()  # or exporting: no choice below may depend on the batch then
        ):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        # oneDNN reorders its filters in each call, so the smaller factor serves as filters.
        swapped = rows.shape[0] < self.out_features
        pixels, filters = (self.weight, rows) if swapped else (rows, self.weight)
        if pixels.numel() <= SMALL:
            return F.linear(input, self.weight, self.bias)
        # One image with channels last, and 1x1 filters. Their dilation changes nothing but what PyTorch chooses: on
        # one thread it leaves undilated 1x1 convolutions to MKL.
        image = pixels.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        out = F.conv2d(image, filters[..., None, None], None if swapped else self.bias, dilation=2)
        out = out.permute(0, 2, 3, 1).reshape(len(pixels), len(filters))
        if swapped:
            out = out.t().contiguous()
            out = out if self.bias is None else out + self.bias
        return out.reshape(*input.shape[:-1], self.out_features)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that takes patches side by side, as patch embeddings do, as a linear layer of each in bfloat16.

    Under autocast on a CPU that is three times as fast. Weights, and results but for rounding, are those of
    `nn.Conv2d`, which also does all else.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C, H, W)."""
        side = self.stride
        apart = self.kernel_size == side != (1, 1) and self.groups == 1 and self.padding == (0, 0)
        whole = input.shape[-2] % side[0] == input.shape[-1] % side[1] == 0
        here = input.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        if not (apart and whole and here and self.dilation == (1, 1)):
            return super().forward(input)
        (batch, channels, height, width), (high, wide) = input.shape, side
        pixels = input.permute(0, 2, 3, 1)
        patches = pixels.reshape(batch, height // high, high, width // wide, wide, channels).transpose(2, 3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.flatten(3), weight, self.bias).permute(0, 3, 1, 2)


class Attention(pvt.Attention):
    """PVTv2's attention, whose scores are products of their own in bfloat16 on a CPU.

    They are few, for keys are reduced, and PyTorch's fused attention is 3 to 5 times slower there.
    """

    @property
    def fused_attn(self) -> bool:
        """Whether timm calls the fused attention."""
        return not (self.q.weight.device.type == "cpu" and torch.is_autocast_enabled("cpu"))


class Stage(pvt.PyramidVisionTransformerStage):
    """A stage of PVTv2 whose features (N, C, H, W) keep the layout of its tokens, channels last, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches, attend, normalise."""
        if self.downsample is not None:
            x = self.downsample(x)
        size = x.shape[1:3]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, size, use_reentrant=False) if self.grad_checkpointing else block(x, size)
        features: Tensor = self.norm(x).unflatten(1, size).permute(0, 3, 1, 2)
        return features


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    pvt.Attention: Attention,
    pvt.PyramidVisionTransformerStage: Stage,
}


def suit_cpu(network: nn.Module) -> nn.Module:
    """Give the layers of a network the forward passes of this file, in place.

    Returns:
        The network.
    """
    for module in network.modules():
        module.__class__ = FASTER.get(type(module), type(module))
    return network
