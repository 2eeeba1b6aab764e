import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from medvision.comparison import Comparison, Difference, Effect, Estimate, Variant, page_figures
from medvision.comparison.page import conclusion, render
from medvision.comparison.tables import tables

EVIL = """a<b> & "c" 'd' </script><script>alert(1)</script> ${title} <!--"""
ALONE = ", for these trained networks alone"  # of one seed
VOID = {"meta", "input", "br", "img", "link", "hr"}


def made(verdicts=("not shown", "better"), names=None, interval=(0.4, 0.6), warnings=(), effects=()):
    """A comparison of variants, the first of which is the baseline."""
    names = names or [f"model=m{n}" for n in range(len(verdicts) + 1)]
    variants = [
        Variant(
            name=name,
            levels={"model": name},
            config={"model.block": name, "loss.weight": None},
            runs=[
                {"folder": f"/runs/r{n}", "command": f"train model={name}", "seed": 1, "epoch": None}
                | {"metrics": {"dice": 0.5 + n / 100}}
            ],
            estimates={"dice": Estimate(0.5 + n / 100, None, *interval, {"seed 1": 0.5 + n / 100})},
        )
        for n, name in enumerate(names)
    ]
    differences = []
    for n, (name, verdict) in enumerate(zip(names[1:], verdicts, strict=True), 1):
        p = {"bootstrap": 0.0004, "permutation": 0.04, "wilcoxon": None}
        differences.append(
            Difference(
                metric="dice",
                variant=name,
                baseline=names[0],
                changed=["model"],
                value=n / 100,
                low=-0.1,
                high=0.2,
                images=20,
                rank_biserial=None,
                verdict=verdict,
                **p,
                **{f"{key}_holm": value for key, value in p.items()},
            )
        )
    return Comparison(
        data="tiny",
        split="test",
        images=20,
        groups=None,
        resamples=100,
        baseline=names[0],
        metrics=["dice"],
        variants=variants,
        differences=differences,
        ranks={"dice": dict.fromkeys(names, [1 / len(names)] * len(names))},
        effects=effects,
        warnings=warnings,
        ids=["i"],
        each={"dice": dict.fromkeys(names, np.zeros(1))},
        each_is={"dice": "dice_image"},
    )


