"""Images that weights have seen: the same picture under one name, or the same file under two."""

import json

import numpy as np
import pytest

from medvision.pretraining import run_of, seen_before
from medvision.runs import RunFolder


@pytest.fixture
def data(dataset, fake_folder_labels, tmp_path):
    """Six images each in train, val and test."""
    root = fake_folder_labels(tmp_path / "mine", 18, splits=["train", "val", "test"])
    found = dataset("folder_labels", root)
    assert [len(found.splits[name]) for name in ("train", "val", "test")] == [6, 6, 6]
    return found


@pytest.fixture
def origin(tmp_path):
    """`origin(train={id: hash}, val={...})`: the folder of an earlier run."""

    def make(hashes=True, **splits):
        place = RunFolder(tmp_path / "earlier")
        place.path.mkdir()
        found = {name: [*of] for name, of in splits.items()}
        kept = {"hashes": {name: [*of.values()] for name, of in splits.items()}} if hashes else {}
        place.splits.write_text(json.dumps(found | kept))
        return place

    return make


def differing(value, bits):
    """A hash with so many of its bits changed."""
    return f"{int(value, 16) ^ ((1 << bits) - 1):064x}"


def named(data, split):
    """Hashes by name."""
    return dict(zip([s.id for s in data.splits[split]], data.hashes(split), strict=True))


def test_hashes_are_those_of_the_cache(data):
    values = data.hashes("val")
    assert len({*values}) == 6 and {len(value) for value in values} == {64}
    back = np.array([np.frombuffer(bytes.fromhex(value), np.uint64) for value in values])
    np.testing.assert_array_equal(back, data.cache.facts["hash"][data.rows("val")])


def test_versions_under_one_name_and_copies_under_two_are_found(data, origin, tmp_path):
    (a, b, c, *_), val = named(data, "test").items(), named(data, "val")
    [*of_val] = val
    train = {a[0]: differing(a[1], 40), b[0]: differing(b[1], 41), "renamed": c[1], "other": "0" * 64}
    place = origin(train=train | named(data, "train"), val={of_val[0]: val[of_val[0]]}, test=val)
    [problem] = seen_before(data, [place], tmp_path)
    assert problem.grade == "warning" and problem.items == tuple(sorted([a[0], c[0], of_val[0]]))
    listed = tmp_path / "seen_by_earlier.txt"
    assert listed.read_text().split() == sorted([a[0], "renamed", of_val[0]])
    assert problem.text == (
        f"{place.path}, from which these weights come, was trained on 1 of 6 images of val and 2 of 6 images of test: "
        f"results on them flatter; leave them out of that training with data.exclude={listed}"
    )


@pytest.mark.parametrize(
    "splits",
    [
        lambda data: {"train": named(data, "train"), "val": {}, "test": named(data, "test")},
        lambda data: {"train": dict.fromkeys(named(data, "test"), "0" * 64), "val": {}},  # names that coincide
    ],
)
def test_other_images_are_not(splits, data, origin, tmp_path):
    assert seen_before(data, [origin(**splits(data))], tmp_path) == []
    assert not [*tmp_path.glob("seen*")]


def test_of_a_run_without_hashes_nothing_is_known(data, origin, tmp_path):
    assert seen_before(data, [origin(hashes=False, train=named(data, "test"), val={})], tmp_path) == []


def test_a_run_is_known_by_its_folder_or_a_checkpoint(origin, tmp_path):
    place = origin(train={}, val={})
    place.best.parent.mkdir()
    place.best.touch()
    (tmp_path / "weights.pth").touch()
    assert run_of(place.path) == run_of(str(place.best)) == place
    assert run_of(None) is run_of("imagenet") is run_of(tmp_path / "weights.pth") is None
