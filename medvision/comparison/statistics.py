"""Variants compared: what a reader needs to believe a difference, as plain objects for tables and pages."""

import itertools
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision.comparison.found import Comparison, Difference, Effect, Estimate, Floats, Variant
from medvision.comparison.variants import Measured, differing, factors_of, grouped, repetitions, settings, together
from medvision.errors import MedvisionError
from medvision.metrics import (
    OF_RANKS,
    MaskRows,
    Resampled,
    Rows,
    holm,
    interval,
    limits,
    lower_is_better,
    paired_test,
    rank_probabilities,
    resample,
    two_sided,
)

log = logging.getLogger(__name__)

FEW_SEEDS, FEW_UNITS = 3, 10
ALPHA = 0.05


def compare(
    runs: Sequence[Measured],
    split: str,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    common: bool = False,
    resamples: int = 10000,
    unfinished: Sequence[Path] = (),
) -> Comparison:
    """Compares runs on the images that all have measured.

    Args:
        runs: The runs, of one data set.
        split: The split that they were measured on.
        metrics: Names; none: the one that chose the epochs.
        baseline: A variant's name, or the name of a run folder in it; None: the first.
        common: Whether to leave out images that not all variants have measured, instead of refusing.
        resamples: Of bootstrap and tests.
        unfinished: Folders of runs that cannot be compared yet, of which a reader is told.

    Raises:
        MedvisionError: If the runs cannot be compared.
    """
    _require_one_data_set(runs)
    metrics = [*dict.fromkeys(metrics)] or [runs[0].config["task"]["monitor"].partition("/")[2]]
    _require_metrics(runs, metrics)
    members = grouped([run.config for run in runs])
    names, levels = factors_of(runs, members) if len(members) > 1 else (["all runs"], [{}])
    reference = _baseline(baseline, names, [[runs[n].folder.name for n in of] for of in members])
    repeated = [repetitions([runs[n] for n in of], name) for of, name in zip(members, names, strict=True)]
    seeds = [{seed: together(of_seed) for seed, of_seed in of.items()} for of in repeated]
    ids = _common_ids(seeds, names, common)
    aligned = [[rows.of(ids) for rows in of.values()] for of in seeds]
    _require_same_truth(aligned, names)
    units = _units(runs, ids)
    every, left_out = aligned, []
    for metric in metrics:
        aligned, warnings = _where_all_have_values(aligned, names, metric)
        left_out += warnings
    drawn = resample(aligned, metrics, units, resamples)
    values = {
        metric: [[float(rows.weighed(metric, np.ones((1, len(ids))))[0]) for rows in of] for of in aligned]
        for metric in metrics
    }
    configs = differing([settings(runs[of[0]].config) for of in members])
    variants, one = [], np.eye(len(members))
    for g, (of, name) in enumerate(zip(members, names, strict=True)):
        possible = {m: drawn[m].contrast(one[g]).clip(*limits(m)) for m in metrics}  # luck of few seeds reaches beyond
        estimates = {m: _estimate([*seeds[g]], values[m][g], possible[m]) for m in metrics}
        config = {key: column[g] for key, column in configs.items()}
        variants.append(Variant(name, levels[g], config, [_described(runs[n], metrics) for n in of], estimates))
    ranks = {}
    for metric in metrics:
        shares = rank_probabilities(drawn[metric].each(), lower_is_better(metric)).tolist()
        ranks[metric] = {name: [] if math.isnan(row[0]) else row for name, row in zip(names, shares, strict=True)}
    each_is = {metric: _of_images(aligned[0][0], metric) for metric in metrics}
    means = {metric: np.array([np.mean(of) for of in values[metric]]) for metric in metrics}
    return Comparison(
        data=runs[0].config["data"]["spec"]["name"],
        split=split,
        images=len(ids),
        groups=int(units.max()) + 1 if any(run.groups for run in runs) else None,
        resamples=resamples,
        baseline=names[reference],
        metrics=metrics,
        variants=variants,
        differences=_differences(aligned, variants, reference, metrics, drawn, units, resamples),
        ranks=ranks,
        effects=[e for m in metrics for e in _effects(m, levels, reference, means[m], drawn[m])],
        warnings=_warnings(runs, unfinished, split, seeds, names, units, len(metrics) * (len(names) - 1), resamples)
        + left_out
        + _ranked_across_folds(repeated, names, metrics),
        ids=ids,
        each={m: dict(zip(names, [_each(of, each_is[m]) for of in every], strict=True)) for m in metrics},
        each_is=each_is,
    )


