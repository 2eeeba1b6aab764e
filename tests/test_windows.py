import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medvision.errors import MedvisionError
from medvision.windows import SlidingWindow, hann, starts

sides = st.integers(1, 23)
overlaps = st.sampled_from([0, 0.1, 0.5, 0.9])


def darkness(image):
    """One answer for each pixel from this pixel alone: the same in any window."""
    return torch.stack([image.mean(1), image[:, 0].cos()], 1)


def in_place(image):
    """An answer that depends on where in the window a pixel lies."""
    h, w = image.shape[-2:]
    return image[:, :1] + torch.arange(h)[:, None] * 0.1 + torch.arange(w) * 0.01


def naive(image, size, overlap):
    """The blend of `in_place`, pixel by pixel in float64."""
    (height, width), (h, w) = image.shape[-2:], size
    padded = np.pad(image[0].numpy(), [(0, 0), (0, max(0, h - height)), (0, max(0, w - width))], mode="edge")
    total, weights = np.zeros(padded.shape[1:]), np.zeros(padded.shape[1:])
    for y in starts(padded.shape[1], h, overlap):
        for x in starts(padded.shape[2], w, overlap):
            for i in range(h):
                for j in range(w):
                    weight = np.sin(np.pi * (i + 0.5) / h) ** 2 * np.sin(np.pi * (j + 0.5) / w) ** 2
                    total[y + i, x + j] += weight * (padded[0, y + i, x + j] + 0.1 * i + 0.01 * j)
                    weights[y + i, x + j] += weight
    return (total / weights)[:height, :width]


@given(sides, sides, overlaps)
def test_windows_cover_a_side_evenly(length, side, overlap):
    length = max(length, side)
    found = starts(length, side, overlap)
    steps = np.diff(found)
    assert found[0] == 0 and found[-1] + side == length
    assert all(0 < step <= max(1, side * (1 - overlap)) for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_starts_by_hand():
    assert starts(10, 10, 0.5) == [0]
    assert starts(10, 4, 0.5) == [0, 2, 4, 6]
    assert starts(11, 4, 0) == [0, 4, 7]
    assert starts(9, 1, 0.9) == list(range(9))


@pytest.mark.parametrize("side", [1, 2, 5, 64])
def test_hann_weights(side):
    expected = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    np.testing.assert_allclose(hann(side), expected, atol=1e-6)
    assert hann(side).min() > 0


@given(sides, sides, sides, sides, overlaps, st.integers(1, 5))
def test_what_a_pixel_alone_decides_is_that_of_the_whole_image(height, width, h, w, overlap, batch):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    answer = SlidingWindow((h, w), overlap, batch)(darkness, image)
    assert answer.shape == (1, 2, height, width)
    torch.testing.assert_close(answer, darkness(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "overlap"), [((4, 6), 0.5), ((5, 3), 0.25), ((9, 20), 0), ((4, 4), 0.75)])
def test_blend_is_that_of_single_pixels(size, overlap):
    image = torch.rand(1, 1, 9, 13, generator=torch.Generator().manual_seed(0))
    expected = naive(image, size, overlap)
    for batch in (1, 3, 100):
        answer = SlidingWindow(size, overlap, batch)(in_place, image)
        np.testing.assert_allclose(answer[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("constant", [torch.zeros_like, torch.ones_like])
def test_what_is_certain_everywhere_stays_so_exactly(constant):
    image = torch.rand(1, 1, 19, 30)
    assert torch.equal(SlidingWindow((8, 8))(constant, image), constant(image))


def test_the_edge_of_a_window_leaves_no_seam():
    blur = nn.Conv2d(1, 1, 3, padding=1, bias=False)  # its padding with zeros is wrong at each edge
    nn.init.constant_(blur.weight, 1 / 9)
    image = torch.ones(1, 1, 64, 64)
    with torch.no_grad():
        whole, blended, hard = (
            blur(image),
            SlidingWindow((16, 16))(blur, image),
            SlidingWindow((16, 16), 0)(blur, image),
        )
    inside = (..., slice(2, -2), slice(2, -2))
    assert (hard - whole)[inside].abs().max() > 0.3
    assert (blended - whole)[inside].abs().max() < 0.01


def test_a_window_sees_the_last_row_repeated_where_the_image_ends():
    seen = []

    def model(image):
        seen.append(image)
        return image

    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    torch.testing.assert_close(SlidingWindow((4, 3))(model, image), image)
    assert torch.equal(seen[0], image[..., [0, 1, 1, 1], :])


@pytest.mark.parametrize("overlap", [1, -0.1, 2, "half"])
def test_an_overlap_out_of_range_is_refused(overlap):
    with pytest.raises(MedvisionError, match=rf"overlap={overlap}: expected a share .* from 0 to below 1"):
        SlidingWindow((4, 4), overlap)
