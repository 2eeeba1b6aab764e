import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf, open_dict
from PIL import Image

from medvision import cli
from medvision.compare import start
from medvision.comparison import Estimate, Variant
from medvision.comparison.tables import escaped, latex
from medvision.errors import MedvisionError


def compare(*overrides):
    """What `python -m medvision.compare` does in this process."""
    configs = [cli.compose("compare", words) for words in cli.variants(list(overrides), "run")]
    for cfg in configs:
        with open_dict(cfg):
            del cfg["hydra"]
    start(configs, None, list(overrides))


def counts(seed, gain):
    rng = np.random.default_rng(seed)
    tp = (np.random.default_rng(9).uniform(300, 700, 15) + 1000 * gain + rng.normal(0, 10, 15)).astype(int)
    return np.stack([tp, 0 * tp, 1000 - tp, 0 * tp + 500], -1)[:, None]


@pytest.fixture
def sweep(fake_run, tmp_path):
    """A sweep of two blocks, two learning rates and two seeds; dense is better by 0.1."""
    job = 0
    for block in ("plain", "dense"):
        for lr in (0.1, 0.2):
            for seed in (1, 2, 3):
                words = [f"model.block={block}", f"optimizer.lr={lr}", f"seed={seed}"]
                config = OmegaConf.create({"seed": seed, "model": {"block": block}, "optimizer": {"lr": lr}})
                fake_run(tmp_path / "sweep" / str(job), counts(job, 0.1 * (block == "dense")), words, config)
                job += 1
    return tmp_path / "sweep"