def _baseline(word: str | None, names: Sequence[str], folders: Sequence[Sequence[str]]) -> int:
    """The place of the variant of a name, or of the one with a run folder of that name."""
    if word is None:
        return 0
    found = [n for n, name in enumerate(names) if word == name or word in folders[n]]
    if len(found) != 1:
        number = f"is in {len(found)} variants" if found else "is not there"
        known = "', '".join(names)
        raise MedvisionError(f"baseline={word} {number}; expected the name of a variant ('{known}') or of a run folder")
    return found[0]


def _require_one_data_set(runs: Sequence[Measured]) -> None:
    facts = [(run.config["data"]["spec"]["name"], type(run.rows), run.rows.classes) for run in runs]
    for run, fact in zip(runs, facts, strict=True):
        if fact != facts[0]:
            raise MedvisionError(
                f"{runs[0].folder} is of {facts[0][0]} ({', '.join(facts[0][2])}), {run.folder} of {fact[0]} "
                f"({', '.join(fact[2])}); runs are compared on one data set: leave one out"
            )


def _require_metrics(runs: Sequence[Measured], metrics: Sequence[str]) -> None:
    """Refuses metrics that not all runs have, and results that are not those that the run stored."""
    for run in runs:
        summary = run.rows.summary()
        if missing := [name for name in metrics if name not in summary]:
            raise MedvisionError(f"metric={missing[0]}: {run.folder} has {', '.join(summary)}")
        for name in metrics:
            stored = run.stored.get(name)
            if stored is None or not math.isclose(summary[name], stored, rel_tol=0, abs_tol=1e-6):
                raise MedvisionError(
                    f"{run.folder}: {name} is {stored} in metrics.json, but {summary[name]} by the per-image results; "
                    "one of the files was changed: train the run again, or leave it out"
                )


def _common_ids(seeds: Sequence[Mapping[str, Rows]], names: Sequence[str], common: bool) -> tuple[str, ...]:
    """The images that every seed of every variant has measured, sorted."""
    images = {
        f"{name}, {seed}": set(rows.ids) for name, of in zip(names, seeds, strict=True) for seed, rows in of.items()
    }
    every, shared = set().union(*images.values()), set.intersection(*images.values())
    if not shared:
        raise MedvisionError("there is no image that all runs have measured; compare runs of the same split")
    if every != shared:
        least = min(images, key=lambda key: len(images[key]))
        found = f"of {len(every)} images {len(shared)} were measured by all runs ({least} has {len(images[least])})"
        if not common:
            raise MedvisionError(
                f"{found}; differences would be those of the images. common=true compares on these {len(shared)}; "
                "or train what is missing, as a fold, or leave runs out"
            )
        log.warning("%s: the others are left out", found)
    return tuple(sorted(shared))


def _require_same_truth(aligned: Sequence[Sequence[Rows]], names: Sequence[str]) -> None:
    first = aligned[0][0]
    for name, of in zip(names, aligned, strict=True):
        for rows in of:
            if changed := (rows.truth != first.truth).reshape(len(rows.ids), -1).any(1).nonzero()[0].tolist():
                raise MedvisionError(
                    f"the truth of {len(changed)} images, as {rows.ids[changed[0]]}, was another for {names[0]} "
                    f"than for {name}; measure both on the same masks or labels"
                )


def _where_all_have_values(
    aligned: list[list[Rows]], names: Sequence[str], metric: str
) -> tuple[list[list[Rows]], list[str]]:
    """Without the values of images that an error has left without one in some run, and a warning of it.

    Else the means would be of different images: a variant that finds nothing in a hard image has no distance there.
    """
    lacking = [[rows.lacking(metric) for rows in of] for of in aligned]
    somewhere, everywhere = (
        kind.reduce([each for of in lacking for each in of]) for kind in (np.logical_or, np.logical_and)
    )
    lost = [int((np.logical_or.reduce(of) & ~everywhere).any(1).sum()) for of in lacking]
    if not any(lost):
        return aligned, []
    aligned = [[rows.without(metric, somewhere) for rows in of] for of in aligned]
    if not all(rows.has_value(metric).any() for of in aligned for rows in of):
        raise MedvisionError(f"metric={metric}: no image has a value in all runs; leave out the metric or a run")
    shown = "; ".join(f"{name} has none in {number}" for name, number in zip(names, lost, strict=True) if number)
    return aligned, [
        f"{metric} is compared where all runs have a value of an image: where one of truth and prediction is empty "
        f"there is none ({shown} of {len(somewhere)}), so means may differ from those in metrics.json"
    ]


