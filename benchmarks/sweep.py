"""Time of a sweep in turn over that of the same runs one after the other, bare, each in its folder.

Bare runs and sweep have the same configs and are measured one after the other, in seconds and in processor seconds of
all processes, which do not see what else the machine does. The overhead is that of expanding, preparing, waiting and
showing the table; the imports of a run are in both.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = ["data.image_size=64", "data.batch_size=8", "model=unet", "model.encoder=resnet18", "callbacks.pictures=null"]


def seconds(*words: str) -> tuple[float, float]:
    """Wall and processor time of a command with all its processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "medvision.train", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    sizes = f"data.images={{train:{arguments.images},val:20,test:20}}"
    config = [*CONFIG, sizes, f"trainer.max_epochs={arguments.epochs}"]
    seeds = [str(seed) for seed in range(1, arguments.jobs + 1)]
    with tempfile.TemporaryDirectory() as folder:
        seconds(*config, "trainer.max_epochs=1", f"hydra.run.dir={folder}/first")  # fills the cache
        bare = [seconds(*config, f"seed={seed}", f"hydra.run.dir={folder}/{seed}") for seed in seeds]
        sweep = seconds("-m", *config, f"seed={','.join(seeds)}", f"hydra.sweep.dir={Path(folder) / 'sweep'}")
    for name, runs, whole in zip(("seconds", "processor seconds"), zip(*bare, strict=True), sweep, strict=True):
        over = (whole - sum(runs)) / len(runs)
        print(
            f"{name:18} a bare run {sum(runs) / len(runs):6.1f}   sweep of {len(runs)} {whole:6.1f}   "
            f"ratio {whole / sum(runs):.3f}   overhead of a job {over:+.2f} (bound of a run of a minute: 13)"
        )


if __name__ == "__main__":
    main()
