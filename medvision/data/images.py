"""The one reader of images and masks, and the one way to resize them.

Pillow, since OpenCV returns half-decoded pictures of truncated files without an error and turns EXIF-rotated
images but not their masks.
"""

import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from medvision.data.source import Member
from medvision.errors import MedvisionError

Pixels = NDArray[np.uint8]


def read_image(member: Member, channels: int) -> Pixels:
    """Reads an image of any common mode; EXIF rotation is applied, an alpha channel dropped, 16 bits scaled to 8.

    Args:
        member: The file.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 of shape (H, W, channels).

    Raises:
        MedvisionError: If the file is truncated or no image.
    """
    return _pixels(_decode(member), channels)


def to_channels(image: Pixels, channels: int) -> Pixels:
    """Grey as RGB, RGB as grey: (H, W, 1 or 3) to (H, W, channels)."""
    if image.shape[2] == channels:
        return image
    return _pixels(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), channels)


def read_mask(member: Member) -> tuple[NDArray[np.bool_], int]:
    """Reads a mask of any common mode: what is brighter than half of white, or 1 where the mask holds 0 and 1 only.

    Returns:
        bool of shape (H, W); and the number of pixels that are neither black nor the mask's brightest value.

    Raises:
        MedvisionError: If the file is truncated or no image.
    """
    image = _decode(member)
    # a palette is seen in its colours, as a viewer shows it; a pure colour is as bright as its brightest channel
    grey = np.asarray(image) if image.mode == "L" else np.asarray(image.convert("RGB")).max(-1)
    top = grey.max(initial=0)
    return grey > (0 if top <= 1 else 127), int(np.count_nonzero((grey > 0) & (grey < top)))


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes (H, W, C) to `size` (height, width), averaging where it shrinks."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    method = cv2.INTER_AREA if size[0] <= height and size[1] <= width else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size[::-1], interpolation=method), np.uint8).reshape(*size, image.shape[2])


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resizes (H, W): a new pixel is set where at least half of its area is."""
    grey = resize_image(mask.astype(np.uint8)[..., None] * np.uint8(255), size)
    result: NDArray[np.bool_] = grey[..., 0] > 127
    return result


class Normalise:
    """uint8 (H, W, C) to float32 (C, H, W) with the training split's mean 0 and standard deviation 1.

    Args:
        mean: Of each channel over the training split, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
    """

    def __init__(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
        self.scale, self.offset = (1 / (255 * std)).astype(np.float32), (mean / std).astype(np.float32)

    def __call__(self, image: Pixels) -> NDArray[np.float32]:
        """The normalised image."""
        planes = image.transpose(2, 0, 1)
        result = np.empty(planes.shape, np.float32)  # filled in place: faster than arrays for each step, same bits
        np.multiply(planes, self.scale[:, None, None], out=result)
        np.subtract(result, self.offset[:, None, None], out=result)
        return result


def _pixels(image: Image.Image, channels: int) -> Pixels:
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _decode(member: Member) -> Image.Image:
    data = member.read()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "LAB":  # Pillow has no way from there to grey
                upright = upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        unknown = isinstance(error, UnidentifiedImageError)  # which tells of an object in memory
        why = f"of no format that is known, {len(data)} bytes" if unknown else f"{type(error).__name__}: {error}"
        raise MedvisionError(
            f"{member} cannot be decoded ({why}); expected a whole PNG, JPEG, TIFF or BMP: fetch it again"
        ) from None
    if upright.mode.startswith("I") or upright.mode == "F":
        return _to_8_bits(upright, member)
    return upright


def _to_8_bits(image: Image.Image, member: Member) -> Image.Image:
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535 or not np.array_equal(values, np.round(values)):
        raise MedvisionError(f"{member} has values from {low:g} to {high:g}; expected 8 or 16 bits, whole numbers")
    scale = 257 if high > 255 else 1
    return Image.fromarray(np.round(values / scale).astype(np.uint8))
