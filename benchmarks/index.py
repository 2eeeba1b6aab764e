"""Time of indexing 200,000 images with masks over that of listing the 400,000 files, in a folder and in a zip.

Listing is `os.walk` with a `stat` of each file, or reading the central directory. Indexing is all that comes before
the first file is opened: names, pairs, checks, order, and the checksum that finds the cache. The two alternate.
"""

import argparse
import os
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

from medvision.data import Folder
from medvision.data.cache import _key
from medvision.spec import DataSpec

SPEC = DataSpec(
    name="many", kind="binary", classes=["x"], in_channels=3, num_outputs=1, mean=None, std=None, image_size=256
)


def listed(path: Path) -> int:
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            return len(archive.infolist())
    return sum(os.stat(os.path.join(folder, file)).st_size >= 0 for folder, _, files in os.walk(path) for file in files)


def indexed(path: Path) -> int:
    samples = Folder(SPEC, path, path.parent / "cache").samples
    _key(samples, (256, 256), 3)
    return 2 * len(samples)


def seconds(work, path: Path, files: int) -> float:
    started = time.perf_counter()
    assert work(path) == files
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    names = [
        f"{kind}/img_{n:07d}{end}.png"
        for kind, end in (("images", ""), ("masks", "_mask"))
        for n in range(arguments.images)
    ]
    with tempfile.TemporaryDirectory() as folder:
        plain, archive = Path(folder) / "data", Path(folder) / "data.zip"
        for kind in ("images", "masks"):
            (plain / kind).mkdir(parents=True)
        with zipfile.ZipFile(archive, "w") as handle:
            for name in names:
                (plain / name).write_bytes(b"\0" * 64)
                handle.writestr(name, b"\0" * 64)
        for path in (plain, archive):
            rounds = [
                (seconds(indexed, path, len(names)), seconds(listed, path, len(names)))
                for _ in range(arguments.rounds + 1)
            ][1:]
            ratios = [ours / listing for ours, listing in rounds]
            print(
                f"{path.name:9} indexed / listed: median {statistics.median(ratios):.1f}, "
                f"from {min(ratios):.1f} to {max(ratios):.1f}"
            )


if __name__ == "__main__":
    main()
