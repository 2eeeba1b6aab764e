"""A data set verified: what is there, how it is split, what is wrong; as JSON, a table and pictures."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from medvision.data import BrokenFiles, Cache, ImageDataModule, Problem
from medvision.data.alike import alike
from medvision.data.splitting import rarest
from medvision.figures import Tile, bars, gallery
from medvision.files import read_json, writable_folder, write_json, write_text

FORMAT = 3  # raised when the same data gives another report
SHOWN = 24  # pictures in a gallery
Pair = tuple[Cache, int, str, Cache, int, str]


@dataclass(frozen=True)
class Verified:
    """Another data set that was verified in the same cache folder."""

    name: str
    root: str
    cache: Path


def report_folder(data: ImageDataModule) -> Path:
    """Where the report of a data set lies."""
    return data.cache_folder / "report"


def verify(data: ImageDataModule, beside: Sequence[ImageDataModule] = ()) -> dict[str, Any]:
    """Verifies a data set against itself and all that were verified before; writes and returns its report.

    A report of the same files, settings and neighbours that is already there is returned as it is. Beside
    `report.json` it draws `samples.png`, `classes.png` and, where there are any, `duplicates.png`; ids that errors
    are about are in `exclude.txt`.

    Args:
        data: The data set.
        beside: Others, whose files are whole, to compare it with besides those that were verified before.

    Raises:
        MedvisionError: If data is missing.
    """
    folder = writable_folder(report_folder(data), "MEDVISION_CACHE")
    try:
        cache: Cache | None = data.cache
    except BrokenFiles:
        cache = None
    others = [] if cache is None else _others(data, beside)
    facts = {
        "format": FORMAT,
        "name": data.spec.name,
        "root": str(data.root.resolve()),
        "cache": None if cache is None else cache.folder.name,
        "classes": list(data.spec.classes),
        "target": data.spec.target,
        "dealing": {
            "folds": data.folds,
            "fold": data.fold,
            "split_seed": data.split_seed,
            "alike_together": data.alike_together,
        },
        "excluded": sorted(data.exclude),
        "found_by_name": [str(problem) for problem in data.problems],
        "compared_with": [f"{other.name}/{other.cache.name}" for other in others],
    }
    path = folder / "report.json"
    if path.exists() and cache is not None:
        before: dict[str, Any] = read_json(path)
        if {key: before.get(key) for key in facts} == facts:
            return before
    findings = list(data.findings)
    splits = data.indexed if cache is None else data.dealt  # dealing looks at pixels
    report: dict[str, Any] = facts | {"images": {name: len(samples) for name, samples in splits.items()}}
    for name in ("samples.png", "classes.png", "duplicates.png", "exclude.txt"):
        (folder / name).unlink(missing_ok=True)
    if cache is not None:
        pairs = _pairs(data)
        for other in others:
            shared, counts = _shared(data, other)
            pairs += shared
            if shared:
                of_splits = ", ".join(
                    f"{n} of {split} ({same} with the same id)" for split, (n, same) in counts.items()
                )
                text = f"Also in {other.name}: {of_splits}; do not train on one and report on the other"
                items = tuple(dict.fromkeys(data.samples[pair[1]].id for pair in shared))
                findings.append(Problem("warning", f"images shared with {other.name}", items, text))
        report |= _measure(data)
        _draw(data, folder, report, pairs)
    report["problems"] = [
        {"grade": p.grade, "kind": p.kind, "number": len(p.items), "items": list(p.items), "text": p.text}
        for p in findings
    ]
    if wrong := sorted({item for p in findings if p.grade == "error" for item in p.items}):
        write_text(folder / "exclude.txt", "\n".join([*wrong, ""]))
    write_json(path, report)
    return report


def _measure(data: ImageDataModule) -> dict[str, Any]:
    """Numbers of a data set whose files are whole."""
    cache, presence, spec = data.cache, data.presence, data.spec
    sizes = Counter(f"{h}x{w}" for h, w in cache.facts["size"].tolist())
    of_splits: dict[str, Any] = {}
    for name in data.dealt:
        rows = data.rows(name)
        mean, std = cache.statistics(rows)
        of_splits[name] = {
            "mean": mean.tolist(),
            "std": std.tolist(),
            "images_of_class": dict(zip(spec.classes, presence[rows].sum(0).tolist(), strict=True)),
            "images_without_class": int((~presence[rows].any(1)).sum()),
        }
        if spec.target == "mask":
            shares, pixels = data.positive_share(rows), cache.facts[rows]["pixels"].sum(0)
            of_splits[name]["pixels_of_class"] = dict(zip(spec.classes, shares.tolist(), strict=True))
            of_splits[name]["number_of_pixels"] = dict(zip(spec.classes, pixels.tolist(), strict=True))
    train = data.rows("train")
    return {
        "splits": of_splits,
        "groups": len({s.group for s in data.samples if s.group is not None}) or None,
        "positive_weights": [float((1 - p) / p) if p else None for p in data.positive_share(train)],
        "balanced_draw": _draws(data, train),
        "sizes": dict(sizes.most_common(10)),
        "different_sizes": len(sizes),
        "fingerprint": cache.digest,
        "cache_megabytes": round(sum(f.stat().st_size for f in cache.folder.iterdir()) / 1e6, 1),
    }


def _draws(data: ImageDataModule, rows: NDArray[np.int64]) -> dict[str, float]:
    """How many times an epoch draws an image of each stratum on average with data.balanced=true."""
    names = [*data.spec.classes, "none"]
    stratum, counts = np.unique(rarest(data.presence)[rows], return_counts=True)
    return {names[s]: float(len(rows) / (len(stratum) * n)) for s, n in zip(stratum, counts, strict=True)}


def _others(data: ImageDataModule, beside: Sequence[ImageDataModule]) -> list[Verified]:
    """Data sets of other sources: those with a report in the same cache folder, and those given; by name."""
    found: dict[str, Verified] = {}
    for path in sorted(data.cache_root.glob("*/report/report.json")):
        report = read_json(path)
        cache = path.parents[1] / str(report["cache"])
        if (cache / "ids.json").exists():
            found[report["name"]] = Verified(report["name"], report["root"], cache)
    for other in beside:
        found[other.spec.name] = Verified(other.spec.name, str(other.root.resolve()), other.cache.folder)
    return [found[name] for name in sorted(found) if found[name].root != str(data.root.resolve())]


def _pairs(data: ImageDataModule) -> list[Pair]:
    """Look-alikes within the data set, those across splits first."""
    split = data.split_of
    pairs = sorted(data.cache.pairs.tolist(), key=lambda p: (split[p[0]] == split[p[1]], p[2]))
    names = [f"{name} {s.id}" for name, s in zip(split, data.samples, strict=True)]
    return [(data.cache, a, names[a], data.cache, b, names[b]) for a, b, _ in pairs]


def _shared(data: ImageDataModule, other: Verified) -> tuple[list[Pair], dict[str, tuple[int, int]]]:
    """Pairs with another data set; and of each split how many images are in them, and how many with the same id."""
    theirs, ids = Cache.open(other.cache), read_json(other.cache / "ids.json")
    found = alike((data.cache.facts["hash"], data.cache.images), (theirs.facts["hash"], theirs.images)).tolist()
    pairs = [(data.cache, a, data.samples[a].id, theirs, b, f"{other.name} {ids[b]}") for a, b, _ in found]
    shared = {data.samples[a].id for a, _, _ in found}
    same = {data.samples[a].id for a, b, _ in found if data.samples[a].id == ids[b]}
    of_splits = {name: {s.id for s in samples} for name, samples in data.dealt.items()}
    return pairs, {name: (len(of & shared), len(of & same)) for name, of in of_splits.items()}


def _draw(data: ImageDataModule, folder: Path, report: dict[str, Any], pairs: Sequence[Pair]) -> None:
    """Draws samples with their masks, the class distribution, and look-alikes."""
    spec, cache = data.spec, data.cache
    rows = np.unique(np.linspace(0, len(data.samples) - 1, min(SHOWN, len(data.samples))).round().astype(int))
    tiles = []
    for row in rows.tolist():
        shown = [name for k, name in enumerate(spec.classes) if data.presence[row, k]]
        label = "" if spec.target == "mask" else f" {', '.join(shown) or 'none'}"
        tiles.append(_tile(cache, row, f"{data.split_of[row]} {data.samples[row].id}{label}"))
    title = f"{spec.name}: {len(rows)} of {len(data.samples)} images, evenly spaced by id"
    gallery(folder / "samples.png", tiles, spec.classes if spec.target == "mask" else [], title)
    bars(folder / "classes.png", _distribution(report))
    if pairs:
        chosen = [pairs[n] for n in np.unique(np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).astype(int))]
        tiles = [
            _tile(c, r, name) for a, i, first, b, j, second in chosen for c, r, name in ((a, i, first), (b, j, second))
        ]
        title = f"{spec.name}: {len(chosen)} of {len(pairs)} pairs that look alike, side by side"
        gallery(folder / "duplicates.png", tiles, [], title)


def _distribution(report: dict[str, Any]) -> dict[str, dict[str, dict[str, tuple[float, str]]]]:
    """For each split the percentage of images that show each class, or none, and of masks the percentage of pixels."""
    images, pixels = "% of the images (number)", "% of the pixels of an image, mean over images (number of pixels)"
    panels: dict[str, dict[str, dict[str, tuple[float, str]]]] = {images: {}}
    for name, of_split in report["splits"].items():
        counts = of_split["images_of_class"]
        if without := of_split["images_without_class"]:
            counts = counts | {"none": without}
        shares = {label: 100 * n / report["images"][name] for label, n in counts.items()}
        panels[images][name] = {label: (share, f"{share:.3g} ({counts[label]})") for label, share in shares.items()}
        if report["target"] == "mask":
            shares = {label: 100 * share for label, share in of_split["pixels_of_class"].items()}
            panels.setdefault(pixels, {})[name] = {
                label: (share, f"{share:.3g} ({of_split['number_of_pixels'][label]:,})")
                for label, share in shares.items()
            }
    return panels


def _tile(cache: Cache, row: int, caption: str) -> Tile:
    return Tile(caption, cache.images[row], cache.masks[row].transpose(2, 0, 1) > 0)


def show(report: dict[str, Any], folder: Path) -> None:
    """Prints a report; plain text where the output is no terminal."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 120, soft_wrap=True, highlight=False)
    table = Table(box=box.ROUNDED if terminal else box.ASCII2)
    splits = report.get("splits", {})
    for column in ("split", "images", *(report["classes"] if splits else [])):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, number in report["images"].items():
        of_split = splits.get(name)
        cells = []
        if of_split:
            for label, images in of_split["images_of_class"].items():
                share = f" ({of_split['pixels_of_class'][label]:.2%})" if "pixels_of_class" in of_split else ""
                cells.append(f"{images}{share}")
        table.add_row(name, str(number), *cells)
    what = "images that show each class (share of pixels)" if report["target"] == "mask" else "images of each class"
    print(f"{report['name']} in {report['root']}: {what}")
    console.print(table)
    if splits:
        weights = ", ".join("-" if w is None else f"{w:.3g}" for w in report["positive_weights"])
        draws = ", ".join(f"{name} {times:.2f}" for name, times in report["balanced_draw"].items())
        sizes = ", ".join(f"{number} of {size}" for size, number in [*report["sizes"].items()][:3])
        mean, std = (", ".join(f"{v:.3f}" for v in splits["train"][key]) for key in ("mean", "std"))
        groups = f"groups: {report['groups']}\n" if report["groups"] else ""
        print(
            f"{groups}mean and standard deviation of train: {mean}; {std}\n"
            f"sizes (height x width): {report['different_sizes']} different; {sizes}\n"
            f"positive weights (negatives per positive in train): {weights}\n"
            f"draws of an image with data.balanced=true: {draws}\n"
            f"cache: {report['cache_megabytes']} MB"
        )
    for grade in ("error", "warning", "note"):
        for p in (p for p in report["problems"] if p["grade"] == grade):
            print(f"{grade}: {Problem(p['grade'], p['kind'], tuple(p['items']), p['text'])}")
    print(f"report: {folder}")
