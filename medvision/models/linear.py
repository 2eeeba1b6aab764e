"""Linear layers that a CPU computes as fast as convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN_OVER_MKL = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
SMALL = 20480  # values of an image up to which PyTorch convolves without oneDNN


class Linear(nn.Linear):
    """`nn.Linear`, (..., in) -> (..., out), whose float32 product on a CPU is oneDNN's instead of MKL's.

    On an AMD EPYC with AVX-512 that is twice as fast. Weights, and results but for rounding, are those of `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply weight and bias."""
        rows = input.reshape(-1, self.in_features)
        # oneDNN reorders its filters in each call, so the smaller factor serves as filters.
        swapped = rows.shape[0] < self.out_features
        pixels, filters = (self.weight, rows) if swapped else (rows, self.weight)
        if (
            not ONEDNN_OVER_MKL
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or pixels.numel() <= SMALL
        ):
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


def use_fast_linear(network: nn.Module) -> None:
    """Let every `nn.Linear` of a network be a `Linear`; weights and their names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
