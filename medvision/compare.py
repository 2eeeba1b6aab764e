"""`python -m medvision.compare run=<sweep>`: what differs between runs, and whether the difference can be believed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import as_csv, writable_folder, write_json, write_text

if TYPE_CHECKING:
    from medvision.comparison import Comparison, Difference

log = logging.getLogger("medvision.compare")  # __name__ is __main__ here


def start(configs: list[DictConfig], _folder: Path, _overrides: list[str]) -> None:
    """Compares the runs that the configs name, which are else the same; prints tables and writes them with figures.

    Raises:
        MedvisionError: If the runs cannot be compared.
    """
    cfg = configs[0]
    if cfg.run is None:
        raise MedvisionError("which runs? run=<folders>, of runs or of sweeps: run=a,b")
    if cfg.split not in (None, "test", "val"):
        raise MedvisionError(f"split={cfg.split}: expected test or val")
    if not isinstance(cfg.resamples, int) or cfg.resamples < 100:
        raise MedvisionError(f"resamples={cfg.resamples}: expected a number of 100 or more")
    from medvision.comparison import compare
    from medvision.configs import load_config
    from medvision.variants import find_runs, read_run

    folders = [Path(str(config.run)).expanduser().resolve() for config in configs]
    places = [*dict.fromkeys(place for folder in folders for place in find_runs(folder))]
    split = cfg.split or ("test" if all(place.results("test").exists() for place in places) else "val")
    runs = []
    for place in places:
        config: Any = OmegaConf.to_container(load_config(place), resolve=False)
        typed = [str(word) for word in OmegaConf.load(place.overrides)] if place.overrides.exists() else []
        runs.append(read_run(place, config, typed, split))
    log.info("comparing %d runs", len(runs))
    metrics = [cfg.metric] if isinstance(cfg.metric, str) else [*(cfg.metric or ())]
    baseline = None if cfg.baseline is None else str(cfg.baseline)  # a job of a sweep is a number
    found = compare(runs, split, metrics, baseline, cfg.common, cfg.resamples)
    beside = folders[0].parent if folders[0] == places[0].path else folders[0]
    output = Path(str(cfg.output)).expanduser().resolve() if cfg.output else beside / "comparison"
    write(found, writable_folder(output, "output=<folder>"))
    show(found)
    print(f"results: {output / 'comparison.json'}")


def write(found: "Comparison", folder: Path) -> None:
    """Writes `comparison.json`, `.csv` and `.tex`, `ranks.png` and `differences.png`."""
    from medvision import figures

    write_json(folder / "comparison.json", found.plain())
    write_text(folder / "comparison.csv", table(found))
    write_text(folder / "comparison.tex", latex(found))
    where = f"{found.data}, {found.split}, {found.images} images"
    ranks = {m: {name: of for name, of in values.items() if of} for m, values in found.ranks.items()}
    if panels := {f"{m}: probability of each rank ({where})": of for m, of in ranks.items() if of}:
        figures.ranks(folder / "ranks.png", panels)
    forest: dict[str, dict[str, tuple[float, float | None, float | None, bool]]] = {}
    for d in found.differences:
        title = f"{d.metric}: difference to {d.baseline}, 95 %, black where shown ({where})"
        forest.setdefault(title, {})[d.variant] = d.value, d.low, d.high, d.verdict != "not shown"
    if forest:
        figures.forest(folder / "differences.png", forest)


def show(found: "Comparison") -> None:
    """Prints variants, differences, effects of factors, and what a reader has to know."""
    from medvision.report import print_rows

    kept = f", {found.groups} groups" if found.groups else ""
    for metric in found.metrics:
        rows = []
        for variant in found.variants:
            of, first = variant.estimates[metric], found.ranks[metric][variant.name][:1]
            values = [_number(of.value), _number(of.std), _interval(of.low, of.high), _percent(first)]
            rows.append([variant.name, str(len(of.seeds)), *values])
        title = f"{metric}, {found.data} {found.split}: {found.images} images{kept}"
        print_rows(title, ["variant", "seeds", "mean", "std", "95 %", "first"], rows)
        rows = []
        for d in (d for d in found.differences if d.metric == metric):
            tests = [
                _p(d.bootstrap_holm),
                _p(d.permutation_holm),
                _p(d.wilcoxon_holm),
                _number(d.rank_biserial, "+", 2),
            ]
            values = [_number(d.value, "+"), _interval(d.low, d.high, "+"), *tests]
            rows.append([d.variant, " & ".join(d.changed), *values, d.verdict])
        if rows:
            header = ["variant", "changed", "difference", "95 %", "bootstrap", "permutation", "Wilcoxon"]
            header += ["rank-biserial", "verdict"]
            title = f"{metric}: difference to {found.baseline}, with p of three tests, adjusted by Holm"
            print_rows(title, header, rows, words=(0, 1, 8))
        rows = []
        for e in (e for e in found.effects if e.metric == metric):
            words = [" x ".join(e.factors), " & ".join(e.levels), " & ".join(e.reference)]
            rows.append([*words, _number(e.value, "+"), _interval(e.low, e.high, "+")])
        if rows:
            header = ["factor", "level", "against", "effect", "95 %"]
            print_rows(f"{metric}: main effects and interactions", header, rows, words=(0, 1, 2))
    for warning in found.warnings:
        log.warning("%s", warning)


def table(found: "Comparison") -> str:
    """A row for each metric and variant, as CSV."""
    factors = [*found.variants[0].levels]
    tested = {(d.metric, d.variant): d for d in found.differences}
    of_difference = ["value", "low", "high", "bootstrap", "bootstrap_holm", "permutation", "permutation_holm"]
    of_difference += ["wilcoxon", "wilcoxon_holm", "rank_biserial", "verdict"]
    header = ["metric", "variant", *factors, "seeds", "mean", "std", "low", "high", "first"]
    rows: list[list[object]] = [
        [*header, *("difference" if name == "value" else f"difference_{name}" for name in of_difference)]
    ]
    for metric in found.metrics:
        for v in found.variants:
            e, d = v.estimates[metric], tested.get((metric, v.name))
            first: Sequence[float | None] = found.ranks[metric][v.name][:1] or [None]
            cells = [metric, v.name, *v.levels.values(), len(e.seeds), e.value, e.std, e.low, e.high, *first]
            rows.append([*cells, *(None if d is None else getattr(d, name) for name in of_difference)])
    return as_csv(rows)


def latex(found: "Comparison") -> str:
    """A table for a paper that loads booktabs, a block for each metric; the best mean is bold."""
    from medvision.metrics import lower_is_better

    tested = {(d.metric, d.variant): d for d in found.differences}
    lines = [r"\begin{tabular}{lrlrlrr}", r"\toprule"]
    lines.append(r"variant & mean $\pm$ std & 95\,\% interval & difference & 95\,\% interval & $p_b$ & $p_p$ \\")
    for metric in found.metrics:
        means = [v.estimates[metric].value for v in found.variants]
        best = min(means) if lower_is_better(metric) else max(means)
        lines += [r"\midrule", rf"\multicolumn{{7}}{{l}}{{{escaped(metric)}}} \\"]
        for v in found.variants:
            e, d = v.estimates[metric], tested.get((metric, v.name))
            mean = rf"\textbf{{{e.value:.4f}}}" if e.value == best else f"{e.value:.4f}"
            mean += "" if e.std is None else rf" $\pm$ {e.std:.4f}"
            cells = [escaped(v.name), mean, _tex_interval(e.low, e.high), *_tex_difference(d)]
            lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    seeds = sorted({len(v.estimates[m].seeds) for v in found.variants for m in found.metrics})
    shown = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    notes = [
        f"% {found.data}, {found.split}: {found.images} images; seeds: {shown}; differences to {found.baseline}",
        "% intervals and p_b: hierarchical bootstrap of seeds and images; p_p: paired permutation of images; Holm",
    ]
    return "\n".join([*notes, *lines, ""])


def _tex_difference(d: "Difference | None") -> list[str]:
    if d is None:
        return [""] * 4
    p = [_p(value).replace("<", "$<$") for value in (d.bootstrap_holm, d.permutation_holm)]
    return [f"${d.value:+.4f}$", _tex_interval(d.low, d.high, "+"), *p]


def _tex_interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"$[{low:{sign}.4f}, {high:{sign}.4f}]$"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    special = {c: rf"\{c}" for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, c) for c in text)


def _number(value: float | None, sign: str = "", digits: int = 4) -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"{low:{sign}.4f} to {high:{sign}.4f}"


def _percent(share: Sequence[float]) -> str:
    return f"{share[0]:.0%}" if share else "-"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


if __name__ == "__main__":
    cli.main("compare", start, several="run")
