import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist, directed_hausdorff

from medvision.errors import MedvisionError
from medvision.metrics import BOUNDARY, boundary_scores, surface_distances

SHAPES = [(1, 1), (1, 9), (7, 1), (8, 8), (5, 17), (24, 13)]


def drawn(seed, shape):
    """A mask: of noise or blobs, or a degenerate one that is not empty."""
    generator = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    row, column = (generator.integers(0, size) for size in shape)
    kind = generator.choice(["noise", "blob", "full", "pixel", "row", "column", "corner"])
    if kind == "noise":
        mask |= generator.random(shape) < generator.choice([0.1, 0.5, 0.9])
    elif kind == "blob":
        smooth = ndimage.gaussian_filter(generator.standard_normal(shape), 2)
        mask |= smooth > np.quantile(smooth, generator.uniform(0.1, 0.9))
    elif kind == "full":
        mask[:] = True
    elif kind == "row":
        mask[row] = True
    elif kind == "column":
        mask[:, column] = True
    elif kind == "corner":
        mask[: row + 1, : column + 1] = True
    mask[row, column] = True
    return mask


def pair(seed, shape):
    return drawn([seed, 0], shape), drawn([seed, 1], shape)


def square(shape, top, left, size):
    mask = np.zeros(shape, bool)
    mask[top : top + size, left : left + size] = True
    return mask


def surface(mask):
    """Pixels of which a neighbour is outside, one by one."""

    def inside(row, column):
        return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]

    return np.array(
        [
            (r, c)
            for r, c in np.argwhere(mask)
            if not all(inside(r + dr, c + dc) for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)))
        ]
    )


def naive(predicted, truth, tolerance):
    """Every metric from the distances of all pairs of surface pixels."""
    distances = cdist(surface(predicted), surface(truth))
    there, back = distances.min(1), distances.min(0)
    both = np.concatenate([there, back])
    return {
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "hd95_pooled": np.percentile(both, 95),
        "assd": (there.sum() + back.sum()) / (len(there) + len(back)),
        "masd": (there.mean() + back.mean()) / 2,
        "nsd": np.mean([distance <= tolerance for distance in both]),
    }


def medpy(predicted, truth):
    """The 95 % Hausdorff distance and the average of MedPy 0.4: erosion and a distance transform of the whole image."""
    cross = ndimage.generate_binary_structure(2, 1)

    def distances(first, second):
        first, second = (mask ^ ndimage.binary_erosion(mask, structure=cross) for mask in (first, second))
        return ndimage.distance_transform_edt(~second)[first]

    there, back = distances(predicted, truth), distances(truth, predicted)
    return {"hd95_pooled": np.percentile(np.hstack((there, back)), 95), "masd": np.mean((there.mean(), back.mean()))}


def monai(predicted, truth, tolerance):
    masks = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    options = {"include_background": True, "spacing": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "hd95": compute_hausdorff_distance(*masks, percentile=95, **options).item(),
            "assd": compute_average_surface_distance(*masks, symmetric=True, **options).item(),
            "nsd": compute_surface_dice(*masks, class_thresholds=[tolerance], **options).item(),
        }


def scores(predicted, truth, **options):
    return {name: float(value) for name, value in boundary_scores(predicted, truth, **options).items()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), tolerance=st.sampled_from([0, 1, 2**0.5, 3.5]))
