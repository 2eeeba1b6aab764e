"""What networks with an encoder share: it can be pretrained, and frozen."""

from typing import Self

import torch
from torch import Tensor, nn

from medvision.models.initialise import initialise
from medvision.models.network import Network
from medvision.models.options import whole_number


class EncoderModel(Network):
    """A network whose encoder can be frozen: training then moves neither its weights nor its running statistics.

    A frozen encoder stays in evaluation mode, so norms, dropout and stochastic depth act as in evaluation.

    Attributes:
        frozen: whether the encoder is frozen now.
    """

    encoder_at = "encoder"  # where a subclass keeps it
    frozen = False

    def start_epoch(self, epoch: int) -> None:
        """Freeze the encoder until the epoch that ``freeze_encoder`` names, if it names one; thaw it from then on.

        The optimizer must exist before and hold the encoder's parameters: frozen ones get no gradient, and it leaves
        them alone. DistributedDataParallel then needs ``find_unused_parameters``.

        Args:
            epoch: the one that begins, counted from 1.
        """
        if not isinstance(self._freeze_encoder, bool):
            self._freeze(epoch < self._freeze_encoder)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.get_submodule(self.encoder_at).eval()
        return self

    def _begin(self, init: str, pretrained: bool, freeze_encoder: bool | int) -> None:
        """Finish the construction.

        Args:
            init: see `initialise`; a pretrained encoder keeps its weights.
            pretrained: whether the encoder is.
            freeze_encoder: False, True, or the epoch, counted from 1, at whose start `start_epoch` thaws it.

        Raises:
            MedvisionError: an unknown rule, or no epoch.
        """
        if not isinstance(freeze_encoder, bool):
            whole_number("freeze_encoder", freeze_encoder)
        encoder = self.get_submodule(self.encoder_at)
        initialise(self, init, skip=encoder if pretrained else None)
        self._freeze_encoder = freeze_encoder
        # Libraries fix some parameters, such as position codes, for good.
        self._freezable = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
        self._freeze(freeze_encoder is True)

    def _freeze(self, frozen: bool) -> None:
        if frozen == self.frozen:
            return
        self.frozen = frozen
        encoder = self.get_submodule(self.encoder_at)
        for name in self._freezable:
            encoder.get_parameter(name).requires_grad_(not frozen)
        self.train(self.training)


def fix_unused(module: nn.Module, image: Tensor) -> None:
    """Take parameters that no answer depends on out of training, such as deep stages of an encoder used in part.

    Weight decay would move them for nothing, and DistributedDataParallel would wait for their gradients.

    Args:
        module: an encoder or a network, in evaluation mode.
        image: (1, C, H, W), of a size that it takes.
    """
    if torch.is_inference_mode_enabled():  # nothing is trained that is made there
        return
    with torch.enable_grad():
        answer = module(image)
        total = torch.stack([part.sum() for part in ([answer] if isinstance(answer, Tensor) else answer)]).sum()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
