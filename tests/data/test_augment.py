import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medvision.data.augment import Augment
from medvision.errors import MedvisionError

ALL: dict[str, Any] = {
    "flip": True,
    "rotate": 180,
    "shift": 0.1,
    "scale": 0.2,
    "elastic": 6,
    "brightness": 0.3,
    "hue": 10,
    "saturation": 0.2,
    "blur": 5,
    "noise": 0.1,
    "dropout": 0.25,
}
GEOMETRY = ["flip", "rotate", "shift", "scale", "elastic"]
COLOUR = ["brightness", "hue", "saturation", "blur", "noise", "dropout"]
SIZES = [(32, 32), (24, 40), (45, 31)]


def only(*names: str) -> Augment:
    return Augment(**{"flip": False, **{name: ALL[name] for name in names}})


def sample(size: tuple[int, int], channels: int = 3, classes: int = 1) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Smooth colours and off-centre rectangles."""
    y, x = np.indices(size)
    planes = [120 + 80 * np.sin(y / (3 + k) + x / (5 - k)) for k in range(channels)]
    mask = np.zeros((*size, classes), np.uint8)
    for k in range(classes):
        mask[size[0] // 8 + k : size[0] // 2, size[1] // 6 : size[1] // 3 + 2 * k, k] = 1
    return np.dstack(planes).astype(np.uint8).reshape(*size, channels), mask


def outcomes(augment: Augment, size: tuple[int, int] = (32, 32), seeds: int = 40, channels: int = 3) -> list[Any]:
    return [augment(*sample(size, channels), seed) for seed in range(seeds)]


def test_every_strength_is_tested() -> None:
    assert [*inspect.signature(Augment).parameters] == [*ALL] == GEOMETRY + COLOUR


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [0, 1, 2, 5])
def test_shapes_types_and_ranges_are_kept(size: tuple[int, int], channels: int, classes: int) -> None:
    augment = Augment(**ALL)
    image, mask = sample(size, channels, classes)
    for seed in range(15):
        new_image, new_mask = augment(image.copy(), mask.copy(), seed)
        assert new_image.shape == image.shape and new_image.dtype == np.uint8
        assert new_mask.shape == mask.shape and new_mask.dtype == np.uint8
        assert set(np.unique(new_mask)) <= {0, 1}


@given(st.integers(0, 2**31 - 1))
def test_the_seed_alone_decides(seed: int) -> None:
    image, mask = sample((24, 40))
    first = AUGMENT(image.copy(), mask.copy(), seed)
    AUGMENT(image.copy(), mask.copy(), seed + 1)
    np.random.seed(seed % 1000)
    random.seed(seed)
    for augment in (AUGMENT, Augment(**ALL)):
        again = augment(image.copy(), mask.copy(), seed)
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


AUGMENT = Augment(**ALL)


def test_seeds_differ() -> None:
    images = {image.tobytes() for image, _ in outcomes(AUGMENT)}
    masks = {mask.tobytes() for _, mask in outcomes(AUGMENT)}
    assert len(images) == 40 and len(masks) > 30


@pytest.mark.parametrize("channels", [1, 3])
def test_all_off_changes_nothing(channels: int) -> None:
    image, mask = sample((24, 40), channels, 2)
    for seed in range(5):
        new_image, new_mask = only()(image, mask, seed)
        assert np.array_equal(new_image, image) and np.array_equal(new_mask, mask)


@pytest.mark.parametrize("name", ALL)
def test_each_strength_does_something_of_its_own(name: str) -> None:
    image, mask = sample((32, 32))
    found = outcomes(only(name))
    changed = [not np.array_equal(new, image) for new, _ in found]
    moved = [not np.array_equal(new, mask) for _, new in found]
    assert sum(changed) > 2
    assert any(moved) == (name in GEOMETRY), "colour leaves the mask alone"


@pytest.mark.parametrize("name", ["hue", "saturation"])
def test_hue_and_saturation_leave_grey_images_alone(name: str) -> None:
    image, _ = sample((32, 32), 1)
    assert all(np.array_equal(new, image) for new, _ in outcomes(only(name), channels=1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", [[name] for name in GEOMETRY] + [GEOMETRY], ids="+".join)
@pytest.mark.parametrize("classes", [1, 5])
def test_image_and_mask_move_alike(size: tuple[int, int], names: list[str], classes: int) -> None:
    """The mask, put into the image: image and mask then differ at the interpolated borders at most."""
    augment = only(*names)
    mask = sample(size, classes=classes)[1]
    image = np.repeat(mask[..., :1] * np.uint8(255), 3, axis=2)
    for seed in range(20):
        new_image, new_mask = augment(image.copy(), mask.copy(), seed)
        wrong = (new_image[..., 0] > 127) != (new_mask[..., 0] > 0)
        padded = np.pad(new_mask[..., 0], 1, mode="edge")
        neighbours = np.array([padded[1 + dy : dy + 1 + size[0], 1 + dx : dx + 1 + size[1]] for dy, dx in NEAR])
        border = neighbours.min(0) != neighbours.max(0)
        assert not (wrong & ~border).any(), seed
        assert wrong.sum() <= 0.6 * border.sum(), seed


NEAR = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def test_flips_are_the_eight_symmetries_of_a_square_and_the_four_of_an_oblong() -> None:
    def symmetries(pixels: NDArray[np.uint8]) -> set[bytes]:
        turned = [np.rot90(pixels, k) for k in range(4)]
        return {p.tobytes() for t in turned for p in (t, t[:, ::-1]) if p.shape == pixels.shape}

    for size, count in (((8, 8), 8), ((6, 9), 4)):
        image = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
        mask = (image[..., :1] % 7 < 3).astype(np.uint8)
        found = [only("flip")(image.copy(), mask.copy(), seed) for seed in range(120)]
        assert {new.tobytes() for new, _ in found} == symmetries(image) and len(symmetries(image)) == count
        assert all(np.array_equal(new_mask, new[..., :1] % 7 < 3) for new, new_mask in found)


def test_dropout_erases_squares_of_at_most_its_size() -> None:
    image, mask = np.full((40, 40, 3), 200, np.uint8), np.ones((40, 40, 1), np.uint8)
    shares = [(only("dropout")(image.copy(), mask.copy(), seed)[0] != 200).mean() for seed in range(60)]
    assert 0 < np.mean(np.array(shares) > 0) < 0.6
    assert max(shares) <= 4 * 0.25**2


def moments(mask: NDArray[np.uint8]) -> tuple[float, NDArray[np.float64]]:
    return float(mask.sum()), np.argwhere(mask[..., 0]).mean(0)


@pytest.mark.parametrize(("name", "strength"), [("shift", 0.1), ("scale", 0.2), ("rotate", 20)])
def test_affine_strengths_are_limits(name: str, strength: float) -> None:
    y, x = np.indices((60, 60))
    mask = ((abs(y - 29.5) < 10) & (abs(x - 29.5) < 4)).astype(np.uint8)[..., None]
    area, _ = moments(mask)
    seen, smaller, larger = [], False, False
    for seed in range(60):
        new = Augment(flip=False, **{name: strength})(np.repeat(mask, 3, 2), mask.copy(), seed)[1]
        new_area, centre = moments(new)
        cov = np.cov(np.argwhere(new[..., 0]).T)
        turn = 90 - abs(np.degrees(0.5 * np.arctan2(2 * cov[0, 1], cov[1, 1] - cov[0, 0])))
        found = {"shift": abs(centre - 29.5).max() / 60, "scale": abs(new_area / area - 1), "rotate": turn}
        limits = {"shift": 0.001, "scale": 0.06, "rotate": 3} | {
            name: {"scale": 1.2**2 - 1 + 0.12, "shift": 0.11, "rotate": 22}[name]
        }
        assert all(found[key] <= limits[key] + (0.015 if key == "shift" else 0) for key in found), (seed, found)
        seen.append(found[name])
        if name == "scale":
            smaller, larger = smaller or new_area < 0.8 * area, larger or new_area > 1.2 * area
    assert max(seen) > strength * 0.7
    assert name != "scale" or (smaller and larger)


@pytest.mark.parametrize("name", [name for name in ALL if name != "flip"])
def test_a_negative_strength_is_named(name: str) -> None:
    with pytest.raises(MedvisionError, match=rf"augment\.{name} is -1; expected 0"):
        Augment(**{name: -1})


@pytest.mark.parametrize("state", [random.getstate, lambda: np.random.get_state()[1].tolist(), torch.get_rng_state])
def test_global_random_state_is_left_alone(state: Callable[[], Any]) -> None:
    before = state()
    outcomes(Augment(**ALL), seeds=20)
    after = state()
    assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after


def test_the_arguments_are_left_alone() -> None:
    image, mask = sample((32, 32))
    for seed in range(20):
        given_image, given_mask = image.copy(), mask.copy()
        AUGMENT(given_image, given_mask, seed)
        assert np.array_equal(given_image, image) and np.array_equal(given_mask, mask)
