"""How often the intervals of `compare` hold the truth and how often its tests find what is not there, by simulation.

Two variants are trained with S seeds each and measured on N images. The score of an image is the sum of what the image
gives to both variants, of the luck of the training, of what the training gives to that image, and of noise. Their
standard deviations are 0.1, `luck`, 0.03 and 0.03. Shown are, over many such studies with a seed for each:

- the share of 95 % intervals that hold the true mean of a variant, and the true difference (`holds`);
- the same of the naive hierarchical bootstrap, which draws seeds with replacement (`naive`);
- as there is no true difference, the share of p below 0.05 of the two tests on images;
- of families of three variants against a baseline, the share with any such p, plain and by Holm, by the resamples and
  Holm, and with any verdict, which takes both.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from medvision.metrics import MaskRows, holm, interval, paired_test, resample, two_sided

METRIC, PIXELS = "jaccard_image", 10**6


def study(
    rng: np.random.Generator, variants: int, seeds: int, images: int, luck: float, units: NDArray[np.intp]
) -> list[list[MaskRows]]:
    """Results of variants that are truly alike, of mean 0.5; half of what an image gives is its group's."""
    of_group = rng.normal(0, 0.1, units.max() + 1)[units]
    of_image = of_group if len(np.unique(units)) == images else (of_group + rng.normal(0, 0.1, images)) / 2**0.5
    ids = tuple(map(str, range(images)))
    result = []
    for _ in range(variants):
        of_variant = rng.normal(0, 0.03, units.max() + 1)[units]  # images of a group err alike
        rows = []
        for _ in range(seeds):
            score = 0.5 + of_image + of_variant + rng.normal(0, luck) + rng.normal(0, 0.03, images)
            tp = (score.clip(0, 1) * PIXELS).astype(np.int64)
            rows.append(MaskRows(ids, ("a",), np.stack([tp, PIXELS - tp, 0 * tp, 0 * tp], -1)[:, None]))
        result.append(rows)
    return result


def naive(groups: list[list[MaskRows]], units: NDArray[np.intp], resamples: int) -> NDArray[np.float64]:
    """Seeds and images both drawn with replacement, (R, G)."""
    rng = np.random.default_rng(1)
    columns = []
    for seeds in groups:
        drawn = resample([[rows] for rows in seeds], [METRIC], units, resamples)[METRIC].means
        columns.append(np.take_along_axis(drawn, rng.integers(0, len(seeds), drawn.shape), 1).mean(1))
    return np.stack(columns, 1)


def holds(drawn: NDArray[np.float64], truth: float) -> bool:
    low, high = interval(drawn)
    return bool(low <= truth <= high)


def simulate(
    seeds: int, luck: float, studies: int, images: int = 100, groups: int | None = None, resamples: int = 1000
) -> dict[str, float]:
    """Shares over studies, by name."""
    units = np.arange(images) % (groups or images)
    found: dict[str, list[bool]] = {}
    for number in range(studies):
        made = study(np.random.default_rng([number, seeds]), 4, seeds, images, luck, units)
        drawn, plain = resample(made, [METRIC], units, resamples)[METRIC], naive(made[:2], units, resamples)
        tests = [paired_test(variant, made[0], METRIC, units, resamples) for variant in made[1:]]
        p = [1.0 if test.permutation is None else test.permutation for test in tests]
        differences = [drawn.contrast(weights) for weights in ([-1, 1, 0, 0], [-1, 0, 1, 0], [-1, 0, 0, 1])]
        chance = [two_sided(of) or 1.0 for of in differences]
        facts = {
            "mean holds": holds(drawn.contrast([1, 0, 0, 0]), 0.5),
            "naive": holds(plain[:, 0], 0.5),
            "difference holds": holds(differences[0], 0),
            "naive difference": holds(plain[:, 1] - plain[:, 0], 0),
            "permutation": p[0] < 0.05,
            "wilcoxon": (tests[0].wilcoxon or 0) < 0.05,
            "any of 3 by permutation": min(p) < 0.05,
            "the same by Holm": min(holm(p)) < 0.05,
            "any of 3 by bootstrap and Holm": min(holm(chance)) < 0.05,
            "any verdict of 3": any(max(both) < 0.05 for both in zip(holm(p), holm(chance), strict=True)),
        }
        for name, fact in facts.items():
            found.setdefault(name, []).append(fact)
    return {name: float(np.mean(facts)) for name, facts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    arguments = parser.parse_args()
    settings = [(1, 0.0, None), (1, 0.02, None), (2, 0.02, None), (3, 0.0, None), (3, 0.005, None), (3, 0.02, None)]
    settings += [(5, 0.02, None), (3, 0.005, 20)]
    for seeds, luck, groups in settings:
        shares = simulate(seeds, luck, arguments.studies, groups=groups)
        kept = f" in {groups} groups" if groups else ""
        print(f"{seeds} seeds, luck {luck}, 100 images{kept}:")
        print("    " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
