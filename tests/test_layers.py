import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "medvision"
ORDER = [
    {"errors", "terminal"},
    {"spec", "files"},
    {"study"},
    {"data", "models", "losses", "metrics", "tta", "windows", "logger", "mixing", "optim", "submission", "provenance"},
    {"figures", "postprocess", "inputs"},
    {"decision"},
    {"tasks", "explanation"},
    {"callbacks", "pruning"},
    {"evaluation", "runs", "verification", "prediction"},
    {"configs"},
    {"build", "launchers", "tracking"},
    {"pretraining", "selection", "costs"},
    {"report", "comparison"},
    {"cli"},
    {"evaluate", "predict", "prepare", "visualize", "compare", "export", "explain", "search", "models.__main__"},
    {"sweep"},
    {"train"},
]
"""A room may import from the levels above its own, never from its own level or from below."""
KNOW_HYDRA = {
    "configs",
    "build",
    "cli",
    "sweep",
    "train",
    "evaluate",
    "predict",
    "prepare",
    "visualize",
    "compare",
    "export",
    "explain",
    "search",
    "models.__main__",
}


def room_of(*parts):
    """The room of a file or a module by its path below the package; a folder's `__main__` is an entry point."""
    return ".".join(parts[:2]) if parts[1:2] == ("__main__",) else parts[0]


def imports():
    """Each import of each file, wherever it stands: (room, file, dotted name)."""
    for file in sorted(PACKAGE.rglob("*.py")):
        room = room_of(*file.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports relatively"
                yield from ((room, file, f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((room, file, alias.name) for alias in node.names)


def test_rooms_import_one_way():
    level = {room: n for n, rooms in enumerate(ORDER) for room in rooms}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    rooms |= {f"{path.parent.name}.__main__" for path in PACKAGE.glob("*/__main__.py")}
    assert rooms - {"__init__"} == level.keys(), "give a new room its place in ORDER"
    for room, file, name in imports():
        package, *rest = name.split(".")
        other = room_of(*rest) if rest else ""
        if package == "medvision" and other != room and other != "__version__":
            assert level[other] < level.get(room, 0), f"{file.name} imports {name}: {room} stands above {other}"


def test_only_build_and_the_entry_points_know_hydra():
    knowing = {room for room, _, name in imports() if name.split(".")[0] in ("hydra", "omegaconf")}
    assert knowing <= KNOW_HYDRA


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (
            [
                *("models", "data", "losses", "metrics", "tasks", "callbacks", "runs", "verification"),
                *("prediction.folder", "prediction.exporting", "explanation.folder"),
            ],
            ["hydra", "omegaconf"],
        ),
        (
            ["cli", "train", "evaluate", "predict", "prepare", "visualize", "compare", "export", "explain", "search"],
            ["torch", "pytorch_lightning", "cv2", "matplotlib", "optuna"],
        ),
    ],
)
def test_importing_leaves_out(modules, unwanted):
    code = f"import sys, {', '.join(f'medvision.{m}' for m in modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert f"medvision.{modules[0]}" in loaded
    assert not set(unwanted) & set(loaded)


def test_results_and_comparisons_need_no_tracker():
    missing = "import sys; sys.modules.update(dict.fromkeys(['wandb', 'mlflow', 'tensorboard', 'optuna']));"
    code = f"{missing} import medvision.comparison.page, medvision.report, medvision.tracking"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
