"""Two images in one: mixup and CutMix of a batch."""

import torch
from torch import Tensor


def mix(image: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, float]:
    """Mixes each image of a batch with another, all in the same way, by torch's generator.

    The loss of what comes is the first image's times its share, plus the other's times the rest.

    Args:
        image: (N, C, H, W).
        mixup: alpha above 0: both images are blended, in shares drawn from Beta(alpha, alpha) (Zhang et al. 2018,
            arXiv:1710.09412).
        cutmix: alpha above 0: a box of one, of an area drawn so, covers the other (Yun et al. 2019, arXiv:1905.04899).
            With both above 0 it is one or the other, with equal odds.

    Returns:
        The mixed images; for each the number of the one mixed in; what share each has of its own image, at least 0.5:
        which of a pair is called the first says nothing, so it is the larger.
    """
    height, width = image.shape[-2:]
    boxes = cutmix > 0 and (mixup == 0 or bool(torch.rand(()) < 0.5))
    alpha = cutmix if boxes else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    share = max(share, 1 - share)
    order = torch.randperm(len(image)).to(image.device)
    if not boxes:
        return share * image + (1 - share) * image[order], order, share
    side = (1 - share) ** 0.5
    high, wide = round(side * height), round(side * width)
    top, left = (int(torch.randint(0, room + 1, ())) for room in (height - high, width - wide))
    mixed = image.clone()
    mixed[..., top : top + high, left : left + wide] = image[order][..., top : top + high, left : left + wide]
    return mixed, order, 1 - high * wide / (height * width)