class Reader(HTMLParser):
    """Reads a page and fails where tags are not closed or identities are not unique."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.said = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [] and len({*self.ids}) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.said.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def embedded(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["pictures"]


def test_it_holds_what_the_terminal_shows():
    effect = Effect("dice", ["model"], ["m1"], ["m0"], 0.0123, None, None)
    found = made(warnings=["too few seeds"], effects=[effect])
    read = Reader(render(found, {}))
    cells = [cell for of in tables(found)["dice"] for row in of.rows for cell in row]
    assert {"<0.001", "0.040", "-", "+0.0200", "-0.1000 to +0.2000", "33%"} <= {*cells}
    assert all(" ".join(cell.split()) in read.text for cell in cells)
    for words in ("too few seeds", "train model=model=m1", "loss.weight", "1 seed of each variant and 20 images", "r2"):
        assert words in read.text
    assert sum(tag == "h1" for tag, _ in read.tags) == 1
    assert {"conclusion", "most", "browser", "runs"} <= {*read.ids}


def test_folds_have_a_column_where_there_are_any():
    found = made()
    assert "fold" not in Reader(render(found, {})).text.split()
    found.variants[1].runs[0]["fold"] = 2
    text = Reader(render(found, {})).text
    assert "run variant seed fold epoch dice r0 model=m0 1 0 - 0.5000 r1 model=m1 1 2 - 0.5100" in text


def test_names_are_text_and_data_cannot_end_its_script():
    names = [f"model={EVIL}{n}" for n in range(3)]
    pictures = {"images": [{"id": EVIL}], "missing": None}
    text = render(made(names=names), {"/runs/r0": [(1, 0, "val/loss", 0.5), (2, 1, "val/loss", 0.25)]}, pictures)
    read = Reader(text)
    assert embedded(text) == pictures
    assert sum(tag == "script" for tag, _ in read.tags) == 2 and read.text.count(" ".join(names[1].split())) >= 4
    assert "<b>" not in text.split("<script")[0] and html.escape(EVIL) in text


def test_nothing_is_loaded_and_nan_is_refused():
    text = render(made(), {}, {"images": []})
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    read = Reader(text)
    assert [tag for tag, of in read.tags if {"src", "srcset", "data"} & of.keys() or tag in ("link", "iframe")] == []
    policy = next(of["content"] for tag, of in read.tags if of.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")
    with pytest.raises(ValueError, match="JSON"):
        render(made(), {}, {"images": [float("nan")]})


def test_the_same_comparison_is_the_same_page():
    pages = {render(made(), {"/runs/r1": [(1, 0, "train/loss", 1.5)]}, {"images": []}) for _ in range(2)}
    assert len(pages) == 1


def test_without_pictures_it_says_why():
    text = render(made(), {}, None, ["there are no pictures: <gone>"])
    assert embedded(text) is None and "there are no pictures: &lt;gone&gt;" in text
    hidden = [of["id"] for tag, of in Reader(text).tags if tag == "section" and "hidden" in of]
    assert hidden == ["most", "browser"]
    assert [of for tag, of in Reader(render(made(), {}, {"images": []})).tags if "hidden" in of] == []


@pytest.mark.parametrize(
    ("verdicts", "lines"),
    [
        (
            ("better", "not shown", "worse"),
            [
                f"dice: shown to be better than model=m0{ALONE}: model=m1 (+0.0100, -0.1000 to +0.2000).",
                f"dice: shown to be worse than model=m0{ALONE}: model=m3 (+0.0300, -0.1000 to +0.2000).",
                "dice: not shown to differ from model=m0: model=m2. That does not say that it does not.",
            ],
        ),
        (
            ("not shown", "not shown"),
            ["dice: not shown to differ from model=m0: model=m1; model=m2. That does not say that they do not."],
        ),
    ],
)
def test_the_conclusion_follows_the_verdicts(verdicts, lines):
    *said, meaning = conclusion(made(verdicts))
    assert said == lines
    assert f"adjusted by Holm over {len(verdicts)} differences, with 1 seed of each variant and 20 images" in meaning


def test_of_one_variant_nothing_is_concluded():
    found = made(())
    assert conclusion(found) == ["There is one variant: nothing is compared, and nothing shown."]
    assert "Differences to the baseline" not in Reader(render(found, {})).text


def test_differences_lie_on_one_axis():
    drawn = page_figures.forest(made(("better", "not shown"), interval=(None, None)), "dice")
    places = [float(at) for at in re.findall(r'<circle cx="([\d.]+)%"', drawn)]
    bars = [(float(a), float(b)) for a, b in re.findall(r'class="bar" x1="([\d.]+)%" x2="([\d.]+)%"', drawn)]
    zero = float(re.search(r'class="zero" x1="([\d.]+)%"', drawn)[1])
    ticks = {float(t): float(x) for x, t in re.findall(r'class="tick" x="([\d.]+)%" [^>]*>([-\d.e]+)<', drawn)}
    slope = (ticks[0.2] - ticks[-0.1]) / 0.3
    assert places == pytest.approx([zero + slope * 0.01, zero + slope * 0.02], abs=0.01)
    assert bars == [pytest.approx((zero - slope * 0.1, zero + slope * 0.2), abs=0.01)] * 2 and zero == ticks[0]
    assert re.findall(r'<tr class="(\w+)">', drawn) == ["clear", "unclear", "axis"]
    lone = page_figures.seeds(made((), interval=(None, None)), "dice")  # no interval, all values the same
    assert "bar" not in lone and lone.count("<circle") == 1


def test_curves_have_a_line_for_each_run():
    rows = [(epoch, epoch, "val/loss", 10.0**-epoch) for epoch in range(1, 1001)]
    rows[3] = (4, 4, "val/loss", float("nan"))
    lines = [(0, "a<b", rows[:5]), (9, "long", rows[:1000:2]), (1, "other", [(1, 0, "lr", 1.0)])]
    drawn = page_figures.curves(lines[:1] + lines[2:], {"val/loss": "validation loss", "val/dice": "dice"})
    (points,) = re.findall(r'class="line v0" points="([^"]+)"', drawn)
    assert len(points.split()) == 4 and "a&lt;b" in drawn and drawn.count("<svg") == 1
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert np.diff(heights)[:2] == pytest.approx([heights[1] - heights[0]] * 2, abs=0.11)  # a logarithmic axis
    many = page_figures.curves([(9, "long", [(n, n, "val/dice", 0.5) for n in range(1000)])], {"val/dice": "dice"})
    (points,) = re.findall(r'class="line v1" points="([^"]+)"', many)
    assert 300 < len(points.split()) <= 400
    assert page_figures.curves(lines, {"val/dice": "dice"}) == ""