def test_against_all_pairs_monai_and_medpy(seed, shape, tolerance):
    predicted, truth = pair(seed, shape)
    found = scores(predicted, truth, tolerance=tolerance)
    assert tuple(found) == BOUNDARY
    assert found == pytest.approx(naive(predicted, truth, tolerance), abs=1e-12)
    assert {name: found[name] for name in ("hd95_pooled", "masd")} == pytest.approx(medpy(predicted, truth), abs=1e-12)
    if tolerance != 2**0.5:  # MONAI rounds distances to float32
        theirs = monai(predicted, truth, tolerance)
        assert {name: found[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
def test_the_largest_distance_is_that_of_scipy(seed, shape):
    predicted, truth = pair(seed, shape)
    there, back = surface_distances(predicted, truth)
    ours, theirs = surface(predicted), surface(truth)
    assert len(there) == len(ours) and len(back) == len(theirs)
    assert there.max() == pytest.approx(directed_hausdorff(ours, theirs)[0])
    assert back.max() == pytest.approx(directed_hausdorff(theirs, ours)[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), before=st.tuples(*[st.integers(0, 5)] * 4))
def test_what_changes_nothing(seed, shape, before):
    predicted, truth = pair(seed, shape)
    expected = pytest.approx(scores(predicted, truth), abs=1e-12)
    assert scores(truth, predicted) == expected
    for change in (np.flipud, np.fliplr, np.transpose, np.rot90):
        assert scores(change(predicted), change(truth)) == expected
    top, bottom, left, right = before
    larger = [np.pad(mask, ((top, bottom), (left, right))) for mask in (predicted, truth)]
    assert scores(*larger) == expected  # the border of the image cuts nothing off a surface
    assert scores(truth, truth) == {"hd95": 0, "hd95_pooled": 0, "assd": 0, "masd": 0, "nsd": 1}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
@example(seed=0, shape=(24, 13))
def test_order_of_the_metrics(seed, shape):
    predicted, truth = pair(seed, shape)
    there, back = surface_distances(predicted, truth)
    found = scores(predicted, truth)
    assert max(there.max(), back.max()) >= found["hd95"] >= found["hd95_pooled"] >= 0
    shares = [scores(predicted, truth, tolerance=tolerance)["nsd"] for tolerance in (0, 1, 2, 50)]
    assert shares == sorted(shares) and shares[-1] == 1


def test_golden_values_of_a_shifted_square():
    truth = square((40, 40), 10, 10, 9)
    predicted = np.roll(truth, 3, axis=1)
    # above and below 6 columns coincide and 3 stand out by 1, 2, 3; the right side is 3 away, the left side is near to
    # above and below in its first and last two rows
    expected = [0] * 12 + 2 * [1, 2, 3] + [3] * 7 + [1, 2, 3, 3, 3, 2, 1]
    for distances in surface_distances(predicted, truth):
        assert sorted(distances.tolist()) == sorted(expected)
    found = scores(predicted, truth, tolerance=2)
    assert found == {"hd95": 3, "hd95_pooled": 3, "assd": 48 / 32, "masd": 48 / 32, "nsd": 20 / 32}


def test_a_touched_border_is_surface():
    full, corner = np.ones((4, 4), bool), square((4, 4), 0, 0, 1)
    there, back = surface_distances(full, corner)
    assert len(there) == 16 - 4
    assert back.tolist() == [0]
    assert there.max() == pytest.approx(18**0.5)


def test_two_metrics_of_one_name():
    """A lesion that was found, and a speck far away that is none: 28 of 424 surface pixels, but of 820 in all."""
    truth, speck = square((256, 256), 20, 20, 100), square((256, 256), 200, 200, 8)
    found = scores(truth | speck, truth)
    far = np.sort(np.hypot(*(surface(speck) - 119).T))
    assert len(far) == 28
    assert found["hd95"] == pytest.approx(far[5] + 0.85 * (far[6] - far[5]))  # 95 % of the way from 0 to 423 is 401.85
    assert found["hd95"] == pytest.approx(116.69, abs=0.01)
    assert found["hd95_pooled"] == 0
    assert found["assd"] == pytest.approx(far.sum() / 820)
    assert found["masd"] == pytest.approx(far.sum() / 424 / 2)
    assert found["nsd"] == pytest.approx(1 - 28 / 820)


@pytest.mark.parametrize(
    ("options", "distance"), [({}, np.nan), ({"empty": "nan"}, np.nan), ({"empty": "diagonal"}, 5)]
)
def test_one_mask_is_empty(options, distance):
    nothing, something = np.zeros((3, 4), bool), square((3, 4), 1, 1, 2)
    for masks in ((nothing, something), (something, nothing)):
        found = scores(*masks, **options)
        assert found.pop("nsd") == 0
        assert [*found.values()] == pytest.approx([distance] * 4, nan_ok=True)
    there, back = surface_distances(nothing, something)
    assert (there.tolist(), back.tolist()) == ([], [np.inf] * 4)


@pytest.mark.parametrize("empty", ["nan", "diagonal"])
def test_both_masks_are_empty(empty):
    nothing = np.zeros((3, 4), bool)
    expected = {"hd95": 0, "hd95_pooled": 0, "assd": 0, "masd": 0, "nsd": 1}
    assert scores(nothing, nothing, empty=empty) == expected


@pytest.mark.parametrize(("both_empty", "distance"), [(1.0, 0.0), (0.0, np.nan), (np.nan, np.nan)])
def test_what_two_empty_masks_count(both_empty, distance):
    nothing, something = np.zeros((3, 4), bool), square((3, 4), 1, 1, 2)
    found = scores(nothing, nothing, both_empty=both_empty, empty="diagonal")
    assert found.pop("nsd") == pytest.approx(both_empty, nan_ok=True)
    assert [*found.values()] == pytest.approx([distance] * 4, nan_ok=True)
    for masks in ((nothing, something), (something, something)):
        assert scores(*masks, both_empty=both_empty) == pytest.approx(scores(*masks), nan_ok=True)


def test_classes_and_images_are_scored_each_for_itself():
    masks = np.array([[pair(seed, (9, 12)) for seed in (k, k + 10)] for k in range(3)])
    masks[1, 1, 0] = False
    predicted, truth = masks[:, :, 0], masks[:, :, 1]
    found = boundary_scores(predicted, truth)
    for name, values in found.items():
        assert values.shape == (3, 2) and values.dtype == np.float64
        for place in np.ndindex(3, 2):
            expected = scores(predicted[place], truth[place])[name]
            assert values[place] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(found["hd95"]).sum() == 1


MASK = np.ones((2, 2), bool)


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ((MASK * 0.7, MASK), {}, r"float64 \(2, 2\), bool \(2, 2\); expected bool"),
        ((MASK, np.ones((2, 3), bool)), {}, r"bool \(2, 2\), bool \(2, 3\); expected bool"),
        ((MASK[0], MASK[0]), {}, r"bool \(2,\)"),
        ((MASK, MASK), {"tolerance": -1}, "tolerance is -1; expected"),
        ((MASK, MASK), {"tolerance": float("nan")}, "tolerance is nan; expected"),
        ((MASK, MASK), {"empty": "zero"}, "empty is 'zero'; expected one of nan, diagonal"),
    ],
)
def test_what_has_no_meaning_is_refused(masks, options, message):
    with pytest.raises(MedvisionError, match=message):
        boundary_scores(*masks, **options)
