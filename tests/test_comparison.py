import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats

from medvision.comparison import compare
from medvision.comparison.variants import read_run
from medvision.configs import load_config
from medvision.errors import MedvisionError
from medvision.metrics import holm
from medvision.runs import RunFolder

IMAGES, EFFECTS = 24, {"plain": 0.0, "dense": 0.1, "worse": -0.1, "same": 0.001}


def masks(seed, gain=0.0, images=IMAGES, luck=0.01):
    """Counts (N, 1, 4) whose Jaccard is that of the images, the same for all seeds, and a gain, noise and luck."""
    of_images = np.random.default_rng(99).uniform(0.4, 0.8, images)
    rng = np.random.default_rng([seed, round(1000 * gain) + 1000])
    tp = ((of_images + gain + rng.normal(0, luck) + rng.normal(0, 0.02, images)).clip(0.01, 0.99) * 1000).astype(int)
    return np.stack([tp, 0 * tp, 1000 - tp, 0 * tp + 500], -1)[:, None]


def read(folder, split="test"):
    place = RunFolder(folder)
    config = OmegaConf.to_container(load_config(place), resolve=False)
    return read_run(place, config, list(OmegaConf.load(place.overrides)), split)


@pytest.fixture
def run(fake_run, tmp_path):
    """`run("dense", 3, fold=1)`: a run of `model.block=dense` with seed 3, and what else is typed."""

    def make(block, seed=1, results=None, name=None, typed=(), config=None, **options):
        words = [f"model.block={block}", f"seed={seed}", *typed]
        facts = OmegaConf.merge({"seed": seed, "model": {"block": block}}, config or {})
        counts = masks(seed, EFFECTS.get(block, 0)) if results is None else results
        return read(
            fake_run(tmp_path / (name or f"{block}{seed}"), counts, words, facts, **options), **split_of(options)
        )

    def split_of(options):
        return {"split": options["split"]} if "split" in options else {}

    return make


def test_three_variants_of_four_seeds(run):
    runs = [run(block, seed) for block in ("plain", "dense", "same") for seed in (1, 2, 3, 4)]
    found = compare(runs, "test", resamples=2000)
    assert (found.data, found.split, found.images, found.groups, found.metrics) == (
        "tiny",
        "test",
        24,
        None,
        ["jaccard_image"],
    )
    assert [v.name for v in found.variants] == ["model.block=plain", "model.block=dense", "model.block=same"]
    assert found.baseline == "model.block=plain" and found.warnings == [] and found.effects == []
    scores = {
        block: np.array([r.stored["jaccard_image"] for r in runs[n : n + 4]])
        for n, block in ((0, "plain"), (4, "dense"))
    }
    plain, dense = (found.variants[n].estimates["jaccard_image"] for n in (0, 1))
    assert plain.value == pytest.approx(scores["plain"].mean()) and plain.std == pytest.approx(
        scores["plain"].std(ddof=1)
    )
    assert [*plain.seeds] == ["seed 1", "seed 2", "seed 3", "seed 4"]
    assert [*plain.seeds.values()] == pytest.approx(scores["plain"])
    assert plain.low < plain.value < plain.high and plain.high - plain.low > 4 * plain.std / 2
    better, same = found.differences
    assert (better.variant, better.changed, better.images) == ("model.block=dense", ["model.block"], 24)
    assert better.value == pytest.approx(dense.value - plain.value) and better.low > 0.05 and better.high < 0.15
    assert better.verdict == "better" and same.verdict == "not shown" and same.low < 0 < same.high
    each = {
        b: np.mean([r.rows.each("jaccard_image") for r in runs[n : n + 4]], 0)
        for n, b in ((0, "plain"), (4, "dense"), (8, "same"))
    }
    p = [stats.wilcoxon(each[b] - each["plain"]).pvalue for b in ("dense", "same")]
    assert [d.wilcoxon for d in found.differences] == pytest.approx(p)
    assert [d.wilcoxon_holm for d in found.differences] == pytest.approx(holm(p))
    for name in ("bootstrap", "permutation"):
        plain_p = [getattr(d, name) for d in found.differences]
        assert [getattr(d, f"{name}_holm") for d in found.differences] == pytest.approx(holm(plain_p))
    assert better.rank_biserial == 1 and abs(same.rank_biserial) < 0.8
    ranks = found.ranks["jaccard_image"]
    assert ranks["model.block=dense"] == pytest.approx([1, 0, 0], abs=0.01)
    np.testing.assert_allclose(np.sum([*ranks.values()], 0), 1)
    assert found.ids == tuple(f"i{n:02d}" for n in range(24))
    np.testing.assert_allclose(found.each["jaccard_image"]["model.block=dense"], each["dense"])


