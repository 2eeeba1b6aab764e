"""Whatever lies in conf/ is composed and built: a new yaml is tested by being there."""

import platform
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from medvision import cli
from medvision.build import build, build_data, keep_freed_memory
from medvision.configs import portable
from medvision.errors import MedvisionError
from medvision.models import EncoderModel
from medvision.runs import RunFolder
from medvision.tasks import ClassificationTask, SegmentationTask

CONF = Path(__file__).resolve().parents[1] / "conf"
NOT_A_PART = {"hydra", "experiment", "scale", "task"}  # Hydra's own; whole trainings; what a data set chooses


def choices(group):
    return sorted(file.stem for file in (CONF / group).glob("[!_]*.yaml"))


GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in NOT_A_PART)
SMALL = ["data.image_size=64", "data.batch_size=2", "data.num_workers=0", "trainer.accelerator=cpu"]


def compose(*overrides, verb="train"):
    """A config without Hydra's own node, as the entry points get it."""
    cfg = cli.compose(verb, list(overrides))
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def first_of_each(names, facts):
    """The first name for each distinct value of `facts(name)`: {value: name}."""
    return {facts(name): name for name in reversed(names)}


def data_facts(name):
    """All that a model can tell of a data set: target, kind, channels, number of classes."""
    spec = compose(f"data={name}").data.spec
    return spec.get("target", "mask"), spec.kind, spec.in_channels, len(spec.classes)


def data_target(name):
    return data_facts(name)[0]


def model_target(name):
    """What a model answers; an own module without `target` answers masks."""
    return getattr(get_class(compose(f"model={name}").model._target_), "target", "mask")


DATA = choices("data")
MODELS = choices("model")
DATA_OF = first_of_each([name for name in DATA if name.startswith("phantom")], data_target)
"""A drawn data set for each target."""
MODEL_OF = {"mask": "unetv2", "label": "resnet18"}
PARTS = [(group, choice) for group in GROUPS for choice in choices(group)]
LEARNED = sorted(
    {(MODEL_OF[data_target(data)], data) for data in DATA}
    | {
        (model, data)
        for model in MODELS
        for facts, data in first_of_each(DATA, data_facts).items()
        if facts[0] == model_target(model)
    }
)
"""Each model with a data set of each kind, each data set with one model."""


def beside(group, choice):
    """What has to be chosen for a part to fit."""
    if group == "data":
        return [f"model={MODEL_OF[data_target(choice)]}"]
    if group == "model":
        return [f"data={DATA_OF[model_target(choice)]}"]
    if group == "loss":
        target = get_class(compose(f"loss={choice}").loss._target_).target
        return [f"data={DATA_OF[target]}", f"model={MODEL_OF[target]}"]
    return []


