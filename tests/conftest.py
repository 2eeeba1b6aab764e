"""What tests share: tiny archives in the official layouts, the real ones where they are at hand, and processes."""

import ctypes
import io
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hydra.utils import get_class, instantiate
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from omegaconf import OmegaConf, open_dict
from PIL import Image

from medvision import cli
from medvision.build import build
from medvision.configs import save_config
from medvision.data import ImageDataModule
from medvision.decision import Decision
from medvision.evaluation import LabelEvaluation, MaskEvaluation
from medvision.launchers import Job
from medvision.report import finish
from medvision.runs import RunFolder
from medvision.spec import DataSpec
from medvision.tasks import ImageCounts

CONF = Path(__file__).resolve().parents[1] / "conf"
RUNS = {
    "attributes": ["data=phantom_attributes", "data.images={count:15}", "model=unet_plain", "model.width=4"],
    "melanoma": ["data=phantom_melanoma", "data.images={train:24,test:5}", "model=resnet18"],
    "insects": ["data=phantom_insects", "data.images={train:8,val:6}", "model=resnet18"],
}

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


@pytest.fixture(scope="module")
def own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the module's own with its data, of which there is none, its cache and its runs."""
    root = tmp_path_factory.mktemp("places")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data", "cache", "runs"):
            patch.setenv(f"MEDVISION_{name.upper()}", str(root / name))
        yield root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RunFolder]]:
    """`trained("attributes")`: a run folder with random weights and its results."""
    made, root = dict[str, RunFolder](), tmp_path_factory.mktemp("runs")

    def make(name: str) -> RunFolder:
        if name not in made:
            words = ["data.image_size=32", "data.num_workers=0", "trainer.accelerator=cpu", f"hydra.run.dir={root}"]
            cfg = cli.compose("train", [*RUNS[name], *words])
            with open_dict(cfg):
                del cfg["hydra"]
            place = RunFolder(root / name)
            save_config(cfg, place)
            run = build(cfg)
            place.best.parent.mkdir()
            checkpoint = {
                "state_dict": run.task.state_dict(),
                "callbacks": {"Checkpoint": {"best_epoch": 1, "best": 0.5}},
            }
            torch.save(checkpoint, place.best)
            place.history.write_text(
                "epoch,step,metric,value\n1,9,train/loss,0.5\n1,9,val/loss,0.6\n1,9,val/jaccard,0.1\n"
            )
            finish(place)
            made[name] = place
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        for place in ("data", "cache", "runs"):
            patch.setenv(f"MEDVISION_{place.upper()}", str(root / place))
        yield make


@pytest.fixture
def jobs(tmp_path: Path) -> Callable[..., list[Job]]:
    """`jobs(2, gpus=1)`: jobs of a sweep with empty folders, each told its number in JOB."""

    def make(count: int, **options: Any) -> list[Job]:
        made = [
            Job(n, tmp_path / "a sweep, n=1" / str(n), f"seed={n}", environment={"JOB": str(n)}, **options)
            for n in range(count)
        ]
        for job in made:
            job.folder.mkdir(parents=True, exist_ok=True)
        return made

    return make


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
    """`spec("binary")` or `spec("multilabel", name=..., target="label")`: the facts of an RGB data set at 16x16."""

    def make(kind: str = "binary", **changes: Any) -> DataSpec:
        classes = changes.setdefault(
            "classes", {"binary": ["lesion"], "multilabel": ["round", "square"]}.get(kind, ["a", "b"])
        )
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


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Any]:
    """`dataset("isic2016", root, facts={...}, ...)`: the data set of `conf/data/isic2016.yaml` at 16x16."""

    def make(name: str, root: Path, facts: Mapping[str, Any] | None = None, **options: Any) -> ImageDataModule:
        config = OmegaConf.load(CONF / f"data/{name}.yaml")
        spec = instantiate(config.spec, _convert_="all", **(facts or {}))
        options = {"cache": tmp_path / "cache", "num_workers": 0, "image_size": 16, **options}
        module: ImageDataModule = get_class(config._target_)(spec, root, **options)
        return module

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


