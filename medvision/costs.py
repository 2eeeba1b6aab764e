"""What a model costs: parameters, multiply-adds, and the time and memory of a step, measured where it runs."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medvision.runs import peak_memory

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from medvision.tasks import Task

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: All of them.
        trainable: Those that training moves.
        multiply_adds: Of one image in evaluation.
        training_seconds: Of a training step.
        training_bytes: Memory of a training step: weights, gradients, the optimizer's state and activations.
        inference_seconds: Of an inference step.
        inference_bytes: Memory of an inference step: weights and activations.
    """

    parameters: int
    trainable: int
    multiply_adds: int
    training_seconds: float
    training_bytes: int
    inference_seconds: float
    inference_bytes: int


def measure(
    make: Callable[[], nn.Module],
    shape: tuple[int, int, int, int],
    device: torch.device,
    steps: int = 3,
    bf16: bool = False,
    channels_last: bool = False,
    threads: int | None = None,
) -> Cost:
    """Measures a model in this process, which should be a fresh one: a memory is seen where it exceeds all before.

    A training step is forward, loss, backward and AdamW. The loss is the binary cross-entropy of each output with
    zeros, so that neither the shape of an output nor their number matters. Memory is the peak above what there was
    before the model was made: on CUDA of what PyTorch allocated; on a CPU of what was resident, which is not exact.

    Args:
        make: Makes the model.
        shape: Of the images of a step, (N, C, H, W).
        device: Where the steps run.
        steps: A time is the median of so many, after one that warms up.
        bf16: Whether forward and loss run under autocast to bfloat16.
        channels_last: The memory order of weights and images.
        threads: Of the CPU; None leaves their number as it is.
    """
    order = torch.channels_last if channels_last else torch.contiguous_format
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def infer() -> None:
        with torch.inference_mode(), autocast:
            model(images)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = _loss(model(images))
        torch.autograd.backward(loss)
        optimizer.step()

    if threads is not None:
        torch.set_num_threads(threads)
    _forget_peak()
    before = _peak(device)
    model = make().to(device).to(memory_format=order)
    images = torch.zeros(shape, device=device).contiguous(memory_format=order)
    model.eval()  # inference comes first: its peak is the lower one
    inference = _median_seconds(infer, steps, device), max(0, _peak(device) - before)  # less: others' was freed
    model.train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    training = _median_seconds(train, steps, device), max(inference[1], _peak(device) - before)  # pages come meanwhile
    return Cost(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        multiply_adds(model, images[:1]),
        *training,
        *inference,
    )


def step_times(
    trainer: "Trainer", task: "Task", models: Sequence[nn.Module], image: Tensor, rounds: int = 5
) -> list[float]:
    """Seconds that each model takes to answer a batch: medians of rounds in which all take turns.

    Args:
        trainer: Decides device and precision.
        task: Decides the memory order.
        models: The models, which stay on the device in evaluation mode.
        image: Normalised images (N, C, H, W).
        rounds: How many, after one that is not counted.
    """
    device = trainer.strategy.root_device
    image = image.to(device).contiguous(memory_format=task.memory_format)
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for _ in range(1 + rounds):
            for model, times in zip(models, seconds, strict=True):
                model.to(device).eval()
                begin = time.perf_counter()
                model(image)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                times.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in seconds]


def multiply_adds(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions, matrix products and attention in evaluation; nothing else is counted.

    Args:
        model: Left in evaluation mode.
        image: (1, C, H, W).
    """
    # older versions of PyTorch do not count the attention that they run on a CPU
    ours = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a whole layer as one operator, which is not counted
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ours) as counter:
            model.eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations, two for each multiply-add, of attention between shapes (N, heads, tokens, width)."""
    images, heads, tokens, width = query
    return 2 * images * heads * tokens * key[-2] * (width + value[-1])


def _loss(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    several = [outputs] if isinstance(outputs, Tensor) else outputs  # a list under deep supervision
    losses = [F.binary_cross_entropy_with_logits(o.float(), torch.zeros_like(o, dtype=torch.float)) for o in several]
    return torch.stack(losses).mean()


def _median_seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _peak(device: torch.device) -> int:
    """Largest memory so far, bytes; where the system tells, without the pages of libraries, which come with use."""
    if device.type == "cuda":
        allocated: int = torch.cuda.max_memory_allocated(device)
        return allocated
    if not STATUS.exists():
        return peak_memory()
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines())
    kilobytes = {name: int(rest[0]) for name, *rest in lines if name in ("VmHWM:", "RssFile:")}
    return 1024 * (kilobytes["VmHWM:"] - kilobytes["RssFile:"])


def _forget_peak() -> None:
    """Begins a new peak of resident memory where the system can (proc_pid_clear_refs(5))."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
