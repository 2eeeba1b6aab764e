"""The tables of a comparison: the same cells for the terminal, a page, a spreadsheet and a paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medvision.comparison.found import Comparison, Difference, Effect
from medvision.files import as_csv
from medvision.metrics import lower_is_better

INTERVAL = r"95\,\% interval"
BOOTSTRAP = (
    "hierarchical bootstrap: images drawn with replacement, the error of few seeds' mean from Student's t (Welch)"
)


@dataclass(frozen=True)
class Table:
    """A table for readers.

    Attributes:
        title: What it is of.
        header: The columns.
        rows: The cells.
        words: The columns that are words; the others are numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)


def tables(found: Comparison) -> dict[str, list[Table]]:
    """For each metric variants, differences to the baseline and effects of factors, as far as there are any."""
    kept = f", {found.groups} groups" if found.groups else ""
    result: dict[str, list[Table]] = {}
    for metric in found.metrics:
        rows = []
        for variant in found.variants:
            of, first = variant.estimates[metric], found.ranks[metric][variant.name][:1]
            values = [number(of.value), number(of.std), interval(of.low, of.high), percent(*first)]
            rows.append([variant.name, str(len(of.seeds)), *values])
        title = f"{metric}, {found.data} {found.split}: {found.images} images{kept}"
        result[metric] = [Table(title, ["variant", "seeds", "mean", "std", "95 %", "first"], rows)]
        rows = []
        for d in (d for d in found.differences if d.metric == metric):
            p = [probability(value) for value in (d.bootstrap_holm, d.permutation_holm, d.wilcoxon_holm)]
            values = [number(d.value, "+"), interval(d.low, d.high, "+"), *p, number(d.rank_biserial, "+", 2)]
            rows.append([d.variant, " & ".join(d.changed), *values, d.verdict])
        if rows:
            header = ["variant", "changed", "difference", "95 %", "bootstrap", "permutation", "Wilcoxon"]
            header += ["rank-biserial", "verdict"]
            title = f"{metric}: difference to {found.baseline}, with p of three tests, adjusted by Holm"
            result[metric].append(Table(title, header, rows, words=(0, 1, 8)))
        rows = []
        for e in (e for e in found.effects if e.metric == metric):
            rows.append([*_words(e), number(e.value, "+"), interval(e.low, e.high, "+")])
        if rows:
            header = ["factor", "level", "against", "effect", "95 %"]
            result[metric].append(Table(f"{metric}: main effects and interactions", header, rows, words=(0, 1, 2)))
    return result


def spreadsheet(found: Comparison) -> str:
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


def spreadsheet_of_effects(found: Comparison) -> str:
    """A row for each main effect and interaction, as CSV."""
    rows = [[e.metric, *_words(e), e.value, e.low, e.high] for e in found.effects]
    return as_csv([["metric", "factor", "level", "against", "effect", "low", "high"], *rows])


def latex(found: Comparison) -> str:
    """A table for a paper that loads booktabs and graphicx, a block for each metric; the best mean is bold.

    The variants are told by their factors; values below 10 have three digits, others one.
    """
    tested = {(d.metric, d.variant): d for d in found.differences}
    factors = [*found.variants[0].levels] or ["variant"]
    blocks: dict[str, list[list[str]]] = {}
    for metric in found.metrics:
        digits, means = _digits(found, metric), [v.estimates[metric].value for v in found.variants]
        best = min(means) if lower_is_better(metric) else max(means)
        rows = blocks[metric] = []
        for v in found.variants:
            e = v.estimates[metric]
            mean = f"{e.value:.{digits}f}"
            mean = rf"\textbf{{{mean}}}" if e.value == best else mean
            mean += "" if e.std is None else rf" $\pm$ {e.std:.{digits}f}"
            names = [*v.levels.values()] or [v.name]
            cells = [mean, _tex_interval(e.low, e.high, digits), *_tex_difference(tested.get((metric, v.name)), digits)]
            rows.append([*map(escaped, names), *cells])
    seeds = sorted({len(v.estimates[m].seeds) for v in found.variants for m in found.metrics})
    shown = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    baseline = " ".join(found.baseline.split())
    notes = [
        f"{found.data}, {found.split}: {found.images} images; seeds: {shown}; differences to {baseline}",
        f"intervals and p_b: {BOOTSTRAP};",
        "p_p: paired permutation of images; p by Holm; r: matched-pairs rank-biserial correlation",
    ]
    heads = [*map(escaped, factors), r"mean $\pm$ std", INTERVAL, "difference", INTERVAL, "$p_b$", "$p_p$", "$r$"]
    return _tabular(notes, "l" * len(factors) + "rlrlrrr", heads, blocks)


def latex_of_effects(found: Comparison) -> str:
    """A table of main effects and interactions for a paper, as `latex`."""
    blocks: dict[str, list[list[str]]] = {}
    for e in found.effects:
        digits = _digits(found, e.metric)
        cells = [f"${e.value:+.{digits}f}$", _tex_interval(e.low, e.high, digits, "+")]
        blocks.setdefault(e.metric, []).append([*map(escaped, _words(e)), *cells])
    return _tabular(
        [f"intervals, not adjusted for their number: {BOOTSTRAP}"],
        "lllrl",
        ["factor", "level", "against", "effect", INTERVAL],
        blocks,
    )


def _words(e: Effect) -> list[str]:
    return [" x ".join(e.factors), " & ".join(e.levels), " & ".join(e.reference)]


def _digits(found: Comparison, metric: str) -> int:
    return 3 if max(v.estimates[metric].value for v in found.variants) < 10 else 1


def _tabular(
    notes: Sequence[str], columns: str, heads: Sequence[str], blocks: Mapping[str, Sequence[Sequence[str]]]
) -> str:
    """A table of cells that are LaTeX, a block for each metric, below comments; as wide as the text at most."""
    lines = [*(f"% {note}" for note in notes), r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines.append(" & ".join(heads) + r" \\")
    for metric, rows in blocks.items():
        lines += [r"\midrule", rf"\multicolumn{{{len(columns)}}}{{l}}{{{escaped(metric)}}} \\"]
        lines += [" & ".join(cells) + r" \\" for cells in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}%", ""])


def _tex_difference(d: Difference | None, digits: int) -> list[str]:
    if d is None:
        return [""] * 5
    p = [probability(value).replace("<", "$<$") for value in (d.bootstrap_holm, d.permutation_holm)]
    size = "-" if d.rank_biserial is None else f"${d.rank_biserial:+.2f}$"
    return [f"${d.value:+.{digits}f}$", _tex_interval(d.low, d.high, digits, "+"), *p, size]


def _tex_interval(low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    return "-" if low is None or high is None else f"$[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]$"


def escaped(text: str) -> str:
    """Text as LaTeX prints it, in one line; letters that are not Latin are for XeLaTeX and LuaLaTeX."""
    special = {c: rf"\{c}" for c in "&%$#_{}"} | {"[": "{[}"}  # which else is an option of the line before
    words = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
    special |= {c: rf"\text{word}{{}}" for c, word in words.items()}
    return "".join(special.get(c, c) for c in " ".join(text.split()))


def number(value: float | None, sign: str = "", digits: int = 4) -> str:
    """A value; `-` where there is none."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def interval(low: float | None, high: float | None, sign: str = "") -> str:
    """Two bounds."""
    return "-" if low is None or high is None else f"{low:{sign}.4f} to {high:{sign}.4f}"


def percent(share: float | None = None) -> str:
    """A share of all."""
    return "-" if share is None else f"{share:.0%}"


def probability(p: float | None) -> str:
    """The p of a test."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