def _ranked_across_folds(
    repeated: Sequence[Mapping[str, Sequence[Measured]]], names: Sequence[str], metrics: Sequence[str]
) -> list[str]:
    """A warning of each metric that ranks images of several folds, which networks of different scale answered."""
    if all(len(folds) == 1 for of in repeated for folds in of.values()):
        return []
    result = []
    for metric in (metric for metric in metrics if metric.partition("/")[0] in OF_RANKS):
        means = [np.mean([run.stored[metric] for folds in of.values() for run in folds]) for of in repeated]
        shown = "; ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means, strict=True))
        result.append(
            f"{metric} ranks images of all folds together, each by the network of its fold: where their probabilities "
            f"differ in scale, it is less than within folds (whose means are: {shown})"
        )
    return result


def _units(runs: Sequence[Measured], ids: Sequence[str]) -> NDArray[np.intp]:
    """For each image the number of the group that it is in, or of its own."""
    groups = {image: ("group", group) for run in runs for image, group in run.groups.items()}
    return np.unique([repr(groups.get(image, ("image", image))) for image in ids], return_inverse=True)[1]


def _estimate(names: Sequence[str], values: Sequence[float], drawn: Floats) -> Estimate:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), std, *_interval(drawn), dict(zip(names, values, strict=True)))


def _interval(drawn: Floats) -> tuple[float | None, float | None]:
    low, high = (None if math.isnan(bound) else float(bound) for bound in interval(drawn))
    return low, high


def _span(metric: str) -> float:
    """The largest difference that a metric can have."""
    least, most = limits(metric)
    return most - least


def _described(run: Measured, metrics: Sequence[str]) -> dict[str, Any]:
    """What a report says of a run."""
    return {
        "folder": str(run.folder),
        "command": shlex.join(["python", "-m", "medvision.train", *run.typed]),
        **run.repetition,
        "epoch": run.epoch,
        "code": run.code,
        "evaluations": [*run.again],
        "metrics": {name: run.stored[name] for name in metrics},
    }


def _differences(
    aligned: Sequence[Sequence[Rows]],
    variants: Sequence[Variant],
    reference: int,
    metrics: Sequence[str],
    drawn: Mapping[str, Resampled],
    units: NDArray[np.intp],
    resamples: int,
) -> list[Difference]:
    """Every variant less the baseline, the p values adjusted over all of them and all metrics."""
    base = variants[reference]
    pairs = [(metric, g) for metric in metrics for g in range(len(variants)) if g != reference]
    tests = [paired_test(aligned[g], aligned[reference], metric, units, resamples) for metric, g in pairs]
    one = np.eye(len(variants))
    gains = [drawn[metric].contrast(one[g] - one[reference]) for metric, g in pairs]
    bootstrap = [two_sided(of) for of in gains]
    adjusted = [_holm(bootstrap), _holm([test.permutation for test in tests]), _holm([test.wilcoxon for test in tests])]
    result = []
    for n, ((metric, g), test) in enumerate(zip(pairs, tests, strict=True)):
        value = variants[g].estimates[metric].value - base.estimates[metric].value
        low, high = _interval(gains[n].clip(-_span(metric), _span(metric)))
        clear = all(p is not None and p < ALPHA for p in (adjusted[0][n], adjusted[1][n]))
        better = (value < 0) == lower_is_better(metric)
        result.append(
            Difference(
                metric=metric,
                variant=variants[g].name,
                baseline=base.name,
                changed=[f for f, level in variants[g].levels.items() if level != base.levels[f]],
                value=value,
                low=low,
                high=high,
                bootstrap=bootstrap[n],
                bootstrap_holm=adjusted[0][n],
                images=test.images,
                permutation=test.permutation,
                permutation_holm=adjusted[1][n],
                wilcoxon=test.wilcoxon,
                wilcoxon_holm=adjusted[2][n],
                rank_biserial=test.rank_biserial,
                verdict=("better" if better else "worse") if clear else "not shown",
            )
        )
    return result


