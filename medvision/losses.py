"""Losses: for masks a weighted sum of named terms, and deep supervision around any; for labels cross-entropy.

A term takes logits and a target of 0 and 1, both (N, K, H, W), and gives a loss for each image and class, (N, K).

An empty target, a class that an image does not show: `bce`, `focal` and `lovasz` see each false positive, or the worst
one, by themselves. One minus an overlap does not: it is close to 1 whatever is predicted, and its gradient vanishes.
There `dice`, `jaccard`, `tversky`, `focal_tversky` and the overlap in `structure` are the mean probability of the plane
instead, the soft Jaccard loss of its background: 0 if nothing is predicted, 1 if all is, and each pixel counts alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvision.errors import MedvisionError

PLANE = (-2, -1)


def _or_area(loss: Tensor, probability: Tensor, target: Tensor) -> Tensor:
    """One minus an overlap; for an empty target the mean probability."""
    return torch.where(target.sum(PLANE) > 0, loss, probability.mean(PLANE))


def bce(logits: Tensor, target: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the pixels; positives of class k count `positive_weights[k]`.

    On an empty target each pixel costs `-log(1 - p)`.
    """
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive_weights, reduction="none").mean(PLANE)


def dice(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """Soft Dice loss, one minus Dice (Milletari et al. 2016, arXiv:1606.04797).

    On an empty target it is the mean probability.
    """
    probability = logits.sigmoid()
    overlap = (probability * target).sum(PLANE)
    total = probability.sum(PLANE) + target.sum(PLANE)
    return _or_area(1 - (2 * overlap + smooth) / (total + smooth), probability, target)


def jaccard(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """Soft Jaccard loss, one minus intersection over union (Rahman & Wang 2016, doi:10.1007/978-3-319-50835-1_22).

    On an empty target it is the mean probability.
    """
    return tversky(logits, target, alpha=1, beta=1, smooth=smooth)


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz hinge (Berman et al. 2018, arXiv:1705.08790).

    On an empty target it is the largest margin error of any pixel: the worst false positive is seen, the next one as
    soon as that has fallen below it.
    """
    scores, truth = logits.flatten(2), target.flatten(2)
    errors, order = (1 - scores * (2 * truth - 1)).sort(dim=-1, descending=True)
    truth = truth.gather(-1, order)
    # Jaccard loss if the pixels with the i+1 largest errors were all wrong; its steps weigh the errors
    positives = truth.sum(-1, keepdim=True)
    wrong = 1 - (positives - truth.cumsum(-1)) / (positives + (1 - truth).cumsum(-1))
    steps = torch.diff(wrong, dim=-1, prepend=torch.zeros_like(wrong[..., :1]))
    return (errors.relu() * steps).sum(-1)


def focal(
    logits: Tensor,
    target: Tensor,
    positive_weights: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
) -> Tensor:
    """Focal loss (Lin et al. 2017, arXiv:1708.02002), mean over the pixels.

    The cross-entropy of a pixel times `(1 - p) ** gamma`, where p is the probability of what is true there. On an empty
    target each pixel costs that much, a sure false positive as much as in `bce` times one minus `alpha`.

    Args:
        logits: (N, K, H, W).
        target: 0 and 1, the same shape.
        positive_weights: What positives of each class count besides, as in `bce`.
        gamma: How little the pixels count that are right already; 0 is cross-entropy.
        alpha: Weight of positives, negatives have one minus it; None weighs both 1.
    """
    loss = _doubt(F.logsigmoid(logits * (1 - 2 * target)), gamma)
    loss = loss * F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive_weights, reduction="none")
    if alpha is not None:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss.mean(PLANE)


def _doubt(wrong: Tensor, gamma: float) -> Tensor:
    """`(1 - p) ** gamma` of log(1 - p): by its logarithm gradients are finite for any gamma and logit."""
    return (gamma * wrong).exp()


def tversky(logits: Tensor, target: Tensor, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1e-5) -> Tensor:
    """Tversky loss, one minus TP / (TP + alpha FP + beta FN), all soft (Salehi et al. 2017, arXiv:1706.05721).

    Both one half is the Dice loss, both 1 the Jaccard loss. On an empty target it is the mean probability, whatever
    `alpha` and `beta` are.
    """
    probability = logits.sigmoid()
    hit = (probability * target).sum(PLANE)
    wrong = alpha * (probability * (1 - target)).sum(PLANE) + beta * ((1 - probability) * target).sum(PLANE)
    return _or_area(wrong / (hit + wrong + smooth), probability, target)  # one minus (hit + smooth) / (...)


def focal_tversky(
    logits: Tensor, target: Tensor, alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, smooth: float = 1e-5
) -> Tensor:
    """`tversky` to the power `gamma` (Abraham & Khan 2019, arXiv:1810.07842).

    Below 1 it tells more between planes that are nearly right, above 1 between those that are wrong. The paper writes
    1 / gamma, with 4/3, and alpha for false negatives. On an empty target it is the mean probability to that power.
    """
    loss = tversky(logits, target, alpha, beta, smooth)
    return loss.clamp(min=torch.finfo(loss.dtype).tiny) ** gamma  # no power of 0, whose slope is infinite


def structure(
    logits: Tensor, target: Tensor, positive_weights: Tensor | None = None, window: int = 31, boundary: float = 5.0
) -> Tensor:
    """Cross-entropy plus one minus Jaccard, both with more weight at edges (Wei et al. 2020, arXiv:1911.11445).

    A pixel weighs `1 + boundary * |a - target|`, where a is the mean target in a window around it, 0 beyond the image.
    The cross-entropy is the weighted mean that the paper means; published code, U-Net v2's among it, weighs only the
    overlap. On an empty target all weights are 1: `bce` plus the mean probability.

    Args:
        logits: (N, K, H, W).
        target: 0 and 1, the same shape.
        positive_weights: What positives of each class count in the cross-entropy besides, as in `bce`.
        window: Side of the window, an odd number of pixels.
        boundary: What a pixel weighs more whose surroundings are all of the other kind.
    """
    reach = window // 2
    mean = F.avg_pool2d(target, (window, 1), 1, (reach, 0))  # rows, then columns: as the square, in less time
    mean = F.avg_pool2d(mean, (1, window), 1, (0, reach))
    weight = 1 + boundary * (mean - target).abs()
    entropy = F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive_weights, reduction="none")
    entropy = (weight * entropy).sum(PLANE) / weight.sum(PLANE)
    probability = logits.sigmoid()
    overlap = (weight * probability * target).sum(PLANE)
    total = (weight * (probability + target)).sum(PLANE)
    return entropy + _or_area(1 - (overlap + 1) / (total - overlap + 1), probability, target)


TERMS: Mapping[str, Callable[..., Tensor]] = {
    "bce": bce,
    "dice": dice,
    "jaccard": jaccard,
    "lovasz": lovasz,
    "focal": focal,
    "tversky": tversky,
    "focal_tversky": focal_tversky,
    "structure": structure,
}
WITH_POSITIVE_WEIGHTS = ("bce", "focal", "structure")

Rule = tuple[str, Callable[[Any], bool]]
ABOVE_0: Rule = ("a number above 0", lambda value: value > 0)
FROM_0: Rule = ("a number of 0 or more", lambda value: value >= 0)
OPTIONS: Mapping[str, Mapping[str, Rule]] = {
    "focal": {
        "gamma": FROM_0,
        "alpha": ("None or a number between 0 and 1", lambda value: value is None or 0 < value < 1),
    },
    "tversky": {"alpha": ABOVE_0, "beta": ABOVE_0},
    "focal_tversky": {"alpha": ABOVE_0, "beta": ABOVE_0, "gamma": ABOVE_0},
    "structure": {
        "window": ("an odd int above 0", lambda value: isinstance(value, int) and value > 0 and value % 2 == 1),
        "boundary": FROM_0,
    },
}


class _Weighted(nn.Module):
    """What losses with weights of classes and of their positives share; the config has these, no checkpoint.

    Args:
        positive_weights: Of each class, checked by the loss itself.
        class_weights: Of each of two or more classes.

    Raises:
        MedvisionError: If class weights would have no effect.
    """

    positive_weights: Tensor | None
    class_weights: Tensor | None

    def __init__(self, positive_weights: Sequence[float] | None, class_weights: Sequence[float] | None) -> None:
        super().__init__()
        if class_weights is not None and (len(class_weights) < 2 or min(class_weights) < 0 or not any(class_weights)):
            raise MedvisionError(
                f"loss.class_weights is {list(class_weights)}; expected a number of 0 or more for each of two or more "
                "classes, one of them above 0; what positives count in a class, loss.positive_weights says"
            )
        positive, classes = (
            None if weights is None else torch.tensor(weights, dtype=torch.float32)
            for weights in (positive_weights, class_weights)
        )
        self.register_buffer("positive_weights", positive, False)
        self.register_buffer("class_weights", None if classes is None else classes / classes.mean(), False)

    def _require_fit(self, classes: int) -> None:
        """Refuses weights of another number of classes than the model has."""
        for name in ("positive_weights", "class_weights"):
            weights = getattr(self, name)
            if weights is not None and len(weights) != classes:
                raise MedvisionError(
                    f"loss.{name} has {len(weights)} numbers, the model {classes} classes; give one for each"
                )


class SegmentationLoss(_Weighted):
    """A weighted sum of terms, each the mean over images and classes, computed in float32.

    Args:
        terms: Weight of each of `bce`, `dice`, `jaccard`, `lovasz`, `focal`, `tversky`, `focal_tversky`, `structure`;
            0 leaves a term out.
        positive_weights: For each class, what a positive pixel counts in `bce`, `focal` and the cross-entropy of
            `structure` against a negative one; None is 1.
        class_weights: What each class counts in the mean over the classes, of two or more; None is the plain mean.
        options: Parameters of the terms by name, as `{"focal": {"gamma": 3}}`; the others keep their defaults.

    Raises:
        MedvisionError: If a term or option is unknown, a value out of its range, no term's weight above 0, or
            `positive_weights` or `class_weights` would have no effect.
    """

    target = "mask"

    def __init__(
        self,
        terms: Mapping[str, float],
        positive_weights: Sequence[float] | None = None,
        class_weights: Sequence[float] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(positive_weights, class_weights)
        if unknown := sorted(terms.keys() - TERMS.keys()):
            raise MedvisionError(f"loss.terms names {unknown}; expected some of {sorted(TERMS)}")
        if min(terms.values(), default=0) < 0 or not any(terms.values()):
            raise MedvisionError(f"loss.terms is {dict(terms)}; expected weights of 0 or more, one of them above 0")
        self.terms = {name: weight for name, weight in terms.items() if weight}
        self.options = {name: dict(values) for name, values in (options or {}).items()}
        for name, values in self.options.items():
            for option, value in values.items():
                _check_option(name, option, value)
        if positive_weights is not None and (
            self.terms.keys().isdisjoint(WITH_POSITIVE_WEIGHTS) or min(positive_weights, default=0) <= 0
        ):
            raise MedvisionError(
                f"loss.positive_weights is {list(positive_weights)}; expected numbers above 0, and a loss with bce, "
                f"focal or structure in it, this one has {sorted(self.terms)}"
            )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (N, K, H, W) against a target (N, K, H, W) of 0 and 1; a scalar.

        Raises:
            MedvisionError: If there are not as many positive or class weights as classes.
        """
        self._require_fit(logits.shape[1])
        logits, target = logits.float(), target.float()
        losses = [weight * self._term(name, logits, target) for name, weight in self.terms.items()]
        planes = torch.stack(losses).sum(0)
        return (planes if self.class_weights is None else planes * self.class_weights).mean()

    def _term(self, name: str, logits: Tensor, target: Tensor) -> Tensor:
        options = self.options.get(name, {})
        if name in WITH_POSITIVE_WEIGHTS:
            over_planes = None if self.positive_weights is None else self.positive_weights[:, None, None]
            options = {**options, "positive_weights": over_planes}
        return TERMS[name](logits, target, **options)


def _check_option(name: str, option: str, value: Any) -> None:
    if option not in OPTIONS.get(name, {}):
        known = [f"{term}.{o}" for term, rules in OPTIONS.items() for o in rules]
        raise MedvisionError(f"loss.options names {name}.{option}; expected some of {known}")
    expected, holds = OPTIONS[name][option]
    if not holds(value):
        raise MedvisionError(f"loss.options.{name}.{option} is {value}; expected {expected}")


class CrossEntropy(_Weighted):
    """Cross-entropy of labels with smoothing (Szegedy et al. 2016, arXiv:1512.00567), computed in float32.

    Class numbers are compared by a softmax over the classes, targets of 0 and 1 by a sigmoid for each class. An image
    that shows no class costs `-log(1 - p)` for each.

    Args:
        label_smoothing: What share of the truth is spread evenly: over all classes, or over there and not there.
        gamma: Of the focal loss (Lin et al. 2017, arXiv:1708.02002): an image counts `(1 - p) ** gamma`, where p is the
            probability of what is true; with a sigmoid, in each class by itself. 0 is cross-entropy.
        positive_weights: With a sigmoid: what an image that shows class k counts against one that does not; None is 1.
        class_weights: What each of two or more classes counts; None is all the same.

    Raises:
        MedvisionError: If a value is out of its range.
    """

    target = "label"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        positive_weights: Sequence[float] | None = None,
        class_weights: Sequence[float] | None = None,
        gamma: float = 0.0,
    ) -> None:
        super().__init__(positive_weights, class_weights)
        if not 0 <= label_smoothing < 1:
            raise MedvisionError(f"loss.label_smoothing is {label_smoothing}; expected a share from 0 to below 1")
        if gamma < 0:
            raise MedvisionError(f"loss.gamma is {gamma}; expected a number of 0 or more")
        if positive_weights is not None and min(positive_weights, default=0) <= 0:
            raise MedvisionError(f"loss.positive_weights is {list(positive_weights)}; expected numbers above 0")
        self.label_smoothing, self.gamma = label_smoothing, gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (N, K) against class numbers (N,) or 0 and 1 (N, K); a scalar.

        Raises:
            MedvisionError: If there are not as many weights as classes, or positive weights for class numbers.
        """
        self._require_fit(logits.shape[1])
        logits = logits.float()
        if target.ndim == 1:
            if self.positive_weights is not None:
                raise MedvisionError(
                    "loss.positive_weights weigh a class against its absence, but here each image has exactly one "
                    "class; give loss.class_weights, or data.balanced=true"
                )
            return self._of_numbers(logits, target)
        smooth = target * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=self.positive_weights, reduction="none")
        if self.gamma:
            losses = losses * _doubt(F.logsigmoid(logits * (1 - 2 * target)), self.gamma)
        return (losses if self.class_weights is None else losses * self.class_weights).mean()

    def _of_numbers(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean over images, each weighed by its class."""
        losses = F.cross_entropy(
            logits, target, self.class_weights, label_smoothing=self.label_smoothing, reduction="none"
        )
        if self.gamma:
            others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1) - logits.logsumexp(1)
            losses = losses * _doubt(others, self.gamma)
        if self.class_weights is None:
            return losses.mean()
        return losses.sum() / self.class_weights[target].sum().clamp(min=1e-9)  # a batch may hold nothing that counts


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
