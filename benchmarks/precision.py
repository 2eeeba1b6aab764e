"""Time of a training step with `trainer.precision=bf16-mixed` (and channels_last) over that in float32, per model."""

import argparse
import statistics
import time

import torch

from medvision import cli
from medvision.build import build


def step(task, optimizer, batch, bf16: bool) -> float:
    started = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = task(batch["image"])
    task.loss(outputs, batch["target"]).backward()
    optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--size", type=int, default=96)
    arguments = parser.parse_args()
    for model in ("unet", "unetpp", "unetv2"):
        variants = []
        for precision in ("32-true", "bf16-mixed"):
            options = [f"data.image_size={arguments.size}", "data.batch_size=8", "data.images={train:8,val:1,test:1}"]
            cfg = cli.compose("train", [f"model={model}", f"trainer.precision={precision}", *options])
            run = build(cfg)
            variants.append((run.task.train(), run.task.optimizer(run.task.model.parameters()), precision))
        batch = next(iter(run.data.train_dataloader()))
        times = [
            [step(task, opt, batch, "bf16" in precision) for task, opt, precision in variants]
            for _ in range(arguments.steps + 1)
        ]
        full, half = (statistics.median(column) for column in list(zip(*times[1:], strict=True)))
        print(f"{model:8} float32 {full * 1e3:6.0f} ms, bf16-mixed {half * 1e3:6.0f} ms: {full / half:.2f} times")


if __name__ == "__main__":
    main()
