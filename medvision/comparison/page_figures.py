"""Figures that a page draws itself, as HTML and SVG that take the page's width and colours."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from medvision.comparison.found import Comparison
from medvision.comparison.tables import interval, number
from medvision.logger import Row

COLOURS = 8  # classes v0, v1, ... of the style sheet
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 250, 52, 34  # of a panel of curves
POINTS = 400  # of a curve


def forest(found: Comparison, metric: str) -> str:
    """Differences to the baseline with their intervals around zero; what is shown to be one is dark."""
    shown = [d for d in found.differences if d.metric == metric]
    ticks = _ticks([0, *(v for d in shown for v in (d.value, d.low, d.high) if v is not None)])
    rows = []
    for d in shown:
        words = f"{number(d.value, '+')} ({interval(d.low, d.high, '+')})"
        drawn = _bar(ticks, d.low, d.high) + f'<circle cx="{_at(ticks, d.value)}" cy="50%" r="5"/>'
        rows.append((d.variant, "unclear" if d.verdict == "not shown" else "clear", drawn, f"{words}, {d.verdict}"))
    return _rows(rows, ticks, zero=True)


def seeds(found: Comparison, metric: str) -> str:
    """The value of each seed, and over it the mean with its interval."""
    estimates = {variant.name: variant.estimates[metric] for variant in found.variants}
    ticks = _ticks([v for e in estimates.values() for v in (e.low, e.high, *e.seeds.values()) if v is not None])
    rows = []
    for n, (name, e) in enumerate(estimates.items()):
        drawn = _bar(ticks, e.low, e.high)
        at = _at(ticks, e.value)
        drawn += f'<line class="mean" x1="{at}" x2="{at}" y1="15%" y2="85%"/>'
        for seed, value in e.seeds.items():
            title = f"<title>{escape(seed)}: {number(value)}</title>"
            drawn += f'<circle class="seed" cx="{_at(ticks, value)}" cy="50%" r="4">{title}</circle>'
        rows.append((name, f"v{n % COLOURS}", drawn, f"{number(e.value)} ({interval(e.low, e.high)})"))
    return _rows(rows, ticks)


def ranks(found: Comparison, metric: str) -> str:
    """The probability of each rank, the darker the likelier; nothing where there are none."""
    known = {name: shares for name, shares in found.ranks[metric].items() if shares}
    if not known:
        return ""
    head = "".join(f'<th scope="col">{rank}</th>' for rank in range(1, len(found.variants) + 1))
    lines = []
    for name, shares in known.items():
        cells = ""
        for share in shares:
            text = f"{share:.0%}" if share >= 0.005 else "" if share == 0 else "&lt;1%"
            dark = ' class="dark"' if share > 0.75 else ""
            cells += f'<td{dark} style="--share:{share * 100:.1f}%">{text}</td>'
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = f'<thead><tr><th scope="col">variant</th>{head}</tr></thead>'
    return f'<div class="wide"><table class="ranks">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def curves(histories: Sequence[tuple[int, str, Sequence[Row]]], metrics: Mapping[str, str]) -> str:
    """The course of trainings: a panel for each metric, a line for each run.

    Args:
        histories: Number of the variant, name of the run, and rows of `metrics.csv`.
        metrics: Names as logged, and the title of each panel.
    """
    panels = []
    for metric, title in metrics.items():
        lines = []
        for variant, name, rows in histories:
            points = [(epoch, value) for epoch, _, logged, value in rows if logged == metric and math.isfinite(value)]
            if points:
                lines.append((variant, name, points[:: -(-len(points) // POINTS)]))
        if lines:
            panels.append(_panel(title, lines))
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _panel(title: str, lines: Sequence[tuple[int, str, Sequence[tuple[int, float]]]]) -> str:
    values = [value for *_, points in lines for _, value in points]
    log = title.endswith("loss") and 0 < 10 * min(values) < max(values)
    scale = math.log10 if log else float
    across = _ticks([epoch for *_, points in lines for epoch, _ in points], least=1)
    up = _ticks([scale(value) for value in values])

    def place(x: float, y: float) -> str:
        right = LEFT + (WIDTH - LEFT - 12) * _share(across, x)
        return f"{right:.1f},{(HEIGHT - BOTTOM) - (HEIGHT - BOTTOM - 24) * _share(up, y):.1f}"

    drawn = [f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>']
    for tick in up:
        x, y = place(across[0], tick).split(",")
        shown = f"{10**tick:.3g}" if log else f"{tick:g}"
        drawn.append(f'<line class="grid" x1="{x}" x2="{WIDTH - 12}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{float(y) + 4:.1f}">{shown}</text>')
    for tick in across:
        x, _ = place(tick, up[0]).split(",")
        drawn.append(f'<text class="tick" text-anchor="middle" x="{x}" y="{HEIGHT - BOTTOM + 16}">{tick:g}</text>')
    drawn.append(f'<text class="tick" text-anchor="end" x="{WIDTH - 12}" y="{HEIGHT - 4}">epoch</text>')
    for variant, name, points in lines:
        shown = " ".join(place(epoch, scale(value)) for epoch, value in points)
        kind = "dot" if len(points) == 1 else "line"
        drawn.append(f'<polyline class="{kind} v{variant % COLOURS}" points="{shown}{f" {shown}" * (kind == "dot")}">')
        drawn.append(f"<title>{escape(name)}</title></polyline>")
    label = f'role="img" aria-label="{escape(title)} over epochs"'
    return f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(drawn)}</svg>'


def _rows(rows: Sequence[tuple[str, str, str, str]], ticks: Sequence[float], zero: bool = False) -> str:
    """A chart with a row for each name, kind, drawing and words, above one axis."""
    grid = "".join(f'<line class="grid" x1="{_at(ticks, t)}" x2="{_at(ticks, t)}" y1="0" y2="100%"/>' for t in ticks)
    grid += f'<line class="zero" x1="{_at(ticks, 0)}" x2="{_at(ticks, 0)}" y1="0" y2="100%"/>' if zero else ""
    lines = [
        f'<tr class="{kind}"><th scope="row">{escape(name)}</th><td><svg role="img" aria-label="{escape(words)}">'
        f"{grid}{drawn}</svg></td><td>{escape(words)}</td></tr>"
        for name, kind, drawn, words in rows
    ]
    labels = "".join(f'<text class="tick" x="{_at(ticks, t)}" y="14" text-anchor="middle">{t:g}</text>' for t in ticks)
    axis = f'<tr class="axis"><td></td><td><svg aria-hidden="true">{labels}</svg></td><td></td></tr>'
    return f'<div class="wide"><table class="chart"><tbody>{"".join(lines)}{axis}</tbody></table></div>'


def _bar(ticks: Sequence[float], low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f'<line class="bar" x1="{_at(ticks, low)}" x2="{_at(ticks, high)}" y1="50%" y2="50%"/>'


def _share(ticks: Sequence[float], value: float) -> float:
    return (value - ticks[0]) / (ticks[-1] - ticks[0])


def _at(ticks: Sequence[float], value: float) -> str:
    """Where a value lies along the axis."""
    return f"{4 + 92 * _share(ticks, value):.2f}%"


def _ticks(values: Sequence[float], least: float = 0) -> list[float]:
    """Round numbers around all values, some two to eight of them, at least so far apart."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 10 - 1e-3, high + abs(high) / 10 + 1e-3
    size = 10.0 ** math.floor(math.log10(high - low))
    step = max(least, next(of * size for of in (0.2, 0.5, 1.0, 2.0) if (high - low) / (of * size) <= 6))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]