def _holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of those that have a value."""
    adjusted = iter(holm([value for value in p if value is not None]))
    return [None if value is None else next(adjusted) for value in p]


def _effects(
    metric: str, levels: Sequence[Mapping[str, str]], reference: int, means: Floats, drawn: Resampled
) -> list[Effect]:
    """Main effects and interactions of pairs, where the variants are all combinations of two factors or more."""
    choices = {factor: [*dict.fromkeys(of[factor] for of in levels)] for factor in levels[0]}
    if len(choices) < 2 or math.prod(map(len, choices.values())) != len(levels):
        return []
    base, result = levels[reference], []
    for number in (1, 2):
        for factors in itertools.combinations(choices, number):
            for to in itertools.product(*([c for c in choices[f] if c != base[f]] for f in factors)):
                weights = np.zeros(len(levels))
                for changed in itertools.product((True, False), repeat=number):
                    at = {f: t if c else base[f] for f, t, c in zip(factors, to, changed, strict=True)}
                    there = np.array([all(of[f] == level for f, level in at.items()) for of in levels])
                    weights += (-1) ** changed.count(False) * there / there.sum()
                bounds = _interval(drawn.contrast(weights).clip(-number * _span(metric), number * _span(metric)))
                result.append(Effect(metric, factors, to, [base[f] for f in factors], float(means @ weights), *bounds))
    return result


def _of_images(rows: Rows, metric: str) -> str:
    """The metric, or if only many images have it, of masks its mean over images, of labels the Brier score."""
    name, slash, of = metric.partition("/")
    if rows.each(metric) is not None:
        return metric
    return f"{name}_image{slash}{of}" if isinstance(rows, MaskRows) else "brier"


def _each(seeds: Sequence[Rows], metric: str) -> Floats:
    """The mean over seeds of the value of each image, NaN where one has none."""
    return np.asarray(np.mean([value for rows in seeds if (value := rows.each(metric)) is not None], 0))


def _warnings(
    runs: Sequence[Measured],
    unfinished: Sequence[Path],
    split: str,
    seeds: Sequence[Mapping[str, Rows]],
    names: Sequence[str],
    units: NDArray[np.intp],
    tests: int,
    resamples: int,
) -> list[str]:
    """What a reader has to know to judge the numbers."""
    result = []
    if unfinished:
        result.append(f"not finished and left out: {', '.join(folder.name for folder in unfinished)}")
    few = {name: len(of) for name, of in zip(names, seeds, strict=True) if len(of) < FEW_SEEDS}
    if few:
        every = f"each variant has {min(few.values())}"
        same = len(few) == len(names) and len({*few.values()}) == 1
        shown = every if same else "; ".join(f"{name} has {number}" for name, number in few.items())
        result.append(
            f"fewer than {FEW_SEEDS} seeds ({shown}). With one, intervals and tests tell these trained networks apart "
            "and say nothing of training again; with two, intervals are very wide"
        )
    if len({tuple(of) for of in seeds}) > 1:
        result.append("the variants were not repeated with the same seeds")
    if split == "val":
        result.append("the numbers are of the validation split, which also chose epochs and thresholds: they flatter")
    number = int(units.max()) + 1
    kind = "groups of images" if number < len(units) else "images"
    if number < FEW_UNITS:
        result.append(f"too few {kind} for intervals and tests to be trusted: {number}")
    if (least := max(2.0 ** (1 - number), 2 / (1 + resamples))) * tests >= ALPHA:  # of permutations, of the bootstrap
        result.append(
            f"no difference can be shown, whatever it is: with {number} {kind} and {resamples} resamples p is at least "
            f"{least:.2g}, and by Holm over {tests} not below {ALPHA}; measure more, as all folds, or compare less"
        )
    if split == "test" and (again := {run.folder.name: run.again for run in runs if run.again}):
        shown = "; ".join(f"{name}: {', '.join(of)}" for name, of in again.items())
        result.append(
            f"the test split was looked at again after training ({shown}): what was chosen by it flatters. Known is "
            "what lies in evaluations/, where the same evaluation counts once"
        )
    if len(codes := {*(run.code for run in runs)}) > 1:
        result.append(f"the runs were made by different code: {', '.join(sorted(code or 'unknown' for code in codes))}")
    fingerprints: dict[str, set[str]] = {}
    for run in runs:
        asked = [(key, value) for key, value in settings(run.config).items() if key.startswith("data")]
        fingerprints.setdefault(repr(sorted(asked)), set()).add(run.fingerprint)
    if any(len(found - {""}) > 1 for found in fingerprints.values()):
        result.append(
            "images, masks or labels have changed between the runs: their configs name the same data, but the "
            "fingerprints in metrics.json differ"
        )
    return result
