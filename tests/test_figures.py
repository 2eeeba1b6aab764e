import itertools

import cv2
import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from PIL import Image

from medvision.data import CachedDataset
from medvision.figures import (
    CLASSES,
    FALSE,
    MISSED,
    TRUTH,
    Example,
    Tile,
    bars,
    curves,
    forest,
    gallery,
    probabilities,
    ranks,
    reliability,
    sheet,
    sweep,
    to_pixels,
)
from medvision.figures.sheets import TILE
from medvision.metrics.calibration import Reliability

GAP, LINE, HEAD = 4, 22, 44  # white between pictures, a line of text, two of them at the top
IMAGE, TRUTHS, PREDICTION, ERRORS = range(4)


def quarters(*labels):
    """A mask (8, 8) from the four quarters that are set: `tl`, `tr`, `bl`, `br`."""
    mask = np.zeros((8, 8), bool)
    for label in labels:
        mask[:4, :4] |= label == "tl"
        mask[:4, 4:] |= label == "tr"
        mask[4:, :4] |= label == "bl"
        mask[4:, 4:] |= label == "br"
    return mask


def example(truth, prediction, colour=(100, 120, 140), size=(8, 8)):
    masks = (
        np.stack([cv2.resize(m.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST) > 0 for m in masks])
        for masks in (truth, prediction)
    )
    return Example("a caption", np.full((*size, len(colour)), colour, np.uint8), *masks)


class Page:
    """The pixels of a sheet, found by row, picture and quarter."""

    def __init__(self, path, shape=(8, 8)):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            self.pixels = np.asarray(image)
        self.width = max(1, round(TILE * shape[1] / shape[0]))

    def at(self, view, quarter, row=0):
        """The colour in the middle of a quarter of a picture."""
        y = HEAD + LINE + row * (TILE + LINE) + TILE * {"t": 1, "b": 3}[quarter[0]] // 4
        x = view * (self.width + GAP) + self.width * {"l": 1, "r": 3}[quarter[1]] // 4
        return tuple(self.pixels[y, x].tolist())


def veil(colour, over):
    return tuple(int(0.75 * o + 0.25 * c) for o, c in zip(over, colour, strict=True))


def draw(tmp_path, *rows, classes=("lesion",)):
    sheet(tmp_path / "sheet.png", rows, classes, "a title")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    return tmp_path / "sheet.png"


@pytest.mark.parametrize("colour", [(100, 120, 140), (90,)], ids=["rgb", "grey"])
@pytest.mark.parametrize("size", [(8, 8), (80, 40), (400, 600)], ids=str)
def test_errors_are_green_blue_and_red(tmp_path, colour, size):
    row = example([quarters("tl", "bl")], [quarters("tl", "tr")], colour, size)
    page = Page(draw(tmp_path, row), size)
    assert page.pixels.shape[0] == HEAD + LINE + TILE
    assert 0 <= page.pixels.shape[1] - 4 * (page.width + GAP) < (100 if size == (80, 40) else 1)  # the legend is wider
    plain = colour if len(colour) == 3 else colour * 3
    assert page.at(ERRORS, "tl") == TRUTH
    assert page.at(ERRORS, "bl") == MISSED
    assert page.at(ERRORS, "tr") == FALSE
    assert page.at(ERRORS, "br") == tuple(int(0.35 * value) for value in plain)
    assert {page.at(IMAGE, quarter) for quarter in ("tl", "tr", "bl", "br")} == {plain}
    for view, inside, colour_of in ((TRUTHS, ("tl", "bl"), TRUTH), (PREDICTION, ("tl", "tr"), CLASSES[0])):
        for quarter in ("tl", "tr", "bl", "br"):
            expected = veil(colour_of, plain) if quarter in inside else plain
            assert page.at(view, quarter) == expected


def test_the_colours_say_what_they_mean():
    red, green, blue = (np.argmax(colour) for colour in (FALSE, TRUTH, MISSED))
    assert (red, green, blue) == (0, 1, 2)


