"""Heat maps during training: which epochs, whose weights, which files; the training itself stays the same."""

import re
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from medvision import figures
from medvision.callbacks import EMA, Explanations, pictures
from medvision.errors import MedvisionError
from medvision.explanation import explain
from medvision.losses import CrossEntropy, SegmentationLoss
from medvision.models import Classifier, UNetPP
from medvision.tasks import ClassificationTask, SegmentationTask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EPOCHS = 3


class Drawing(nn.Module):
    """Draws random numbers and keeps running statistics, both of which a careless explanation would change."""

    def __init__(self, model):
        super().__init__()
        self.model, self.drop = model, nn.Dropout(0.3)

    def forward(self, image):
        return self.model(self.drop(image))


@pytest.fixture
def fit(dataset, fake_hymenoptera, fake_isic2017, tmp_path):
    """`fit("run", callback, ...)`: trains a tiny network in a folder; the trainer and the weights and momenta after."""

    def train(name, *extra, masks=False, logger=False, watched=None):
        archive = "isic2017" if masks else "hymenoptera"
        root = (fake_isic2017 if masks else fake_hymenoptera)(tmp_path / archive / name)
        data = dataset(archive, root, batch_size=3, image_size=32)
        data.watched = watched
        torch.manual_seed(0)
        if masks:
            model, make, loss = UNetPP(channels=(4, 8)), SegmentationTask, SegmentationLoss({"bce": 1})
        else:
            model, make, loss = Classifier("resnet10t", num_outputs=2), ClassificationTask, CrossEntropy()
        task = make(Drawing(model), loss, partial(torch.optim.SGD, lr=0.01, momentum=0.9), None, data.spec)
        folder = tmp_path / name
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[*extra],
            logger=TensorBoardLogger(folder, name=None, version="tensorboard") if logger else False,
            default_root_dir=folder,
            accumulate_grad_batches=2,  # gradients stay over validation
            val_check_interval=1,
            limit_train_batches=3,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(task, datamodule=data)
        [optimizer] = trainer.optimizers
        momenta = {f"momentum {n}": s["momentum_buffer"] for n, s in enumerate(optimizer.state.values())}
        state = dict(task.state_dict()) | momenta | {"random": torch.get_rng_state()}
        return folder, {key: value.clone() for key, value in state.items()}

    return train


@pytest.mark.parametrize("masks", [False, True])
def test_training_is_the_same_bit_for_bit(fit, masks):
    _, without = fit("without", masks=masks)
    folder, found = fit("with", Explanations(images=3, method="eigen_grad_cam"), masks=masks, logger=True)
    assert len(list((folder / "explanations").iterdir())) == EPOCHS
    assert found.keys() == without.keys() and len(found) > 20
    assert [key for key, value in found.items() if not torch.equal(value, without[key])] == []


def test_files_and_loggers_at_chosen_epochs(fit):
    folder, _ = fit("run", Explanations(images=2, epochs=[1, 3], layers=["model.encoder.layer1"] * 2), logger=True)
    files = sorted((folder / "explanations").iterdir())
    assert [file.name for file in files] == ["epoch_0001.png", "epoch_0003.png"]
    sheets = [np.asarray(Image.open(file)) for file in files]
    assert sheets[0].shape == sheets[1].shape and not np.array_equal(*sheets)
    assert sheets[0].shape[1] == 2 * 230 and sheets[0].shape[0] > 2 * 224  # image and a layer; two images
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = events.Images("explanations")
    assert len({event.step for event in shown}) >= 2
    assert (shown[0].height, shown[0].width) == sheets[0].shape[:2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["model.encoder.layer9"]}, r"no layer 'model\.encoder\.layer9': did you mean"),
        ({"layers": ["model.head"]}, r"layer model\.head answers 2 for an image of 32x32: no map"),
        ({"target": "wasps"}, "target=wasps: expected one of predicted, ants, bees"),
    ],
)
def test_what_cannot_be_explained_is_refused_before_the_first_step(options, words, fit):
    steps = []

    class Note(pl.Callback):
        def on_train_batch_start(self, *_):
            steps.append(1)

    with pytest.raises(MedvisionError, match=words):
        fit("run", Explanations(**options), Note())
    assert not steps


def test_every_second_epoch(fit):
    folder, _ = fit("run", Explanations(images=1, epochs=2))
    assert [file.name for file in (folder / "explanations").iterdir()] == ["epoch_0002.png"]


def test_the_weights_explained_are_those_of_validation(fit, monkeypatch):
    """With an average of the weights, whichever callback comes first."""
    events = []

    def noted(model, *arguments):
        events.append(("explained", next(model.parameters()).detach().clone()))
        return explain(model, *arguments)

    class Note(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            events.append(("validated", next(pl_module.model.parameters()).detach().clone()))

        def on_train_batch_end(self, trainer, pl_module, *_):
            events.append(("trained", next(pl_module.model.parameters()).detach().clone()))

    monkeypatch.setattr(pictures, "explain", noted)
    for name, order in (("before", [Explanations(images=1), EMA(0.5)]), ("after", [EMA(0.5), Explanations(images=1)])):
        events.clear()
        fit(name, *order, Note())
        latest = {}
        for kind, weights in events:
            latest[kind] = weights
            if kind == "explained":
                assert torch.equal(weights, latest["validated"])
                averaged = "trained" in latest and not torch.equal(weights, latest["trained"])
        assert averaged


def test_captions_have_image_and_answer_in_lines_of_their_own(fit, monkeypatch):
    """Either may be long, and what is longer than a picture is cut."""
    drawn = []
    monkeypatch.setattr(figures, "gallery", lambda path, tiles, *_, **__: drawn.append(tiles))
    fit("run", Explanations(images=2, epochs=[1], layers=["model.encoder.layer1"]))
    captions = [tile.caption for tile in drawn[-1]]
    assert all(re.fullmatch(r"ants/\w+\n0\.\d{3} (ants|bees)", caption) for caption in captions[::2])
    assert captions[1::2] == ["model.encoder.layer1"] * 2


def test_a_second_split_that_is_watched_has_no_rows(fit, monkeypatch):
    """`protocol=paper` validates the reported split too, whose images are not asked for."""
    rows = []
    monkeypatch.setattr(Explanations, "_draw", lambda self, trainer: rows.append(len(self._rows)))
    fit("run", Explanations(images=99), masks=True, watched="test")
    assert {*rows} == {3}  # images of val


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": 0}, "images=0, epochs=1; expected numbers of 1 or more"),
        ({"epochs": 0}, "epochs=0; expected"),
        ({"epochs": [3, 0]}, r"epochs=\[3, 0\]; expected"),
        ({"epochs": []}, r"epochs=\[\]; expected"),
        ({"method": "score_cam"}, r"callbacks\.explain\.method=score_cam: expected one of grad_cam, "),
    ],
)
def test_refuses(options, words):
    with pytest.raises(MedvisionError, match=words):
        Explanations(**options)
