import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import flop_counter

from medvision import costs
from medvision.costs import measure, multiply_adds

CPU = torch.device("cpu")


class Net(nn.Module):
    """Convolutions, one of them grouped, one transposed, and a frozen scale; the answer is as classifiers' too."""

    def __init__(self, answer="tensor"):
        super().__init__()
        self.answer = answer
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 4, (1, 5), groups=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False)
        self.scale = nn.Parameter(torch.ones(7), requires_grad=False)
        self.seen = []

    def forward(self, image):
        self.seen.append((self.training, image.is_contiguous(memory_format=torch.channels_last), image.shape))
        logits = self.up(self.second(self.first(image)))
        return {"tensor": logits, "list": [logits, logits[..., :1]], "label": logits.mean((2, 3))}[self.answer]


PARAMETERS = (3 * 9 * 8 + 8) + 4 * 4 * 5 + 4 * 2 * 4
MULTIPLY_ADDS = (16 * 24) * 8 * 3 * 9 + (16 * 20) * 4 * 4 * 5 + (16 * 20) * 4 * 2 * 4  # at 32x48


def test_multiply_adds_of_convolutions():
    assert multiply_adds(Net(), torch.zeros(1, 3, 32, 48)) == MULTIPLY_ADDS


class Attention(nn.Module):
    """An attention of two heads, 16 queries of width 8 for 5 keys with values of width 8."""

    def forward(self, image):
        query, key = image.new_zeros(1, 2, 16, 8), image.new_zeros(1, 2, 5, 8)
        return F.scaled_dot_product_attention(query, key, key)


@pytest.mark.parametrize("old", [False, True])
def test_multiply_adds_of_attention(old, monkeypatch):
    if old:  # a PyTorch that leaves it out
        monkeypatch.delitem(flop_counter.flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    assert multiply_adds(Attention(), torch.zeros(1, 3, 8, 8)) == 2 * 16 * 5 * (8 + 8)


def test_multiply_adds_of_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
    tokens = 10
    projections, attention, mlp = tokens * 16 * (3 * 16 + 16), tokens * tokens * (16 + 16), 2 * tokens * 16 * 32
    before = torch.backends.mha.get_fastpath_enabled()
    assert multiply_adds(layer, torch.zeros(1, tokens, 16)) == projections + attention + mlp
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("name", ["pvt_v2_b0", "mixed"])
def test_no_attention_of_an_encoder_is_left_out(name):
    """By hand: patches, keys and values of fewer tokens, projections, attention, and a depthwise 3x3 in each MLP."""
    import timm
    from segmentation_models_pytorch.encoders import get_encoder

    if name == "mixed":
        encoder = get_encoder("mit_b0", weights=None).eval()
        widths, depths, reductions, mlp = (32, 64, 160, 256), (2, 2, 2, 2), (8, 4, 2, 1), (4, 4, 4, 4)
    else:
        encoder = timm.create_model(name, features_only=True).eval()
        widths, depths, reductions, mlp = (32, 64, 160, 256), (2, 2, 2, 2), (8, 4, 2, 1), (8, 8, 4, 4)
    expected, width_before = 0, 3
    for level, (width, depth, reduction, ratio) in enumerate(zip(widths, depths, reductions, mlp, strict=True)):
        side = 64 // 2 ** (level + 2)
        tokens, kept = side**2, (side // reduction) ** 2
        kernel = 7 if level == 0 else 3
        expected += tokens * width_before * width * kernel**2
        shrink = kept * width * width * reduction**2 if reduction > 1 else 0
        projections = 2 * tokens * width**2 + 2 * kept * width**2
        attention = 2 * tokens * kept * width
        perceptron = 2 * tokens * width * width * ratio + tokens * width * ratio * 9
        expected += depth * (shrink + projections + attention + perceptron)
        width_before = width
    assert multiply_adds(encoder, torch.zeros(1, 3, 64, 64)) == expected


@pytest.mark.parametrize("answer", ["tensor", "list", "label"])
@pytest.mark.parametrize("half", [False, True])
def test_measure(answer, half):
    nets = []

    def make():
        nets.append(Net(answer))
        return nets[-1]

    cost = measure(make, (2, 3, 32, 48), CPU, steps=2, bf16=half, channels_last=half)
    assert (cost.parameters, cost.trainable, cost.multiply_adds) == (PARAMETERS + 7, PARAMETERS, MULTIPLY_ADDS)
    assert 0 < cost.inference_seconds < 60 and 0 < cost.training_seconds < 60
    assert cost.training_bytes >= cost.inference_bytes >= 0
    (net,) = nets
    batch, one = torch.Size([2, 3, 32, 48]), torch.Size([1, 3, 32, 48])
    steps = [(False, half, batch)] * 3 + [(True, half, batch)] * 3 + [(False, half, one)]
    assert net.seen == steps
    assert net.scale.grad is None and net.up.weight.grad.abs().max() > 0


def test_a_training_step_moves_the_weights():
    net = Net()
    before = net.up.weight.detach().clone()
    measure(lambda: net, (1, 3, 16, 16), CPU, steps=1)
    assert not torch.equal(net.up.weight, before) and torch.equal(net.scale, torch.ones(7))


@pytest.mark.parametrize("shapes", [[(2, 1, 4, 4)], [(2, 5)], [(2, 1, 4, 4), (2, 1, 2, 2)]])
def test_the_loss_does_not_care_about_shapes(shapes):
    outputs = [torch.zeros(shape) for shape in shapes]
    for given in (outputs, outputs[0]):
        assert costs._loss(given).item() == pytest.approx(math.log(2))


def test_a_time_is_the_median_of_all_steps_but_the_first(monkeypatch):
    clock = iter([0, 100, 100, 101, 101, 111, 111, 113])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    ran = []
    assert costs._median_seconds(lambda: ran.append(1), 3, CPU) == 2 and len(ran) == 4


def test_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    measure(Net, (1, 3, 16, 16), CPU, steps=1)
    measure(Net, (1, 3, 16, 16), CPU, steps=1, threads=3)
    assert asked == [3]
