"""Augmentation of an image and its mask; the only file that knows albumentations."""

import os
import random
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision.errors import MedvisionError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network at import

import albumentations as A
import cv2

Pixels = NDArray[np.uint8]


class Augment:
    """Random flips, turns, scaling, elastic deformation, colour, blur and noise; the geometry is the mask's too.

    Every strength may be 0, which leaves that operation out. A call is a function of its arguments alone.

    Args:
        flip: Mirror each axis with probability one half and turn by multiples of 90 degrees.
        rotate: Largest angle, degrees.
        shift: Largest shift, as a share of the image.
        scale: Largest relative change of size.
        elastic: Strength of the elastic deformation, pixels, applied to three images in ten.
        brightness: Largest relative change of brightness and contrast.
        hue: Largest shift of the hue, degrees of 180; RGB images only.
        saturation: Largest relative change of saturation; RGB images only.
        blur: Largest side of the Gaussian blur's kernel, pixels, applied to two images in ten.
        noise: Largest standard deviation of added noise, in [0, 1], applied to two images in ten.
        dropout: Largest side of up to four erased squares, as a share of the image; the mask is kept.

    Raises:
        MedvisionError: If a strength is negative.
    """

    def __init__(
        self,
        flip: bool = True,
        rotate: float = 0,
        shift: float = 0,
        scale: float = 0,
        elastic: float = 0,
        brightness: float = 0,
        hue: float = 0,
        saturation: float = 0,
        blur: int = 0,
        noise: float = 0,
        dropout: float = 0,
    ) -> None:
        strengths = {k: v for k, v in locals().items() if k not in ("self", "flip")}
        for name, value in strengths.items():
            if value < 0:
                raise MedvisionError(f"augment.{name} is {value}; expected 0 (off) or more")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns of an argument that it does not know
            geometry = self._geometry(flip, rotate, shift, scale, elastic)
            colour = self._colour(brightness, blur, noise, dropout)
            rgb = self._rgb(hue, saturation)
            self._pipelines = {1: A.Compose(geometry + colour), 3: A.Compose(geometry + rgb + colour)}

    @staticmethod
    def _geometry(flip: bool, rotate: float, shift: float, scale: float, elastic: float) -> list[Any]:
        ops: list[Any] = []
        if flip:
            # turning by 90 degrees would change the shape of a non-square image: two mirrors and a transposition
            # of square ones only are the symmetries that keep it
            ops += [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), _TransposeSquare(p=0.5)]
        border = {"border_mode": cv2.BORDER_REFLECT_101}
        if rotate or shift or scale:
            ops.append(
                A.Affine(
                    rotate=(-rotate, rotate),
                    translate_percent=(-shift, shift),
                    scale=(1 - scale, 1 + scale),
                    p=0.9,
                    **border,
                )
            )
        if elastic:
            ops.append(A.ElasticTransform(alpha=elastic * 10, sigma=10, p=0.3, **border))
        return ops

    @staticmethod
    def _colour(brightness: float, blur: int, noise: float, dropout: float) -> list[Any]:
        ops: list[Any] = []
        if brightness:
            limits = (-brightness, brightness)
            ops.append(A.RandomBrightnessContrast(brightness_limit=limits, contrast_limit=limits, p=0.7))
        if blur:
            ops.append(A.GaussianBlur(blur_limit=(3, max(3, blur | 1)), p=0.2))
        if noise:
            ops.append(A.GaussNoise(std_range=(0, noise), p=0.2))
        if dropout:
            side = (dropout / 4, dropout)
            ops.append(
                A.CoarseDropout(
                    num_holes_range=(1, 4),
                    hole_height_range=side,
                    hole_width_range=side,
                    fill_mask=None,
                    p=0.3,
                )
            )
        return ops

    @staticmethod
    def _rgb(hue: float, saturation: float) -> list[Any]:
        if not hue and not saturation:
            return []
        percent = 255 * saturation
        return [A.HueSaturationValue((-hue, hue), (-percent, percent), (0, 0), p=0.5)]

    def __call__(self, image: Pixels, mask: Pixels, seed: int) -> tuple[Pixels, Pixels]:
        """Augments one sample.

        Args:
            image: uint8 (H, W, C), C being 1 or 3.
            mask: uint8 (H, W, K) of 0 and 1; K may be 0.
            seed: Decides everything that is drawn.

        Returns:
            Image and mask of the same shapes and value ranges.
        """
        pipeline = self._pipelines[image.shape[2]]
        # one stream for all operations: set_random_seed would start each from the same number, and flips that are
        # drawn alike are no flips but one rotation
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        if not mask.size:  # labels instead of masks
            return pipeline(image=image)["image"].reshape(image.shape), mask
        result = pipeline(image=image, mask=mask)
        return result["image"].reshape(image.shape), result["mask"].reshape(mask.shape)


class _TransposeSquare(A.Transpose):
    """Transposition that leaves non-square images as they are."""

    def apply(self, img: Any, **params: Any) -> Any:
        return super().apply(img, **params) if img.shape[0] == img.shape[1] else img

    def apply_to_mask(self, mask: Any, **params: Any) -> Any:
        return super().apply_to_mask(mask, **params) if mask.shape[0] == mask.shape[1] else mask
