"""One page of figures for labels: how a split is ranked, calibrated and decided, a row for each class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvision.figures.charts import charted, plain
from medvision.metrics import Bootstrap, cumulate, interval
from medvision.metrics.calibration import Calibration

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

GRID = np.linspace(0, 1, 101)
"""Where bands are drawn, of the false positive rate or the recall."""
PANELS = {"ROC": "auroc", "precision-recall": "average_precision", "reliability": "ece", "scores": "brier"}
"""What is drawn of each class, and the metric that stands above it."""
ROWS = 20
"""Classes that a page has room for."""
SIDE = 3.7
"""Of a panel, inches."""


def confusion(truth: Bools, decided: Bools) -> NDArray[np.int64]:
    """How many images show i (rows) and are decided for j (columns).

    Args:
        truth: bool (N, K) of exclusive classes, or (N,) of one class: i is its absence and its presence.
        decided: bool, the same shape.

    Returns:
        int64 (K, K), or (2, 2).
    """
    if truth.ndim == 1:
        truth, decided = (np.stack([~values, values], 1) for values in (truth, decided))
    return truth.T.astype(np.int64) @ decided.astype(np.int64)


def page(
    path: Path,
    probability: Floats,
    truth: Bools,
    decided: Bools,
    classes: Sequence[str],
    threshold: Sequence[float],
    bootstrap: Bootstrap,
    values: Mapping[str, float],
    title: str,
) -> None:
    """Draws ROC, precision-recall, reliability, histograms of the scores and the confusion matrix.

    Curves have 95 % bands, pointwise, from the bootstrap; a dot is where the decision lies. A curve of a class that
    every image shows or none is not drawn, and says so. Of more than `ROWS` classes those with the lowest AUROC have
    a row; the confusion matrix is of all.

    Args:
        path: The PNG.
        probability: (N, K), in 0 to 1.
        truth: bool (N, K).
        decided: bool (N, K).
        classes: The K names.
        threshold: Of each class; none where exactly one class is there, which makes one confusion matrix of all.
        bootstrap: Of the N images.
        values: Metrics as `metrics.summarise_labels` names them, of which some are written.
        title: Stands above.
    """
    order = sorted(range(len(classes)), key=lambda k: values.get(f"auroc/{classes[k]}", 2))
    shown, whole = sorted(order[:ROWS]), len(PANELS)
    if len(shown) < len(classes):
        title += f": the {ROWS} of {len(classes)} classes with the lowest AUROC"
    cell = max(SIDE / len(classes), min(0.3, 20 / len(classes)))  # of the confusion matrix, inches
    wide = SIDE if len(threshold) else cell * len(classes)
    size = (whole * SIDE + wide + 1, SIDE * len(shown) + 0.6)
    with charted(path, len(shown), whole + 1, size, width_ratios=[*[SIDE] * whole, wide]) as charts:
        figure: Any = charts[0].figure
        figure.suptitle(plain(title, 180, 3))
        for k, row in zip(shown, np.reshape(np.array(charts, object), (len(shown), -1)), strict=True):
            p, t, d, name = probability[:, k], truth[:, k], decided[:, k], classes[k]
            _curves(row[0], row[1], p, t, d, bootstrap)
            _reliability(row[2], p, t)
            _scores(row[3], p, t, name, threshold[k] if len(threshold) else None)
            for axes, (panel, metric) in zip(row[:whole], PANELS.items(), strict=True):
                value = values.get(f"{metric}/{name}" if len(classes) > 1 else metric)
                text = "" if value is None else f"\n{metric} {value:.3f}"
                axes.set_title(plain(f"{panel} of {name}", 42, 2) + text, fontsize=10)
            if len(threshold):
                _matrix(row[whole], confusion(t, d), [f"not {name}", name], SIDE / 2)
                row[whole].set_title(plain(f"confusion of {name}", 42, 2), fontsize=10)
            else:
                row[whole].remove()
        if not len(threshold):
            rows = int(np.ceil(wide / SIDE)) + 1  # one for the names below
            axes = figure.add_subplot(row[0].get_gridspec()[:rows, whole], title="confusion", anchor="N")
            _matrix(axes, confusion(truth, decided), classes, cell)


def bands(probability: Floats, truth: Bools, bootstrap: Bootstrap) -> tuple[Floats, Floats]:
    """Pointwise 95 % bands of the ROC and of the precision-recall curve of one class.

    Args:
        probability: (N,).
        truth: bool (N,), of both kinds.
        bootstrap: Of the N images.

    Returns:
        Lower and upper bound (2, 101): of the sensitivity at each of 101 false positive rates, and of the precision at
        each of as many recalls; NaN where one kind is of a single image or group.
    """
    roc, pr = [], []
    left = bootstrap.without_one(np.stack([truth, ~truth], 1))
    for weights in bootstrap.weights() if (left @ truth).all() and (left @ ~truth).all() else ():
        _, hits, false = cumulate(probability, truth, weights)
        for tp, fp in zip(hits, false, strict=True):
            if tp[-1] > 0 and fp[-1] > 0:  # a resample may lack one kind
                recall = tp / tp[-1]
                roc.append(np.interp(GRID, np.append(0, fp / fp[-1]), np.append(0, recall)))
                at = np.searchsorted(recall, np.maximum(GRID - 1e-12, 1e-12))  # at 0 the first that finds anything
                pr.append(tp[at] / (tp + fp)[at])
    empty = np.full((1, len(GRID)), np.nan)
    return interval(roc or empty), interval(pr or empty)


def _curves(roc: Any, pr: Any, probability: Floats, truth: Bools, decided: Bools, bootstrap: Bootstrap) -> None:
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    pr.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    if truth.all() or not truth.any():
        for axes in (roc, pr):
            text = f"not defined:\n{'every image shows' if truth.any() else 'no image shows'} the class"
            axes.text(0.5, 0.5, text, ha="center", va="center")
        return
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    pr.axhline(truth.mean(), color="grey", linewidth=0.8, linestyle=":")
    _, (tp,), (fp,) = cumulate(probability, truth, np.ones((1, len(truth))))
    recall, precision = tp / tp[-1], tp / (tp + fp)
    bounds = bands(probability, truth, bootstrap)
    for axes, (low, high) in zip((roc, pr), bounds, strict=True):
        axes.fill_between(GRID, low, high, alpha=0.25, linewidth=0)
    roc.plot(np.append(0, fp / fp[-1]), np.append(0, recall))
    pr.plot(np.append(0, recall), np.append(precision[0], precision), drawstyle="steps-pre")
    roc.plot(decided[~truth].mean(), decided[truth].mean(), "ko", markersize=5)
    if decided.any():
        pr.plot(decided[truth].mean(), truth[decided].mean(), "ko", markersize=5)


def _reliability(axes: Any, probability: Floats, truth: Bools) -> None:
    calibration = Calibration(1)
    calibration.update(torch.from_numpy(probability[:, None]), torch.from_numpy(truth[:, None]))
    (found,) = calibration.compute()
    share = found.count / found.count.sum()
    edges = np.linspace(0, 1, len(share) + 1)
    axes.bar(edges[:-1], share, np.diff(edges), align="edge", color="lightgrey", label="share of images")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    known = found.count > 0
    axes.plot(found.confidence[known], found.frequency[known], linewidth=0.8, label="how often it was there")
    axes.scatter(found.confidence[known], found.frequency[known], s=6 + 300 * share[known])  # few images, a small dot
    axes.set(xlabel="probability", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.legend(fontsize=7, framealpha=0.5)


def _scores(axes: Any, probability: Floats, truth: Bools, name: str, threshold: float | None) -> None:
    for label, values in ((f"not {name}", probability[~truth]), (name, probability[truth])):
        if len(values):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, 25, (0, 1), weights=weights, alpha=0.55, label=plain(label, 24, 2) + f" ({len(values)})")
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:.3g}")
    axes.set(xlabel="probability", ylabel="share of these images", xlim=(0, 1))
    axes.margins(y=0.4)  # room for the legend
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1])
    axes.legend(fontsize=7, loc="upper right")


def _matrix(axes: Any, counts: NDArray[np.int64], names: Sequence[str], cell: float) -> None:
    """Counts in cells of a side in inches; of many classes without the zeros."""
    share, few, size = counts / np.maximum(counts.sum(1, keepdims=True), 1), len(names) <= 5, min(10, 40 * cell)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), number in np.ndenumerate(counts):
        if number or len(names) <= 10:
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, number, ha="center", va="center", color=colour, fontsize=size)
    shown = [plain(name, 14, 3) if few else plain(name, 48) for name in names]
    across = {"rotation": 90, "ha": "center"} if len(names) > 3 else {}
    axes.set_xticks(range(len(names)), shown, fontsize=min(8, size), **across)
    axes.set_yticks(range(len(names)), shown, fontsize=min(8, size))
    axes.set(xlabel="decision", ylabel="truth")
