"""Whatever lies in conf/experiment runs at the small scale: one as typed, of all others each job in this process."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from medvision import cli as command_line
from medvision import train
from medvision.comparison.variants import grouped

EXPERIMENTS = sorted(file.stem for file in (Path(__file__).resolve().parents[2] / "conf/experiment").glob("*.yaml"))
TYPED = "isic2017_unet_vs_unetv2"


@pytest.fixture(scope="module")
def places(own_places):
    """Those of this module, where no pretrained weights are named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MEDVISION_PRETRAINED", raising=False)
        yield own_places


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != TYPED])
def test_an_experiment_at_the_small_scale(name, jobs_of, places):
    fingerprints, stored = set(), []
    for number, job in enumerate(jobs_of(name, "+scale=smoke")):
        folder = places / "runs" / name / str(number)
        cfg = command_line.compose("train", [*job, "trainer.accelerator=cpu", "hydra.mode=RUN"])
        with open_dict(cfg):
            del cfg["hydra"]
        train.start(cfg, folder, job)
        results = json.loads((folder / "metrics.json").read_text())
        fingerprints.add(results["fingerprint"])
        assert results["epoch"] == 1 and results["challenge"] == {}
        stored.append(OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml")))
        assert stored[-1]["data"]["spec"]["name"].startswith("phantom")
        shutil.rmtree(folder)  # checkpoints of large networks, some hundred MB each
    assert (
        len(fingerprints) == 1 and len(grouped(stored)) == number + 1
    )  # each a variant of its own, on the same images


def test_an_experiment_as_it_is_typed(cli, jobs_of):
    folder = cli.root / "sweep"
    done = cli("train", f"experiment={TYPED}", "+scale=smoke", f"hydra.sweep.dir={folder}")
    runs = sorted(config.parents[1] for config in folder.rglob(".hydra/config.yaml"))
    assert len(runs) == len(jobs_of(TYPED, "+scale=smoke")) == 2
    for run, model in zip(runs, ("SMP", "UNetV2"), strict=True):
        cfg = OmegaConf.load(run / ".hydra/config.yaml")
        assert cfg.model._target_ == f"medvision.models.{model}" and cfg.data.spec.name == "phantom_isic2017"
        assert json.loads((run / "metrics.json").read_text())["epoch"] == 1
    assert "jaccard_image, phantom_isic2017 test: 8 images" in done.stdout
    variants = json.loads((folder / "comparison" / "comparison.json").read_text())["variants"]
    assert len(variants) == 2 and "unetv2" in str(variants)
