"""`python -m medvision.models`: what each model costs, measured on this machine."""

import csv
import io
import logging
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from medvision import cli
from medvision.errors import MedvisionError
from medvision.files import writable_folder, write_text
from medvision.spec import as_size

if TYPE_CHECKING:
    import torch

    from medvision.costs import Cost

log = logging.getLogger("medvision.models")  # __name__ is __main__ here

CHOICES = {
    "precision": ("32-true", "bf16-mixed"),
    "device": ("auto", "cpu", "cuda"),
    "sort": ("parameters", "name"),
}
REASON = "not measured because"


def start(configs: list[DictConfig], _folder: Path, overrides: list[str]) -> None:
    """Measures models one after the other, each in a process of its own, and prints a table.

    Raises:
        MedvisionError: If a word has no sense, or, after the table, if a model could not be measured.
    """
    cfg = configs[0]
    if losses := [o for o in overrides if o.startswith("loss")]:
        raise MedvisionError(f"{losses[0]}: the steps measured here have a loss of their own; leave it out")
    size = _checked(cfg)
    trainings = _trainings(cfg, size, overrides)
    device = _device(cfg.device)
    from medvision.terminal import print_rows

    rows: dict[str, Cost | str] = {}
    for name, training in trainings.items():
        log.info("measuring %s (%d of %d)", name, len(rows) + 1, len(trainings))
        rows[name] = _apart(training, cfg, size, device)
    rows = _sorted(rows, cfg.sort)
    settings = _settings(cfg, size, device)
    header, lines = as_table(rows)
    print_rows(_title(settings, cfg.steps), header, lines, (0, header.index(REASON)) if REASON in header else (0,))
    if cfg.output is not None:
        write_text(Path(cfg.output), as_csv(rows, settings))
        print(f"numbers: {cfg.output}")
    if refused := [name for name, cost in rows.items() if isinstance(cost, str)]:
        raise MedvisionError(f"not measured: {', '.join(refused)}; the table says why")


def _checked(cfg: DictConfig) -> tuple[int, int]:
    """Refuses values without sense; the height and width in pixels."""
    for word, choices in CHOICES.items():
        if cfg[word] not in choices:
            raise MedvisionError(f"{word}={cfg[word]}: expected one of {', '.join(choices)}")
    for word in ("batch_size", "in_channels", "num_outputs", "steps", "threads"):
        if not (type(cfg[word]) is int and cfg[word] > 0) and not (word == "threads" and cfg.threads is None):
            raise MedvisionError(f"{word}={cfg[word]}: expected a whole number of 1 or more")
    if cfg.output is not None:
        if Path(cfg.output).suffix != ".csv":
            raise MedvisionError(f"output={cfg.output}: expected the name of a .csv file")
        writable_folder(Path(cfg.output).parent, "output=<file.csv>")
    return as_size([*cfg.image_size] if isinstance(cfg.image_size, ListConfig) else cfg.image_size, "image_size")


def _trainings(cfg: DictConfig, size: tuple[int, int], overrides: list[str]) -> dict[str, DictConfig]:
    """For each model its config of training, with the model's options that were typed."""
    own = [o for o in overrides if o.lstrip("+~").startswith(("model=", "model.", "hydra.searchpath="))]
    if "model" not in cfg:  # none was named
        own = [*own, f"model={','.join(cli.choices('model', own))}"]
    words = [
        "data=phantom",
        f"data.image_size=[{size[0]},{size[1]}]",
        f"data.batch_size={cfg.batch_size}",
        f"data.spec.in_channels={cfg.in_channels}",
        f"data.spec.num_outputs={cfg.num_outputs}",
        f"trainer.precision={cfg.precision}",
    ]
    variants = cli.variants(own, "model")
    return {v[-1].partition("=")[2]: cli.compose("train", [*words, *v]) for v in variants}


def _device(word: str) -> "torch.device":
    import torch

    gpu = torch.cuda.is_available()
    if word == "cuda" and not gpu:
        raise MedvisionError("device=cuda: PyTorch finds no GPU; device=cpu measures without")
    return torch.device("cuda" if gpu and word != "cpu" else "cpu")


