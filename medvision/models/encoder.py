"""What networks with an encoder share: it can be pretrained, and frozen."""

from typing import Self

import torch
from torch import Tensor, nn

from medvision.models.cpu import suit_cpu
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

    def layers(self, image: Tensor) -> list[list[tuple[str, nn.Parameter]]]:
        """All parameters by layer, as the image passes them: those before the first block, each block, all the rest.

        A block is what a list of the encoder repeats: a residual or a transformer block, or else a convolution. With
        it is what leads to it from the block before, such as a downsampling; with the last one, what follows it in the
        encoder. The rest are decoder and head, or the head of a classifier. These are the layers of ELECTRA
        (https://arxiv.org/abs/2003.10555) and BEiT (https://arxiv.org/abs/2106.08254).

        Args:
            image: (N, C, H, W), of a size to train on. The network is run on it once: libraries do not say in which
                order an encoder uses its parts.

        Returns:
            (name, parameter) of each parameter, once, in a list for each layer; none is empty.
        """
        encoder = self.get_submodule(self.encoder_at)
        blocks = _blocks(encoder)
        holders = [m for m in encoder.modules() if m in blocks or any(True for _ in m.parameters(recurse=False))]
        # A block is called as a whole or through its parts; either says when it has its turn.
        block_of = {part: block for block in blocks for part in block.modules()}
        turns: dict[nn.Module, None] = {}

        def note(holder: nn.Module, _: object) -> None:
            turns.setdefault(block_of.get(holder, holder))

        hooks = [holder.register_forward_pre_hook(note) for holder in holders]
        training = self.training
        try:
            with torch.no_grad():
                self.eval().forward(image)
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        layers: list[list[nn.Parameter]] = [[]]
        between: list[nn.Parameter] = []
        for module in turns:
            between += module.parameters(recurse=module in blocks)
            if module in blocks:
                layers.append(between)
                between = []
            elif len(layers) == 1:
                layers[0] += between
                between = []
        # What was not used, such as a level that the decoder does not ask for, gets no gradient anyway.
        layers[-1] += [*between, *encoder.parameters()]
        layers.append([*self.parameters()])
        left = {parameter: name for name, parameter in self.named_parameters()}
        named = [[(left.pop(p), p) for p in layer if p in left] for layer in layers]
        return [layer for layer in named if layer]

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
        encoder = suit_cpu(self.get_submodule(self.encoder_at))
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


def _blocks(encoder: nn.Module) -> set[nn.Module]:
    """The innermost modules that stand in a list of modules and are made of layers; without any, single layers."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    elements = {child for module in encoder.modules() if isinstance(module, lists) for child in module.children()}
    convolved = {module for module in elements if _weighs(module)}
    made = {m for m in convolved if not isinstance(m, lists) and any(_weighs(child) for child in m.children())}
    inner = {module for module in made if made.isdisjoint([*module.modules()][1:])}
    return inner or {module for module in convolved if not any(module.children())}


def _weighs(module: nn.Module) -> bool:
    """Whether it has a matrix or kernel, as no norm has."""
    return any(parameter.ndim > 1 for parameter in module.parameters())
