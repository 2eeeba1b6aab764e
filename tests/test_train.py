"""What interrupts a training, and what it says then."""

import shlex
import signal

import pytest

from medvision import cli, train
from medvision.errors import MedvisionError
from medvision.tasks import SegmentationTask

TINY = ["data.images={train:4,val:2,test:2}", "data.image_size=32", "data.num_workers=0", "trainer.accelerator=cpu"]
TINY += ["model=unet_plain", "model.width=4", "model.depth=2", "trainer.max_epochs=1", "callbacks.pictures=null"]


@pytest.fixture
def interrupting():
    """Raises what Ctrl-C does; Lightning ignores further ones for good."""
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        raise KeyboardInterrupt

    yield interrupt
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["training_step", "test_step"])
def test_an_interrupted_run_says_how_to_go_on(own_places, tmp_path, monkeypatch, interrupting, where):
    monkeypatch.setattr(SegmentationTask, where, interrupting)
    folder = tmp_path / "a run, n=1"
    with pytest.raises(MedvisionError, match=r"^interrupted; go on with: python -m medvision.train ") as refused:
        train.start(cli.compose("train", TINY), folder, TINY)
    monkeypatch.undo()
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / ".best.ckpt.1.tmp").touch()  # as if it had been killed
    (word,) = shlex.split(str(refused.value))[-1:]
    train.start(cli.compose("train", [word]), folder, [word])
    assert (folder / "metrics.json").exists() and not [*folder.rglob(".*.tmp")]


def test_an_interrupt_is_no_error_of_ours(capsys, interrupting):
    with pytest.raises(SystemExit) as ended, cli._refusals(with_traceback=False):
        interrupting()
    assert ended.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_a_full_disk_is_told_in_one_message(capsys):
    with pytest.raises(SystemExit) as ended, cli._refusals(with_traceback=False), open("/dev/full", "w") as full:
        full.write("more")
    said = "error: [Errno 28] No space left on device; make room where runs and the cache lie, and go on\n"
    assert ended.value.code == 1 and capsys.readouterr().err.startswith(said)
    with pytest.raises(FileNotFoundError), cli._refusals(with_traceback=False):
        raise FileNotFoundError("no error of ours, which keeps its traceback")