def _settings(cfg: DictConfig, size: tuple[int, int], device: "torch.device") -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    words = {word: cfg[word] for word in ("batch_size", "in_channels", "num_outputs", "precision")}
    threads = cfg.threads or torch.get_num_threads()
    return {"height": size[0], "width": size[1], **words, "device": device.type, "threads": threads}


def _apart(training: DictConfig, cfg: DictConfig, size: tuple[int, int], device: "torch.device") -> "Cost | str":
    """A model's cost, or why there is none, from a fresh process, whose peak memory is that of this model."""
    from medvision.build import build_model, channels_last, keep_freed_memory
    from medvision.costs import measure

    # a copy of a process that has imported everything, where CUDA allows it
    context = multiprocessing.get_context("spawn" if device.type == "cuda" else "forkserver")
    context.set_forkserver_preload(["medvision.build", "medvision.costs"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory) as pool:  # as training does
        measured = pool.submit(
            measure,
            partial(build_model, training),
            (cfg.batch_size, cfg.in_channels, *size),
            device,
            cfg.steps,
            bf16="bf16" in cfg.precision,
            channels_last=channels_last(training),
            threads=cfg.threads,
        )
        try:
            return measured.result()
        except BrokenProcessPool:
            return "its process was killed, perhaps for want of memory; try a smaller batch_size or image_size"
        except Exception as error:  # whatever it is, the other models are measured
            if cfg.traceback:
                raise
            return " ".join(str(error).split()) or type(error).__name__


def _sorted(rows: "Mapping[str, Cost | str]", by: str) -> "dict[str, Cost | str]":
    """Rows by name, or by parameters with those that have none at the end."""

    def key(name: str) -> tuple[float, str]:
        cost = rows[name]
        return (float("inf") if isinstance(cost, str) else cost.parameters) if by == "parameters" else 0, name

    return {name: rows[name] for name in sorted(rows, key=key)}


def as_csv(rows: "Mapping[str, Cost | str]", settings: Mapping[str, Any]) -> str:
    """The exact numbers, a line for each model, with what they were measured at and why some are absent."""
    from medvision.costs import Cost

    text = io.StringIO()
    header = ["model", *(field.name for field in fields(Cost)), *settings, "error"]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for name, cost in rows.items():
        writer.writerow({"model": name, **settings} | ({"error": cost} if isinstance(cost, str) else asdict(cost)))
    return text.getvalue()


def as_table(rows: "Mapping[str, Cost | str]") -> tuple[list[str], list[list[str]]]:
    """Header and lines; the columns of trainable parameters and of reasons are there where a model needs them."""
    costs = [cost for cost in rows.values() if not isinstance(cost, str)]
    columns: dict[str, Callable[[Cost], str]] = {
        "parameters (M)": lambda cost: f"{cost.parameters / 1e6:.2f}",
        "trainable (M)": lambda cost: f"{cost.trainable / 1e6:.2f}",
        "multiply-adds (G)": lambda cost: f"{cost.multiply_adds / 1e9:.2f}",
        "training (ms)": lambda cost: f"{cost.training_seconds * 1e3:.0f}",
        "training (MB)": lambda cost: f"{cost.training_bytes / 1e6:.0f}",
        "inference (ms)": lambda cost: f"{cost.inference_seconds * 1e3:.0f}",
        "inference (MB)": lambda cost: f"{cost.inference_bytes / 1e6:.0f}",
    }
    if all(cost.trainable == cost.parameters for cost in costs):
        del columns["trainable (M)"]
    reasons = [REASON] if len(costs) < len(rows) else []
    lines = []
    for name, cost in rows.items():
        if isinstance(cost, str):
            lines.append([name, *("-" for _ in columns), cost])
        else:
            lines.append([name, *(show(cost) for show in columns.values()), *("" for _ in reasons)])
    return ["model", *columns, *reasons], lines


def _title(settings: Mapping[str, Any], steps: int) -> str:
    """What the numbers are of, and what they are not."""
    resident = "resident memory, so not exact" if settings["device"] == "cpu" else "what PyTorch allocated"
    return (
        "{height}x{width}, batch {batch_size}, {in_channels} channels in, {num_outputs} out, {precision}, {device}, "
        "{threads} threads\n"
    ).format(**settings) + (
        f"multiply-adds: of one image; ms: of a step, median of {steps}; MB: peak of a step with the model, {resident}"
    )


if __name__ == "__main__":
    cli.main("models", start, several="model")
