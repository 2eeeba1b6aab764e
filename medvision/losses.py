"""Segmentation losses: a weighted sum of named terms, and deep supervision around any loss."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError


def bce(logits: Tensor, target: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over all pixels and classes; positives of class k count `positive_weights[k]`."""
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive_weights)


def dice(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """Soft Dice loss, one minus Dice of each image and class, then the mean (Milletari et al. 2016, arXiv:1606.04797).

    On an empty target it is close to 1 whatever is predicted, with hardly any gradient: pair it with `bce`.
    """
    probability, axes = logits.sigmoid(), (-2, -1)
    overlap = (probability * target).sum(axes)
    total = probability.sum(axes) + target.sum(axes)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz hinge of each image and class, then the mean (Berman et al. 2018, arXiv:1705.08790).

    On an empty target it is the largest margin error of any pixel, so that false positives are seen.
    """
    scores, truth = logits.flatten(2), target.flatten(2)
    errors, order = (1 - scores * (2 * truth - 1)).sort(dim=-1, descending=True)
    truth = truth.gather(-1, order)
    # Jaccard loss if the pixels with the i+1 largest errors were all wrong; its steps weigh the errors
    positives = truth.sum(-1, keepdim=True)
    jaccard = 1 - (positives - truth.cumsum(-1)) / (positives + (1 - truth).cumsum(-1))
    steps = torch.diff(jaccard, dim=-1, prepend=torch.zeros_like(jaccard[..., :1]))
    return (errors.relu() * steps).sum(-1).mean()


TERMS: Mapping[str, Callable[..., Tensor]] = {"bce": bce, "dice": dice, "lovasz": lovasz}


class SegmentationLoss(nn.Module):
    """A weighted sum of terms, computed in float32.

    Args:
        terms: Weight of each of `bce`, `dice`, `lovasz`; 0 leaves a term out.
        positive_weights: For each class, what a positive pixel counts in `bce` against a negative one; None is 1.

    Raises:
        MedvisionError: If a term is unknown, a weight negative, none above 0, or `positive_weights` has no effect.
    """

    positive_weights: Tensor | None

    def __init__(self, terms: Mapping[str, float], positive_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if unknown := sorted(terms.keys() - TERMS.keys()):
            raise MedvisionError(f"loss.terms names {unknown}; expected some of {sorted(TERMS)}")
        if min(terms.values(), default=0) < 0 or not any(terms.values()):
            raise MedvisionError(f"loss.terms is {dict(terms)}; expected weights of 0 or more, one of them above 0")
        self.terms = {name: weight for name, weight in terms.items() if weight}
        if positive_weights is not None and ("bce" not in self.terms or min(positive_weights, default=0) <= 0):
            raise MedvisionError(
                f"loss.positive_weights is {list(positive_weights)}; expected numbers above 0, and a loss with bce "
                f"in it, this one has {sorted(self.terms)}"
            )
        weights = None if positive_weights is None else torch.tensor(positive_weights, dtype=torch.float32)
        # one number for each class, over its whole plane; no part of a checkpoint, the config has them
        self.register_buffer("positive_weights", None if weights is None else weights[:, None, None], persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (N, K, H, W) against a target (N, K, H, W) of 0 and 1; a scalar."""
        logits, target = logits.float(), target.float()
        options = {"bce": {"positive_weights": self.positive_weights}}
        losses = [w * TERMS[name](logits, target, **options.get(name, {})) for name, w in self.terms.items()]
        return torch.stack(losses).sum()


class DeepSupervision(nn.Module):
    """Any loss over one output or a list of outputs (Lee et al. 2015, arXiv:1409.5185).

    Args:
        loss: The loss of one output.
        weights: A weight for each output, the main one first; None is the mean.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.loss, self.weights = loss, weights

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Weighted sum of the outputs' losses; a single output has weight 1.

        Raises:
            MedvisionError: If there are not as many weights as outputs.
        """
        if isinstance(outputs, Tensor):
            loss: Tensor = self.loss(outputs, target)
            return loss
        weights = [1 / len(outputs)] * len(outputs) if self.weights is None else self.weights
        if len(weights) != len(outputs):
            raise MedvisionError(
                f"task.supervision_weights has {len(weights)} numbers, the model {len(outputs)} outputs; "
                "give one for each, the main output first"
            )
        return torch.stack([w * self.loss(output, target) for w, output in zip(weights, outputs, strict=True)]).sum()
