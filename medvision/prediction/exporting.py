"""A trained network as a file for other programs: with all that they need to use it, and checked before it is there."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvision import __version__
from medvision.data.images import Pixels
from medvision.errors import MedvisionError
from medvision.files import replacing
from medvision.models import Network
from medvision.prediction.predictor import Trained
from medvision.tasks import require_numbers

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}
"""Each format with the ending of its files."""
METADATA = "medvision"
"""The key of the facts in ONNX's `metadata_props`; with `.json` the name of the extra file of torch.export."""

Answer = Callable[[Tensor], Tensor]


def require_format(form: str) -> None:
    """Refuses a format that cannot be written.

    Raises:
        MedvisionError: If it is unknown, or wants packages that are not installed.
    """
    if form not in FORMATS:
        raise MedvisionError(f"format={form}: expected one of {', '.join(FORMATS)}")
    wanted = ("onnx", "onnxruntime", "onnxscript") if form == "onnx" else ()
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise MedvisionError(f"format={form} needs packages that are not installed: pip install {' '.join(missing)}")


def metadata(trained: Trained, dynamic_size: bool = False) -> dict[str, Any]:
    """What a program has to do before and after the network, as plain values.

    An image of `channels` (RGB or grey) in `input_range` is resized to `size` (height, width) by OpenCV's `INTER_AREA`
    where neither side grows (`resize.shrinking`), else by `INTER_LINEAR`; divided by the end of the range, less `mean`,
    over `std`. The answer is logits; `activation` makes probabilities of them. Those of masks are resized to the image
    (`resize.answer`). Where there is a `temperature`, the logit of each probability is divided by it; a class is there
    where that reaches its `threshold`, without one it is the most probable; `cleaning` is what is then done with masks
    (`medvision.postprocess.Cleaning`).
    """
    task, spec, decision = trained.task, trained.task.spec, trained.decision
    return {
        "model": task.model.title if isinstance(task.model, Network) else type(task.model).__name__,
        "data": spec.name,
        "medvision": __version__,
        "input": "image",
        "channels": spec.in_channels,
        "size": list(spec.image_size),
        "size_multiple_of": _multiple(trained) if dynamic_size else None,
        "input_range": [0, 255],
        "mean": [float(value) for value in trained.mean],
        "std": [float(value) for value in trained.std],
        "resize": {"shrinking": "area", "else": "linear", "answer": "linear" if spec.target == "mask" else None},
        "output": "logits",
        "activation": "softmax" if spec.kind == "multiclass" else "sigmoid",
        "target": spec.target,
        "kind": spec.kind,
        "classes": list(spec.classes),
        "threshold": list(decision.threshold),
        "temperature": list(decision.temperature),
        "cleaning": [dataclasses.asdict(of_class) for of_class in decision.cleaning],
    }


def export(
    trained: Trained,
    path: Path,
    form: str,
    images: Sequence[Pixels],
    dynamic_size: bool = False,
    tolerance: float = 1e-4,
) -> tuple[float, float]:
    """Writes a network in float32, which takes batches of any number; the file is there only once it was checked.

    Args:
        trained: The task, moved to the CPU.
        path: The file.
        form: A key of `FORMATS`.
        images: uint8 (H, W, 1 or 3) to check it on.
        dynamic_size: Whether it takes images of any size whose sides are multiples of the network's stride.
        tolerance: Greatest difference of probabilities, in [0, 1].

    Returns:
        The greatest difference of probabilities, over all images, between the file and the network in float32, and
        between the file and the network in the run's own precision, as it predicts.

    Raises:
        MedvisionError: If the format cannot be written, the network cannot be exported so, or the file answers
            otherwise than the network.
    """
    require_format(form)
    task, spec = trained.task.cpu().float().eval(), trained.task.spec
    task.model.to(memory_format=torch.contiguous_format)
    facts, step = metadata(trained, dynamic_size), _multiple(trained)
    sizes = [spec.image_size] + [(spec.image_size[0] + step, spec.image_size[1] + 2 * step)] * dynamic_size
    seen = [torch.stack([trained.see(image, size) for image in images]).cpu() for size in sizes]
    program = _program(_Logits(task.model), spec.in_channels, spec.image_size, dynamic_size)
    with replacing(path) as temporary:
        answer = (_save_onnx if form == "onnx" else _save_torch)(program, temporary, facts)
        difference = own = 0.0
        with torch.inference_mode():
            for batch in (part for whole in seen for part in (whole, whole[:1])):
                expected, found = task.activate(task(batch)), task.activate(answer(batch))
                require_numbers(expected, "an image of the check")
                difference = max(difference, float((expected - found).abs().max()))
                with trained.precision.forward_context():
                    own = max(own, float((task.activate(task(batch)) - found).abs().max()))
        if not difference <= tolerance:
            raise MedvisionError(
                f"probabilities of the exported network differ by up to {difference:.2g} from those of the "
                f"network itself, more than tolerance={tolerance:g}; nothing was written. Choose another format "
                f"({', '.join(FORMATS)}), or allow more"
            )
    return difference, own


class _Logits(nn.Module):
    """The network behind an input of the name `image`, not compiled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model.forward(image)
        return logits


def _multiple(trained: Trained) -> int:
    model = trained.task.model
    return model.stride if isinstance(model, Network) else 1


def _program(model: nn.Module, channels: int, size: tuple[int, int], dynamic_size: bool) -> Any:
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        dims |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    try:  # two images: a batch of one would be taken for a constant
        return torch.export.export(model, (torch.zeros(2, channels, *size),), dynamic_shapes=(dims,), strict=False)
    except Exception as error:  # whatever its tracing meets in a network
        cure = "leave dynamic_size out" if dynamic_size else "this network has operations that cannot be traced"
        reason = f"{error}".strip().partition("\n")[0]
        raise MedvisionError(f"torch.export refuses this network ({type(error).__name__}: {reason}); {cure}") from error


def _save_torch(program: Any, path: Path, facts: dict[str, Any]) -> Answer:
    with path.open("wb") as handle:
        torch.export.save(program, handle, extra_files={f"{METADATA}.json": json.dumps(facts)})
    with path.open("rb") as handle:
        module: Answer = torch.export.load(handle).module()
    return module


def _save_onnx(program: Any, path: Path, facts: dict[str, Any]) -> Answer:
    import onnxruntime

    made: Any = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"])
    made.model.metadata_props[METADATA] = json.dumps(facts)
    made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
