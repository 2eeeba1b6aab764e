"""Images that weights have seen before: those of validation and test that an earlier run was trained on."""

from collections.abc import Sequence
from pathlib import Path

from medvision.data import ImageDataModule, Problem
from medvision.data.alike import CLOSE
from medvision.files import read_json, write_text
from medvision.runs import RunFolder


def run_of(weights: str | Path | None) -> RunFolder | None:
    """The run that weights are of, given by its folder or by a checkpoint in it; None if they are of none."""
    if weights is None:
        return None
    path = Path(weights).expanduser().resolve()
    place = RunFolder(path.parents[1] if path.is_file() else path)
    return place if place.splits.exists() else None


def seen_before(data: ImageDataModule, origins: Sequence[RunFolder], folder: Path) -> list[Problem]:
    """A warning for each run that was trained on images of this one's validation or test, or chose its epoch by them.

    Images are the same if their perceptual hashes are equal, or close under the same name: images of the ISIC archive
    keep their name and not their bytes from one challenge to the next, while `1.png` is another image elsewhere. Copies
    that were renamed and changed are not found here, `medvision.prepare` looks for them.

    Args:
        data: The data set, with its cache.
        origins: Runs whose weights this one begins with, or that those began with.
        folder: Where a list of the images is written, by their names in the earlier run: `seen_by_<run>.txt`.
    """
    problems = []
    for origin in origins:
        then = read_json(origin.splits)
        hash_of: dict[str, str] = {}
        for split in ("train", "val"):
            hash_of |= zip(then[split], then.get("hashes", {}).get(split, ()), strict=False)  # an older run has none
        name_of = {value: name for name, value in hash_of.items()}
        found: dict[str, str] = {}
        counts = []
        for split in [name for name in ("val", "test") if name in data.splits]:
            before = len(found)
            for sample, value in zip(data.splits[split], data.hashes(split), strict=True):
                if _close(value, hash_of.get(sample.id)):
                    found[sample.id] = sample.id
                elif value in name_of:
                    found[sample.id] = name_of[value]
            if len(found) > before:
                counts.append(f"{len(found) - before} of {len(data.splits[split])} images of {split}")
        if found:
            listed = folder / f"seen_by_{origin.path.name}.txt"
            write_text(listed, "".join(f"{name}\n" for name in sorted({*found.values()})))
            text = (
                f"{origin.path}, from which these weights come, was trained on {' and '.join(counts)}: results on them "
                f"flatter; leave them out of that training with data.exclude={listed}"
            )
            problems.append(Problem("warning", "images seen before", tuple(sorted(found)), text))
    return problems


def _close(first: str, second: str | None) -> bool:
    """Whether two perceptual hashes, as hexadecimal digits, are of versions of one picture."""
    return second is not None and (int(first, 16) ^ int(second, 16)).bit_count() <= CLOSE
