"""What a run's numbers depend on besides its config, recorded and compared, and two runs compared bit for bit."""

import csv
import hashlib
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from medvision.files import read_json

PACKAGES = [
    "medvision",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "torchmetrics",
    "timm",
    "segmentation-models-pytorch",
    "albumentations",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "pillow",
    "scikit-learn",
    "hydra-core",
    "omegaconf",
]
VARIABLES = ["MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG"]
NO_MATTER = ("seed", "git", "starts", "hardware.platform", "hardware.cpus", "hardware.memory_gb")
"""Entries of the environment that move no number: the seed is in the config, what matters of git is in `source`."""


def environment(seed: int) -> dict[str, Any]:
    """Versions, the code, git state, hardware, settings of torch and seed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # a checkout that was not installed
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "seed": seed,
        "python": platform.python_version(),
        "versions": versions,
        "source": source(),
        "git": _git(),
        "hardware": {
            "platform": platform.platform(),
            "libc": " ".join(platform.libc_ver()),
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpus": gpus,
        },
        "settings": {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "float32_matmul": torch.get_float32_matmul_precision(),
            "onednn": bool(torch.backends.mkldnn.enabled),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            **{name: os.environ.get(name) for name in VARIABLES},
        },
    }


@cache
def source() -> str:
    """A digest of this package's code: two checkouts with changes that are not committed can be told apart by it."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the code that runs, None where it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments and can move numbers, as `name: then -> now`.

    What an older record does not have is not known to be the same, and differs.
    """
    old, new = (dict(_leaves(record)) for record in (then, now))
    names = [name for name in sorted(old.keys() | new.keys()) if not name.startswith(NO_MATTER)]
    missing = "not recorded"
    return [
        f"{name}: {old.get(name, missing)} -> {new.get(name, missing)}"
        for name in names
        if old.get(name, missing) != new.get(name, missing)
    ]


def compare_weights(one: Path, other: Path) -> str | None:
    """How the tensors of two checkpoints differ, weights, averages and optimizer; None if in no bit."""
    first, second = (dict(_leaves(torch.load(path, map_location="cpu", weights_only=True))) for path in (one, other))
    tensors = [
        {name: value for name, value in found.items() if isinstance(value, torch.Tensor)} for found in (first, second)
    ]
    if tensors[0].keys() != tensors[1].keys():
        return f"{len(tensors[0].keys() ^ tensors[1].keys())} tensors are only in one"
    pairs = [(value, tensors[1][name]) for name, value in tensors[0].items()]
    if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
        return "tensors have other shapes or types"
    differing = [(a, b) for a, b in pairs if not torch.equal(_bits(a), _bits(b))]
    if not differing:
        return None
    largest = max(float((a.double() - b.double()).abs().nan_to_num(0, torch.inf).max()) for a, b in differing)
    return f"{len(differing)} of {len(pairs)} tensors differ, by up to {largest:.3g}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def compare_values(one: Path, other: Path) -> str | None:
    """How the numbers of two JSON or CSV files differ; None if in none."""
    first, second = (dict(_leaves(read_json(path) if path.suffix == ".json" else _rows(path))) for path in (one, other))
    if first.keys() != second.keys():
        return f"{len(first.keys() ^ second.keys())} values are only in one"
    differing = [(first[name], second[name]) for name in first if not _same(first[name], second[name])]
    if not differing:
        return None
    numbers = [abs(a - b) for a, b in differing if isinstance(a, float | int) and isinstance(b, float | int)]
    size = f", by up to {max(numbers):.3g}" if numbers else ""
    return f"{len(differing)} of {len(first)} values differ{size}"


def _rows(path: Path) -> list[list[float | str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return [[_number(cell) for cell in row] for row in csv.reader(handle)]


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _same(one: object, other: object) -> bool:
    both = isinstance(one, float) and isinstance(other, float)
    return one == other or (both and math.isnan(one) and math.isnan(other))  # type: ignore[arg-type]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple) and node:
        for i, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{i}" if prefix else str(i))
    else:
        yield prefix, node
