import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from medvision.comparison.variants import (
    differences,
    factors_of,
    find_runs,
    grouped,
    read_results,
    read_run,
    repetitions,
    together,
)
from medvision.configs import load_config
from medvision.errors import MedvisionError
from medvision.metrics import LabelRows, MaskRows
from medvision.runs import RunFolder

COUNTS = np.random.default_rng(0).integers(1, 30, (6, 1, 4))


def read(folder, split="test"):
    place = RunFolder(folder)
    typed = list(OmegaConf.load(place.overrides))
    return read_run(place, OmegaConf.to_container(load_config(place), resolve=False), typed, split)


@pytest.fixture
def runs(fake_run, tmp_path):
    """`runs(["model=a", "seed=1"], ...)`: runs of overrides, of which dotted scalars go into the config as well."""

    def make(*overrides, configs=None, **options):
        made = []
        for n, words in enumerate(overrides):
            config = OmegaConf.create()
            for word in words:
                key, value = word.split("=")
                if "." in key or key == "seed":
                    OmegaConf.update(
                        config, key, OmegaConf.create([value])[0] if value.isalpha() else json.loads(value)
                    )
            if configs:
                config = OmegaConf.merge(config, configs[n])
            folder = tmp_path / f"run{len([*tmp_path.iterdir()])}"
            made.append(read(fake_run(folder, COUNTS, words, config, **options)))
        return made

    return make


def test_differences():
    def config(**changes):
        seed = changes.pop("seed", 0)
        base = {
            "seed": seed,
            "data": {"_target_": "m.ISIC", "seed": seed, "size": [64, 64]},
            "optimizer": {"_target_": "m.from_torch", "name": "AdamW", "lr": 0.1},
            "paths": {"data": f"${{oc.env:MEDVISION_DATA,'/{seed}'}}"},
        }
        return base | changes

    nets = [{"_target_": "m.UNetPP", "depth": 4}, {"_target_": "m.SMP", "architecture": "FPN", "encoder": "b0"}]
    assert differences([config(), config()]) == [[], []]
    assert differences([config(seed=1), config(seed=2)]) == [["seed=1"], ["seed=2"]]
    assert differences([config(model=net) for net in nets]) == [["model=UNetPP"], ["model=FPN"]]
    three = [config(model=net) for net in (*nets, nets[0] | {"depth": 2})]
    assert differences(three) == [["model=UNetPP", "model.depth=4"], ["model=FPN"], ["model=UNetPP", "model.depth=2"]]
    sgd = {"_target_": "m.from_torch", "name": "SGD", "lr": 0.2}
    assert differences([config(), config(optimizer=sgd)]) == [
        ["optimizer=AdamW", "optimizer.lr=0.1"],
        ["optimizer=SGD", "optimizer.lr=0.2"],
    ]
    assert differences([config(swa=None), config(swa={"_target_": "m.SWA"})]) == [["swa=null"], ["swa=SWA"]]


def test_masks_are_read_as_they_were_written(fake_run, tmp_path):
    counts = np.random.default_rng(1).integers(0, 30, (5, 2, 4))
    folder = fake_run(tmp_path / "r", counts, classes=("a", "b"), groups=["p", "p", "q", "q", "r"])
    rows, groups = read_results(folder / "results_test.csv")
    assert isinstance(rows, MaskRows) and rows.classes == ("a", "b") and rows.ids == ("i00", "i01", "i02", "i03", "i04")
    np.testing.assert_array_equal(rows.counts, counts)
    assert groups == {"i00": "p", "i01": "p", "i02": "q", "i03": "q", "i04": "r"}
    assert rows.summary() == json.loads((folder / "metrics.json").read_text())["test"]


@pytest.mark.parametrize("classes", [("a", "b"), ("a",)])
def test_labels_are_read_as_they_were_written(fake_run, tmp_path, classes):
    probability = np.random.default_rng(1).dirichlet([1, 1], 6)[:, : len(classes)].astype(np.float32)
    rows, groups = read_results(fake_run(tmp_path / "r", probability, classes=classes) / "results_test.csv")
    assert isinstance(rows, LabelRows) and rows.exclusive == (len(classes) > 1) and groups == {}
    np.testing.assert_array_equal(rows.probability, probability)
    stored = json.loads((tmp_path / "r" / "metrics.json").read_text())["test"]
    assert rows.summary() == pytest.approx(stored, abs=1e-7)


