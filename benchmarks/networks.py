"""Time and memory of a training and an inference step of the networks over those of `smp.Unet(resnet34)`.

Both alternate in one process and are timed in CPU time (with --threads above 1: wall time), so that neither drift nor
other jobs on the machine favour one.
A training step is forward, binary cross-entropy summed over the outputs, backward and AdamW; inference is one forward
in `torch.inference_mode`. bf16 is autocast with channels_last, over `smp.Unet` in float32, contiguous. Memory is the
peak of two training steps in a process of their own, above what the imports took: weights, gradients, moments and all.

Published implementations are compared through `smp.Unet` as well: theirs / smp.Unet was measured once, elsewhere.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from medvision.build import keep_freed_memory
from medvision.models import SMP, UNetFamily, UNetIsensee, UNetPP, UNetV2

REFERENCE = partial(smp.Unet, "resnet34", encoder_weights=None)
NETWORKS = {
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
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
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
        with torch.inference_mode(), self.autocast():
            self.network(self.images)


def seconds(step, clock) -> float:
    started = clock()
    step()
    return clock() - started


def peak(make, size: int, batch: int, bf16: bool, threads: int) -> float:
    """Megabytes of two training steps; the first has no moments before its end."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job = Job(make, size, batch, bf16)
    job.train()
    job.train()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(*arguments) -> float:
    # The process is new, and begins before this one has grown: its peak would begin there.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["unetv2", "unetpp"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[96])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    sizes, batch, names = arguments.sizes, arguments.batch, arguments.networks
    makers = {"smp.Unet": REFERENCE, **{name: NETWORKS[name] for name in names}}
    peaks = {
        (name, size, bf16): memory(make, size, batch, bf16, arguments.threads)
        for name, make in makers.items()
        for size in sizes
        for bf16 in (False, True)
    }
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print("ratios of time: ours / smp.Unet, published / smp.Unet, ours / published, largest wanted; peak memory in MB")
    for size in sizes:
        base = [peaks["smp.Unet", size, bf16] for bf16 in (False, True)]
        print(f"{size}x{size}, batch {batch}: smp.Unet {base[0]:.0f} MB, in bf16 {base[1]:.0f} MB")
        for name in names:
            reference = Job(REFERENCE, size, batch, bf16=False)
            ours = [Job(NETWORKS[name], size, batch, bf16) for bf16 in (False, True)]
            for position, step in enumerate(("train", "infer")):
                rounds = []
                for _ in range(arguments.rounds + 1):
                    base, *rest = (seconds(getattr(job, step), clock) for job in (reference, *ours))
                    rounds.append([each / base for each in rest])
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
                    print(line + (f" {peaks[name, size, bf16]:6.0f} MB" if step == "train" else ""), flush=True)


if __name__ == "__main__":
    main()
