import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from medvision.errors import MedvisionError
from medvision.postprocess import OPTIONS, Cleaning, best_option, clean, option_counts

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))
CLEANINGS = st.builds(
    Cleaning, st.booleans(), st.sampled_from([0, 0.05, 0.2, 1, 2, 5]) | st.floats(0, 0.99), st.booleans()
)
SIDES = [(-1, 0), (1, 0), (0, -1), (0, 1)]
AROUND = [*SIDES, (-1, -1), (-1, 1), (1, -1), (1, 1)]


def naive_regions(mask, steps):
    """Sets of pixels of each region, row by row by their first pixels, by walking."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, edge = set(), {min(left)}
        while edge:
            region |= edge
            edge = {(y + dy, x + dx) for y, x in edge for dy, dx in steps} & left - region
        left -= region
        regions.append(region)
    return regions


def naive_clean(cleaning, mask):
    height, width = mask.shape
    result = mask.copy()
    if cleaning.fill:
        for region in naive_regions(~mask, SIDES):
            if not any(y in (0, height - 1) or x in (0, width - 1) for y, x in region):
                for pixel in region:
                    result[pixel] = True
    parts = naive_regions(result, AROUND)
    least = cleaning.min_area * mask.size if cleaning.min_area < 1 else cleaning.min_area
    parts = [part for part in parts if len(part) >= least]
    if cleaning.largest:
        parts = sorted(parts, key=len, reverse=True)[:1]  # stable: the first of equally large ones
    result[:] = False
    for pixel in itertools.chain(*parts):
        result[pixel] = True
    return result


@given(MASKS, CLEANINGS)
@settings(max_examples=200)
@example(np.zeros((4, 5), bool), Cleaning(True, 0.5, True))
@example(np.ones((4, 5), bool), Cleaning(True, 0.5, True))
@example(np.array([[0, 0, 1], [1, 0, 0]], bool), Cleaning(largest=True))  # the upper right part is the first
@example(np.array([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool), Cleaning(largest=True))
def test_equals_walking(mask, cleaning):
    before = mask.copy()
    np.testing.assert_array_equal(cleaning(mask), naive_clean(cleaning, mask))
    np.testing.assert_array_equal(mask, before)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.5, 0.6]))
@settings(max_examples=20)
def test_filling_equals_scipy(seed, share):
    mask = np.random.default_rng(seed).random((40, 60)) < share
    np.testing.assert_array_equal(Cleaning(fill=True)(mask), ndimage.binary_fill_holes(mask))


@given(MASKS, CLEANINGS)
def test_invariants(mask, cleaning):
    found = cleaning(mask)
    assert (found.dtype, found.shape) == (bool, mask.shape)
    np.testing.assert_array_equal(cleaning(found), found)  # idempotent
    filled = Cleaning(fill=True)(mask)
    assert not (mask & ~filled).any()  # filling never removes
    assert not (found & ~filled).any()  # nothing else adds
    if cleaning.largest:
        assert ndimage.label(found, np.ones((3, 3)))[1] <= 1
    np.testing.assert_array_equal(Cleaning()(mask), mask)
    turned = Cleaning(cleaning.fill, cleaning.min_area)(mask[::-1].T)
    np.testing.assert_array_equal(turned, Cleaning(cleaning.fill, cleaning.min_area)(mask)[::-1].T)


RING = np.array([list(row) for row in ("###...#", "#.#....", "##.....")]) == "#"


@pytest.mark.parametrize(
    ("cleaning", "rows"),
    [
        (Cleaning(fill=True), ("###...#", "###....", "##.....")),
        (Cleaning(largest=True), ("###....", "#.#....", "##.....")),
        (Cleaning(min_area=2), ("###....", "#.#....", "##.....")),
        (Cleaning(min_area=1), ("###...#", "#.#....", "##.....")),
        (Cleaning(min_area=1 / 21), ("###...#", "#.#....", "##.....")),
        (Cleaning(min_area=1.01 / 21), ("###....", "#.#....", "##.....")),
        (Cleaning(min_area=8), (".......",) * 3),
        (Cleaning(fill=True, min_area=8), ("###....", "###....", "##.....")),
        (Cleaning(min_area=9, largest=True), (".......",) * 3),
    ],
)
def test_by_hand(cleaning, rows):
    """The hole touches the outside only by a corner; the ring closes by one."""
    expected = np.array([list(row) for row in rows]) == "#"
    np.testing.assert_array_equal(cleaning(RING), expected)


def test_an_island_within_a_hole_is_filled_over():
    mask = np.pad(np.pad(np.ones((1, 1), bool), 1), 1, constant_values=True)
    assert mask.sum() == 17
    assert Cleaning(fill=True, largest=True)(mask).all()
    assert Cleaning(largest=True)(mask).sum() == 16


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (5, 5)])
def test_empty_and_full_masks_stay(value, shape):
    mask = np.full(shape, value)
    for option in OPTIONS:
        np.testing.assert_array_equal(option(mask), mask)


def test_each_class_has_its_own():
    masks = np.stack([RING, RING])
    found = clean(masks, [Cleaning(fill=True), Cleaning(largest=True)])
    np.testing.assert_array_equal(found[0], Cleaning(fill=True)(RING))
    np.testing.assert_array_equal(found[1], Cleaning(largest=True)(RING))


def test_options_are_the_grid_from_the_simplest():
    assert len({*OPTIONS}) == len(OPTIONS) == 16
    assert OPTIONS[0] == Cleaning() and OPTIONS[-1] == Cleaning(True, 0.01, True)


def test_it_says_what_it_does():
    assert str(Cleaning()) == "none"
    assert str(Cleaning(True, 0.01, True)) == "holes filled, parts below 0.01 removed, largest part kept"


@pytest.mark.parametrize("area", [-1, float("nan"), float("inf")])
def test_area_that_is_none_is_refused(area):
    with pytest.raises(MedvisionError, match=f"min_area is {area}; expected a share of the image"):
        Cleaning(min_area=area)


@pytest.mark.parametrize("masks", [np.zeros((2, 3, 3)), np.zeros((1, 3, 3), bool)])
def test_masks_that_do_not_fit_are_refused(masks):
    with pytest.raises(MedvisionError, match=r"expected bool \(2, H, W\)"):
        clean(masks, [Cleaning(), Cleaning()])


def naive_jaccards(images, option, pooled):
    both, either = [], []
    for predicted, truth in images:
        cleaned = np.stack([naive_clean(option, mask) for mask in predicted])
        both.append((cleaned & truth).sum((1, 2)))
        either.append((cleaned | truth).sum((1, 2)))
    both, either = np.array(both), np.array(either)
    if pooled:
        both, either = both.sum(0, keepdims=True), either.sum(0, keepdims=True)
    return np.where(either, both / np.maximum(either, 1), 1).mean(0)


def chosen(images, options=OPTIONS, pooled=False):
    counts = np.stack([option_counts(predicted, truth, options) for predicted, truth in images])
    return best_option(counts, "jaccard" if pooled else "jaccard_image", options=options)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_choice_equals_trying_all(seed, pooled):
    generator = np.random.default_rng(seed)
    options = [Cleaning(*values) for values in itertools.product((False, True), (0, 2, 0.1), (True, False))]
    images = [
        tuple(generator.random((2, 2, *generator.integers(3, 8, 2))) < generator.choice([0, 0.3, 0.6], (2, 2, 1, 1)))
        for _ in range(3)
    ]
    found = chosen(images, options, pooled)
    jaccards = np.array([naive_jaccards(images, option, pooled) for option in options])
    for k in range(2):
        best = [o for o, value in zip(options, jaccards[:, k], strict=True) if value >= jaccards[:, k].max() - 1e-12]
        assert found[k] == best[0]


def test_choice_by_hand():
    """The first class has a hole and a stray pixel too much, the second is right as it is, the third too."""
    truth = np.zeros((3, 12, 12), bool)
    truth[0, 2:9, 2:9] = True
    truth[1, 1:3, 1:3] = truth[1, 8:10, 8:10] = True
    predicted = truth.copy()
    predicted[0, 5, 5] = False
    predicted[0, 11, 11] = True
    assert chosen([(predicted, truth)]) == (Cleaning(fill=True, largest=True), Cleaning(), Cleaning())


def test_the_first_wins_ties():
    images = [(np.ones((1, 3, 3), bool), np.eye(3, dtype=bool)[None])]
    assert chosen(images) == (Cleaning(),)
    assert chosen(images, [Cleaning(largest=True), Cleaning()]) == (Cleaning(largest=True),)


def test_a_class_without_a_value_is_left_as_it_is():
    counts = np.stack([option_counts(*np.zeros((2, 1, 3, 3), bool))])
    assert best_option(counts, "dice", float("nan")) == (Cleaning(),)


def test_mean_over_images_and_pooled_choose_differently():
    """Removing all but the largest part helps two small images and harms a large one."""
    small, large = np.zeros((2, 1, 5, 5), bool), np.zeros((2, 1, 20, 20), bool)
    small[:, 0, 0, :2] = True
    small[0, 0, 4, 4] = True  # 2 of 3 pixels are right, then all
    large[:, 0, :10, :9] = large[:, 0, 12:, 12:] = True  # 154 of 154, then 90
    images = [tuple(small), tuple(small), tuple(large)]
    options = [Cleaning(), Cleaning(largest=True)]
    assert chosen(images, options) == (Cleaning(largest=True),)
    assert chosen(images, options, pooled=True) == (Cleaning(),)