def test_plain_objects_are_json(run):
    found = compare([run("plain"), run("dense")], "test", resamples=200)
    stored = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert "each" not in stored and "ids" not in stored
    first = stored["variants"][0]
    assert first["levels"] == {"model.block": "plain"} and first["config"] == {"model.block": "plain"}
    assert first["runs"][0]["command"] == "python -m medvision.train model.block=plain seed=1"
    assert first["estimates"]["jaccard_image"]["std"] is None
    assert stored["differences"][0]["verdict"] == "better"
    assert "fewer than 3 seeds (each variant has 1)" in stored["warnings"][0]


def test_another_baseline_turns_the_signs(run):
    runs = [run("plain"), run("dense"), run("worse")]
    there = compare(runs, "test", baseline="model.block=dense", resamples=500)
    assert [d.verdict for d in there.differences] == ["worse", "worse"]
    assert compare(runs, "test", baseline="dense1", resamples=500).differences == there.differences
    back = compare(runs, "test", resamples=500)
    assert back.differences[0].value == -there.differences[0].value
    assert back.differences[0].low == pytest.approx(-there.differences[0].high)
    with pytest.raises(
        MedvisionError, match=r"baseline=x is not there; expected the name of a variant \('model\.block=plain', '"
    ):
        compare(runs, "test", baseline="x")


def test_a_family_is_all_metrics_and_pairs(run):
    runs = [run(block) for block in EFFECTS]
    found = compare(runs, "test", ["jaccard_image", "dice"], resamples=400)
    assert [d.metric for d in found.differences] == ["jaccard_image"] * 3 + ["dice"] * 3
    assert [d.permutation_holm for d in found.differences] == holm([d.permutation for d in found.differences])
    assert [d.wilcoxon is None for d in found.differences] == [False] * 3 + [True] * 3
    wilcoxon = [d.wilcoxon for d in found.differences[:3]]
    assert [d.wilcoxon_holm for d in found.differences[:3]] == holm(wilcoxon)
    each = found.each["dice"]["model.block=plain"]  # of pooled pixels that of its namesake
    np.testing.assert_allclose(each, runs[0].rows.each("dice_image"))


def test_lower_is_better_for_brier(run):
    truth = (np.arange(30) % 2 == 0)[:, None]
    good, bad = (np.where(truth, 1 - e, e).astype(np.float32) for e in (0.1, 0.4))
    options = {"classes": ("a",), "monitor": "val/auroc"}
    runs = [run("plain", results=bad, **options), run("dense", results=good, **options)]
    found = compare(runs, "test", ["brier", "accuracy"], resamples=500)
    assert found.differences[0].value == pytest.approx(0.01 - 0.16) and found.differences[0].verdict == "better"
    assert found.differences[1].value == 0 and found.differences[1].permutation == 1
    assert found.ranks["brier"]["model.block=dense"] == [1, 0]
    assert found.ranks["accuracy"]["model.block=dense"] == [0.5, 0.5]
    assert compare(runs, "test", resamples=200).metrics == ["auroc"]


def precise(false, found=500, empty=0):
    """Counts (N, 1, 4) of images of which half of the truth is found, after images without truth."""
    false, found = np.broadcast_arrays(false, found)
    counts = np.stack([found, false, 1000 - found, 9000 - false], -1)
    counts[:empty] = [0, 0, 0, 10000]
    return counts[:, None]