def test_each_class_has_its_colour_and_the_errors_join_them(tmp_path):
    truth = [quarters("tl", "tr"), quarters("tl", "br")]
    prediction = [quarters("tl", "tr", "bl"), quarters("tl", "tr")]
    page = Page(draw(tmp_path, example(truth, prediction), classes=("round", "square")))
    grey = (100, 120, 140)
    assert page.at(TRUTHS, "tr") == page.at(PREDICTION, "bl") == veil(CLASSES[0], grey)
    assert page.at(TRUTHS, "br") == veil(CLASSES[1], grey)
    assert page.at(TRUTHS, "tl") == page.at(PREDICTION, "tr") == veil(CLASSES[1], veil(CLASSES[0], grey))
    assert page.at(ERRORS, "tl") == TRUTH  # both classes right
    assert page.at(ERRORS, "tr") == FALSE  # one right, the other false
    assert page.at(ERRORS, "bl") == FALSE
    assert page.at(ERRORS, "br") == MISSED


def test_more_classes_than_colours(tmp_path):
    masks = [quarters("tl")] * 8
    page = Page(draw(tmp_path, example(masks, masks), classes=[f"class{k}" for k in range(8)]))
    assert page.at(ERRORS, "tl") == TRUTH


def test_a_row_for_each_example_as_wide_as_the_widest(tmp_path):
    rows = [example([quarters()], [quarters()], (c, c, c), size) for c, size in ((10, (8, 8)), (200, (8, 16)))]
    path = draw(tmp_path, *rows)
    narrow, wide = Page(path), Page(path, (8, 16))
    assert wide.pixels.shape == (HEAD + 2 * (LINE + TILE), 4 * (2 * TILE + GAP), 3)
    assert narrow.at(IMAGE, "tl", row=0) == (10, 10, 10)
    assert wide.at(PREDICTION, "br", row=1) == (200, 200, 200)
    assert (narrow.pixels[HEAD : HEAD + LINE + TILE, 4 * (TILE + GAP) :] == 255).all()


def test_captions_and_title_are_written(tmp_path):
    pixels = Page(draw(tmp_path, example([quarters()], [quarters()]))).pixels
    for top in (0, LINE, HEAD):
        line = pixels[top : top + LINE]
        assert (line.min(-1) < 128).sum() > 30  # letters
        assert (line == 255).all(-1).mean() > 0.8


def test_pictures_at_their_own_size(tmp_path, monkeypatch):
    small, large = (example([quarters("tl")], [quarters("tr")], size=size) for size in ((40, 60), (80, 48)))
    sheet(tmp_path / "a.png", [small, large], ["lesion"], "t", height=None)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape[0] == HEAD + 2 * LINE + 40 + 80
    assert pixels[HEAD + LINE + 10, 3 * (60 + GAP) + 15].tolist() == list(MISSED)
    assert pixels[HEAD + 2 * LINE + 40 + 20, 3 * (48 + GAP) + 36].tolist() == list(FALSE)
    monkeypatch.setattr(
        "medvision.figures.sheets.PAGE", (4 * 40 * 60 + 4 * 80 * 48) // 4
    )  # a quarter: half of each side
    sheet(tmp_path / "b.png", [small, large], ["lesion"], "t", height=None)
    pixels = np.asarray(Image.open(tmp_path / "b.png"))
    assert pixels.shape[0] == HEAD + 2 * LINE + 20 + 40
    assert pixels[HEAD + LINE + 5, 3 * (30 + GAP) + 7].tolist() == list(MISSED)


def test_a_long_caption_makes_the_sheet_wider(tmp_path):
    row = example([quarters()], [quarters()])
    sheet(tmp_path / "a.png", [Example("word " * 60, row.image, row.truth, row.prediction)], ["lesion"], "t")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape[1] > 4 * (TILE + GAP) + 500
    line = (pixels[HEAD : HEAD + LINE] < 128).any(-1).any(0)
    assert 4 < len(line) - np.flatnonzero(line)[-1] < 20  # the last letter is not cut


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (200, 1)], ids=str)
def test_tiny_images(tmp_path, size):
    full = np.ones((1, *size), bool)
    row = Example("tiny", np.full((*size, 1), 77, np.uint8), full, full)
    page = Page(draw(tmp_path, row), size)
    assert page.at(IMAGE, "tl") == (77, 77, 77)
    assert page.at(ERRORS, "br") == TRUTH


