"""What tests share: tiny archives in the official layouts, the real ones where they are at hand, and processes."""

import ctypes
import io
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from PIL import Image

from medvision.spec import DataSpec

torch.set_num_threads(1)
cv2.setNumThreads(1)
settings.register_profile(
    "tests",
    deadline=None,
    max_examples=40,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("isic2017")`: the folder of the real archives, or the test is skipped."""

    def find(name: str) -> Path:
        root = os.environ.get("MEDVISION_REAL_DATA")
        if not root:
            pytest.skip("MEDVISION_REAL_DATA is not set: no real archives")
        folder = Path(root) / name
        if not folder.is_dir():
            pytest.skip(f"no {name} in MEDVISION_REAL_DATA={root}")
        return folder

    return find


@pytest.fixture(scope="session")
def spec() -> Callable[..., DataSpec]:
    """`spec("binary")` or `spec("multilabel", name=..., ...)`: the facts of an RGB data set at 16x16."""

    def make(kind: str = "binary", **changes: Any) -> DataSpec:
        classes = changes.setdefault("classes", {"binary": ["lesion"], "multilabel": ["round", "square"]}[kind])
        channels = changes.setdefault("in_channels", 3)
        facts = {
            "name": "tiny",
            "num_outputs": len(classes),
            "mean": [0.7, 0.6, 0.5][:channels],
            "std": [0.15, 0.2, 0.25][:channels],
            "image_size": 16,
        }
        return DataSpec(kind=kind, **(facts | changes))  # type: ignore[arg-type]

    return make


def _encode(pixels: NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(pixels, "PNG")`: the bytes of an image file."""
    return _encode


def _pack(path: Path, files: Mapping[str, bytes], as_folder: bool = False) -> Path:
    if as_folder:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path
    path = path.with_name(f"{path.name}.zip")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


@pytest.fixture(scope="session")
def pack() -> Callable[..., Path]:
    """`pack(folder / stem, files, as_folder)`: writes files by name to `stem.zip` or the folder `stem`."""
    return _pack


def _sizes(size: tuple[int, int], number: int) -> tuple[int, int]:
    return size[0] + 4 * (number % 3), size[1] + 6 * (number % 2)


def _lesion(rng: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    height, width = size
    y, x = np.indices(size)
    centre = rng.uniform(0.35, 0.65, 2) * size
    radius = rng.uniform(0.18, 0.3, 2) * size
    mask = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 <= 1
    skin, pigment = rng.normal((200, 160, 140), 8), rng.normal((110, 70, 60), 8)
    image = np.where(mask[..., None], pigment, skin) + rng.normal(0, 5, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8) * 255


def _fake_isic2017(
    root: Path,
    counts: Mapping[str, int] | None = None,
    as_folder: bool = False,
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
) -> Path:
    names = {"train": ("Training", 0), "val": ("Validation", 1000), "test": ("Test_v2", 2000)}
    for split, count in (counts or {"train": 6, "val": 3, "test": 3}).items():
        part, first = names[split]
        data, truth = f"ISIC-2017_{part}_Data", f"ISIC-2017_{part}_Part1_GroundTruth"
        images: dict[str, bytes] = {f"{data}/{data}_metadata.csv": b"image_id,age_approximate,sex\n"}
        masks: dict[str, bytes] = {}
        for number in range(first, first + count):
            image, mask = _lesion(np.random.default_rng([seed, number]), _sizes(size, number))
            images[f"{data}/ISIC_{number:07d}.jpg"] = _encode(image, "JPEG", quality=95)
            images[f"{data}/ISIC_{number:07d}_superpixels.png"] = _encode(image // 16)
            masks[f"{truth}/ISIC_{number:07d}_segmentation.png"] = _encode(mask)
        for stem, files in ((data, images), (truth, masks)):
            inside = {name.removeprefix(f"{stem}/"): content for name, content in files.items()}
            _pack(root / stem, inside if as_folder else files, as_folder)
    return root


@pytest.fixture(scope="session")
def fake_isic2017() -> Callable[..., Path]:
    """`fake_isic2017(root, counts, as_folder, size)`: dark ellipses on skin in the official archives; gives `root`.

    Sizes differ from image to image by a few pixels; `seed` gives other images.
    """
    return _fake_isic2017


def _fake_dsb2018(
    root: Path, images: int = 12, as_folder: bool = False, size: tuple[int, int] = (24, 32), seed: int = 0
) -> Path:
    files: dict[str, bytes] = {}
    for number in range(images):
        rng = np.random.default_rng([seed, number])
        height, width = _sizes(size, number)
        name, (y, x) = f"{rng.bytes(16).hex()}", np.indices((height, width))
        image = np.full((height, width, 4), 255, np.uint8)
        image[..., :3] = rng.integers(5, 40, (height, width, 1))
        for nucleus in range(3):
            centre = rng.uniform(0.15, 0.85, 2) * (height, width)
            mask = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= rng.uniform(2, 4) ** 2
            image[mask, :3] = rng.integers(150, 220)
            files[f"{name}/masks/{number:04x}{nucleus}.png"] = _encode(mask.astype(np.uint8) * 255)
        files[f"{name}/images/{name}.png"] = _encode(image)
    _pack(root / "stage1_train", files, as_folder)
    return root


@pytest.fixture(scope="session")
def fake_dsb2018() -> Callable[..., Path]:
    """`fake_dsb2018(root, images, as_folder, size)`: bright discs, one mask file each; gives `root`."""
    return _fake_dsb2018


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """`with unprivileged():` makes the permissions of files count for root too, by giving up what is above them."""

    @contextmanager
    def drop() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this thread
        before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
        assert libc.capget(header, before) == 0
        after = (ctypes.c_uint32 * 6)(*before)
        after[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        assert libc.capset(header, after) == 0
        try:
            yield
        finally:
            assert libc.capset(header, before) == 0

    return drop


@pytest.fixture
def in_processes() -> Callable[..., list[Any]]:
    """`in_processes(3, work)`: the results of `work(0)` to `work(2)`, called at once in forked processes."""

    def run(count: int, work: Callable[[int], Any]) -> list[Any]:
        context = multiprocessing.get_context("fork")
        start, results = context.Barrier(count), context.SimpleQueue()

        def child(number: int) -> None:
            start.wait(30)
            try:
                results.put((number, work(number), None))
            except BaseException as error:
                results.put((number, None, repr(error)))

        children = [context.Process(target=child, args=(number,)) for number in range(count)]
        for process in children:
            process.start()
        found = sorted((results.get() for _ in children), key=lambda item: int(item[0]))
        for process in children:
            process.join(30)
        assert [error for *_, error in found if error] == []
        return [result for _, result, _ in found]

    return run
