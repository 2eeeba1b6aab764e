import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from medvision.data.images import read_image, read_mask, resize_image, resize_mask
from medvision.data.source import Member, Source
from medvision.errors import MedvisionError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), np.uint8)
GREY = RNG.integers(0, 256, (13, 17), np.uint8)
SHAPE = RNG.random((13, 17)) < 0.4


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(colours: list[tuple[int, int, int]], indices: NDArray[np.uint8]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.fixture
def member(tmp_path: Path) -> Callable[..., Member]:
    """A file with the given bytes as a member of a folder."""

    def make(content: bytes, name: str = "x.png") -> Member:
        (tmp_path / name).write_bytes(content)
        return next(member for member in Source(tmp_path).members() if member.name == name)

    return make


ALPHA = np.dstack([RGB, RNG.integers(0, 256, (13, 17), np.uint8)])
LUMA = np.round(RGB @ [0.299, 0.587, 0.114])
COLOURS = [(255, 0, 0), (10, 200, 30), (0, 0, 0), (90, 90, 90)]
INDICES = RNG.integers(0, 4, (13, 17), np.uint8)
IMAGES = {
    "rgb": (saved(Image.fromarray(RGB)), RGB),
    "rgba": (saved(Image.fromarray(ALPHA)), RGB),
    "grey": (saved(Image.fromarray(GREY)), np.dstack([GREY] * 3)),
    "la": (saved(Image.fromarray(np.dstack([GREY, GREY[::-1]]))), np.dstack([GREY] * 3)),
    "1-bit": (saved(Image.fromarray(SHAPE)), np.dstack([SHAPE * np.uint8(255)] * 3)),
    "palette": (saved(palette(COLOURS, INDICES)), np.array(COLOURS, np.uint8)[INDICES]),
    "palette, transparent": (saved(palette(COLOURS, INDICES), transparency=1), np.array(COLOURS, np.uint8)[INDICES]),
    "16-bit grey": (saved(Image.fromarray(GREY * np.uint16(257))), np.dstack([GREY] * 3)),
    "16-bit rgb": (cv2.imencode(".png", RGB[..., ::-1] * np.uint16(257))[1].tobytes(), RGB),
    "8 bits in 16": (saved(Image.fromarray(GREY.astype(np.uint16))), np.dstack([GREY] * 3)),
    "32-bit tiff": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), np.dstack([GREY] * 3)),
    "float tiff": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), np.dstack([GREY] * 3)),
    "tiff": (saved(Image.fromarray(RGB), "TIFF"), RGB),
    "bmp": (saved(Image.fromarray(RGB), "BMP"), RGB),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_mode_are_read_as_rgb(member: Callable[..., Member], kind: str) -> None:
    content, expected = IMAGES[kind]
    image = read_image(member(content), 3)
    assert image.dtype == np.uint8 and image.shape == (13, 17, 3)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_any_mode_are_read_as_grey(member: Callable[..., Member], kind: str) -> None:
    content, expected = IMAGES[kind]
    image = read_image(member(content), 1)
    assert image.dtype == np.uint8 and image.shape == (13, 17, 1)
    assert np.abs(image[..., 0] - expected @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_any_mode_are_read(member: Callable[..., Member], mode: str) -> None:
    y, x = np.indices((24, 32))
    smooth = np.dstack([40 + 4 * x, 200 - 5 * y, 90 + 2 * x]).astype(np.uint8)
    content = saved(Image.fromarray(smooth).convert(mode), "JPEG", quality=98)
    assert Image.open(io.BytesIO(content)).mode == mode
    expected = smooth if mode != "L" else np.dstack([smooth @ [0.299, 0.587, 0.114]] * 3)
    assert np.abs(read_image(member(content), 3).astype(float) - expected).max() < 9


@pytest.mark.parametrize("channels", [1, 3])
def test_lab_is_read(member: Callable[..., Member], channels: int) -> None:
    grey = np.full((4, 5, 3), 90, np.uint8)
    image = read_image(member(saved(Image.fromarray(grey).convert("LAB"), "TIFF"), "x.tif"), channels)
    assert image.shape == (4, 5, channels) and np.abs(image.astype(int) - 90).max() <= 2


TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_turns_image_and_mask_alike(member: Callable[..., Member], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    black_or_white = np.kron(SHAPE, np.ones((8, 8), bool))
    picture = Image.fromarray(black_or_white.astype(np.uint8) * 255)
    jpeg = member(saved(picture, "JPEG", quality=95, exif=exif), "x.jpg")
    png = member(saved(picture, exif=exif))
    expected = TURNS[orientation](black_or_white)
    for file in (jpeg, png):
        assert np.array_equal(read_mask(file)[0], expected)
        assert np.array_equal(read_image(file, 1)[..., 0] > 127, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("read", [lambda m: read_image(m, 3), lambda m: read_mask(m)[0]], ids=["image", "mask"])
def test_never_half_a_picture(member: Callable[..., Member], kind: str, read: Callable[[Member], Any]) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (40, 48, 3), np.uint8))
    content = saved(picture, kind)
    whole = read(member(content))
    refused = 0
    for length in np.linspace(0, len(content) - 1, 60).astype(int):
        file = member(content[:length])
        try:
            assert np.array_equal(read(file), whole), length
        except MedvisionError as error:
            refused += 1
            assert str(file) in str(error) and "fetch it again" in str(error)
    assert refused >= 55


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" * 9])
@pytest.mark.parametrize("read", [lambda m: read_image(m, 3), read_mask], ids=["image", "mask"])
def test_what_is_no_image_is_named(
    member: Callable[..., Member], content: bytes, read: Callable[[Member], Any]
) -> None:
    file = member(content, "label.png")
    with pytest.raises(MedvisionError, match=r"label\.png cannot be decoded.*expected a whole PNG, JPEG") as caught:
        read(file)
    assert "object at" not in str(caught.value)  # which says nothing, and something else each time


@pytest.mark.parametrize("values", [[-1.0, 3], [0, 70000], [0, np.nan], [0, np.inf], [0, 0.25, 1]])
def test_numbers_that_are_no_grey_levels_are_named(member: Callable[..., Member], values: list[float]) -> None:
    content = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
    for read in (lambda m: read_image(m, 1), read_mask):
        with pytest.raises(MedvisionError, match=r"x\.tif has values.*expected 8 or 16 bits"):
            read(member(content, "x.tif"))


SMOOTH = np.where(SHAPE, RNG.integers(128, 256, SHAPE.shape), RNG.integers(0, 128, SHAPE.shape)).astype(np.uint8)
BITS = SHAPE.astype(np.uint8)
MASKS = {
    "0 and 255": saved(Image.fromarray(BITS * 255)),
    "0 and 1": saved(Image.fromarray(BITS)),
    "grey edges": saved(Image.fromarray(SMOOTH)),
    "rgb": saved(Image.fromarray(np.dstack([BITS * 255] * 3))),
    "rgb, grey edges": saved(Image.fromarray(np.dstack([SMOOTH] * 3))),
    "rgb, 0 and 1": saved(Image.fromarray(np.dstack([BITS] * 3))),
    "rgba": saved(Image.fromarray(np.dstack([BITS * 255] * 3 + [np.full_like(BITS, 255)]))),
    "1-bit": saved(Image.fromarray(SHAPE)),
    "palette of black and white": saved(palette([(0, 0, 0), (255, 255, 255)], BITS)),
    "palette of white and black": saved(palette([(255, 255, 255), (0, 0, 0)], 1 - BITS)),
    "16-bit, 0 and 65535": saved(Image.fromarray(BITS * np.uint16(65535))),
    "16-bit, 0 and 1": saved(Image.fromarray(BITS.astype(np.uint16))),
    "16-bit, 0 and 255": saved(Image.fromarray(BITS * np.uint16(255))),
    "tiff of 0.0 and 1.0": saved(Image.fromarray(BITS.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_any_coding_are_read(member: Callable[..., Member], kind: str) -> None:
    mask, between = read_mask(member(MASKS[kind]))
    assert mask.dtype == np.bool_ and np.array_equal(mask, SHAPE)
    grey = np.count_nonzero(np.isin(SMOOTH, [0, SMOOTH.max()], invert=True)) if "grey edges" in kind else 0
    assert type(between) is int and between == grey


@pytest.mark.parametrize(("value", "expected"), [(0, False), (1, True), (127, False), (128, True), (255, True)])
def test_a_mask_of_one_value(member: Callable[..., Member], value: int, expected: bool) -> None:
    mask, between = read_mask(member(saved(Image.fromarray(np.full((3, 4), value, np.uint8)))))
    assert np.array_equal(mask, np.full((3, 4), expected)) and between == 0


def coverage(size: int, new: int) -> NDArray[np.float64]:
    """Share of each new pixel, (new, size), that lies on each old one."""
    edges, old = np.arange(new + 1)[:, None] * size / new, np.arange(size)
    overlap = np.minimum(edges[1:], old + 1) - np.maximum(edges[:-1], old)
    return overlap.clip(0) * new / size


def averaged(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float64]:
    rows, columns = coverage(pixels.shape[0], size[0]), coverage(pixels.shape[1], size[1])
    return np.einsum("ih,hw...,jw->ij...", rows, pixels.astype(float), columns)


SIDES = st.integers(1, 24)
SHRINKING = st.tuples(SIDES, SIDES).flatmap(lambda s: st.tuples(st.integers(1, s[0]), st.integers(1, s[1]), st.just(s)))


@given(SHRINKING, st.sampled_from([1, 3]), st.randoms(use_true_random=False))
def test_shrinking_averages_areas(sizes: tuple[int, int, tuple[int, int]], channels: int, random: Any) -> None:
    height, width, old = sizes
    image = np.random.default_rng(random.getrandbits(32)).integers(0, 256, (*old, channels), np.uint8)
    small = resize_image(image, (height, width))
    assert small.shape == (height, width, channels) and small.dtype == np.uint8
    assert np.abs(small - averaged(image, (height, width))).max() <= 1.5


@given(SHRINKING.flatmap(lambda s: st.tuples(st.just(s[:2]), arrays(np.bool_, s[2]))))
def test_a_smaller_mask_is_set_where_half_of_the_area_is(case: tuple[tuple[int, int], NDArray[np.bool_]]) -> None:
    size, mask = case
    share = averaged(mask, size)
    sure = np.abs(share - 0.5) > 0.01  # OpenCV leaves out slivers of pixels
    assert np.array_equal(resize_mask(mask, size)[sure], (share > 0.5)[sure])


def test_exactly_half_counts() -> None:
    mask = np.array([[True, False, True, True, False, False], [True, False, False, False, False, False]])
    assert resize_mask(mask, (1, 3)).tolist() == [[True, True, False]]


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.randoms(use_true_random=False))
def test_any_resizing_keeps_types_shapes_and_constants(old: tuple[int, int], new: tuple[int, int], random: Any) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    image, mask = rng.integers(0, 256, (*old, 3), np.uint8), rng.random(old) < 0.5
    resized, smaller = resize_image(image, new), resize_mask(mask, new)
    assert resized.shape == (*new, 3) and resized.dtype == np.uint8
    assert smaller.shape == new and smaller.dtype == np.bool_
    assert image.min() <= resized.min() and resized.max() <= image.max()
    assert resize_mask(np.ones(old, bool), new).all() and not resize_mask(np.zeros(old, bool), new).any()
    if old == new:
        assert np.array_equal(resized, image) and np.array_equal(smaller, mask)


@given(st.tuples(*[st.integers(40, 300)] * 2), st.tuples(*[st.integers(40, 300)] * 2), st.floats(0.15, 0.45))
def test_area_and_place_of_a_disc_are_kept(old: tuple[int, int], new: tuple[int, int], radius: float) -> None:
    def disc(size: tuple[int, int]) -> NDArray[np.bool_]:
        y, x = ((np.arange(side) + 0.5) / side - 0.5 for side in size)
        return np.asarray(np.hypot(y[:, None], x) <= radius)

    resized = resize_mask(disc(old), new)
    assert abs(resized.mean() / disc(new).mean() - 1) < 0.08
    assert (resized != disc(new)).mean() < 0.03


def test_doubling_and_halving_a_mask_gives_it_back() -> None:
    assert np.array_equal(resize_mask(resize_mask(SHAPE, (26, 34)), (13, 17)), SHAPE)
