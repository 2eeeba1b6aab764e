"""The classification task: mixed batches and their resumption, operating points, what a split says of itself."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from medvision import cli, figures
from medvision.build import build
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.evaluation import LabelEvaluation
from medvision.figures.labels import bands, confusion, page
from medvision.losses import CrossEntropy
from medvision.metrics import Bootstrap, best_decision, delong
from medvision.mixing import mix
from medvision.report import print_details, print_table
from medvision.tasks import ClassificationTask


def task_of(facts, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(facts.num_outputs)
    )
    model(torch.zeros(1, 3, 8, 8))
    return ClassificationTask(model, CrossEntropy(0.1), partial(torch.optim.Adam, lr=0.01), None, facts, **options)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_the_loss_of_mixed_images_is_mixed(kind, spec):
    task = task_of(spec(kind, target="label", image_size=8), mixup=0.4).eval()
    image = torch.randn(6, 3, 8, 8)
    target = torch.tensor([0, 1, 1, 0, 1, 0]) if kind == "multiclass" else torch.randint(0, 2, (6, 2)).float()
    torch.manual_seed(3)
    outputs, found = task._loss({"image": image, "target": target}, "train")
    torch.manual_seed(3)
    mixed, order, share = mix(image, 0.4, 0)
    assert 0.5 < share < 1 and torch.equal(outputs, task(mixed))
    # cross-entropy is linear in the truth: as if the truths had been blended
    both = nn.functional.one_hot(target, 2).float() if kind == "multiclass" else target
    blended = 0.9 * (share * both + (1 - share) * both[order]) + 0.05
    logs = outputs.log_softmax(1) if kind == "multiclass" else nn.functional.logsigmoid(outputs)
    one = blended * logs
    expected = -one.sum(1).mean() if kind == "multiclass" else -(one + (1 - blended) * (logs - outputs)).mean()
    torch.testing.assert_close(found, expected)
    assert torch.equal(task._loss({"image": image, "target": target}, "val")[0], task(image))


def test_a_training_with_mixed_batches_resumes_to_the_same_weights(spec, tmp_path):
    facts = spec("multiclass", target="label", image_size=8)
    draw = torch.Generator().manual_seed(1)
    items = [{"image": torch.randn(3, 8, 8, generator=draw), "target": torch.tensor(n % 2)} for n in range(10)]
    loader = DataLoader(items, batch_size=4)

    def fit(epochs, path=None):
        task = task_of(facts, mixup=0.3, cutmix=1.0, seed=5)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(task, loader, loader, ckpt_path=path)
        return trainer, task.state_dict()

    whole = fit(3)[1]
    fit(1)[0].save_checkpoint(tmp_path / "x.ckpt")
    torch.rand(5)  # nothing depends on what was drawn before
    resumed = fit(3, tmp_path / "x.ckpt")[1]
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "binary",
            {"monitor": "val/brier"},
            "val/brier task.mode=max would keep the worst epoch; expected task.mode=min",
        ),
        ("binary", {"monitor": "val/auroc", "mode": "min"}, "would keep the worst epoch; expected task.mode=max"),
        ("binary", {"mixup": -1}, r"task.mixup is -1; expected 0 \(off\) or more"),
        ("binary", {"operating_point": {"recall": 0.9}}, "task.operating_point={'recall': 0.9}: expected youden"),
        ("multiclass", {"operating_point": {"sensitivity": 0.9}}, "tiny has exclusive classes"),
    ],
)
def test_refusals(kind, options, said, spec):
    with pytest.raises(MedvisionError, match=said):
        task_of(spec(kind, target="label", image_size=8), **options)


def test_an_epoch_cannot_be_chosen_by_what_validation_cannot_have(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDVISION_CACHE", str(tmp_path))
    tiny = ["data=phantom_melanoma", "model=resnet18", "data.images={train:12,test:8}"]
    run = build(cli.compose("train", tiny))
    assert not any(sample.labels for sample in run.data.splits["val"])
    said = (
        r"task.monitor=val/average_precision is not defined where no image shows malignant, as in the 2 of val; choose"
    )
    with pytest.raises(MedvisionError, match=said):
        run.check_monitor()
    build(cli.compose("train", [*tiny, "task.monitor=val/loss", "task.mode=min"])).check_monitor()
    build(cli.compose("train", [*tiny, "data.images={train:40,test:8}"])).check_monitor()


def made(classes=("m",), exclusive=False, images=60, **changes):
    generator = np.random.default_rng(0)
    truth = generator.random((images, len(classes))) < 0.4
    if exclusive:
        truth = np.eye(len(classes), dtype=bool)[generator.integers(0, len(classes), images)]
    probability = np.clip(generator.normal(0.35 + 0.2 * truth, 0.2), 0.01, 0.99).astype(np.float32)
    ids = tuple(f"i{n:02}" for n in range(images))
    return LabelEvaluation("test", classes, exclusive, ids, probability, truth, **changes)


def test_the_operating_point_is_that_of_the_task():
    wanted = {"sensitivity": 0.9}
    found = made(("a", "b"), operating_point=wanted)
    decision = found.choose("val/auroc")
    assert decision.threshold == tuple(
        best_decision(found.probability[:, k], found.truth[:, k], wanted) for k in (0, 1)
    )
    assert min(found.summary(decision)[f"sensitivity/{name}"] for name in "ab") >= 0.9
    assert decision != made(("a", "b")).choose("val/auroc")


def test_details_of_a_split():
    one = made()
    found = one.details(Decision((0.4,)))
    said, there = one.probability[:, 0] >= 0.4, one.truth[:, 0]
    cells = [[(~there & ~said).sum(), (~there & said).sum()], [(there & ~said).sum(), (there & said).sum()]]
    assert found == {"delong": {"auroc": delong(one.probability[:, 0], there)}, "confusion": {"m": cells}}
    grouped = made(groups=tuple(f"g{n // 2}" for n in range(60)))
    assert "delong" not in grouped.details(Decision((0.4,)))  # which would take them for independent
    exclusive = made(("a", "b", "c"), exclusive=True)
    found = exclusive.details(Decision(()))
    said, there = exclusive.probability.argmax(1), exclusive.truth.argmax(1)
    matrix = [[((there == i) & (said == j)).sum() for j in range(3)] for i in range(3)]
    assert found["confusion"] == matrix and found["delong"].keys() == {"auroc/a", "auroc/b", "auroc/c"}


def test_a_split_with_one_class_is_named_in_the_table(capsys):
    found = made(images=3)
    found = LabelEvaluation("test", ("m",), False, found.ids, found.probability, np.zeros((3, 1), bool))
    decision = Decision((0.4,))
    details = found.details(decision)
    assert "auroc" not in found.summary(decision)
    assert details["not_defined"]["auroc"] == "no image shows m" and "delong" not in details
    print_table("title", {"test": found.summary(decision)}, {}, {"test": details})
    print_details("test", details)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "| auroc" in line)
    assert row.split("|")[2].strip() == "not defined"
    assert "not defined on test, where no image shows m: balanced_accuracy, auroc, " in printed


def test_bands_are_those_of_a_loop_over_the_same_resamples():
    one = made(images=20)
    p, t = one.probability[:, 0].astype(float), one.truth[:, 0]
    bootstrap = Bootstrap(20, resamples=40)
    roc, pr = bands(p, t, bootstrap)
    assert roc.shape == pr.shape == (2, 101) and (roc[0] <= roc[1]).all() and (pr[0] <= pr[1]).all()

    def precision(images, recall):
        cuts = [p[images] >= cut for cut in sorted(set(p[images]), reverse=True)]
        return next(t[images][said].mean() for said in cuts if said[t[images]].mean() >= max(recall - 1e-9, 1e-9))

    for at in (0, 0.5, 1):
        drawn = bootstrap.apply(lambda images, at=at: precision(images, at))
        assert pr[:, round(100 * at)] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-9)
    assert (roc[:, -1] == 1).all()
    assert np.isnan(bands(p, np.arange(20) == 3, bootstrap)).all()  # of one positive nothing is known


def test_the_surest_mistakes_are_named_and_of_the_classes_that_are_mistaken(tmp_path, monkeypatch):
    probability = np.array([[0.1, 0.36], [0.9, 0.8], [0.9, 0.1]], np.float32)
    one = LabelEvaluation("test", ("a", "b"), False, tuple("xyz"), probability, np.array([[1, 0]] * 3, bool))
    samples = [
        SimpleNamespace(id=i, read=lambda _: (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 0)))) for i in "xyz"
    ]
    data, sheets = SimpleNamespace(splits={"test": samples}, spec=SimpleNamespace(in_channels=3)), {}
    monkeypatch.setattr(figures, "gallery", lambda path, tiles, *_: sheets.update({path.name: tiles}))
    one.draw(tmp_path / "p.png", data, Decision((0.05, 0.3)))
    every, mistakes = ([tile.caption for tile in sheets[name]] for name in ("p.png", "p_mistakes.png"))
    assert every == ["x\n0.10 a\nsaid: a + b", "y\n0.20 a\nsaid: a + b", "z\n0.90 a"]
    assert mistakes == ["y\n0.20 a\nsaid: a + b", "x\n0.64 a\nsaid: a + b"]  # that a is there was said of x


def test_confusion_of_one_class_begins_with_its_absence():
    truth, decided = np.array([0, 0, 0, 1], bool), np.array([0, 1, 0, 1], bool)
    assert confusion(truth, decided).tolist() == [[2, 1], [0, 1]]


@pytest.mark.parametrize(("classes", "exclusive"), [(("m",), False), (("a", "b", "c"), True), (("a", "b"), False)])
def test_a_page(classes, exclusive, tmp_path, monkeypatch):
    one = made(classes, exclusive)
    one.truth[:, -1] &= exclusive  # of the last class no image
    decision = Decision(() if exclusive else (0.4,) * len(classes))
    decided = one.probability >= 0.4
    values = {("auroc" if len(classes) == 1 else f"auroc/{c}"): n / 8 for n, c in enumerate(classes)}
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    bootstrap = Bootstrap(60, resamples=20)
    page(
        tmp_path / "x.png", one.probability, one.truth, decided, classes, decision.threshold, bootstrap, values, "title"
    )
    axes = {axes.get_title(): axes for axes in drawn[0].axes}
    roc = [f"ROC of {c}\nauroc {n / 8:.3f}" for n, c in enumerate(classes)]
    assert [title for title in axes if title.startswith("ROC")] == roc
    texts = ["".join(text.get_text() for text in axes[title].texts) for title in roc]
    assert ("not defined:\nno image shows the class" in texts) != exclusive
    assert sum(title.startswith("confusion") for title in axes) == (1 if exclusive else len(classes))
    shown = [int(text.get_text()) for text in axes["confusion" if exclusive else f"confusion of {classes[0]}"].texts]
    assert sum(shown) == (decided.sum(1)[one.truth.any(1)].sum() if exclusive else 60)
    assert all(max(axes[f"scores of {c}"].get_yticks()) <= 1 for c in classes)


def test_a_page_of_more_classes_than_it_has_room_for(tmp_path, monkeypatch):
    classes = tuple(f"c{n}" for n in range(150))  # a row of each would be more than 65,536 pixels
    one, drawn = made(classes, True, images=150), []
    values = {f"auroc/{name}": 1 - n / 150 for n, name in enumerate(classes[:149])}
    monkeypatch.setattr("medvision.figures.labels.ROWS", 2)
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    decided = one.probability.argmax(1)[:, None] == np.arange(150)
    page(tmp_path / "x.png", one.probability, one.truth, decided, classes, (), Bootstrap(150, resamples=2), values, "t")
    assert drawn[0].get_suptitle() == "t: the 2 of 150 classes with the lowest AUROC"
    titles = [axes.get_title().split("\n")[0] for axes in drawn[0].axes]
    assert [title for title in titles if title.startswith("ROC")] == ["ROC of c147", "ROC of c148"]
    matrix = drawn[0].axes[titles.index("confusion")]
    assert sum(int(text.get_text()) for text in matrix.texts) == 150 and len(matrix.get_yticklabels()) == 150
    assert max(Image.open(tmp_path / "x.png").size) < 6000


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    classes = ("$a^$", "_under", "a name that is " + "much " * 20 + "too long")
    one, drawn = made(classes, True), []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    decided = one.probability.argmax(1)[:, None] == np.arange(3)
    page(tmp_path / "x.png", one.probability, one.truth, decided, classes, (), Bootstrap(60, resamples=2), {}, "t")
    axes = {axes.get_title(): axes for axes in drawn[0].axes}
    legend = [text.get_text() for text in axes["scores of _under"].get_legend().get_texts()]
    assert [words.split(" (")[0] for words in legend] == ["not _under", " _under"]
    assert r"ROC of \$a^\$" in axes and all(len(title) < 100 for title in axes)
    names = [label.get_text() for label in axes["confusion"].get_yticklabels()]
    assert names[:2] == [r"\$a^\$", " _under"] and names[2].count("\n") == 2 and names[2].endswith("…")


def test_a_page_of_one_image(tmp_path):
    values = np.array([[0.3]], np.float32), np.array([[True]]), np.array([[False]])
    page(tmp_path / "x.png", *values, ["m"], [0.5], Bootstrap(1), {}, "one")
    assert min(Image.open(tmp_path / "x.png").size) > 200
