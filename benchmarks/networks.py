"""Time and memory of a training and an inference step of the networks over those of `smp.Unet(resnet34)`.

Each runs in a process of its own, and they take turns; CPU time is compared (with --threads above 1: wall time), so
that neither drift nor other jobs on the machine favour one. Ours runs as in a training here: AdamW as this library
makes it, freed memory kept, and in evaluation one autocast context around all batches. `smp.Unet` runs as PyTorch does
by default, as the published implementations did when they were measured; with --keep it keeps freed memory too.
A training step is forward, binary cross-entropy summed over the outputs, backward and AdamW; inference is one forward
in `torch.no_grad`. bf16 is autocast with channels_last, over `smp.Unet` in float32, contiguous. Memory is the peak of a
process after two training steps, above what the imports took: weights, gradients, moments and all.

Published implementations are compared through `smp.Unet` as well: theirs / smp.Unet was measured once, elsewhere.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from medvision.build import keep_freed_memory
from medvision.models import SMP, UNetFamily, UNetIsensee, UNetPP, UNetV2
from medvision.optim import from_torch

REFERENCE = partial(smp.Unet, "resnet34", encoder_weights=None)
NETWORKS = {
    "smp.Unet": REFERENCE,
    "unetv2": partial(UNetV2, "pvt_v2_b2", deep_supervision=True, drop_path_rate=0.1),
    "unetpp": partial(UNetPP, deep_supervision=True),
    "unet_plain": UNetFamily,
    "unet_residual": partial(UNetFamily, block="residual"),
    "unet_attention": partial(UNetFamily, skip="attention", width=16),
    "unet_isensee": UNetIsensee,
    "smp_unetplusplus": partial(SMP, "UnetPlusPlus", "resnet34"),
}
# Milliseconds of the published implementations, float32, contiguous, one thread of an AMD EPYC, batch 8: another
# machine's table, of which only the relation to its own smp.Unet counts here.
PUBLISHED = {
    ("smp.Unet", 96): (647, 216),
    ("smp.Unet", 256): (4762, 1414),
    ("unetv2", 96): (660, 204),
    ("unetv2", 256): (5024, 1374),
    ("unetpp", 96): (3117, 861),
    ("unet_plain", 96): (1102, 351),
    ("unet_residual", 96): (1102, 351),  # none published: the plain one's
    ("unet_attention", 96): (275, 94),  # MONAI's AttentionUnet, widths 16 ... 256
    ("unet_attention", 256): (2591, 605),
    ("unet_isensee", 96): (468, 176),
    ("unet_isensee", 256): (5272, 1244),
    ("smp_unetplusplus", 96): (1406, 458),
    ("smp_unetplusplus", 256): (13745, 3204),
}
# Largest share of the published time: float32, bf16.
BOUNDS = {"unetv2": (1.0, 0.53), "unetpp": (0.87, 0.45)}


class Job:
    """A network with its optimizer and a batch of random images."""

    def __init__(self, make, size: int, batch: int, bf16: bool) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if bf16 else torch.contiguous_format
        self.network = make().to(memory_format=layout)
        adamw = torch.optim.AdamW if make is REFERENCE else partial(from_torch, name="AdamW")
        self.optimizer = adamw(self.network.parameters(), lr=1e-4)
        self.images = torch.randn(batch, 3, size, size).to(memory_format=layout)
        self.target = (torch.rand(batch, 1, size, size) > 0.5).float()
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)

    def train(self) -> None:
        self.network.train()
        self.optimizer.zero_grad()
        with self.autocast():
            outputs = self.network(self.images)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        sum(F.binary_cross_entropy_with_logits(logits.float(), self.target) for logits in outputs).backward()
        self.optimizer.step()

    def infer(self) -> None:
        self.network.eval()
        with torch.no_grad():
            self.network(self.images)


def work(connection: Connection, name: str, size: int, batch: int, bf16: bool, keep: bool, threads: int) -> None:
    """Answers `train` and `infer` with the seconds of a step, the first time after one that warms up."""
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    clock = time.process_time if threads == 1 else time.perf_counter
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job = Job(NETWORKS[name], size, batch, bf16)
    for _ in range(2):
        job.train()  # the first has no moments before its end
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    for step in ("train", "infer"):
        with job.autocast() if step == "infer" else nullcontext():
            while connection.recv():
                started = clock()
                getattr(job, step)()
                connection.send(clock() - started)


class Worker:
    """A job in a process of its own.

    Attributes:
        megabytes: Peak of its training step.
    """

    def __init__(self, *arguments) -> None:
        context = multiprocessing.get_context("spawn")  # new: a fork's peak would begin at what its parent took
        self.connection, other = context.Pipe()
        context.Process(target=work, args=(other, *arguments), daemon=True).start()
        self.megabytes = self.connection.recv()

    def seconds(self) -> float:
        self.connection.send(True)
        return self.connection.recv()

    def next(self) -> None:
        """From training on to inference, from there to the end."""
        self.connection.send(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS][1:], default=["unetv2", "unetpp"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[96])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="smp.Unet keeps freed memory as well")
    arguments = parser.parse_args()
    batch, threads = arguments.batch, arguments.threads
    print("ratios of time: ours / smp.Unet, published / smp.Unet, ours / published, largest wanted; peak memory in MB")
    for size in arguments.sizes:
        for name in arguments.networks:
            reference = Worker("smp.Unet", size, batch, False, arguments.keep, threads)
            if name == arguments.networks[0]:
                print(f"{size}x{size}, batch {batch}: smp.Unet {reference.megabytes:.0f} MB")
            ours = [Worker(name, size, batch, bf16, True, threads) for bf16 in (False, True)]
            for position, step in enumerate(("train", "infer")):
                rounds = []
                for _ in range(arguments.rounds + 1):
                    base, *rest = (worker.seconds() for worker in (reference, *ours))
                    rounds.append([each / base for each in rest])
                for worker in (reference, *ours):
                    worker.next()
                medians = (statistics.median(column) for column in zip(*rounds[1:], strict=True))  # the first warms up
                for bf16, ratio in zip((False, True), medians, strict=True):
                    line = f"  {name:16} {step} {'bf16' if bf16 else 'fp32'} {ratio:6.2f}"
                    milliseconds = PUBLISHED.get((name, size))
                    if milliseconds and batch == 8:
                        theirs = milliseconds[position] / PUBLISHED["smp.Unet", size][position]
                        wanted = f"{BOUNDS[name][bf16]:.2f}" if name in BOUNDS else "   -"
                        line += f" {theirs:6.2f} {ratio / theirs:6.2f} {wanted}"
                    else:
                        line += "      -      -    -"
                    print(line + (f" {ours[bf16].megabytes:6.0f} MB" if step == "train" else ""), flush=True)


if __name__ == "__main__":
    main()