def test_to_pixels_undoes_the_normalisation(spec):
    facts = spec()
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image[0, :2] = [[0, 0, 0], [255, 255, 255]]
    normalisation = np.array(facts.mean), np.array(facts.std)
    normalised = CachedDataset(None, np.arange(0), [], facts, normalisation).normalise(image)
    np.testing.assert_array_equal(to_pixels(normalised, *normalisation), image)
    assert to_pixels(normalised * 100, *normalisation).max() == 255  # clipped, not wrapped


HISTORY = [
    (1, 4, "train/loss_step", 9.0),
    (1, 9, "lr", 1e-3),
    (1, 9, "train/loss", 0.8),
    (1, 9, "val/loss", 0.9),
    (1, 9, "val/jaccard_image", 0.3),
    (2, 19, "lr", 5e-4),
    (2, 19, "train/loss", 0.5),
    (2, 19, "val/loss", float("nan")),
    (2, 19, "val/jaccard_image", 0.6),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_curves_over_epochs(tmp_path, drawn):
    curves(tmp_path / "curves.png", {"a run": HISTORY})
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.size == (1430, 396)
    loss, validation, rate = drawn[0].axes
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"epoch"}
    assert [*lines(loss)] == ["train/loss_step", "train/loss", "val/loss"]
    assert lines(loss)["train/loss_step"] == [[0.5, 9.0]]
    assert lines(loss)["train/loss"] == [[1.0, 0.8], [2.0, 0.5]]
    assert lines(validation) == {"val/jaccard_image": [[1.0, 0.3], [2.0, 0.6]]}
    assert lines(rate) == {"lr": [[1.0, 1e-3], [2.0, 5e-4]]}
    assert loss.get_yscale() == "log" and rate.get_yscale() == "linear"  # 9 is far off 0.5
    curves(tmp_path / "curves.png", {"a run": HISTORY}, by="step")
    assert drawn[1].axes[2].get_xlabel() == "step"
    assert lines(drawn[1].axes[2]) == {"lr": [[10.0, 1e-3], [20.0, 5e-4]]}


def test_curves_of_each_class(tmp_path, drawn):
    rows = [(1, 9, f"val/{name}", n / 10) for n, name in enumerate(["dice/a", "jaccard", "jaccard/a", "jaccard/b"])]
    curves(tmp_path / "curves.png", {"a run": rows})
    assert [axes.get_title() for axes in drawn[0].axes][1:3] == ["metrics", "val/jaccard of each class"]
    assert lines(drawn[0].axes[2]) == {"a": [[1.0, 0.2]], "b": [[1.0, 0.3]]}
    curves(tmp_path / "curves.png", {"a run": [*rows, (1, 9, "val/dice", 0.5)]}, "val/dice")
    assert [lines(axes) for axes in drawn[1].axes[1:3]] == [{"val/dice": [[1.0, 0.5]]}, {"a": [[1.0, 0.0]]}]


