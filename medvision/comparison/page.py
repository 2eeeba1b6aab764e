"""A comparison as one page that needs no network: conclusion, tables, figures, images, configs and commands."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from medvision import __version__
from medvision.comparison import page_figures
from medvision.comparison.found import Comparison
from medvision.comparison.statistics import ALPHA
from medvision.comparison.tables import Table, interval, number, tables
from medvision.comparison.variants import word
from medvision.logger import Row

PARTS = Path(__file__).parent
BOOTSTRAP = (
    "Intervals are of a hierarchical bootstrap: images, or groups of them, are drawn with replacement, the same for "
    "all variants; of the seeds, too few to draw from, the error of their mean is drawn from Student's t (Welch). With "
    "one seed there is no such error."
)
SHORT = 20  # letters that stay in one line


def render(
    found: Comparison,
    histories: Mapping[str, Sequence[Row]],
    pictures: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        found: The comparison.
        histories: For each run folder the rows of its `metrics.csv`.
        pictures: As `page_images.pictured` gives them; None: none.
        warnings: What a reader has to know besides the comparison's own.
    """
    style, script, text = ((PARTS / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    data = json.dumps({"pictures": pictures}, allow_nan=False, separators=(",", ":"))
    return Template(text).substitute(
        title=escape(f"{found.data}, {found.split}: {_count(len(found.variants), 'variant')} compared"),
        style=style,
        script=script,
        data=data.replace("<", "\\u003c"),  # nothing in it ends the script
        facts=_facts(found),
        conclusion="".join(f"<p>{escape(line)}</p>" for line in conclusion(found)),
        warnings=_warnings([*found.warnings, *warnings]),
        results="".join(_of_metric(found, metric, of) for metric, of in tables(found).items()),
        curves=_curves(found, histories),
        pictured="" if pictures else "hidden",
        runs=_table(_runs(found)),
        configs=_configs(found),
        commands=_commands(found),
        version=escape(__version__),
    )


def conclusion(found: Comparison) -> list[str]:
    """What the comparison shows and what it does not, in sentences that follow from the verdicts."""
    if not found.differences:
        return ["There is one variant: nothing is compared, and nothing shown."]
    seeds = {len(e.seeds) for v in found.variants for e in v.estimates.values()}
    alone = ", for these trained networks alone" if min(seeds) == 1 else ""
    lines = []
    for metric in found.metrics:
        of = [d for d in found.differences if d.metric == metric]
        for verdict in ("better", "worse"):
            shown = [f"{d.variant} ({number(d.value, '+')}, {interval(d.low, d.high, '+')})" for d in of]
            if shown := [text for text, d in zip(shown, of, strict=True) if d.verdict == verdict]:
                lines.append(f"{metric}: shown to be {verdict} than {found.baseline}{alone}: {'; '.join(shown)}.")
        if unclear := [d.variant for d in of if d.verdict == "not shown"]:
            lines.append(
                f"{metric}: not shown to differ from {found.baseline}: {'; '.join(unclear)}. "
                f"That does not say that {'they do' if len(unclear) > 1 else 'it does'} not."
            )
    lines.append(
        f"Shown means that the bootstrap over seeds and images and the permutation test have p below {ALPHA}, both "
        f"adjusted by Holm over {_count(len(found.differences), 'difference')}, with "
        f"{' to '.join(str(n) for n in sorted({min(seeds), max(seeds)}))} seed{'s' if max(seeds) > 1 else ''} of each "
        f"variant and {_count(found.images, 'image')}."
    )
    return lines


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _facts(found: Comparison) -> str:
    seeds = dict.fromkeys(str(run["seed"]) for v in found.variants for run in v.runs)
    facts = {
        "data": found.data,
        "split": found.split,
        "images": f"{found.images}" + (f" in {_count(found.groups, 'group')}" if found.groups else ""),
        "runs": str(sum(len(v.runs) for v in found.variants)),
        "seeds": ", ".join(seeds),
        "metrics": ", ".join(found.metrics),
        "baseline": found.baseline,
        "resamples": str(found.resamples),
    }
    names = "".join(
        f'<li><i class="swatch v{n % page_figures.COLOURS}"></i>{escape(v.name)}</li>'
        for n, v in enumerate(found.variants)
    )
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl>{listed}</dl><ul class="legend">{names}</ul>'


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f'<ul class="warnings">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def _of_metric(found: Comparison, metric: str, of: Sequence[Table]) -> str:
    variants, *others = of
    parts = [f"<section><h2>{escape(metric)}</h2>", _table(variants), "<h3>Values of each seed</h3>"]
    parts.append("<p>Dots are seeds, the line is their mean, the bar its 95 % interval over seeds and images.</p>")
    parts.append(page_figures.seeds(found, metric))
    if found.differences:
        parts.append("<h3>Differences to the baseline</h3>")
        parts.append(
            f"<p>With 95 % intervals; dark where a difference to {escape(found.baseline)} is shown. {BOOTSTRAP}</p>"
        )
        parts.append(page_figures.forest(found, metric))
    parts += [_table(table) for table in others]
    if found.effects:
        parts.append("<p>Intervals of effects are not adjusted for their number.</p>")
    if len(found.variants) > 1 and (drawn := page_figures.ranks(found, metric)):
        parts += ["<h3>Rank stability</h3><p>The probability of each rank in that bootstrap.</p>"]
        parts.append(drawn)
    return f"{''.join(parts)}</section>"


def _table(table: Table) -> str:
    """A table that can be sorted by a click on a heading."""
    longest = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
    of_words = ['class="word short"' if length <= SHORT else 'class="word"' for length in longest]
    kinds = [of_words[n] if n in table.words else 'class="number"' for n in range(len(table.header))]
    head = "".join(
        f'<th scope="col" {kind} aria-sort="none"><button type="button">{escape(name)}</button></th>'
        for kind, name in zip(kinds, table.header, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(f'<td {kind}>{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="wide"><table class="sortable">{caption}{head}<tbody>{rows}</tbody></table></div>'


def _runs(found: Comparison) -> Table:
    folds = ["fold"] if any("fold" in run for variant in found.variants for run in variant.runs) else []
    rows = []
    for variant in found.variants:
        for run in variant.runs:
            of_folds = [str(run.get(name, 0)) for name in folds]
            epoch = "-" if run["epoch"] is None else str(run["epoch"])
            values = [number(run["metrics"][metric]) for metric in found.metrics]
            rows.append([Path(run["folder"]).name, variant.name, str(run["seed"]), *of_folds, epoch, *values])
    return Table("", ["run", "variant", "seed", *folds, "epoch", *found.metrics], rows, words=(0, 1))


def _commands(found: Comparison) -> str:
    runs = [run for variant in found.variants for run in variant.runs]
    return "\n".join(escape(f"# {Path(run['folder']).name}\n{run['command']}") for run in runs)


def _configs(found: Comparison) -> str:
    keys = [*found.variants[0].config]
    if not keys:
        return "<p>The configs of the runs do not differ but by seed and fold.</p>"
    rows = [[key, *(word(variant.config[key]) for variant in found.variants)] for key in keys]
    header = ["entry", *(variant.name for variant in found.variants)]
    return _table(Table("", header, rows, words=range(len(header))))


def _curves(found: Comparison, histories: Mapping[str, Sequence[Row]]) -> str:
    """The training loss, that of validation, and the compared metrics on validation, as far as they were logged."""
    lines = [
        (n, f"{variant.name}, {Path(run['folder']).name}", histories.get(run["folder"], []))
        for n, variant in enumerate(found.variants)
        for run in variant.runs
    ]
    titles = {"train/loss": "training loss", "val/loss": "validation loss"}
    titles |= {f"val/{metric}": f"{metric} on validation" for metric in found.metrics}
    return page_figures.curves(lines, titles) or "<p>Nothing was logged.</p>"