def _put(root: Path, stem: str, files: Mapping[str, bytes], as_folder: bool) -> None:
    """The files of one archive; in the zip they lie in a folder of its name, as in the official ones."""
    _pack(root / stem, files if as_folder else {f"{stem}/{name}": file for name, file in files.items()}, as_folder)


def _lesions(numbers: Iterable[int], size: tuple[int, int], seed: int) -> dict[str, tuple[bytes, NDArray[np.uint8]]]:
    drawn = {n: _lesion(np.random.default_rng([seed, n]), _sizes(size, n)) for n in numbers}
    return {f"ISIC_{n:07d}": (_encode(image, "JPEG", quality=95), mask) for n, (image, mask) in drawn.items()}


def _fake_isic2016(
    root: Path,
    counts: Mapping[str, int] | None = None,
    as_folder: bool = False,
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
) -> Path:
    names = {"train": ("Training", 0, ("benign", "malignant")), "test": ("Test", 2000, ("0.0", "1.0"))}
    for split, count in (counts or {"train": 16}).items():
        part, first, words = names[split]
        stem = f"ISBI2016_ISIC_Part3_{part}"
        images = _lesions(range(first, first + count), size, seed)
        _put(root, f"{stem}_Data", {f"{i}.jpg": jpeg for i, (jpeg, _) in images.items()}, as_folder)
        rows = "".join(f"{i},{words[number % 3 == 1]}\n" for number, i in enumerate(images))
        (root / f"{stem}_GroundTruth.csv").write_text(rows)
    return root


@pytest.fixture(scope="session")
def fake_isic2016() -> Callable[..., Path]:
    """`fake_isic2016(root, {"train": 16, "test": 6}, as_folder, size)`: every third one malignant; gives `root`."""
    return _fake_isic2016


def _fake_isic2017_diagnosis(
    root: Path, counts: Mapping[str, int] | None = None, as_folder: bool = False, **options: Any
) -> Path:
    names = {"train": ("Training", 0), "val": ("Validation", 1000), "test": ("Test_v2", 2000)}
    counts = counts or {"train": 12, "val": 6, "test": 6}
    _fake_isic2017(root, counts, as_folder, **options)
    for split, count in counts.items():
        part, first = names[split]
        rows = [f"ISIC_{first + n:07d},{float(n % 3 == 1)},{float(n % 3 == 2)}\n" for n in range(count)]
        table = root / f"ISIC-2017_{part}_Part3_GroundTruth.csv"
        table.write_text("image_id,melanoma,seborrheic_keratosis\n" + "".join(rows))
    return root


@pytest.fixture(scope="session")
def fake_isic2017_diagnosis() -> Callable[..., Path]:
    """`fake_isic2017_diagnosis(root, counts, as_folder, size)`: in turn neither, melanoma, keratosis; gives `root`."""
    return _fake_isic2017_diagnosis


ATTRIBUTES = ("pigment_network", "negative_network", "streaks", "milia_like_cyst", "globules")


def _fake_isic2018(
    root: Path,
    counts: Mapping[str, int] | None = None,
    as_folder: bool = False,
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
    attributes: bool = False,
) -> Path:
    names = {"train": ("Training", 0), "val": ("Validation", 1000), "test": ("Test", 2000)}
    for split, count in (counts or {"train": 16}).items():
        part, first = names[split]
        images = _lesions(range(first, first + count), size, seed)
        _put(root, f"ISIC2018_Task1-2_{part}_Input", {f"{i}.jpg": jpeg for i, (jpeg, _) in images.items()}, as_folder)
        masks = {}
        for number, (i, (_, mask)) in enumerate(images.items()):
            if not attributes:
                masks[f"{i}_segmentation.png"] = _encode(mask)
            for k, name in enumerate(ATTRIBUTES if attributes else ()):
                masks[f"{i}_attribute_{name}.png"] = _encode(mask * np.uint8((number + k) % (k + 2) == 0))
        _put(
            root,
            f"ISIC2018_{f'Task2_{part}_GroundTruth_v3' if attributes else f'Task1_{part}_GroundTruth'}",
            masks,
            as_folder,
        )
    return root


