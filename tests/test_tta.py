import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medvision.errors import MedvisionError
from medvision.tta import D4, FLIPS, VIEWS, TestTimeAugmentation, View

SIZES = [(6, 9), (8, 8), (5, 1)]


def sigmoid(logits):
    return logits.float().sigmoid()


@pytest.mark.parametrize("size", SIZES)
def test_the_eight_symmetries_are_those_of_numpy(size):
    image = torch.randn(2, 3, *size)
    plain = image.numpy()
    expected = [np.rot90(x, turns, (-2, -1)) for x in (plain, plain[..., ::-1]) for turns in range(4)]
    seen = [view.of(image).numpy() for view in D4]
    assert len(seen) == 8
    for view in seen:
        assert sum(view.shape == e.shape and (view == e).all() for e in expected) == (1 if min(size) > 1 else 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", D4)
def test_a_view_is_undone_exactly(view, size):
    image = torch.randn(2, 3, *size)
    assert torch.equal(view.undo(view.of(image), image.shape[-2:]), image)


def test_a_scaled_view_has_its_size_and_comes_back_to_the_images():
    image = torch.linspace(0, 1, 12).expand(1, 1, 8, 12)
    view = View(transposed=True, dims=(-1,), scale=0.75)
    assert view.of(image).shape == (1, 1, 9, 6)
    back = view.undo(view.of(image), image.shape[-2:])
    assert back.shape == image.shape and (back - image).abs()[..., 1:-1].max() < 0.05


def test_words():
    assert [len(VIEWS[name]) for name in ("none", "flips", "d4", "d4_scales")] == [1, 4, 8, 24]
    assert VIEWS["flips"] == FLIPS and len(set(VIEWS["d4_scales"])) == 24
    with pytest.raises(MedvisionError, match="tta=d5: expected one of none, flips, d4, d4_scales"):
        TestTimeAugmentation("d5")
    with pytest.raises(MedvisionError, match="tta_mean=median: expected probability or logit"):
        TestTimeAugmentation("d4", "median")


@settings(max_examples=20, deadline=None)
@given(
    views=st.sampled_from(["none", "flips", "d4"]),
    mean_of=st.sampled_from(["probability", "logit"]),
    batch=st.integers(1, 40),
    size=st.sampled_from([(6, 9), (7, 7)]),
)
def test_the_mean_over_views_is_that_of_a_loop(views, mean_of, batch, size):
    torch.manual_seed(0)
    model, image = nn.Conv2d(3, 2, 3, padding=1), torch.randn(3, 3, *size)
    with torch.no_grad():
        found = TestTimeAugmentation(views, mean_of, batch)(model, sigmoid, image)
        each = []
        for view in VIEWS[views]:
            logits = view.undo(model(view.of(image)), image.shape[-2:])
            each.append(logits.sigmoid() if mean_of == "probability" else logits)
        mean = torch.stack(each).mean(0)
    expected = mean if mean_of == "probability" else mean.sigmoid()
    assert found.shape == (3, 2, *size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_model_that_treats_all_views_alike_answers_the_same():
    image = torch.randn(2, 3, 5, 8)
    model = nn.AvgPool2d(3, 1, 1)
    for views in ("flips", "d4"):
        found = TestTimeAugmentation(views)(model, sigmoid, image)
        torch.testing.assert_close(found, model(image).sigmoid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(6, 9), (8, 8)])
def test_labels(size):
    torch.manual_seed(0)
    head, image = nn.Linear(3 * 4, 5), torch.randn(2, 3, *size)

    def model(x):
        return head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

    found = TestTimeAugmentation("d4_scales")(model, lambda logits: logits.softmax(1), image)
    assert found.shape == (2, 5)
    expected = torch.stack([model(view.of(image)).softmax(1) for view in VIEWS["d4_scales"]]).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_more_images_at_once_than_asked():
    given_at_once = []

    def model(x):
        given_at_once.append(len(x))
        return x

    TestTimeAugmentation("d4", batch=8)(model, sigmoid, torch.randn(3, 1, 4, 4))
    assert given_at_once == [6, 6, 6, 6]
    given_at_once.clear()
    TestTimeAugmentation("d4", batch=2)(model, sigmoid, torch.randn(3, 1, 4, 6))
    assert given_at_once == [3] * 8