def test_curves_of_several_runs(tmp_path, drawn):
    other = [(epoch, 2 * step + 1, name, 2 * value) for epoch, step, name, value in HISTORY]  # twice the steps
    classes = [(1, 9, "val/jaccard_image/a", 0.1), (1, 9, "val/jaccard_image/b", 0.2)]
    curves(tmp_path / "curves.png", {"lr=1": HISTORY, "lr=2": [*other, *classes]})
    titles = ["loss (training dotted)", "val/jaccard_image", "val/jaccard_image/a", "val/jaccard_image/b"]
    assert [axes.get_title() for axes in drawn[0].axes[:5]] == [*titles, "learning rate"]
    loss, jaccard, of_a, _, rate, _ = drawn[0].axes
    assert [(line.get_label(), line.get_linestyle(), line.get_color()) for line in loss.lines] == [
        (f"lr={n}", style, f"C{n - 1}") for n in (1, 2) for style in (":", "-")
    ]
    assert lines(jaccard) == {"lr=1": [[1.0, 0.3], [2.0, 0.6]], "lr=2": [[1.0, 0.6], [2.0, 1.2]]}
    assert [*lines(of_a)] == ["lr=2"]
    assert lines(rate)["lr=2"] == [[1.0, 2e-3], [2.0, 1e-3]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["lr=1", "lr=2"]


def test_curves_of_classes_are_named_as_they_are_while_there_are_few(tmp_path, drawn):
    def rows(names):
        return [(1, 4, "val/auroc", 0.5), *((1, 4, f"val/auroc/{name}", 0.5) for name in names)]

    for names in (["$a^$", "_b", "much " * 20], [f"c{n}" for n in range(11)]):
        curves(tmp_path / "curves.png", {"a run": rows(names)})
    few, many = (figure.axes[2].get_legend() for figure in drawn)
    assert [text.get_text() for text in few.get_texts()] == [r"\$a^\$", " _b", "much " * 5 + "…"] and many is None


def test_a_long_caption_keeps_its_ends(tmp_path):
    image, none = np.full((4, 4, 3), 9, np.uint8), np.zeros((0, 4, 4), bool)
    for n, name in enumerate(["one/" + "long " * 20 + "/1.png", "one/" + "long " * 20 + "/2.png", "one/…/2.png"]):
        gallery(tmp_path / f"{n}.png", [Tile(name, image, none)], [], "", columns=1)
    first, second, third = ((tmp_path / f"{n}.png").read_bytes() for n in range(3))
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("word", ["Größe", "naïve", "ήλιος", "кожа"])
def test_captions_have_the_letters_of_their_words(word, tmp_path):
    image, none = np.full((4, 4, 3), 9, np.uint8), np.zeros((0, 4, 4), bool)
    for n, letter in enumerate([*word, "\ufffe"]):  # the last one has no shape of its own
        gallery(tmp_path / f"{n}.png", [Tile(letter, image, none)], [], "", columns=1)
    *letters, missing = ((tmp_path / f"{n}.png").read_bytes() for n in range(len(word) + 1))
    assert missing not in letters


def test_curves_of_an_empty_history(tmp_path, drawn):
    curves(tmp_path / "curves.png", {"a run": []})
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1430, 396)
    assert [len(axes.lines) for axes in drawn[0].axes] == [0, 0, 0]


def test_bars_of_splits_stand_beside_each_other(tmp_path, drawn):
    panel = {"train": {"a": (30.0, "30 (3)"), "b": (7.0, "7 (1)")}, "val": {"b": (50.0, "50 (2)")}}
    bars(tmp_path / "bars.png", {"images": panel, "pixels": {"train": {"a": (1.0, "1")}}})
    images, pixels = drawn[0].axes
    assert [[bar.get_width() for bar in split] for split in images.containers] == [[30.0, 7.0], [50.0]]
    assert [text.get_text() for text in images.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in images.texts] == ["30 (3)", "7 (1)", "50 (2)"]
    (_, of_train), (of_val,) = (([bar.get_y() + bar.get_height() / 2 for bar in split]) for split in images.containers)
    assert of_train == pytest.approx(1 - 0.21) and of_val == pytest.approx(1 + 0.21)
    assert pixels.get_title() == "pixels" and [text.get_text() for text in images.get_legend().get_texts()] == [*panel]