def test_who_finds_nothing_in_hard_images_is_compared_on_the_others(run, tmp_path):
    hard = np.arange(24) >= 16
    plain = [run("plain", seed, precise(np.where(hard, 4000, 100 + seed))) for seed in (1, 2, 3)]
    shy = precise(np.where(hard, 0, 200), np.where(hard, 0, 500))  # less precise wherever it finds anything
    found = compare(
        [*plain, *(run("dense", seed, shy) for seed in (1, 2, 3))], "test", ["precision_image", "dice"], resamples=500
    )
    (precision, dice), (one, other) = found.differences, (v.estimates["precision_image"].value for v in found.variants)
    assert (one, other) == (pytest.approx(500 / 602, abs=1e-3), 500 / 700)
    assert precision.verdict == "worse" and precision.images == 16 and precision.value == other - one
    assert dice.images == 24
    assert found.warnings == [
        "precision_image is compared where all runs have a value of an image: where one of truth and prediction is "
        "empty there is none (model.block=dense has none in 8 of 24), so means may differ from those in metrics.json"
    ]
    only_hard = run("worse", 1, precise(np.where(hard, 200, 0), np.where(hard, 500, 0)))
    with pytest.raises(MedvisionError, match="metric=precision_image: no image has a value in all runs"):
        compare([run("dense", 4, shy), only_hard], "test", ["precision_image"])


def test_finding_nothing_where_nothing_is_lacks_no_value(run):
    right, alarmed = precise(np.full(24, 100), empty=6), precise(np.full(24, 100), empty=6)
    alarmed[:6, 0] = [0, 50, 0, 9950]
    runs = [run(b, 1, of, config={"task": {"empty": None}}) for b, of in (("plain", right), ("dense", alarmed))]
    runs = [replace(run, stored=run.rows.summary()) for run in runs]
    found = compare(runs, "test", ["jaccard_image"], resamples=200)
    values = [v.estimates["jaccard_image"].value for v in found.variants]
    assert values[1] == pytest.approx(values[0] * 18 / 24) and len(found.warnings) == 1  # false alarms count


def test_what_cannot_be_shown_is_said(run):
    groups = [f"sequence {n % 5}" for n in range(24)]
    runs = [run(block, groups=groups) for block in ("plain", "dense")]
    found = compare(runs, "test", resamples=500)
    assert found.differences[0].permutation == 2 / 2**5 and found.differences[0].verdict == "not shown"
    assert found.warnings[-1].startswith(
        "no difference can be shown, whatever it is: with 5 groups of images and 500 resamples p is at least 0.062, "
        "and by Holm over 1 not below 0.05"
    )
    runs = [run(block, 2) for block in EFFECTS]
    for resamples, said in ((120, False), (119, True)):  # 3 tests of 2 / 121
        assert ("no difference can be" in compare(runs, "test", resamples=resamples).warnings[-1]) is said


def test_rankings_over_folds_are_warned_of(run):
    ids = [f"i{n:02d}" for n in range(24)]
    halves = [np.linspace(0, 0.4, 12)[:, None], np.linspace(0.6, 1, 12)[:, None]]  # of another scale each
    runs = [
        run(
            b, 1, half.astype(np.float32), name=f"{b}{fold}", config={"data": {"fold": fold}}, ids=ids[12 * fold :][:12]
        )
        for b in ("plain", "dense")
        for fold, half in enumerate(halves)
    ]
    found = compare(runs, "test", ["auroc", "brier"], resamples=100)
    within = runs[0].stored["auroc"]
    assert found.variants[0].estimates["auroc"].value != pytest.approx(within, abs=0.01)
    assert [line for line in found.warnings if "ranks images of all folds" in line] == [
        "auroc ranks images of all folds together, each by the network of its fold: where their probabilities differ "
        f"in scale, it is less than within folds (whose means are: model.block=plain {within:.4f}; model.block=dense "
        f"{within:.4f})"
    ]
    assert not any("ranks" in line for line in compare(runs[::2], "test", ["auroc"], resamples=100).warnings)


