"""Time of decoding JPEGs of 3000x2000 with OpenCV in every epoch over that of reading the cache.

Both augment and normalise alike, `augment=light` at 256x256. The plain loop has no checks: `cv2.imread`, `cv2.resize`.
Epochs of the two alternate in one process, one thread each, so that a drift of the machine meets both.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from medvision.data import Augment, Folder
from medvision.data.sampling import Draw
from medvision.spec import DataSpec

SIZE = (2000, 3000)  # height, width
NETWORK = (256, 256)


def write(root: Path, images: int) -> None:
    """Draws textured images with an ellipse each, `images/` and `masks/`."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        texture = sum(
            scale * cv2.resize(rng.standard_normal((SIZE[0] // step, SIZE[1] // step, 3), np.float32), SIZE[::-1])
            for step, scale in ((1, 6), (4, 10), (20, 12), (100, 15))
        )
        mask = np.zeros(SIZE, np.uint8)
        axes = tuple(rng.integers(300, 900, 2).tolist())
        cv2.ellipse(mask, (SIZE[1] // 2, SIZE[0] // 2), axes, float(rng.integers(180)), 0, 360, 255, -1)
        skin = np.where(mask[..., None] > 0, (60, 70, 110), (140, 160, 200))
        image = (skin + texture).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(root / f"images/{number:04d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        cv2.imwrite(str(root / f"masks/{number:04d}.png"), mask)


def plain_epoch(root: Path, dataset, with_masks: bool) -> float:
    started = time.perf_counter()
    for seed, name in enumerate(dataset.ids):
        image = cv2.cvtColor(cv2.imread(str(root / f"images/{name}.jpg")), cv2.COLOR_BGR2RGB)
        image = cv2.resize(image, NETWORK[::-1], interpolation=cv2.INTER_AREA)
        mask = np.zeros(NETWORK, np.uint8)
        if with_masks:
            mask = cv2.imread(str(root / f"masks/{name}.png"), cv2.IMREAD_GRAYSCALE)
            mask = (cv2.resize(mask, NETWORK[::-1], interpolation=cv2.INTER_AREA) > 127).astype(np.uint8)
        image, mask = dataset.augment(image, mask[..., None], seed)
        torch.from_numpy(dataset.normalise(image))
        torch.from_numpy(np.ascontiguousarray(mask.transpose(2, 0, 1), np.float32))
    return (time.perf_counter() - started) / len(dataset)


def cached_epoch(dataset, repeats: int = 10) -> float:
    started = time.perf_counter()
    for repeat in range(repeats):
        for position in range(len(dataset)):
            dataset[Draw(position, repeat * len(dataset) + position)]
    return (time.perf_counter() - started) / (repeats * len(dataset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    light = Path(__file__).parents[1] / "conf/augment/light.yaml"
    augment: Augment = instantiate(OmegaConf.load(light))
    spec = DataSpec(
        name="large",
        kind="binary",
        classes=["lesion"],
        in_channels=3,
        num_outputs=1,
        mean=None,
        std=None,
        image_size=256,
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write(root, arguments.images)
        data = Folder(spec, root, Path(folder) / "cache", augment=augment, num_workers=0, folds=3)
        dataset = data.dataset("train", train=True)
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        for with_masks in (False, True):
            cached_epoch(dataset)
            rounds = [(plain_epoch(root, dataset, with_masks), cached_epoch(dataset)) for _ in range(arguments.rounds)]
            ratios = [plain / ours for plain, ours in rounds]
            decoded, cached = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
            what = "images and masks" if with_masks else "images only"
            print(
                f"{what:16} decoded {decoded:6.1f} ms, cached {cached:5.2f} ms an image: "
                f"median {statistics.median(ratios):.0f} times, from {min(ratios):.0f} to {max(ratios):.0f}"
            )


if __name__ == "__main__":
    main()
