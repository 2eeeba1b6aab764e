import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from medvision.data import ImageDataModule, Sample
from medvision.data.base import Splits
from medvision.data.splitting import assign_folds, rarest
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def plain(draw: st.DrawFn) -> tuple[list[str], int, list[int]]:
    """Ids, folds, strata."""
    number = draw(st.integers(2, 60))
    strata = draw(st.lists(st.integers(0, 4), min_size=number, max_size=number))
    return [f"image{i}" for i in range(number)], draw(st.integers(2, min(number, 10))), strata


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[str], int, list[int], list[str]]:
    """Ids, folds, strata, groups: at least as many groups as folds."""
    ids, folds, strata = draw(plain())
    groups = draw(st.lists(st.integers(0, len(ids)), min_size=len(ids), max_size=len(ids)))
    assume(len(set(groups)) >= folds)
    return ids, folds, strata, [f"patient {g}" for g in groups]


@given(plain(), SEEDS)
def test_without_groups_sizes_and_strata_differ_by_one_image_at_most(
    case: tuple[list[str], int, list[int]], seed: int
) -> None:
    ids, folds, strata = case
    dealt = assign_folds(ids, folds, strata, seed=seed)
    assert dealt.shape == (len(ids),) and set(dealt.tolist()) == set(range(folds))
    sizes = np.bincount(dealt, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for stratum in set(strata):
        share = np.bincount(dealt[np.array(strata) == stratum], minlength=folds)
        assert share.max() - share.min() <= 1


@given(grouped(), SEEDS)
def test_groups_are_never_torn_and_no_fold_is_empty(
    case: tuple[list[str], int, list[int], list[str]], seed: int
) -> None:
    ids, folds, strata, groups = case
    dealt = assign_folds(ids, folds, strata, groups, seed)
    assert set(dealt.tolist()) == set(range(folds))
    assert all(len(set(dealt[np.array(groups) == group])) == 1 for group in groups)


@given(grouped(), SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_the_images_changes_nothing(
    case: tuple[list[str], int, list[int], list[str]], seed: int, random: Any
) -> None:
    ids, folds, strata, groups = case
    turned = random.sample(range(len(ids)), len(ids))

    def permuted(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in turned]

    for names in (groups, None):
        dealt = assign_folds(ids, folds, strata, names, seed)
        assert np.array_equal(dealt, assign_folds(ids, folds, strata, names, seed))
        again = assign_folds(permuted(ids), folds, permuted(strata), None if names is None else permuted(names), seed)
        assert again.tolist() == permuted(dealt.tolist())


@given(plain(), SEEDS)
def test_the_names_of_strata_change_nothing(case: tuple[list[str], int, list[int]], seed: int) -> None:
    ids, folds, strata = case
    named = assign_folds(ids, folds, [("stratum", s) for s in strata], seed=seed)
    assert np.array_equal(named, assign_folds(ids, folds, strata, seed=seed))


@pytest.mark.parametrize("groups", [None, [i // 2 for i in range(60)]], ids=["alone", "grouped"])
def test_other_seeds_deal_differently(groups: list[int] | None) -> None:
    ids = [f"{i:02}" for i in range(60)]
    dealt = {tuple(assign_folds(ids, 5, [i % 3 for i in range(60)], groups, seed).tolist()) for seed in range(20)}
    assert len(dealt) == 20


def test_other_seeds_hold_out_others_even_where_all_groups_differ_in_size() -> None:
    groups = [number for number in range(10) for _ in range(number + 1)]
    ids = [f"{i:02}" for i in range(len(groups))]
    held_out = {tuple(np.flatnonzero(assign_folds(ids, 5, None, groups, seed) == 0)) for seed in range(20)}
    assert len(held_out) > 1


@given(st.integers(5, 40), SEEDS)
def test_equal_groups_are_dealt_equally(number: int, seed: int) -> None:
    groups = np.repeat(np.arange(number), 3)
    dealt = assign_folds([f"{i:03}" for i in range(3 * number)], 5, [0] * (3 * number), groups.tolist(), seed)
    sizes = np.bincount(dealt, minlength=5)
    assert sizes.max() - sizes.min() <= 3


def test_groups_keep_the_shares_of_strata() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), rng.integers(1, 8, 200))
    strata = rng.choice(4, len(groups), p=[0.6, 0.25, 0.1, 0.05])
    dealt = assign_folds([f"{i:04}" for i in range(len(groups))], 5, strata.tolist(), groups.tolist())
    for stratum in range(4):
        share = np.bincount(dealt[strata == stratum], minlength=5)
        assert share.max() - share.min() <= 3


@pytest.mark.parametrize(("folds", "units"), [(1, 4), (0, 4), (-1, 4), (5, 4), (3, 2), (2, 1), (2, 0)])
def test_too_few_are_refused(folds: int, units: int) -> None:
    ids = [f"{i}" for i in range(units)]
    words = rf"data\.folds is {folds}; expected 2 or more and at most {units}, the number of "
    with pytest.raises(MedvisionError, match=words + "images"):
        assign_folds(ids, folds)
    with pytest.raises(MedvisionError, match=words + "groups of images"):
        assign_folds([*ids, *(f"{i}b" for i in ids)], folds, groups=[*ids, *ids])


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20))
def test_the_rarest_class_that_is_present(rows: list[list[bool]]) -> None:
    presence = np.array(rows)
    for row, column in zip(presence, rarest(presence), strict=True):
        shown = [k for k in range(3) if row[k]]
        assert column == (min(shown, key=lambda k: (presence[:, k].sum(), k)) if shown else 3)
    assert rarest(np.zeros((4, 0), bool)).tolist() == [0] * 4


class Listed(ImageDataModule):
    """Files `<split>/<class>-<group>-<number>.png`; without a group `<class>--<number>.png`."""

    page = "https://example.org/listed"
    turned = False

    def index(self) -> Splits:
        found: dict[str, list[Sample]] = {}
        for member in self.source("listed").members()[:: -1 if self.turned else 1]:
            split, name = member.name.removesuffix(".png").split("/")
            label, group, _ = name.split("-")
            found.setdefault(split, []).append(Sample(name, member, labels=(int(label),), group=group or None))
        return found


@pytest.fixture
def listed(
    tmp_path: Path, pack: Callable[..., Path], spec: Callable[..., DataSpec], encode: Callable[..., bytes]
) -> Callable[..., Listed]:
    """`listed({"train": ["0-a-1", ...]}, {"0-a-2": "0-a-1"}, folds=5)`: noise, but for the copies named."""

    def make(names: Mapping[str, Sequence[str]], copies: Mapping[str, str] | None = None, **options: Any) -> Listed:
        def draw(name: str) -> bytes:
            source = (copies or {}).get(name, name)
            return encode(np.random.default_rng([*source.encode()]).integers(0, 256, (8, 8, 3), np.uint8))

        pack(tmp_path / "root/listed", {f"{s}/{name}.png": draw(name) for s, ns in names.items() for name in ns})
        facts = spec("multilabel", name="listed", classes=["a", "b"], target="label")
        options = {"cache": tmp_path / "cache", "image_size": 8, "num_workers": 0, **options}
        return Listed(facts, tmp_path / "root", **options)

    return make


def ids(data: ImageDataModule) -> dict[str, list[str]]:
    return {name: [s.id for s in samples] for name, samples in data.splits.items()}


ALONE = [f"{int(i % 5 == 0)}--{i:02}" for i in range(40)]
GROUPED = [f"{int(i % 5 == 0)}-p{i // 4}-{i:02}" for i in range(40)]
OFFICIAL = {"val": [f"0--v{i}" for i in range(5)], "test": [f"{i % 2}--t{i}" for i in range(6)]}


@pytest.mark.parametrize("names", [ALONE, GROUPED], ids=["alone", "grouped"])
@pytest.mark.parametrize("folds", [3, 5, 8])
def test_every_image_is_tested_and_validated_on_once(
    listed: Callable[..., Listed], names: list[str], folds: int
) -> None:
    held: Counter[tuple[str, str]] = Counter()
    for fold in range(folds):
        found = ids(listed({"train": names}, folds=folds, fold=fold))
        assert [*found] == ["train", "val", "test"] and all(found.values())
        assert sorted(i for split in found.values() for i in split) == sorted(names)
        held.update((split, i) for split in ("val", "test") for i in found[split])
        of_groups = {split: {i.split("-")[1] for i in members} - {""} for split, members in found.items()}
        assert not of_groups["train"] & of_groups["val"] | of_groups["test"] & (of_groups["train"] | of_groups["val"])
    assert held == Counter({(split, i): 1 for split in ("val", "test") for i in names})


def test_the_official_test_split_stays_and_the_rest_validates_once(listed: Callable[..., Listed]) -> None:
    held: Counter[str] = Counter()
    for fold in range(4):
        found = ids(listed({"train": ALONE, **OFFICIAL}, folds=4, fold=fold))
        assert found["test"] == sorted(OFFICIAL["test"])
        assert sorted(found["train"] + found["val"]) == sorted(ALONE + OFFICIAL["val"])
        held.update(found["val"])
    assert held == Counter(ALONE + OFFICIAL["val"])


def test_official_splits_stay_without_folds(listed: Callable[..., Listed]) -> None:
    names = {"train": ALONE, **OFFICIAL}
    assert ids(listed(names, split_seed=3)) == {split: sorted(members) for split, members in names.items()}
    without_test = {"train": ALONE, "val": OFFICIAL["val"]}
    assert [*ids(listed(without_test))] == ["train", "val"]


@pytest.mark.parametrize("official", [{}, {"test": OFFICIAL["test"]}], ids=["nothing", "test"])
def test_what_is_missing_is_dealt_in_five_folds(listed: Callable[..., Listed], official: dict[str, list[str]]) -> None:
    data = listed({"train": ALONE, **official})
    found = ids(data)
    assert {split: len(members) for split, members in found.items()} == (
        {"train": 32, "val": 8, "test": 6} if official else {"train": 24, "val": 8, "test": 8}
    )
    assert ids(listed({"train": ALONE, **official}, folds=5)) == found
    for split in ("val",) if official else ("val", "test"):
        assert sum(i[0] == "1" for i in found[split]) in (1, 2), "8 of 40 are of the second class"


def test_splits_depend_on_ids_and_the_seed_of_the_splits_only(
    listed: Callable[..., Listed], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ids(listed({"train": ALONE}))
    np.random.seed(1)
    assert ids(listed({"train": ALONE}, seed=7, image_size=16)) == first
    monkeypatch.setattr(Listed, "turned", True)
    assert ids(listed({"train": ALONE})) == first
    assert len({tuple(ids(listed({"train": ALONE}, split_seed=s))["test"]) for s in range(5)}) == 5


@pytest.mark.parametrize("seed", range(4))
def test_identical_images_are_never_in_two_dealt_splits(listed: Callable[..., Listed], seed: int) -> None:
    copies = {ALONE[i + 1]: ALONE[i] for i in range(0, 24, 3)} | {ALONE[30]: ALONE[0], ALONE[35]: ALONE[0]}
    split = {
        i: name for name, members in ids(listed({"train": ALONE}, copies, split_seed=seed)).items() for i in members
    }
    assert len(split) == 40 and {split[copy] for copy in copies if copies[copy] == ALONE[0]} == {split[ALONE[0]]}
    assert all(split[copy] == split[original] for copy, original in copies.items())


def test_look_alikes_stay_together_unless_they_may_part(
    dataset: Callable[..., Any], fake_folder_labels: Callable[..., Path], encode: Callable[..., bytes], tmp_path: Path
) -> None:
    """Each image of class b is a darker copy of one of class a."""
    root, rng = fake_folder_labels(tmp_path / "mine", 24), np.random.default_rng(0)
    for number in range(0, 24, 2):
        noise = rng.normal(0, 1, (5, 6, 3)) * 50 + 120
        fine = rng.normal(0, 1, (40, 48, 3)) * 15
        image = (np.kron(noise, np.ones((8, 8, 1))) + fine).clip(0, 255).astype(np.uint8)
        (root / f"a/{number:02}.jpg").write_bytes(encode(image))
        (root / f"b/{number + 1:02}.jpg").write_bytes(encode((image * 0.8).astype(np.uint8)))

    def torn(**options: Any) -> int:
        found = ids(dataset("folder_labels", root, folds=4, **options))
        split = {int(i[2:]): name for name, members in found.items() for i in members}
        return sum(split[number] != split[number + 1] for number in range(0, 24, 2))

    for seed in range(4):
        assert torn(split_seed=seed) == 0
    assert max(torn(split_seed=seed, alike_together=False) for seed in range(4)) > 0


def test_groups_with_an_image_in_common_stay_together(listed: Callable[..., Listed]) -> None:
    """Group 0 holds a copy of an image of group 1, which holds one of group 2: one chain."""
    copies = {GROUPED[0]: GROUPED[4], GROUPED[5]: GROUPED[8]}
    for seed in range(6):
        found = ids(listed({"train": GROUPED}, copies, split_seed=seed))
        where = [{name for name, members in found.items() if i in members} for i in GROUPED[:12]]
        assert all(names == where[0] for names in where)


def test_the_fold_of_an_image_that_is_excluded_is_dealt_anew(listed: Callable[..., Listed]) -> None:
    found = ids(listed({"train": ALONE}, exclude=[ALONE[3]]))
    assert sorted(i for members in found.values() for i in members) == sorted(set(ALONE) - {ALONE[3]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folds": 1}, r"data\.folds is 1; expected 2 or more, or null for the official splits"),
        ({"folds": 5, "fold": 5}, r"data\.fold is 5; expected 0 to 4"),
        ({"fold": -1}, r"data\.fold is -1; expected 0 to 4"),
        ({"fold": 5}, r"data\.fold is 5; expected 0 to 4"),
        ({"folds": 2}, r"data\.folds is 2; expected 3 or more: listed has no official test split"),
        ({"folds": 41}, r"data\.folds is 41; expected 2 or more and at most 40, the number of images|groups"),
    ],
)
def test_folds_that_cannot_be_are_named(listed: Callable[..., Listed], options: dict[str, int], words: str) -> None:
    with pytest.raises(MedvisionError, match=words):
        _ = listed({"train": ALONE}, **options).splits


def test_fewer_groups_than_folds_are_named(listed: Callable[..., Listed]) -> None:
    names = [f"0-p{i % 3}-{i}" for i in range(20)]
    words = r"data\.folds is 5; expected 2 or more and at most 3, the number of groups of images"
    with pytest.raises(MedvisionError, match=words):
        _ = listed({"train": names}, folds=5).splits
    assert {len(members) for members in ids(listed({"train": names}, folds=3)).values()} == {6, 7}


def test_fewer_groups_than_five_are_dealt_one_by_one_where_no_folds_are_asked_for(
    listed: Callable[..., Listed],
) -> None:
    names = [f"0-p{i % 3}-{i}" for i in range(20)]
    found = ids(listed({"train": names}))
    assert {split: len({i.split("-")[1] for i in members}) for split, members in found.items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }
    with pytest.raises(MedvisionError, match="no official test split here, so one fold is tested on"):
        _ = listed({"train": [name.replace("p2", "p1") for name in names]}).splits


def test_two_folds_are_enough_where_there_is_a_test_split(listed: Callable[..., Listed]) -> None:
    found = ids(listed({"train": ALONE, "test": OFFICIAL["test"]}, folds=2, fold=1))
    assert {split: len(members) for split, members in found.items()} == {"train": 20, "val": 20, "test": 6}


def test_masks_are_dealt_by_their_rarest_class(
    dataset: Callable[..., Any], fake_isic2018_attributes: Callable[..., Path], tmp_path: Path
) -> None:
    data = dataset("isic2018_attributes", fake_isic2018_attributes(tmp_path / "isic2018", {"train": 60}), folds=5)
    assert [*map(len, data.splits.values())] == [36, 12, 12]
    stratum = dict(zip([s.id for s in data.samples], data.strata(), strict=True))
    for k, number in Counter(stratum.values()).items():
        for split in ("val", "test"):
            share = sum(stratum[s.id] == k for s in data.splits[split])
            assert number // 5 <= share <= -(-number // 5)
    counts = data.presence.sum(0)
    assert counts.tolist() == [sum((n + k) % (k + 2) == 0 for n in range(60)) for k in range(5)]
    image = Image.open(io.BytesIO(data.samples[0].masks[0][0].read()))
    assert data.presence[0].tolist() == [
        bool(np.asarray(Image.open(io.BytesIO(m[0].read()))).any()) for m in data.samples[0].masks
    ]
    assert image.size == (32, 24)