@pytest.fixture(scope="module", autouse=True)
def places(own_places):
    """Those of this module, where wandb does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        yield own_places


@pytest.fixture
def prepared(request, places):
    """`prepared("isic2017")`: overrides with which a data set is at hand: a fake of it, or few drawn images."""

    def prepare(name):
        cfg = compose(f"data={name}")
        if cfg.data.phantom:
            return [f"data.images.{split}=10" for split in cfg.data.images]
        try:
            fake = request.getfixturevalue(f"fake_{name}")
        except pytest.FixtureLookupError:
            pytest.skip(f"no fixture fake_{name} writes this data set")
        root = places / "fakes" / name  # data sets of one source share the root of their configs
        if not root.exists():
            fake(root)
        return [f"data.root={root}"]

    return prepare


def test_groups_are_found():
    assert {"model", "data", "loss", "optimizer", "scheduler", "augment", "callbacks", "logger", "trainer"} <= set(
        GROUPS
    )
    assert ("model", "unetv2") in PARTS and ("data", "_base") not in PARTS


@pytest.mark.parametrize(("group", "choice"), PARTS, ids=["=".join(part) for part in PARTS])
def test_every_part_is_built(group, choice, tmp_path):
    run = build(compose(f"{group}={choice}", *beside(group, choice), *SMALL))
    masks = run.data.spec.target == "mask"
    assert isinstance(run.task, SegmentationTask if masks else ClassificationTask)
    assert isinstance(run.task.model, nn.Module)
    k, plane = run.data.spec.num_outputs, (8, 8) if masks else ()
    target = torch.zeros(1).long() if run.data.spec.kind == "multiclass" else torch.ones(1, k, *plane)
    assert run.task.loss(torch.zeros(1, k, *plane), target) > 0
    configured = run.task.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    assert optimizer.defaults["lr"] == run.config.optimizer.lr
    assert isinstance(configured, dict) == bool(run.config.scheduler)
    run.folder = RunFolder(tmp_path)
    trainer, *_ = run.training()
    assert len(trainer.loggers) == 1 + len(run.config.logger)
    assert {type(c).__name__ for c in trainer.callbacks} >= {"Checkpoint", "EpochLines"}


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_is_built(name, jobs_of):
    jobs = jobs_of(name)
    variants = [job for job in jobs if "seed=1" in job] or jobs
    configs = [compose(*job) for job in variants]
    assert len({OmegaConf.to_yaml(cfg) for cfg in configs}) == len(variants)
    if len(jobs) > 1:  # a claim
        seeds = Counter(word for job in jobs for word in job if word.startswith("seed="))
        assert seeds == {f"seed={seed}": len(variants) for seed in (1, 2, 3)}
    run = build(configs[0], pretrained=False)  # no download
    assert (run.data.phantoms is None) == (name != "demo")
    assert next(run.task.model.parameters()).requires_grad


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_has_a_small_scale(name, jobs_of):
    large, small = jobs_of(name), jobs_of(name, "+scale=smoke")
    assert len(small) <= 8 and len(large) % len(small) == 0
    for job in (small[0], small[-1]):
        cfg = compose(*job)
        assert cfg.data.phantom and cfg.data.spec.name.startswith("phantom") and not cfg.data.spec.get("challenge")
        assert (cfg.data.image_size, cfg.trainer.max_epochs) == (32, 1)
        assert len(small) == 1 or cfg.seed == 1
        if name != "demo":
            assert cfg.model.get("encoder_weights") is None  # no network


def test_pretrained_weights_are_named_by_the_environment(jobs_of, monkeypatch):
    def weights(name, *words):
        return list(dict.fromkeys(compose(*job).model.encoder_weights for job in jobs_of(name, *words)))

    assert weights("isic2017_pretraining") == [None, "imagenet"]
    assert weights("isic2018_attributes_encoder") == ["imagenet"]
    monkeypatch.setenv("MEDVISION_PRETRAINED", "/runs/a,/runs/b")
    assert weights("isic2017_pretraining") == [None, "/runs/a", "/runs/b"]
    assert weights("isic2017_pretraining", "+scale=smoke") == ["/runs/a", "/runs/b"]


@pytest.mark.parametrize("name", choices("data"))
def test_every_data_set_is_built(name):
    cfg = compose(f"data={name}", verb="prepare")
    data = build_data(cfg)
    assert data.spec.name == name and data.spec.num_outputs == len(data.spec.classes)


@pytest.mark.parametrize("name", [name for name in DATA if not name.startswith("phantom")])
def test_phantoms_are_drawn_in_the_layout_of_a_data_set(name):
    cfg = compose(f"data={name}", "data.phantom=true", "data.images=24", "data.image_size=16", verb="prepare")
    if get_class(cfg.data._target_).drawing is None:
        with pytest.raises(MedvisionError, match=f"nothing draws in the layout of {name}; leave it out"):
            build_data(cfg)
        return
    data = build_data(cfg)
    assert (data.spec.name, data.spec.challenge) == (f"phantom_{name}", None)
    assert len(data.samples) == 24 and {*data.splits} >= {"train", "val"}
    assert [problem for problem in data.problems if problem.grade != "note"] == []
    real = compose(f"data={name}", verb="prepare").data.spec
    assert real.name == name and data.spec.classes == tuple(real.classes)


def test_every_task_is_chosen_by_a_data_set():
    chosen = {cli.compose("train", [f"data={d}"]).hydra.runtime.choices["task@_global_"] for d in DATA}
    assert chosen == set(choices("task"))


@pytest.mark.parametrize("verb", [file.stem for file in CONF.glob("*.yaml")])
def test_every_verb_is_composed(verb):
    cfg = compose(verb=verb)
    OmegaConf.resolve(cfg)
    assert cfg.traceback is False


def test_pairs_are_found():
    assert {data for _, data in LEARNED} == set(DATA) and {model for model, _ in LEARNED} == set(MODELS)
    assert len(LEARNED) < len(MODELS) * len(DATA)
    assert {"resnet18", "unet"} <= set(choices("model"))
    assert (model_target("resnet18"), model_target("unet")) == ("label", "mask")


@pytest.mark.parametrize(
    ("model", "other"), [(m, other) for m in choices("model") for other in DATA_OF if other != model_target(m)]
)
def test_a_model_is_refused_for_data_of_another_target(model, other):
    said = f"answers a {model_target(model)}.* data={DATA_OF[other]} has {other}s: choose model="
    with pytest.raises(MedvisionError, match=said):
        build(compose(f"model={model}", f"data={DATA_OF[other]}", *SMALL))


@pytest.mark.parametrize(("model", "data"), LEARNED, ids=["-".join(pair) for pair in LEARNED])
def test_models_learn_from_data(model, data, prepared):
    run = build(compose(f"model={model}", f"data={data}", "augment=heavy", *SMALL, *prepared(data)))
    task, spec = run.task, run.data.spec
    batch = next(iter(run.data.train_dataloader()))
    assert [*batch] == ["image", "target", "id"] and batch["image"].shape == (2, spec.in_channels, 64, 64)
    if spec.target == "mask":
        assert batch["target"].shape == (2, spec.num_outputs, 64, 64)
    else:
        labels = [{s.id: s.labels for s in run.data.samples}[i] for i in batch["id"]]
        flags = [[float(k in found) for k in range(spec.num_outputs)] for found in labels]
        multiclass = spec.kind == "multiclass"
        assert batch["target"].tolist() == ([found[0] for found in labels] if multiclass else flags)
        assert batch["target"].dtype == (torch.int64 if multiclass else torch.float32)
    loss = task.loss(task.train()(batch["image"]), batch["target"])
    loss.backward()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    assert loss.isfinite() and len(gradients) > 10
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 0
    with torch.inference_mode():
        probability = task.eval().probability(batch["image"])
    assert probability.shape == (2, spec.num_outputs, *((64, 64) if spec.target == "mask" else ()))
    assert probability.min() >= 0 and probability.max() <= 1
    if spec.kind == "multiclass":
        torch.testing.assert_close(probability.sum(1), torch.ones(2))


@pytest.mark.parametrize("model", choices("model"))
def test_the_optimizer_has_each_parameter_once_layer_by_layer(model):
    overrides = [f"model={model}", *beside("model", model), "optimizer.no_decay_on_norms=true", *SMALL]
    if not isinstance(build(compose(*overrides)).task.model, EncoderModel):
        with pytest.raises(
            MedvisionError, match=r"optimizer.layer_decay=0.5 counts the layers of an encoder, and this"
        ):
            build(compose(*overrides, "optimizer.layer_decay=0.5"))
        return
    task = build(compose(*overrides, "optimizer.layer_decay=0.5", "model.freeze_encoder=2")).task
    groups = task.configure_optimizers()["optimizer"].param_groups
    trained = [p for group in groups for p in group["params"]]
    assert len(trained) == len(set(trained)) and set(trained) == {p for p in task.parameters() if p.requires_grad}
    rates = sorted({group["lr"] for group in groups}, reverse=True)
    assert len(rates) > 4 and rates == [1e-3 * 0.5**n for n in range(len(rates))]


def test_defaults():
    cfg = compose()
    assert (cfg.model._target_, cfg.data._target_) == ("medvision.models.UNetV2", "medvision.data.ISIC2017")
    assert cfg.data.spec.name == "phantom" and cfg.data.phantom


def test_the_data_set_chooses_the_task_and_the_task_the_loss():
    cfg = compose("model=unetv2", "data=isic2017")
    assert cfg.task._target_ == "medvision.tasks.SegmentationTask"
    assert {name: weight for name, weight in cfg.loss.terms.items() if weight} == {"bce": 0.5, "dice": 1}


@pytest.mark.parametrize("order", [1, -1])
def test_a_loss_that_is_asked_for_wins(order):
    cfg = compose(*["data=dsb2018", "loss=lovasz"][::order])
    assert {name: weight for name, weight in cfg.loss.terms.items() if weight} == {"lovasz": 1}


def test_the_facts_of_the_data_set_reach_the_model():
    cfg = compose("data=isic2017", "data.spec.in_channels=1", "data.spec.num_outputs=2")
    assert (cfg.model.in_channels, cfg.model.num_outputs) == (1, 2)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("asked", "size"), [("[64,96]", (64, 96)), ("64", (64, 64))])
def test_image_size(data, asked, size):
    assert build_data(compose(f"data={data}", f"data.image_size={asked}")).spec.image_size == size


def test_image_size_and_seed_reach_the_batches(prepared):
    overrides = [*SMALL, *prepared("phantom"), "data.image_size=[32,48]", "augment=none"]
    first, again, other = (
        next(iter(build(compose(*overrides, f"seed={seed}")).data.train_dataloader())) for seed in (0, 0, 1)
    )
    assert first["image"].shape == (2, 3, 32, 48)
    assert first["id"] == again["id"] and torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])


def test_a_seed_makes_the_same_weights():
    first, again, other = (build(compose(f"seed={seed}")).task.model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_an_own_module_is_a_model():
    cfg = compose("data.image_size=8")
    cfg.model = {"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 1, "kernel_size": 1}
    assert isinstance(build(cfg).task.model, nn.Conv2d)


@pytest.mark.parametrize("option", ["encoder_weights", "published_weights"])
def test_files_to_begin_with_are_not_needed_where_a_checkpoint_follows(option):
    cfg = compose(f"model.{option}=nowhere.pth", *SMALL)
    with pytest.raises(MedvisionError, match=f"nowhere.pth': no such file. Give model.{option}=null"):
        build(cfg)
    assert build(cfg, pretrained=False).config.model[option] is None


def test_build_leaves_the_config_as_it_was():
    cfg = compose("model.num_outputs=${data.spec.num_outputs}")
    before = OmegaConf.to_yaml(cfg)
    build(cfg)
    assert OmegaConf.to_yaml(cfg) == before and "${" in before


def test_places_follow_the_environment(places, monkeypatch):
    cfg = cli.compose("train", ["data=isic2017"])
    assert Path(cfg.data.root) == places / "data" / "isic2017"
    assert Path(cfg.data.cache) == places / "cache"
    assert Path(cfg.hydra.run.dir).parent == places / "runs"
    assert Path(cfg.hydra.run.dir).name.startswith("isic2017-unetv2-")
    for name in ("DATA", "CACHE", "RUNS"):
        monkeypatch.delenv(f"MEDVISION_{name}")
    cfg = compose()
    assert (cfg.paths.data, Path(cfg.paths.cache).resolve(), cfg.paths.runs) == (
        "data",
        Path(".cache").resolve(),
        "runs",
    )


def test_what_was_typed_as_a_place_is_found_from_elsewhere(places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["data=folder", "data.root=mine", "data.exclude=list.txt", "ckpt_path=a.ckpt"]
    stored = portable(cli.compose("train", words))
    typed = stored["data"]["root"], stored["data"]["exclude"], stored["ckpt_path"]
    assert typed == tuple(str(tmp_path / name) for name in ("mine", "list.txt", "a.ckpt"))
    assert portable(cli.compose("train", ["data=isic2017"]))["data"]["root"] == "${paths.data}/${data.spec.name}"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("modle=unet", "model"),
        ("sed=1", "seed"),
        ("experimnet=demo", "experiment"),
        ("trainer.max_epoch=3", "trainer.max_epochs"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("data.imagesize=64", "data.image_size"),
        ("callbacks.early_stoping.patience=3", "callbacks.early_stopping.patience"),
    ],
)
def test_a_misspelled_option_is_answered_with_the_right_name(override, meant):
    key = override.split("=")[0]
    with pytest.raises(MedvisionError, match=f"^{override}: there is no option '{key}'.*did you mean '{meant}'"):
        cli.compose("train", ["loss=dice", override, "seed=2"])


@pytest.mark.parametrize(
    ("group", "choice", "meant"),
    [("model", "unetv3", "unetv2"), ("data", "isic17", "isic2017"), ("loss", "bec", "bce")],
)
def test_a_misspelled_choice_is_answered_with_the_right_name(group, choice, meant):
    message = f"^{group}={choice}: there is no such choice.*did you mean '{meant}'.*Choices: "
    with pytest.raises(MedvisionError, match=message + ", ".join(choices(group))):
        cli.compose("train", ["seed=2", f"{group}={choice}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model", "^model: expected <name>=<value>, as seed=1"),
        ("data.image_size=[64", r"input '\[64'"),
        ("seed=${nothing}", "does not resolve: .*'nothing' not found"),
        ("+seed=1", "already at 'seed'"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(override, message):
    with pytest.raises(MedvisionError, match=message):
        build(compose(override))


def test_a_misspelling_of_another_verb():
    with pytest.raises(MedvisionError, match=r"there is no option 'rnu'.*did you mean 'run'"):
        cli.compose("evaluate", ["rnu=somewhere"])


def test_a_config_has_no_room_for_a_typo():
    cfg = compose()
    with pytest.raises(OmegaConfBaseException):
        cfg.trainer.max_epoch = 3
    assert isinstance(cfg.trainer, DictConfig) and compose("+trainer.fast_dev_run=true").trainer.fast_dev_run is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=[64,96,3]"], r"image size is \[64, 96, 3\]; expected a positive int or \[height, width\]"),
        (["data.image_size=0"], "image size is 0; expected a positive int"),
        (["data.batch_size=0"], "data.batch_size is 0; expected 1 or more"),
        (["loss.terms.bce=-1"], "loss.terms is .*'bce': -1"),
        (["data.spec.classes=[a,b]"], "a binary data set has one class"),
        (
            ["data=isic2017", "data.spec.challenge=isic2019"],
            "data.spec.challenge is isic2019; expected null or one of isic2017_part1, ",
        ),
        (["data.spec.challenge=isic2017_part1"], "data.spec.challenge=isic2017_part1: no challenge scores phantoms"),
        (
            ["data=isic2018_attributes", "data.spec.challenge=isic2017_part1"],
            r"counts have the shape \(1, 5, 4\); expected \(images, 1, 4\)",
        ),
        (["temperature=2"], "temperature=2: expected none or validation"),
        (["cleaning=largest"], "cleaning=largest: expected none or validation"),
        (
            ["data=isic2016", "model=resnet18", "cleaning=validation"],
            "cleaning=validation is of masks, data=isic2016 has",
        ),
        (["model._target_=medvision.models.UNetV9"], "model: medvision.models.UNetV9 cannot be made"),
    ],
)
def test_what_a_part_refuses_is_said_in_one_message(overrides, message):
    with pytest.raises(MedvisionError, match=message):
        build(compose(*overrides))


def test_configs_are_found_in_a_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    assert cli.config_folder() == CONF
    package = tmp_path / "medvision"
    (package / "conf").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    assert cli.config_folder() == package / "conf"


def test_own_configs_come_from_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [unetpp]\nchannels: [4, 8]\n")
    cfg = cli.compose("train", ["model=mine"], str(tmp_path))
    assert (cfg.model._target_, cfg.model.channels) == ("medvision.models.UNetPP", [4, 8])
    with pytest.raises(MedvisionError, match="--config-dir nowhere is no folder"):
        cli.compose("train", [], "nowhere")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's allocator")
def test_training_does_not_pay_page_faults_for_memory_it_had_before() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            tensors = [torch.ones(1 << 20) for _ in range(20)]
            del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    faults()
    assert faults() < 20 * 1024  # one round of fresh pages; five rounds are five times as many


def test_a_word_that_cannot_be_read_is_named():
    with pytest.raises(MedvisionError, match=r"^hydra.run.dir=it's: .* is quoted: \"hydra.run.dir='it\\'s'\"$"):
        compose("seed=1", "hydra.run.dir=it's")