def test_broken_results_are_refused(fake_run, tmp_path):
    path = fake_run(tmp_path / "r", COUNTS, classes=("a",)) / "results_test.csv"
    with pytest.raises(MedvisionError, match=r"results_val\.csv is missing; expected the per-image results"):
        read_results(path.with_name("results_val.csv"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(MedvisionError, match="is broken: expected a row for each image and class"):
        read_results(path)
    path.write_text(lines[0] + "\n")
    with pytest.raises(MedvisionError, match="is broken"):
        read_results(path)


def test_jobs_of_a_sweep_are_found_in_their_order(fake_run, tmp_path):
    for job in ("0", "2", "10", "11"):
        fake_run(tmp_path / "sweep" / job, COUNTS)
    (tmp_path / "sweep" / "11" / "metrics.json").unlink()
    found = [[place.path.name for place in places] for places in find_runs(tmp_path / "sweep")]
    assert found == [["0", "2", "10"], ["11"]]
    assert find_runs(tmp_path / "sweep" / "2") == ([RunFolder(tmp_path / "sweep" / "2")], [])
    with pytest.raises(MedvisionError, match=r"11 is not finished; go on with python -m medvision\.train resume="):
        find_runs(tmp_path / "sweep" / "11")
    (tmp_path / "none").mkdir()
    with pytest.raises(MedvisionError, match="none holds no finished run; expected a run folder or a folder of them"):
        find_runs(tmp_path / "none")


def test_what_the_folder_tells_of_a_run(fake_run, tmp_path):
    folder = fake_run(tmp_path / "r", COUNTS, ["seed=3"], {"seed": 3, "data": {"fold": 2}})
    (folder / "evaluations").mkdir()
    for name in ("test_0.5", "test_stored_d4", "val_0.5"):
        (folder / "evaluations" / f"{name}.json").write_text("{}")
    (folder / "environment.json").write_text(json.dumps({"git": {"commit": "0123456789abcdef", "dirty": True}}))
    run = read(folder)
    assert run.again == ("test_0.5", "test_stored_d4") and run.code == "0123456789 and changes"
    assert run.repetition == {"seed": 3, "fold": 2}


def group(runs):
    members = grouped([run.config for run in runs])
    return members, *factors_of(runs, members)


def test_seeds_and_folds_are_repetitions(runs):
    words = [
        [f"model.block={b}", f"seed={s}", f"data.fold={f}"] for b in ("plain", "dense") for s in (1, 2) for f in (0, 1)
    ]
    made = runs(*words)
    members, names, levels = group(made)
    assert members == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert names == ["model.block=plain", "model.block=dense"]
    assert levels == [{"model.block": "plain"}, {"model.block": "dense"}]


def test_trackers_and_places_make_no_variant(runs):
    changes = [{}, {"logger": {"wandb": {"_target_": "W"}}}, {"data": {"num_workers": 3}}]
    changes.append({"paths": {"data": "${oc.env:MEDVISION_DATA,'/elsewhere'}"}})
    changes += [{"test": False}, {"callbacks": {"explain": {"_target_": "E", "epochs": [1]}}}]
    assert grouped([run.config for run in runs(*[[]] * 6, configs=changes)]) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", ["positive_weights", "class_weights"])
def test_weights_counted_in_each_fold_make_no_variant(name, runs):
    def of(fold, weights, lr):
        return {"data": {"fold": fold}, "loss": {name: weights}, "optimizer": {"lr": lr}}

    counted = [of(fold, [2.0 + fold], lr) for lr in (0.1, 0.2) for fold in (0, 1)]
    assert grouped([run.config for run in runs(*[[]] * 4, configs=counted)]) == [[0, 1], [2, 3]]
    given = [of(fold, [weight], 0.1) for weight in (1.0, 3.0) for fold in (0, 1)]
    assert grouped([run.config for run in runs(*[[]] * 4, configs=given)]) == [[0, 1], [2, 3]]


def test_variants_are_named_by_what_was_typed(runs):
    net = {"model": {"_target_": "m.UNetPP", "depth": 4}}
    deep = {"model": {"_target_": "m.UNetPP", "depth": 4, "deep": True}, "loss": {"_target_": "m.Lovasz"}}
    plain = {"model": {"deep": False}}
    made = runs(["model=unet"], ["model=unetpp"], ["model=unetpp", "loss=lovasz"], configs=[plain, net, deep])
    _, names, levels = group(made)
    assert names == ["model=unet", "model=unetpp", "model=unetpp, loss=lovasz"]
    assert levels == [
        {"model": "unet", "loss": "default"},
        {"model": "unetpp", "loss": "default"},
        {"model": "unetpp", "loss": "lovasz"},
    ]


def test_a_default_is_named_by_its_value(runs):
    _, names, levels = group(runs([], ["optimizer.lr=0.5"]))
    assert names == ["optimizer.lr=0.001", "optimizer.lr=0.5"]
    assert levels == [{"optimizer.lr": "0.001"}, {"optimizer.lr": "0.5"}]
    configs = [{"model": {"deep": False, "weights": None}}, {"model": {"deep": True, "weights": "imagenet"}}]
    _, names, _ = group(runs([], ["model.deep=true", "model.weights=imagenet"], configs=configs))
    assert names == ["model.deep=false, model.weights=null", "model.deep=true, model.weights=imagenet"]


def test_what_was_not_typed_is_named_by_the_config(runs):
    nets = [{"model": {"_target_": f"m.{name}", "block": name}} for name in ("UNetPP", "FPN")]
    _, names, levels = group(runs([], [], configs=nets))
    assert names == ["model=UNetPP", "model=FPN"]  # the block follows from the model
    small = [net | {"optimizer": {"lr": lr}} for net, lr in zip(nets, (0.1, 0.2), strict=True)]
    _, names, levels = group(runs([], [], configs=small))
    assert names == ["model=UNetPP, optimizer.lr=0.1", "model=FPN, optimizer.lr=0.2"]
    assert levels[0] == {"model + optimizer.lr": "UNetPP + 0.1"}  # only together: one factor


def test_an_entry_that_older_code_lacked_tells_variants_apart(runs):
    words = [["model.block=plain", "seed=1"], ["model.block=dense", "seed=1"], ["model.block=plain", "seed=2"]]
    made = runs(*words, configs=[{}, *[{"task": {"tolerance": 2}}] * 2])
    members, names, levels = group(made)
    assert members == [[0], [1], [2]] and levels[0] == {"model.block": "plain", "task.tolerance": "-"}
    assert names == ["model.block=plain", *(f"model.block={b}, task.tolerance=2" for b in ("dense", "plain"))]
    assert group(made[::2])[1] == ["task.tolerance=-", "task.tolerance=2"]


def test_repetitions_are_seeds_or_folds_that_make_a_whole(fake_run, tmp_path):
    def run(seed, fold, ids):
        config = {"seed": seed, "data": {"fold": fold}}
        return read(fake_run(tmp_path / f"{seed}{fold}{''.join(ids)}", COUNTS[: len(ids)], [], config, ids=ids))

    whole = repetitions([run(1, 0, "ab"), run(1, 1, "cd"), run(2, 0, "ab"), run(2, 1, "cd")], "a net")
    assert {seed: together(of).ids for seed, of in whole.items()} == {"seed 1": tuple("abcd"), "seed 2": tuple("abcd")}
    official = repetitions([run(3, 0, "ab"), run(3, 1, "ab")], "a net")
    assert {seed: [run.folder.name for run in of] for seed, of in official.items()} == {
        "seed 3": ["30ab"],
        "seed 3, fold 1": ["31ab"],
    }
    with pytest.raises(MedvisionError, match=r"a net, seed 4: its folds \(40ab, 41bc\) have measured some images in"):
        repetitions([run(4, 0, "ab"), run(4, 1, "bc")], "a net")
    with pytest.raises(MedvisionError, match=r"are the same training \(a net, seed 5\) and no repetition of it"):
        repetitions([run(5, 0, "ab"), run(5, 0, "cd")], "a net")