def test_differences_stand_about_zero_with_their_intervals(tmp_path, drawn):
    values = {"a$b$": (0.2, 0.1, 0.3, True), "c": (-0.1, None, None, False)}
    forest(tmp_path / "f.png", {"dice": values, "jaccard": {"c": (0.0, -0.1, 0.1, False)}})
    first, second = drawn[0].axes
    interval, value, alone, zero = first.lines
    assert [*interval.get_xdata()] == [0.1, 0.3] and [*interval.get_ydata()] == [0, 0]
    assert [*value.get_xdata()] == [0.2] and [*alone.get_xdata()] == [-0.1] and [*alone.get_ydata()] == [1]
    assert [*zero.get_xdata()] == [0, 0] and zero.get_color() != "black"
    assert [line.get_color() for line in first.lines[:3]] == ["black", "black", "grey"]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == [r"a\$b\$", "c"] and first.get_ylim() == (1.5, -0.5)
    assert not any(map(is_math_text, names))
    assert second.get_title(loc="right") == "jaccard" and len(second.lines) == 3


def test_ranks_are_shares_in_rows(tmp_path, drawn):
    ranks(tmp_path / "r.png", {"dice": {"a": [0.9, 0.1, 0], "b": [0.1, 0.899, 0.001], "c": [0, 0.001, 0.999]}})
    (axes,) = drawn[0].axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.9, 0.1, 0], [0.1, 0.899, 0.001], [0, 0.001, 0.999]])
    texts = ["90%", "10%", "", "10%", "90%", "<1%", "", "<1%", "100%"]
    assert [text.get_text() for text in axes.texts] == texts
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_long_names_of_rows_do_not_meet(tmp_path, drawn):
    names = ["short", "x" * 300, "model.name=a, " * 15]
    forest(tmp_path / "f.png", {"dice": dict.fromkeys(names, (0.0, -0.1, 0.1, False))})
    ranks(tmp_path / "r.png", {"dice": dict.fromkeys(names, (0.5, 0.3, 0.2))})
    for figure in drawn:
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


def test_probabilities_beside_their_image(tmp_path, drawn):
    image = np.full((6, 8, 1), 90, np.uint8)
    values, truth = np.array([0.25, 0.75], np.float32), np.array([True, False])
    probabilities(tmp_path / "p.png", image, ["ants", "bees"], values, truth, [0.4, 0.5], "title")
    left, right = drawn[0].axes
    assert left.get_title() == "title" and (left.images[0].get_array() == 90).all()
    assert [bar.get_width() for bar in right.patches] == [0.25, 0.75]
    green, red = (np.argmax(bar.get_facecolor()[:3]) for bar in right.patches)
    assert (green, red) == (1, 0)
    assert [[*line.get_xdata()] for line in right.lines] == [[0.4, 0.4], [0.5, 0.5]]
    assert [text.get_text() for text in right.texts] == ["0.250", "0.750"]


def test_captions_of_a_gallery_stay_above_their_picture(tmp_path):
    image, none = np.full((4, 4, 3), 9, np.uint8), np.zeros((0, 4, 4), bool)
    gallery(
        tmp_path / "g.png", [Tile("word " * 30 + "\nsecond", image, none), Tile("", image, none)], [], "t", columns=2
    )
    pixels = np.asarray(Image.open(tmp_path / "g.png"))
    top = 20 + 4 + 2 * 20  # title, gap, two lines
    assert pixels.shape == (top + TILE + 4, 2 * (TILE + 6), 3)
    assert (pixels[top : top + TILE, :TILE] == 9).all()
    captions = (pixels[24:top] < 128).any(-1)
    assert captions[:20, TILE - 20 : TILE].any() and captions[20:, :TILE].any()
    assert not captions[:, TILE + 6 :].any()