def test_a_sweep_is_compared_and_written(sweep, capsys):
    compare(f"run={sweep}", "resamples=500", "metric=[jaccard_image,dice]")
    folder = sweep / "comparison"
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison.csv",
        "comparison.json",
        "comparison.tex",
        "differences.png",
        "effects.csv",
        "effects.tex",
        "ranks.png",
        "report.html",
    ]
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "jaccard_image, tiny test: 15 images"
    assert f"results: {folder / 'comparison.json'}" in shown and f"page:    {folder / 'report.html'}" in shown
    assert "jaccard_image: difference to model.block=plain, optimizer.lr=0.1, with p of three tests" in shown
    assert "dice: main effects and interactions" in shown
    stored = json.loads((folder / "comparison.json").read_text())
    assert [v["name"] for v in stored["variants"]][3] == "model.block=dense, optimizer.lr=0.2"
    assert len(stored["effects"]) == 2 * 3 and stored["effects"][0]["factors"] == ["model.block"]
    with (folder / "comparison.csv").open() as handle:
        rows = [*csv.DictReader(handle)]
    assert len(rows) == 2 * 4 and rows[0]["difference"] == ""
    for row, difference in zip(rows[1:4], stored["differences"], strict=False):
        assert row["optimizer.lr"] in ("0.1", "0.2") and float(row["difference"]) == difference["value"]
        assert row["difference_verdict"] == difference["verdict"]
    assert [d["verdict"] for d in stored["differences"][:3]] == ["not shown", "better", "better"]
    for name in ("ranks", "differences"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 600 and len(picture.convert("L").getcolors(256)) > 10
    again = (folder / "comparison.json").read_bytes()
    compare(f"run={sweep}", "resamples=500", "metric=[jaccard_image,dice]")  # what it wrote is no run
    assert (folder / "comparison.json").read_bytes() == again


def test_what_is_not_finished_is_told(sweep, caplog):
    (sweep / "11" / "metrics.json").unlink()
    compare(f"run={sweep},{sweep / '3'}", "resamples=100")
    assert "not finished and left out: 11" in caplog.text
    assert "not finished and left out: 11" in (sweep / "comparison" / "report.html").read_text()


def test_runs_by_name_with_a_baseline_and_a_folder(sweep, tmp_path, capsys):
    names = ",".join(str(sweep / job) for job in ("0", "1", "6"))
    compare(f"run={names}", "resamples=100", "baseline=6", f"output={tmp_path / 'o'}")
    stored = json.loads((tmp_path / "o" / "comparison.json").read_text())
    assert stored["baseline"] == "model.block=dense"  # the learning rate does not differ here
    assert [len(v["runs"]) for v in stored["variants"]] == [2, 1]
    assert stored["variants"][0]["runs"][1]["folder"] == str(sweep / "1")
    assert "| model.block" in capsys.readouterr().out


def test_the_table_for_a_paper(sweep, tmp_path):
    compare(f"run={sweep}", "resamples=200", f"output={tmp_path}")
    lines = (tmp_path / "comparison.tex").read_text().splitlines()
    assert lines[0].startswith("% tiny, test: 15 images; seeds: 3; differences to model.block=plain")
    assert lines[4:6] == [r"\begin{tabular}{llrlrlrrr}", r"\toprule"]
    assert lines[3].startswith(r"\resizebox{") and lines[-2:] == [r"\bottomrule", r"\end{tabular}}%"]
    body = lines[6:-2]
    rows = [line for line in body if " & " in line]
    assert rows[0].startswith(r"model.block & optimizer.lr & mean $\pm$ std & 95\,\% interval & difference")
    assert len(rows) == 5 and all(row.count("&") == 8 and row.endswith(r"\\") for row in rows)
    assert sum(r"\textbf" in row for row in rows) == 1 and r"\multicolumn{9}{l}{jaccard\_image} \\" in body
    best = next(row for row in rows if r"\textbf" in row)
    assert best.startswith("dense & 0.") and re.search(r"\\textbf{0\.\d{3}} \$\\pm\$ 0\.\d{3} & \$\[0", best)
    assert "$+0.1" in best and best.endswith(r"& $+1.00$ \\")


def test_the_table_of_effects_for_a_paper(sweep, tmp_path):
    compare(f"run={sweep}", "resamples=200", f"output={tmp_path}")
    lines = (tmp_path / "effects.tex").read_text().splitlines()
    rows = [line for line in lines if " & " in line]
    assert lines[2] == r"\begin{tabular}{lllrl}" and len(rows) == 4 and all(row.count(" & ") == 4 for row in rows)
    assert rows[1].startswith("model.block & dense & plain & $+0.1")
    assert rows[3].startswith(r"model.block x optimizer.lr & dense \& 0.2 & plain \& 0.1 & $")
    effects = json.loads((tmp_path / "comparison.json").read_text())["effects"]
    with (tmp_path / "effects.csv").open() as handle:
        found = [*csv.DictReader(handle)]
    assert [float(row["effect"]) for row in found] == [effect["value"] for effect in effects]
    words = [found[2][name] for name in ("factor", "level", "against")]
    assert words == ["model.block x optimizer.lr", "dense & 0.2", "plain & 0.1"]
    compare(f"run={sweep / '0'}", "resamples=200", f"output={tmp_path}")  # of one variant
    assert not {"effects.tex", "effects.csv", "differences.png"} & {path.name for path in tmp_path.iterdir()}


def test_values_above_ten_have_one_digit():
    estimates = {name: {"hd95": Estimate(value, 1.25, 0.0, 30.06, {})} for name, value in (("a", 31.4339), ("b", 9.9))}
    variants = [Variant(f"m={name}", {"m": name}, {}, [], of) for name, of in estimates.items()]
    found = SimpleNamespace(metrics=["hd95"], variants=variants, differences=[], data="d", split="test", images=2)
    found.baseline = "m=a"
    rows = [line for line in latex(found).splitlines() if line.startswith(("a", "b"))]
    assert rows == [
        r"a & 31.4 $\pm$ 1.2 & $[0.0, 30.1]$ &  &  &  &  &  \\",
        r"b & \textbf{9.9} $\pm$ 1.2 & $[0.0, 30.1]$ &  &  &  &  &  \\",
    ]


def test_letters_that_latex_reads_otherwise():
    assert escaped(r"a_b 50% {x} ~^ \d #1 $ &") == (
        r"a\_b 50\% \{x\} \textasciitilde{}\textasciicircum{} \textbackslash{}d \#1 \$ \&"
    )
    assert escaped("[32,48]") == "{[}32,48]"  # begins a row
    assert escaped("<a|b>\n\nc") == r"\textless{}a\textbar{}b\textgreater{} c"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which runs"),
        (["run=x", "split=train"], "split=train: expected test or val"),
        (["run=x", "resamples=10"], "resamples=10: expected a number of 100 or more"),
        (["run=x", "images=-1"], "images=-1: expected a number of images, or 0 for none"),
        (["runs/a", "runs/b"], "runs/a: expected <name>=<value>, as seed=1 or run=<folder>"),
        (["run=nowhere"], "nowhere holds no finished run"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(MedvisionError, match=message):
        compare(*words)


def test_without_a_test_split_validation_is_compared(fake_run, tmp_path, caplog):
    for seed in (1, 2):
        fake_run(tmp_path / str(seed), counts(seed, 0), [f"seed={seed}"], {"seed": seed}, split="val")
    compare(f"run={tmp_path}", "resamples=100")
    stored = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert stored["split"] == "val" and len(stored["variants"]) == 1
    assert not (tmp_path / "comparison" / "differences.png").exists()
    assert "validation split, which also chose" in caplog.text


def test_a_page_without_the_data_says_why(sweep, tmp_path, caplog):
    compare(f"run={sweep}", "resamples=100", f"output={tmp_path / 'asked'}")
    reason = "there are no pictures of images: data: medvision.data.Tiny cannot be made"  # a fake run has no data
    assert reason in caplog.text and reason in (tmp_path / "asked" / "report.html").read_text()
    caplog.clear()
    compare(f"run={sweep}", "resamples=100", "images=0", f"output={tmp_path / 'none'}")
    assert "no pictures" not in caplog.text + (tmp_path / "none" / "report.html").read_text()