@pytest.fixture(scope="session")
def fake_isic2018_lesion() -> Callable[..., Path]:
    """`fake_isic2018_lesion(root, {"train": 16, ...}, as_folder, size)`: gives `root`."""
    return _fake_isic2018


@pytest.fixture(scope="session")
def fake_isic2018_attributes() -> Callable[..., Path]:
    """`fake_isic2018_attributes(root, {"train": 16, ...}, as_folder, size)`: gives `root`.

    Attribute k (from 0) is the whole lesion where the image's number plus k is a multiple of k + 2, else absent.
    """
    return partial(_fake_isic2018, attributes=True)


FRAMES = (1, 2, 26, 27, 51, 52, 68, 69, 79, 80, 104, 105, 127, 128)


def _fake_cvc_clinicdb(
    root: Path,
    frames: Iterable[int] = FRAMES,
    as_folder: bool = False,
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
    kind: str = "png",
) -> Path:
    files = {}
    for number in frames:
        image, mask = _lesion(np.random.default_rng([seed, number]), size)
        edges = cv2.blur(mask, (3, 3))
        files[f"Original/{number}.{kind}"] = _encode(image, {"png": "PNG", "tif": "TIFF"}[kind])
        files[f"Ground Truth/{number}.{kind}"] = _encode(np.dstack([edges] * 3), {"png": "PNG", "tif": "TIFF"}[kind])
    _put(root, "CVC-ClinicDB", files, as_folder)
    return root


@pytest.fixture(scope="session")
def fake_cvc_clinicdb() -> Callable[..., Path]:
    """`fake_cvc_clinicdb(root, frames, as_folder, size, kind="tif")`: two frames of each of 7 sequences; gives `root`.

    Masks are RGB with grey edges.
    """
    return _fake_cvc_clinicdb


def _photo(number: int, label: int, size: tuple[int, int], seed: int) -> bytes:
    rng = np.random.default_rng([seed, label, number])
    image, mask = _lesion(rng, _sizes(size, number))
    image[mask > 0] = ((60, 50, 40), (220, 180, 40), (40, 90, 200))[label % 3]
    return _encode(image, "JPEG", quality=95)


def _fake_hymenoptera(
    root: Path,
    counts: Mapping[str, int] | None = None,
    as_folder: bool = False,
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
) -> Path:
    files = {
        f"{split}/{name}/{100 * (split == 'val') + number:05d}_{name[0]}.jpg": _photo(
            100 * (split == "val") + number, label, size, seed
        )
        for split, count in (counts or {"train": 6, "val": 4}).items()
        for label, name in enumerate(("ants", "bees"))
        for number in range(count)
    }
    _put(root, "hymenoptera_data", files, as_folder)
    return root


@pytest.fixture(scope="session")
def fake_hymenoptera() -> Callable[..., Path]:
    """`fake_hymenoptera(root, {"train": 6, "val": 4}, as_folder, size)`: so many of each class; gives `root`."""
    return _fake_hymenoptera


def _fake_folder(
    root: Path,
    images: int = 12,
    classes: Sequence[str] = (),
    splits: Sequence[str] = ("",),
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
) -> Path:
    files = {}
    for number in range(images):
        split = splits[number % len(splits)]
        below = f"{split}/" if split else ""
        image, mask = _lesion(np.random.default_rng([seed, number]), _sizes(size, number))
        files[f"{below}images/case{number:02d}.png"] = _encode(image)
        for k, name in enumerate(classes):
            files[f"{below}masks/{name}/case{number:02d}.png"] = _encode(np.roll(mask, 3 * k, 0))
        if not classes:
            files[f"{below}masks/case{number:02d}.png"] = _encode(mask)
    return _pack(root, files, as_folder=True)


