import json
import shlex
import time
from collections import Counter

import psutil
import torch

SMALL = [
    "data.images={train:12,val:4,test:4}",
    "data.image_size=32",
    "data.batch_size=4",
    "data.num_workers=0",
    "model=unet",
    "model.encoder=resnet18",
    "model.encoder_weights=null",
    "trainer.max_epochs=4",
    "callbacks.pictures=null",
]
SEARCH = [
    *SMALL,
    "optimizer.lr=tag(log,interval(1e-4,1e-2))",
    "loss=choice(bce,bce_dice)",
    "search.trials=3",
    "search.workers=2",
    "search.min_epochs=1",
    "search.reduction_factor=2",
]
CREATED, REPORTED = 4, 7
"""Operations in Optuna's journal."""


def test_a_killed_search_goes_on_and_its_trials_are_trainings(cli):
    folder = cli.root / "search"
    words = [*SEARCH, f"hydra.sweep.dir={folder}"]
    process = cli.start("search", *words)
    deadline = time.monotonic() + 300
    while not [*folder.glob("*/checkpoints/last.ckpt")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        one.kill()
    process.wait()
    psutil.wait_procs(tree, 60)
    assert not [*folder.glob("*/metrics.json")] and not (folder / "search.json").exists()

    done = cli("search", *words)
    assert "(going on)" in done.stdout and "3 trials" in done.stdout
    found = json.loads((folder / "search.json").read_text())
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2]
    states = Counter(trial["state"] for trial in found["trials"])
    assert states["complete"] >= 1 and states["complete"] + states["pruned"] == 3
    for trial in found["trials"]:
        place = folder / str(trial["number"])
        assert (place / "metrics.json").exists() == (trial["state"] == "complete")
        assert (place / "pruned.json").exists() == (trial["state"] == "pruned")
        assert [*trial["epochs"]] == [str(n + 1) for n in range(len(trial["epochs"]))]
        assert len(trial["epochs"]) == 4 if trial["state"] == "complete" else trial["epochs"]
        assert not [*place.glob("*test*")]
    journal = [json.loads(line) for line in (folder / "search.journal").read_text().splitlines()]
    assert sum(line["op_code"] == CREATED for line in journal) == 3
    reported = [(line["trial_id"], line["step"]) for line in journal if line["op_code"] == REPORTED]
    assert len(reported) == len(set(reported)) == sum(len(trial["epochs"]) for trial in found["trials"])

    best, plain = folder / str(found["best"]), cli.root / "plain"
    assert shlex.split(found["command"])[:3] == ["python", "-m", "medvision.train"]
    cli("train", *shlex.split(found["command"])[3:], f"hydra.run.dir={plain}")
    of_trial, of_plain = (json.loads((place / "metrics.json").read_text()) for place in (best, plain))
    assert "test" not in of_trial and "test" in of_plain
    for key in ("val", "threshold", "epoch", "monitor"):
        assert of_trial[key] == of_plain[key]
    assert of_trial["monitor"]["value"] == found["trials"][found["best"]]["value"]
    weights = [torch.load(p / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"] for p in (best, plain)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    measured = cli("evaluate", f"run={best}").stdout
    assert json.loads((best / "evaluations" / "test_stored.json").read_text())["test"] == of_plain["test"], measured
