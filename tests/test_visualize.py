"""Images of a run chosen and drawn, and curves of several runs, from run folders as training leaves them."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from medvision import cli, figures, selection
from medvision.build import load_run
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation import evaluate
from medvision.metrics import scores
from medvision.postprocess import Cleaning
from medvision.runs import RunFolder
from medvision.selection import from_the_worst, results, values
from medvision.visualize import start

HISTORY = [(1, 9, "train/loss", 0.5), (1, 9, "val/loss", 0.6), (1, 9, "val/jaccard", 0.1)]


def draw(*overrides):
    configs = [cli.compose("visualize", words) for words in cli.variants(list(overrides), "run")]
    start(configs, None, list(overrides))


@pytest.fixture
def sheets(monkeypatch):
    """What was drawn: (name of the file, rows, classes, title, options)."""
    drawn = []

    def keep(name):
        real = getattr(figures, name)

        def wrapped(path, *arguments, **options):
            if not path.name.startswith("predictions_"):  # those of the end of a training
                drawn.append((path.name, *arguments, options))
            real(path, *arguments, **options)

        monkeypatch.setattr(figures, name, wrapped)

    for name in ("sheet", "gallery", "probabilities"):
        keep(name)
    return drawn


def table(place, split):
    return [*csv.DictReader(place.results(split).open())]


def test_one_image_has_a_row_for_each_class_at_its_own_size(trained, sheets, capsys):
    place = trained("attributes")
    rows = table(place, "val")
    ids = sorted({row["id"] for row in rows})
    draw(f"run={place.path}", "split=val", "index=1")
    path = place.path / "visualizations" / f"val_1_{ids[1]}.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {path}"
    _, examples, classes, _, options = sheets[0]
    assert options == {"height": None} and len(examples) == 6 and len(classes) == 5
    of_image = [row for row in rows if row["id"] == ids[1]]
    height, width = (int(of_image[0][side]) for side in ("height", "width"))
    whole, *each = examples
    assert whole.image.shape == (height, width, 3)
    dice, jaccard = (np.mean([float(row[name]) for row in of_image]) for name in ("dice", "jaccard"))
    assert whole.caption.startswith(f"{ids[1]}   dice {dice:.3f}") and f"   jaccard {jaccard:.3f}" in whole.caption
    for k, (example, row) in enumerate(zip(each, of_image, strict=True)):
        tp, fp, fn = (int(row[name]) for name in ("tp", "fp", "fn"))
        found = (example.truth & example.prediction).sum(), example.prediction.sum(), example.truth.sum()
        assert found == (tp, tp + fp, tp + fn)  # what is drawn is what was measured
        shown = f"dice {float(row['dice']):.3f}   jaccard {float(row['jaccard']):.3f}   {tp + fn} pixels, {tp + fp} "
        assert example.caption == f"{classes[k]}   {shown}predicted"
    assert Image.open(path).size[1] == 44 + 6 * (22 + height)
    draw(f"run={place.path}", "split=val", f"id={ids[1]}", f"output={place.path / 'elsewhere'}")
    assert (place.path / "elsewhere" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_what_an_evaluation_draws_is_what_it_measured(trained, sheets, tmp_path, precision):
    """With a decision that is not the stored one, and in the arithmetic of the run."""
    run = load_run(trained("attributes").path)
    run.config.trainer.precision = precision
    decision = Decision((0.48,) * 5, (1.7,) * 5, (Cleaning(fill=True, min_area=20),) * 5)
    found = evaluate(run.evaluating(), run.task, run.data, "test", decision)
    selection.draw(tmp_path / "sheet.png", run, found, decision)
    [(_, examples, classes, title, _)] = sheets
    assert title.startswith(f"test: from the worst to the best of {len(found.images)} images") and len(classes) == 5
    counts = dict(zip((image.id for image in found.images), found.counts(decision), strict=True))
    for example, (name, rank) in zip(examples, found.spread(decision).items(), strict=True):
        assert example.caption.startswith(f"{name}   rank {rank} of {len(found.images)}   dice ")
        both, drawn = (example.truth & example.prediction).sum((1, 2)), example.prediction.sum((1, 2))
        tp, fp, fn, _ = counts[name].T
        assert [both.tolist(), drawn.tolist(), example.truth.sum((1, 2)).tolist()] == [
            tp.tolist(),
            (tp + fp).tolist(),
            (tp + fn).tolist(),
        ]


@pytest.mark.parametrize("metric", ["jaccard", "dice/globules", "sensitivity"])
@pytest.mark.parametrize("choice", ["worst", "best"])
def test_sheets_follow_the_stored_results(trained, sheets, monkeypatch, choice, metric):
    place = trained("attributes")
    monkeypatch.setattr(selection, "evaluate", None)  # nothing is measured again
    name, _, of = metric.partition("/")
    of_image = {}
    for row in table(place, "test"):
        if row["class"] == of or not of:
            of_image.setdefault(row["id"], []).append(float(row[name] or "nan"))
    mean = {i: np.nanmean(v) for i, v in of_image.items() if not np.isnan(v).all()}
    expected = sorted(mean, key=lambda i: (mean[i], i), reverse=choice == "best")[:2]
    draw(f"run={place.path}", f"{choice}=2", *([] if metric == "jaccard" else [f"metric={metric}"]))
    file, examples, classes, title, _ = sheets[0]
    assert file == f"test_{choice}2_{metric.replace('/', '_')}.png"
    assert [e.caption.split()[0] for e in examples] == expected
    assert title.endswith(f": the 2 {choice} of {len(mean)} images by {metric}")
    assert {len(e.truth) for e in examples} == {1 if of else 5} and len(classes) == (1 if of else 5)
    first = 1 if choice == "worst" else len(mean)
    assert f"   rank {first} of {len(mean)}" in examples[0].caption
    assert (f"sensitivity {mean[expected[0]]:.3f}" in examples[0].caption) == (metric == "sensitivity")


def test_a_split_without_results_is_measured(trained, sheets, caplog):
    place = trained("attributes")
    run = load_run(place.path)
    ids = [sample.id for sample in run.data.splits["train"]]
    caplog.set_level("INFO")
    rows = results(run, place, "train")
    assert f"measuring {len(ids)} images of train" in caplog.text
    assert list(dict.fromkeys(row["id"] for row in rows)) == ids and len(rows) == 5 * len(ids)
    counts = np.array([[int(row[name]) for name in ("tp", "fp", "fn", "tn")] for row in rows])
    np.testing.assert_allclose(scores(counts)["dice"], [float(row["dice"]) for row in rows])


def test_results_of_other_images_are_not_taken(trained, tmp_path, caplog):
    place = RunFolder(shutil.copytree(trained("attributes").path, tmp_path / "copy"))
    lines = place.results("val").read_text().splitlines(keepends=True)
    place.results("val").write_text("".join(lines[:-5]))
    assert len(results(load_run(place.path), place, "val")) == len(lines) - 1
    assert "is of other images than val has now" in caplog.text


def test_random_images_are_those_of_the_seed(trained, sheets):
    place = trained("attributes")
    for seed in (0, 0, 1):
        draw(f"run={place.path}", "split=train", "random=4", f"seed={seed}")
    chosen = [[e.caption.split()[0] for e in examples] for _, examples, *_ in sheets]
    assert chosen[0] == chosen[1] == sorted(set(chosen[0])) and len(chosen[0]) == 4
    assert chosen[1] != chosen[2]
    assert [file for file, *_ in sheets[1:3]] == ["train_random4_seed0.png", "train_random4_seed1.png"]
    draw(f"run={place.path}", "split=val", "random=99")
    assert len(sheets[-1][1]) == len({row["id"] for row in table(place, "val")})


@pytest.mark.parametrize("name", ["melanoma", "insects"])
def test_labels_by_the_probability_given_to_their_truth(trained, sheets, name):
    place = trained(name)
    rows = table(place, "val")
    given, classes = {}, list(dict.fromkeys(row["class"] for row in rows))
    for row in rows:
        value = float(row["probability"])
        given.setdefault(row["id"], []).append(value if row["truth"] == "1" else 1 - value)
    order = sorted(given, key=lambda i: (min(given[i]), i))
    draw(f"run={place.path}", "split=val", "worst=3")
    file, tiles, _, _, _ = sheets[0]
    assert file == "val_worst3_probability.png"
    for rank, (tile, image) in enumerate(zip(tiles, order[:3], strict=True), 1):
        first, second, truth, *said = tile.caption.split("\n")
        assert (first, second) == (image, f"rank {rank} of {len(order)}   probability {min(given[image]):.3f}")
        of = {row["class"]: row for row in rows if row["id"] == image}
        names = {flag: [c for c in classes if of[c][flag] == "1"] for flag in ("truth", "decision")}
        assert truth == (" + ".join(names["truth"]) or "none")
        wrong = names["truth"] != names["decision"]
        assert said == ([f"said: {' + '.join(names['decision']) or 'none'}"] if wrong else [])
    draw(f"run={place.path}", "split=val", "index=0")
    _, _, shown, probability, truth, threshold, title, _ = sheets[1]
    of_image = [row for row in rows if row["id"] == min(given)]
    assert list(shown) == classes and f"\n{min(given)}: " in title
    np.testing.assert_allclose(probability, [float(row["probability"]) for row in of_image], atol=1e-6)
    assert truth.tolist() == [row["truth"] == "1" for row in of_image]
    assert len(threshold) == (1 if name == "melanoma" else 0)


def test_values_and_order():
    rows = [
        {"id": i, "class": c, "threshold": "0.5", "dice": d, "hd95": h}
        for i, c, d, h in (("x", "a", "0.5", "3"), ("x", "b", "", "1"), ("y", "a", "", ""), ("y", "b", "0.2", "7"))
    ]
    assert values(rows, "dice") == {"x": 0.5, "y": 0.2}
    assert values(rows, "dice/a") == {"x": 0.5}  # y has none
    assert values(rows, "hd95") == {"x": 2.0, "y": 7.0}
    assert from_the_worst(values(rows, "dice"), "dice") == ["y", "x"]
    assert from_the_worst(values(rows, "hd95/b"), "hd95/b") == ["y", "x"]  # far is bad
    assert from_the_worst({"b": 1.0, "a": 1.0}, "dice") == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which images.*one of index=, id=, worst=, best=, random=, or curves=true; found nothing"),
        (["index=1", "best=2"], "found index=1 and best=2"),
        (["index=1", "curves=true"], "curves=true draws no images; leave out index="),
        (["worst=0"], "worst=0: expected a number of images, 1 or more"),
        (["random=3", "metric=dice"], "metric=dice is for worst=, best= and curves=true; leave it out with random="),
        (["split=val", "index=3"], "index=3: val has 3 images; expected 0 to 2"),
        (["split=val", "index=-1"], "index=-1: val has 3 images; expected 0 to 2"),
        (["split=vla", "index=0"], "no split 'vla' here; it has train, val, test"),
        (["worst=2", "metric=dcie"], "metric=dcie: expected one of dice, jaccard.*<class>: pigment_network, neg"),
        (["worst=2", "metric=dice/lesion"], "metric=dice/lesion: expected one of dice"),
        (["curves=true", "metric=dice"], "metric=dice: expected one of loss, jaccard"),
        (["curves=true", "by=hour"], "by=hour: expected epoch or step"),
    ],
)
def test_refusals(trained, words, message):
    with pytest.raises(MedvisionError, match=message):
        draw(f"run={trained('attributes').path}", *words)


def test_a_wrong_name_is_answered_with_the_nearest_or_its_split(trained):
    place = trained("attributes")
    val, test = (sorted({row["id"] for row in table(place, split)}) for split in ("val", "test"))
    with pytest.raises(MedvisionError, match=f"id={val[0]}x: val has no such image; the nearest is '{val[0]}'"):
        draw(f"run={place.path}", "split=val", f"id={val[0]}x")
    with pytest.raises(MedvisionError, match=f"id={test[0]} is not in val but in test; choose split=test"):
        draw(f"run={place.path}", "split=val", f"id={test[0]}")


def test_what_is_no_single_finished_run_is_refused(trained, tmp_path):
    place = trained("attributes").path
    with pytest.raises(MedvisionError, match="which run"):
        draw("index=0")
    with pytest.raises(MedvisionError, match="images are drawn of one run, not of 2"):
        draw(f"run={place},{tmp_path}", "index=0")
    with pytest.raises(MedvisionError, match="holds no run"):
        draw(f"run={tmp_path}", "index=0")
    begun = shutil.copytree(place, tmp_path / "begun")
    (begun / "metrics.json").unlink()
    (begun / "metrics.csv").unlink()
    with pytest.raises(MedvisionError, match="is not finished"):
        draw(f"run={begun}", "index=0")
    with pytest.raises(MedvisionError, match=r"metrics\.csv holds no epoch yet"):
        draw(f"run={place},{begun}", "curves=true")


def test_curves_are_named_by_what_differs(trained, monkeypatch, tmp_path, capsys):
    drawn = []
    places = [trained(name).path for name in ("insects", "melanoma")]  # which draws curves too
    monkeypatch.setattr(figures, "curves", lambda path, *arguments: drawn.append((path, *arguments)))
    draw(f"run={places[0]},{places[1]}", "curves=true", "metric=jaccard", "by=step")
    path, histories, metric, by = drawn[0]
    assert path == places[0] / "visualizations" / "curves_insects_melanoma_jaccard_by_step.png"
    assert (metric, by) == ("val/jaccard", "step")
    for label, word in zip(histories, ("phantom_insects", "phantom_melanoma"), strict=True):
        assert f"data.spec={word}" in label and "model=" not in label
    assert [*histories.values()] == [
        [(1, 9, "train/loss", 0.5), (1, 9, "val/loss", 0.6), (1, 9, "val/jaccard", 0.1)]
    ] * 2
    copy = shutil.copytree(places[0], tmp_path / "copy")
    draw(f"run={places[0]},{copy}", "curves=true", f"output={tmp_path / 'out'}")
    assert [*drawn[1][1]] == [str(places[0]), str(copy)]  # nothing differs
    assert drawn[1][0].parent == tmp_path / "out"
