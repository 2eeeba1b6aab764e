"""Time of four calls of the grad-cam library, one for each layer, over that of `explanation.explain` for all four.

Grad-CAM of the four stages of ResNet-152 at 224x224, one image. The two alternate, one thread, in CPU time; the heat
maps are compared.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from medvision.explanation import Target, explain
from medvision.models import Classifier
from medvision.spec import DataSpec

LAYERS = [f"encoder.layer{n}" for n in (1, 2, 3, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet152")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = DataSpec("drawn", ("a", "b"), "multiclass", 3, 2, image_size=arguments.size, target="label")  # type: ignore[arg-type]
    # the norms that begin at zero would leave nothing to be explained
    model = Classifier(arguments.network, num_outputs=2, init="kaiming").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.1, 0.5)
    image = torch.randn(1, 3, arguments.size, arguments.size)
    target = Target(spec, lambda logits: logits.softmax(1), "b")

    def library() -> np.ndarray:
        found = []
        for layer in LAYERS:
            with GradCAM(model, [model.get_submodule(layer)]) as cam:
                found.append(cam(image, [ClassifierOutputTarget(1)]))
        return np.stack(found, 1)

    def ours() -> np.ndarray:
        return explain(model, image, LAYERS, ["grad_cam"], target).heat["grad_cam"].numpy()

    rounds = []
    for _ in range(arguments.rounds + 1):
        started = time.process_time()
        theirs = library()
        between = time.process_time()
        found = ours()
        rounds.append((between - started, time.process_time() - between))
        assert theirs.max() > 0.99
        np.testing.assert_allclose(found, theirs, atol=1e-5)
    rounds = rounds[1:]  # the first warms up
    ratios = [slow / fast for slow, fast in rounds]
    slow, fast = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"four calls of the library {slow:.2f} s, ours {fast:.2f} s: median {statistics.median(ratios):.1f} times, "
        f"from {min(ratios):.1f} to {max(ratios):.1f}; greatest difference {np.abs(found - theirs).max():.1e}"
    )


if __name__ == "__main__":
    main()
