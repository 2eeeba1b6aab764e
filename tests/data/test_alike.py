import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from medvision.data import alike as alike_module
from medvision.data.alike import CLOSE, alike, perceptual_hash

SIZE = (32, 32)


def picture(number: int, size: tuple[int, int] = (96, 128)) -> NDArray[np.uint8]:
    """Colours of all frequencies, low ones strongest as in photographs; another picture for each number."""
    rng = np.random.default_rng(number)
    octaves = [rng.normal(0, 60 / 2**n, (3 * 2**n, 4 * 2**n, 3)) for n in range(6)]
    mixed = sum(cv2.resize(octave, size[::-1], interpolation=cv2.INTER_CUBIC) for octave in octaves)
    return np.asarray(mixed + 120).clip(0, 255).astype(np.uint8)


def jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized(image: NDArray[np.uint8], height: int, width: int, method: int = cv2.INTER_AREA) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


def brighter(image: NDArray[np.uint8], factor: float, offset: float) -> NDArray[np.uint8]:
    return (image.astype(np.float64) * factor + offset).clip(0, 255).astype(np.uint8)


COPIES: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "smaller": lambda image: resized(image, 48, 64),
    "larger": lambda image: resized(image, 240, 320, cv2.INTER_CUBIC),
    "stretched to a square": lambda image: resized(image, 64, 64),
    "stretched in height": lambda image: resized(image, 200, 100, cv2.INTER_LINEAR),
    "jpeg": lambda image: jpeg(image, 90),
    "coarse jpeg": lambda image: jpeg(image, 30),
    "brighter": lambda image: brighter(image, 1.0, 25),
    "darker": lambda image: brighter(image, 0.7, 0),
    "more contrast": lambda image: brighter(image, 1.2, -20),
    "all of it": lambda image: jpeg(resized(brighter(image, 0.9, 10), 64, 64), 60),
    "grey": lambda image: np.dstack([image.mean(-1).round().astype(np.uint8)] * 3),
}


def as_set(*images: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    return np.stack([perceptual_hash(i) for i in images]), np.stack([resized(i, *SIZE) for i in images])


def bits(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(perceptual_hash(first) ^ perceptual_hash(second)).sum())


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(kind: str) -> None:
    originals = [picture(number) for number in range(12)]
    copies = [COPIES[kind](image) for image in originals]
    found = alike(as_set(*originals), as_set(*copies))
    assert found[:, :2].tolist() == [[number, number] for number in range(12)]
    assert found[:, 2].tolist() == [bits(a, b) for a, b in zip(originals, copies, strict=True)]
    assert found[:, 2].max() <= CLOSE


def test_other_pictures_are_not_found() -> None:
    hashes, images = as_set(*(picture(number) for number in range(150)))
    assert alike((hashes, images)).shape == (0, 3)


@pytest.mark.parametrize("change", [lambda image: 255 - image, lambda image: image[::-1], lambda image: image[:, ::-1]])
def test_negatives_and_mirror_images_are_other_pictures(change: Any) -> None:
    images = [picture(number) for number in range(10)]
    turned = [np.ascontiguousarray(change(image)) for image in images]
    assert alike(as_set(*images), as_set(*turned)).shape == (0, 3)


def test_close_hashes_of_images_that_do_not_correlate_are_not_pairs() -> None:
    hashes, images = as_set(picture(0), picture(1))
    assert alike((hashes[[0, 0]], images)).shape == (0, 3)
    assert alike((hashes[[0, 0]], images[[0, 0]])).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_pairs_within_a_set_are_found_once_whatever_the_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(alike_module, "BLOCK", block)
    numbers = [0, 1, 2, 0, 3, 1, 0]
    images = [COPIES[kind](picture(n)) for n, kind in zip(numbers, COPIES, strict=False)]
    found = alike(as_set(*images))
    expected = [[a, b] for a in range(7) for b in range(a + 1, 7) if numbers[a] == numbers[b]]
    assert found[:, :2].tolist() == expected == [[0, 3], [0, 6], [1, 5], [3, 6]]
    assert all(a < b for a, b, _ in found.tolist())


@pytest.mark.parametrize("block", [2, 1024])
def test_pairs_between_sets_are_all_found(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(alike_module, "BLOCK", block)
    first, second = as_set(*map(picture, (0, 1, 2, 3, 1))), as_set(*map(picture, (3, 1, 9)))
    assert alike(first, second).tolist() == [[1, 1, 0], [3, 0, 0], [4, 1, 0]]
    assert alike(second, first).tolist() == [[0, 3, 0], [1, 1, 0], [1, 4, 0]]


def test_empty_sets_have_no_pairs() -> None:
    nothing = np.zeros((0, 4), np.uint64), np.zeros((0, *SIZE, 3), np.uint8)
    found = alike(nothing)
    assert found.shape == (0, 3) and found.dtype == np.int64
    assert alike(nothing, as_set(picture(0))).shape == alike(as_set(picture(0)), nothing).shape == (0, 3)


@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 3]))
def test_the_first_bit_of_a_hash_is_set(seed: int, height: int, width: int, channels: int) -> None:
    """So no two hashes differ in all 256 bits, which 8 bits could not count."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    found = perceptual_hash(image)
    assert found.shape == (4,) and found.dtype == np.uint64
    assert np.unpackbits(found.view(np.uint8))[0] == 1


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_images_of_one_colour_have_a_hash(value: int) -> None:
    hashes, images = as_set(*[np.full((20, 30, 3), value, np.uint8)] * 2)
    assert np.array_equal(hashes[0], hashes[1])
    assert alike((hashes, images)).shape == (0, 3), "nothing correlates with a plain surface"


@pytest.mark.parametrize("differing", [0, 40, 41, 128, 254, 255])
def test_the_distance_never_wraps(differing: int) -> None:
    first = np.ones(256, np.uint8)
    second = np.concatenate([np.ones(256 - differing, np.uint8), np.zeros(differing, np.uint8)])
    hashes = np.stack([np.packbits(h).view(np.uint64) for h in (first, second)])
    images = np.stack([resized(picture(0), *SIZE)] * 2)
    expected = [[0, 1, differing]] if differing <= CLOSE else []
    assert alike((hashes, images)).tolist() == expected


def test_grey_images_are_compared_too() -> None:
    images = [picture(n)[..., :1] for n in (0, 1, 0)]
    hashes = np.stack([perceptual_hash(i) for i in images])
    small = np.stack([resized(i, *SIZE)[..., None] for i in images])
    assert alike((hashes, small)).tolist() == [[0, 2, 0]]
