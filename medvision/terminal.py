"""What is shown on the terminal: tables, and commands as they are typed there. Imports no torch."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_rows(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """Prints a table, columns of words to the left, numbers to the right; plain text where that is no terminal."""
    terminal = sys.stdout.isatty()
    table = Table(box=box.ROUNDED if terminal else box.ASCII2)
    for n, name in enumerate(header):
        table.add_column(name, justify="left" if n in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # [ and ] are no markup
    print(title)
    Console(width=None if terminal else 1000).print(table)  # a line of a file is not broken


def quoted(path: Path | str) -> str:
    """A path or text as a value on the command line, which Hydra reads as it is."""
    text = str(path)
    return text if re.fullmatch(r"[\w/.+@-]+", text, re.ASCII) else "'" + text.replace("'", "\\'") + "'"


def command(verb: str, name: str, path: Path) -> str:
    """A command with a path, as the shell reads it: `command("train", "resume", folder)`."""
    return shlex.join(["python", "-m", f"medvision.{verb}", f"{name}={quoted(path)}"])