def test_intervals_end_where_a_metric_does(run):
    lucky = {("plain", 1): 0.3, ("plain", 2): -0.3, ("dense", 1): -0.3, ("dense", 2): 0.3}
    runs = [run(block, seed, masks(seed, gain)) for (block, seed), gain in lucky.items()]
    found = compare(runs, "test", resamples=500)
    plain, difference = found.variants[0].estimates["jaccard_image"], found.differences[0]
    assert (plain.low, plain.high) == (0, 1) and -1 <= difference.low < -0.9 and 0.9 < difference.high <= 1


def test_groups_of_images_are_one_unit(run):
    groups = [f"p{n % 6}" for n in range(IMAGES)]
    runs = [run("plain", groups=groups), run("dense", groups=groups)]
    found = compare(runs, "test", resamples=500)
    assert found.groups == 6
    assert found.differences[0].wilcoxon == 2 / 2**6 == found.differences[0].permutation  # the least that six allow
    alone = compare([run(b, name=f"{b}_alone") for b in ("plain", "dense")], "test", resamples=500)
    assert alone.groups is None and alone.differences[0].wilcoxon < 1e-4
    assert any(
        "too few groups of images for intervals and tests to be trusted: 6" in warning for warning in found.warnings
    )


def test_folds_of_a_cross_validation_are_one_measurement(run):
    runs = []
    for block in ("plain", "dense"):
        counts = masks(1, EFFECTS[block])
        for fold, part in enumerate((slice(0, 10), slice(10, 24))):
            ids = [f"i{n:02d}" for n in range(24)][part]
            options = {"ids": ids, "config": {"data": {"fold": fold}}, "typed": [f"data.fold={fold}"]}
            runs.append(run(block, results=counts[part], name=f"{block}_{fold}", **options))
    found = compare(runs, "test", resamples=300)
    whole = compare([run(b, results=masks(1, EFFECTS[b]), name=b) for b in ("plain", "dense")], "test", resamples=300)
    assert found.images == 24 and len(found.variants) == 2
    assert found.differences == whole.differences
    with pytest.raises(
        MedvisionError, match=r"of 24 images 10 were measured by all runs \(model\.block=dense, seed 1 has 10\)"
    ):
        compare(runs[:3], "test")


def test_other_images_are_refused_unless_common_is_asked_for(run, caplog):
    more = run("dense", results=masks(1, 0.1, images=30))
    with pytest.raises(MedvisionError, match=r"of 30 images 24 were measured.*common=true compares on these 24"):
        compare([run("plain"), more], "test")
    with caplog.at_level(logging.WARNING, "medvision"):
        found = compare([run("plain", name="again"), more], "test", common=True, resamples=200)
    assert found.images == 24 and "the others are left out" in caplog.text
    value = more.rows.each("jaccard_image")[:24].mean()
    assert found.variants[1].estimates["jaccard_image"].value == pytest.approx(value)
    apart = run("dense", ids=[f"x{n}" for n in range(24)], name="apart")
    with pytest.raises(MedvisionError, match="there is no image that all runs have measured"):
        compare([run("plain", name="third"), apart], "test", common=True)


def test_what_cannot_be_compared_is_refused(run):
    plain = run("plain")
    with pytest.raises(
        MedvisionError, match=r"is of tiny \(lesion\), .*other of tiny \(a, b\); runs are compared on one"
    ):
        compare([plain, run("dense", results=np.ones((4, 2, 4), int), classes=("a", "b"), name="other")], "test")
    changed = masks(1)
    changed[5, 0] += [0, 0, 1, -1]
    with pytest.raises(
        MedvisionError, match=r"the truth of 1 images, as i05, was another for model\.block=plain than for"
    ):
        compare([plain, run("dense", results=changed, name="changed")], "test")
    with pytest.raises(MedvisionError, match=r"metric=jacard: .*plain1 has dice, jaccard, "):
        compare([plain], "test", ["jacard"])
    edited = run("dense", name="edited")
    edited.stored["jaccard_image"] += 0.01
    with pytest.raises(
        MedvisionError, match=r"edited: jaccard_image is 0\.\d+ in metrics\.json, but 0\.\d+ by the per-image"
    ):
        compare([plain, edited], "test")


