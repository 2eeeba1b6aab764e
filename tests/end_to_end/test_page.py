"""The page of a comparison in a real browser, on runs that differ by their threshold alone."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from medvision import figures
from medvision.compare import compare_folders
from medvision.comparison import page_images
from medvision.files import read_json, write_json
from medvision.report import finish
from medvision.runs import RunFolder

TRUTH, MISSED, FALSE = (np.array(c) for c in (figures.TRUTH, figures.MISSED, figures.FALSE))


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the page is opened by playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    with api.sync_playwright() as play:
        own = play.chromium.executable_path
        found = next(filter(None, (*map(shutil.which, names), shutil.which(own))), None)
        if found is None:
            pytest.skip(f"no browser: none of {', '.join(names)} is installed, nor playwright's own")
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """`visit(file, width)`: the page without a network; its console has to stay silent."""
    contexts, said = [], []

    def show(path, width=1000):
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url[:5] == "http:" else None)
        page.goto(path.as_uri())
        page.wait_for_selector("#detail[aria-busy=false]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert said == []


def variants_of(folder, root, thresholds):
    """Copies of a run with other thresholds, measured anew."""
    for threshold in thresholds:
        place = RunFolder(root / f"t{threshold}")
        shutil.copytree(folder, place.path)
        config = OmegaConf.load(place.config)
        config.threshold = threshold
        OmegaConf.save(config, place.config)
        OmegaConf.save(OmegaConf.create([f"threshold={threshold}"]), place.overrides)
        finish(place)
    return root


@pytest.fixture(scope="module")
def masks(finished, tmp_path_factory):
    """The page of two variants of a run on masks, of which the first has a second seed, that says it cleans.

    Its pictures are as large as the images.
    """
    root = variants_of(finished[0], tmp_path_factory.mktemp("masks"), (0.3, 0.55))
    again = RunFolder(shutil.copytree(root / "t0.3", root / "t0.3again"))
    config = OmegaConf.load(again.config)
    config.seed += 1
    OmegaConf.save(config, again.config)
    write_json(again.metrics, read_json(again.metrics) | {"cleaning": [{"min_area": 10**6}]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_images, "SIDE", 256)
        return compare_folders([root], resamples=100, images=6) / "report.html"


@pytest.fixture(scope="module")
def labels(cli, tmp_path_factory):
    """The page of two variants of a run on labels."""
    root = tmp_path_factory.mktemp("labels")
    small = ["data.images={train:40,test:30}", "data.image_size=32", "data.batch_size=8", "trainer.max_epochs=1"]
    cli("train", "data=phantom_melanoma", "model=resnet18", *small, f"hydra.run.dir={root / 'run'}")
    found = variants_of(root / "run", root / "variants", (0.3, 0.6))
    return compare_folders([found], resamples=100, images=60, metrics=["brier"]) / "report.html"


def data_of(path):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1]
    return json.loads(text)["pictures"]


def decode(address):
    return np.array(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def canvas(page, selector):
    """The pixels (H, W, 3) of a canvas."""
    script = """c => [c.width, c.height, [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]]"""
    width, height, flat = page.locator(selector).evaluate(script)
    return np.array(flat).reshape(height, width, 4)[..., :3]


def column(page, table, n):
    return page.locator(table).locator(f"tbody tr td:nth-child({n})").all_inner_texts()


def set_slider(page, value):
    page.locator("#threshold").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_tables_are_sorted_by_a_click(masks, visit):
    page = visit(masks)
    table = "#results .sortable >> nth=0"
    before = [float(cell) for cell in column(page, table, 3)]
    assert len({*before}) == 2
    heading = page.locator(table).locator("th button").nth(2)
    heading.click()
    assert [float(cell) for cell in column(page, table, 3)] == sorted(before)
    assert page.locator(table).locator("th").nth(2).get_attribute("aria-sort") == "ascending"
    heading.click()
    assert [float(cell) for cell in column(page, table, 3)] == sorted(before, reverse=True)
    page.locator(table).locator("th button").first.click()
    assert column(page, table, 1) == ["threshold=0.3", "threshold=0.55"]


@pytest.mark.parametrize("threshold", [None, 0.2, 0.57, 1.0])
def test_the_slider_redraws_masks_and_dice(masks, visit, threshold):
    page, data = visit(masks), data_of(masks)
    if threshold is not None:
        set_slider(page, threshold)
    image = data["images"][0]
    page.wait_for_selector("#detail[aria-busy=false]")
    truth = decode(image["truth"]) > 0
    assert image["size"] == image["original"]
    for v, answer in enumerate(image["answers"]):
        at = threshold if threshold is not None else data["runs"][image["runs"][v][0]]["threshold"][0]
        steps, decided = np.split(decode(answer[0]), 2)
        mask = steps >= round(at * 200)
        drawn = canvas(page, f"#detail canvas.errors >> nth={v}")
        for colour, where in ((TRUTH, truth & mask), (MISSED, truth & ~mask), (FALSE, mask & ~truth)):
            assert np.array_equal((drawn == colour).all(-1), where)
        dice = 2 * (truth & mask).sum() / (truth.sum() + mask.sum())
        assert page.locator("#detail .dice").nth(v).inner_text() == f"{dice:.4f}"
        stored = image["values"][v][0][data["metrics"].index("dice_image")]
        assert f"stored {stored:.4f} at original size" in page.locator("#detail .answer").nth(v).inner_text()
        if threshold is None:
            assert np.array_equal(decided > 0, mask) and dice == pytest.approx(stored, abs=1e-6)  # what was measured


def test_another_seed_is_chosen(masks, visit):
    page, data = visit(masks), data_of(masks)
    seeds = page.locator("#seed option").all_inner_texts()
    first = int(seeds[0].removeprefix("seed "))
    assert seeds == [f"seed {first}", f"seed {first + 1}"] and data["seeds"] == [seeds, seeds[:1]]
    answers = page.locator("#detail .answer")
    assert answers.count() == 2 and f"seed {first})" in answers.nth(1).inner_text()
    page.locator("#seed").select_option("1")
    page.wait_for_selector(f"#detail :text('run t0.3again, seed {first + 1}')")
    assert answers.count() == 1  # the other has none
    image = data["images"][0]
    _, cleaned = np.split(decode(image["answers"][0][1]), 2)
    plain = np.split(decode(image["answers"][0][0]), 2)[1]
    assert np.any(cleaned != plain)
    drawn = canvas(page, "#detail canvas.errors")
    assert np.array_equal(((drawn == TRUTH) | (drawn == FALSE)).all(-1), cleaned > 0)
    assert "threshold 0.3, cleaned: Dice" in answers.inner_text() and "size, cleaned" in answers.inner_text()
    set_slider(page, 0.3)
    page.wait_for_selector("#detail :text('threshold 0.3, not cleaned: Dice')")
    drawn = canvas(page, "#detail canvas.errors")
    assert np.array_equal(((drawn == TRUTH) | (drawn == FALSE)).all(-1), plain > 0)
    page.locator("#sort").select_option("1 0")  # what has no value is listed all the same
    assert page.locator("#list li b").all_inner_texts() == ["-"] * 6


def test_keys_move_the_threshold_and_a_button_brings_it_back(masks, visit):
    page = visit(masks)
    stored = page.locator("#stored")
    assert page.locator("#at").inner_text() == "stored: 0.3 / 0.55" and stored.is_disabled()
    page.locator("#threshold").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#at").inner_text() == "0.305"
    stored.click()
    assert page.locator("#at").inner_text() == "stored: 0.3 / 0.55"


def test_images_are_sorted_found_and_walked_through(masks, visit):
    page, data = visit(masks), data_of(masks)
    names = page.locator("#list li em")

    def listed():
        return names.all_inner_texts()

    apart = {image["id"]: image["apart"] for image in data["images"]}
    assert len(apart) == 6 and [apart[name] for name in listed()] == sorted(apart.values(), reverse=True)
    page.locator("#order").click()
    assert [apart[name] for name in listed()] == sorted(apart.values())
    dice = {image["id"]: image["values"][1][0][data["metrics"].index("dice_image")] for image in data["images"]}
    page.locator("#sort").select_option(f"1 {data['metrics'].index('dice_image')}")
    assert [dice[name] for name in listed()] == sorted(dice.values())
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#list li[aria-selected=true]").inner_text().startswith(listed()[1])
    page.wait_for_function(
        "id => document.querySelector('#detail figcaption').textContent.startsWith(id)", arg=listed()[1]
    )
    last = listed()[-1]
    page.locator("#find").fill(last)
    assert listed() == [last]


@pytest.mark.parametrize("width", [1000, 420])
def test_long_names_are_broken_and_the_slider_can_be_moved(masks, visit, tmp_path, width):
    long = tmp_path / "long.html"
    long.write_text(masks.read_text().replace("threshold=0.55", f"threshold={'x' * 300}"))
    page = visit(long, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.getElementById('at').textContent = 'stored: ' + Array(8).fill('0.55').join(' / ')")
    assert page.locator("#threshold").bounding_box()["width"] > 150


@pytest.mark.parametrize("width", [1000, 420])
def test_it_fits_the_window_and_shows_something(masks, visit, tmp_path, width):
    page = visit(masks, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.wait_for_function("[...document.querySelectorAll('figure')].every(f => f.ariaBusy === 'false')")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    shot = np.array(Image.open(tmp_path / "page.png").convert("RGB"))
    assert shot.shape[1] == width and shot.shape[0] > 1500
    assert min((shot == colour).all(-1).sum() for colour in (TRUTH, FALSE)) > 100


def test_it_is_printed_on_white(masks, visit):
    page = visit(masks)
    page.emulate_media(media="screen", color_scheme="dark")
    warning, colour = page.locator(".warnings"), "e => getComputedStyle(e).backgroundColor"
    assert warning.evaluate(colour) == "rgb(43, 36, 21)"
    page.emulate_media(media="print", color_scheme="dark")
    assert warning.evaluate(colour) == "rgb(255, 246, 224)"
    assert page.locator("body").evaluate(colour) == "rgb(255, 255, 255)"


def test_labels_have_a_threshold_too(labels, visit):
    page, data = visit(labels), data_of(labels)
    truth = np.array(data["every"]["truth"])[:, 0] > 0
    assert 0 < truth.sum() < len(truth) == 30
    for threshold in (None, 0.0, 0.45, 1.0):
        if threshold is not None:
            set_slider(page, threshold)
        for v, stored in enumerate((0.3, 0.6)):
            decided = np.array(data["every"]["probability"][v][0])[:, 0] >= (stored if threshold is None else threshold)
            right = [decided[truth].mean(), 1 - decided[~truth].mean(), (decided == truth).mean()]
            cells = page.locator("#labels tbody tr").nth(v).locator("td").all_inner_texts()
            assert cells[1:4] == [f"{value:.4f}" for value in right]
            assert [int(cell) for cell in cells[4:]] == [
                *((decided & truth).sum(), (decided & ~truth).sum(), (~decided & truth).sum()),
                (~decided & ~truth).sum(),
            ]
    shown = page.locator("#detail .answer").first.inner_text()
    image = page.locator("#list li[aria-selected=true] em").inner_text()
    place = data["every"]["ids"].index(image)
    assert f"{data['every']['probability'][0][0][place][0]:.3f}" in shown and "malignant" in shown