@pytest.mark.parametrize(("shape", "shown"), [((50, 100), (112, 224)), ((90, 60), (224, 149)), ((1, 500), (14, 224))])
def test_pictures_of_a_gallery_keep_their_shape(shape, shown, tmp_path):
    """A row of numbers alone is made thick enough to be seen."""
    mask = np.zeros((1, *shape), bool)
    mask[:, :, : shape[1] // 2] = True
    gallery(tmp_path / "g.png", [Tile("", np.full((*shape, 1), 9, np.uint8), mask)], [], "t", columns=1)
    pixels = np.asarray(Image.open(tmp_path / "g.png")).astype(int)
    assert pixels.shape == (24 + 20 + shown[0] + 4, TILE + 6, 3)
    page = pixels[44:] < 255
    assert page[: shown[0], : shown[1]].all() and not page[shown[0] :].any() and not page[:, shown[1] :].any()
    veiled = (np.ptp(pixels[44 : 44 + shown[0], : shown[1]], axis=2) > 20).mean()
    assert veiled == pytest.approx(0.5, abs=0.06)


def test_the_title_of_a_narrow_gallery_is_whole(tmp_path):
    gallery(
        tmp_path / "g.png", [Tile("", np.full((4, 4, 3), 255, np.uint8), np.zeros((0, 4, 4), bool))], [], "m" * 60, 1
    )
    pixels = np.asarray(Image.open(tmp_path / "g.png"))
    dark = np.flatnonzero((pixels[:20] < 128).any((0, 2)))
    assert TILE < dark.max() < pixels.shape[1] - 2 and len(dark) / np.ptp(dark) > 0.6


def test_a_gallery_of_nothing_has_its_title(tmp_path):
    gallery(tmp_path / "g.png", [], [], "0 of 0 mistakes")
    assert Image.open(tmp_path / "g.png").size == (6 * (TILE + 6), 24)


def test_a_threshold_stands_on_its_curve_within_its_band(tmp_path, drawn):
    thresholds = np.array([0.2, 0.4, 0.6], np.float32)
    curves_of = {"round": np.array([[0.1, 0.3, 0.2], [0.0, 0.2, 0.1], [0.2, 0.5, 0.3]]), "square": np.full((3, 3), 0.4)}
    sweep(tmp_path / "threshold.png", thresholds, curves_of, [0.4, 0.5], "dice_image", "a title")
    assert [path.name for path in tmp_path.iterdir()] == ["threshold.png"]
    (axes,) = drawn[0].axes
    first, at_first, _, at_second = axes.lines
    np.testing.assert_allclose(first.get_xydata(), np.stack([thresholds, [0.1, 0.3, 0.2]], 1))
    np.testing.assert_allclose(at_first.get_xydata(), [[0.4, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(at_second.get_xydata(), [[0.5, 0.4]], rtol=1e-6)
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(np.round(corner, 6)) for corner in corners} >= {(0.4, 0.2), (0.4, 0.5), (0.2, 0.0), (0.6, 0.3)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["round: 0.4", "square: 0.5"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("threshold", "dice_image", "a title")


def broken(self, path, *args, **kwargs):
    path.write_bytes(b"\x89PNG half")
    raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("owner", "method", "make"),
    [
        (Image.Image, "save", lambda path: sheet(path, [example([quarters()], [quarters()])], ["lesion"], "title")),
        (Figure, "savefig", lambda path: curves(path, {"a run": HISTORY})),
    ],
    ids=["sheet", "curves"],
)
@pytest.mark.parametrize("before", [b"the old picture", None])
def test_a_failure_leaves_no_half_written_file(tmp_path, monkeypatch, owner, method, make, before):
    path = tmp_path / "picture.png"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises(OSError, match="no space left"):
        make(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({path.name: before} if before else {})


def test_reliability_has_a_diagram_for_each_class_and_a_line_for_each_name(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    nan = float("nan")
    found = Reliability(np.array([3, 0, 1]), np.array([0.1, nan, 0.9]), np.array([1 / 3, nan, 1]), 0.25)
    reliability(tmp_path / "x.png", {"a": {"before": found, "after": found}, "b": {"before": found}}, "a title")
    first, second, *shares = figures[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["a", "b"]
    lines = first.lines[1:]
    assert [line.get_label() for line in lines] == [f"{n}: ECE 0.2000, Brier 0.2500" for n in ("before", "after")]
    np.testing.assert_allclose(lines[0].get_xydata(), [[0.1, 1 / 3], [0.9, 1]])
    np.testing.assert_allclose(shares[1].patches[0].get_data().values, [0.75, 0, 0.25])