@pytest.fixture(scope="session")
def fake_folder() -> Callable[..., Path]:
    """`fake_folder(root, images, classes, splits, size)`: `[<split>/]images/` and `masks/[<class>/]`; gives `root`."""
    return _fake_folder


def _fake_folder_labels(
    root: Path,
    images: int = 12,
    classes: Sequence[str] = ("a", "b"),
    splits: Sequence[str] = ("",),
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
) -> Path:
    files = {}
    for number in range(images):
        label, split = number % len(classes), splits[number // len(classes) % len(splits)]
        name = f"{classes[label]}/{number:02d}.jpg"
        files[f"{split}/{name}" if split else name] = _photo(number, label, size, seed)
    return _pack(root, files, as_folder=True)


@pytest.fixture(scope="session")
def fake_folder_labels() -> Callable[..., Path]:
    """`fake_folder_labels(root, images, classes, splits, size)`: `[<split>/]<class>/`; gives `root`."""
    return _fake_folder_labels


def _fake_run(
    folder: Path,
    results: NDArray[Any],
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    ids: Sequence[str] = (),
    groups: Sequence[str] | None = None,
    classes: Sequence[str] = ("lesion",),
    split: str = "test",
    monitor: str = "val/jaccard_image",
) -> Path:
    ids = tuple(ids) or tuple(f"i{n:02d}" for n in range(len(results)))
    decision = Decision((0.5,) * len(classes) if results.ndim == 3 or len(classes) == 1 else ())
    evaluation: MaskEvaluation | LabelEvaluation
    if results.ndim == 3:
        images = tuple(ImageCounts(i, (10, 10), counts[None], counts) for i, counts in zip(ids, results, strict=True))
        grid = np.array([0.5], np.float32)
        evaluation = MaskEvaluation(split, tuple(classes), images, grid, tuple(groups) if groups else None)
    else:
        number = max(2, len(classes))
        truth = np.arange(len(ids))[:, None] % number == np.arange(len(classes))
        evaluation = LabelEvaluation(split, tuple(classes), len(classes) > 1, ids, results, truth)
    facts = OmegaConf.create(
        {
            "seed": 0,
            "paths": {"data": "${oc.env:MEDVISION_DATA,'/somewhere'}"},
            "data": {"_target_": "medvision.data.Tiny", "seed": "${seed}", "split_seed": 0, "fold": 0},
            "model": {"_target_": "medvision.models.UNetFamily", "block": "plain", "width": 8},
            "loss": {"_target_": "medvision.losses.SegmentationLoss", "positive_weights": None},
            "optimizer": {"_target_": "medvision.optim.from_torch", "name": "AdamW", "lr": 0.001},
            "task": {"_target_": "medvision.tasks.SegmentationTask", "monitor": monitor},
        }
    )
    facts.data.spec = {"name": "tiny", "classes": list(classes)}
    facts = OmegaConf.merge(facts, OmegaConf.create(dict(config or {})))
    facts.data.seed = facts.seed
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(facts, folder / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(overrides)), folder / ".hydra" / "overrides.yaml")
    (folder / f"results_{split}.csv").write_text(evaluation.table(decision))
    (folder / "metrics.json").write_text(json.dumps({split: evaluation.summary(decision)}))
    return folder


@pytest.fixture(scope="session")
def fake_run() -> Callable[..., Path]:
    """`fake_run(folder, counts, ["model=unet"], {"seed": 1})`: what `compare` reads of a finished run.

    Results are counts (N, K, 4) of masks or probabilities (N, K) of labels, whose truth alternates.
    """
    return _fake_run


@pytest.fixture(scope="session")
def jobs_of() -> Callable[..., list[list[str]]]:
    """`jobs_of("dsb2018_loss", "+scale=smoke")`: the overrides of each job of an experiment."""

    def expand(name: str, *words: str) -> list[list[str]]:
        typed = [f"experiment={name}", *words]
        cfg = cli.compose("train", typed)
        if not str(cfg.hydra.mode).endswith("MULTIRUN"):
            return [typed]
        return cli.expand(typed, cfg.hydra.sweeper.params)

    return expand


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
