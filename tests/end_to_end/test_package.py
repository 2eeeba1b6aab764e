import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", reason="building a wheel without a network needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("medvision-*.whl"))


def test_wheel_holds_every_config_and_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"medvision/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "medvision").rglob("*.py")}
    parts = {"medvision/py.typed", *(f"medvision/comparison/page.{kind}" for kind in ("html", "css", "js"))}
    assert configs | modules | parts <= names


def test_wheel_finds_its_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    command = [sys.executable, "-m", "medvision.train", "--cfg", "job", "model=unetpp"]
    code = "import medvision.cli; print(medvision.cli.config_folder())"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert where.stdout.strip() == str(tmp_path / "medvision" / "conf")
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "medvision.models.UNetPP" in shown.stdout


def test_constraints_hold_exact_versions_and_no_addresses():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if line.count("==") != 1 or "/" in line or "@" in line] == []


def test_make_help_names_the_targets():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in shown for target in ("demo", "test", "check", "benchmark"))