def test_warnings_of_what_a_reader_has_to_know(run):
    plain, dense = run("plain", 1, split="val"), run("dense", 2, split="val")
    found = compare([plain, dense], "val", resamples=200)
    assert [warning.partition(" (")[0].partition(":")[0] for warning in found.warnings] == [
        "fewer than 3 seeds",
        "the variants were not repeated with the same seeds",
        "the numbers are of the validation split, which also chose epochs and thresholds",
    ]
    folder = run("worse").folder
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "test_0.4.json").write_text("{}")
    (folder / "environment.json").write_text(json.dumps({"git": {"commit": "a" * 40, "dirty": False}}))
    found = compare([read(folder)] + [run("plain", seed) for seed in (3, 4, 5)], "test", resamples=200)
    assert "fewer than 3 seeds (model.block=worse has 1)" in found.warnings[0]
    assert "the test split was looked at again after training (worse1: test_0.4)" in found.warnings[2]
    assert found.warnings[3] == "the runs were made by different code: aaaaaaaaaa, unknown"


def test_data_that_has_changed_between_the_runs_is_told(run):
    def warnings(*runs):
        found = compare([replace(of, fingerprint=data) for of, data in runs], "test", resamples=200)
        return [warning for warning in found.warnings if warning.startswith("images, masks or labels have changed")]

    plain, dense = run("plain", 1), run("dense", 2)
    assert len(warnings((plain, "a"), (dense, "b"))) == 1
    assert not warnings((plain, "a"), (dense, "a")) and not warnings((plain, "a"), (dense, ""))
    assert not warnings((plain, "a"), (run("worse", config={"data": {"exclude": ["x"]}}), "b"))
    (plain.folder / "metrics.json").write_text(json.dumps({"test": plain.stored, "fingerprint": "a"}))
    assert read(plain.folder).fingerprint == "a"


def test_a_grid_has_main_effects_and_interactions(run):
    gains = {("plain", 0.1): 0.0, ("plain", 0.2): 0.05, ("dense", 0.1): 0.1, ("dense", 0.2): 0.05}
    runs = []
    for (block, lr), gain in gains.items():
        for seed in (1, 2, 3):
            options = {"typed": [f"optimizer.lr={lr}"], "config": {"optimizer": {"lr": lr}}}
            runs.append(run(block, seed, results=masks(seed, gain, luck=0), name=f"{block}{lr}{seed}", **options))
    found = compare(runs, "test", resamples=1000)
    means = [v.estimates["jaccard_image"].value for v in found.variants]  # in the order of `gains`
    block, lr, both = found.effects
    assert (block.factors, block.levels, block.reference) == (("model.block",), ("dense",), ["plain"])
    assert (
        block.value == pytest.approx((means[2] + means[3] - means[0] - means[1]) / 2) == pytest.approx(0.05, abs=0.01)
    )
    assert lr.value == pytest.approx((means[1] + means[3] - means[0] - means[2]) / 2) == pytest.approx(0, abs=0.01)
    assert both.factors == ("model.block", "optimizer.lr") and (both.levels, both.reference) == (
        ("dense", "0.2"),
        ["plain", "0.1"],
    )
    assert both.value == pytest.approx(means[3] - means[2] - means[1] + means[0]) == pytest.approx(-0.1, abs=0.01)
    assert block.low > 0 and lr.low < 0 < lr.high and both.high < 0
    changed = [d.changed for d in found.differences]
    assert changed == [["optimizer.lr"], ["model.block"], ["model.block", "optimizer.lr"]]
    assert compare(runs[:9], "test", resamples=200).effects == []  # no grid: one factor at a time is in `changed`


def test_one_variant_has_a_mean_and_no_pairs(run):
    found = compare([run("plain", seed) for seed in (1, 2, 3)], "test", resamples=200)
    assert [v.name for v in found.variants] == ["all runs"] and found.differences == []
    assert found.ranks == {"jaccard_image": {"all runs": [1]}}
