"""Commands that are shown, typed again."""

import shlex

import pytest

from medvision import cli
from medvision.terminal import command, quoted


@pytest.mark.parametrize("name", ["plain", "a=b", "a b", "it's", 'say "x"', "x,y", "[1]", "$x", "ü", "a~b", "a+b@c"])
def test_a_path_comes_back_as_it_was(name, tmp_path):
    assert cli.compose("train", [f"resume={quoted(tmp_path / name)}"]).resume == str(tmp_path / name)
    python, dash, module, word = shlex.split(command("train", "resume", tmp_path / name))
    assert (python, dash, module) == ("python", "-m", "medvision.train")
    assert cli.compose("train", [word]).resume == str(tmp_path / name)
