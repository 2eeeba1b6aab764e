"""Time of an epoch of `medvision.train` over that of a plain PyTorch loop with the same model, data and settings.

Everything that is on by default is on: progress and epoch lines, metrics.csv, pictures, early stopping, both
checkpoints. The plain loop trains, clips, steps the schedule and validates with the same counts; it saves nothing.
Epochs of the two alternate in one process, so that a drift of the machine meets both.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from medvision import cli
from medvision.build import Run, build
from medvision.callbacks import Pictures
from medvision.metrics import count, summarise
from medvision.runs import RunFolder


def plain_epochs(run: Run):
    """Yields the seconds of one epoch after another."""
    model, data, cfg = run.task.model, run.data, run.config
    optimizer = run.task.optimizer(model.parameters())
    schedule = run.task.scheduler(optimizer)
    train, val = data.train_dataloader(), data.val_dataloader()
    while True:
        started = time.perf_counter()
        model.train()
        for batch in train:
            optimizer.zero_grad()
            run.task.loss(model(batch["image"]), batch["target"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.trainer.gradient_clip_val)
            optimizer.step()
        schedule.step()
        model.eval()
        counts = []
        with torch.inference_mode():
            for batch in val:
                logits = model(batch["image"])
                run.task.loss(logits, batch["target"])
                counts.append(count(logits.sigmoid() >= 0.5, batch["target"]))
        summarise(torch.cat(counts).numpy(), data.spec.classes)
        yield time.perf_counter() - started


class Alternate(pl.Callback):
    """Runs a plain epoch before each of ours; stands first, so that all else of an epoch counts as ours."""

    def __init__(self, plain) -> None:
        self.plain, self.times, self._started = plain, [], None

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._stop()
        other = next(self.plain)
        self._started = (time.perf_counter(), other)

    def on_fit_end(self, trainer, pl_module) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._started is not None:
            started, other = self._started
            self.times.append((time.perf_counter() - started, other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=11)
    default = ["model=unetv2", "data=phantom", "data.image_size=96", "data.images.train=1000"]
    parser.add_argument("overrides", nargs="*", default=default)
    arguments = parser.parse_args()
    cfg = cli.compose("train", [*arguments.overrides, f"trainer.max_epochs={arguments.epochs}"])
    with tempfile.TemporaryDirectory() as folder:
        ours, other = build(cfg), build(cfg)
        ours.folder = RunFolder(Path(folder))
        trainer, _ = ours.training()
        alternate = Alternate(plain_epochs(other))
        trainer.callbacks.insert(0, alternate)
        for callback in trainer.callbacks:
            if isinstance(callback, Pictures):
                callback.every_seconds *= 2  # half of the time on the clock is the plain loop's
        trainer.fit(ours.task, datamodule=ours.data)
    times = alternate.times[3:]  # the first ones warm up and make the files that later checkpoints write over
    print(
        " ".join(arguments.overrides),
        f"- seconds per epoch, ours and plain: {[(round(a, 2), round(b, 2)) for a, b in times]}",
    )
    ratios = [a / b for a, b in times]
    whole = sum(a for a, _ in times) / sum(b for _, b in times)
    print(f"ours / plain: median {statistics.median(ratios):.3f}, of the sums {whole:.3f}")


if __name__ == "__main__":
    main()
