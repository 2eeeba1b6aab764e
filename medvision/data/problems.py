"""What is wrong with the data, and how much it matters."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from medvision.errors import MedvisionError

log = logging.getLogger(__name__)

Grade = Literal["note", "warning", "error"]


@dataclass(frozen=True)
class Problem:
    """Something in a data set that its user should know.

    Attributes:
        grade: `note`; `warning`: training goes on and the run records it; `error`: training refuses.
        kind: What it is, in a few words that are the same for every data set.
        items: The images or files that it is about.
        text: What was found and what to do.
    """

    grade: Grade
    kind: str
    items: tuple[str, ...]
    text: str = ""

    def without(self, excluded: Collection[str]) -> "Problem | None":
        """What is left of it where some of its items are excluded; None if nothing is."""
        left = tuple(item for item in self.items if item not in excluded)
        return replace(self, items=left) if left or not self.items else None

    def __str__(self) -> str:
        """One line: what, how many, what to do, and the first items."""
        shown = ", ".join(self.items[:10]) + (f" and {len(self.items) - 10} more" if len(self.items) > 10 else "")
        number = f" ({len(self.items)})" if self.items else ""
        return ": ".join(part for part in (f"{self.kind}{number}", self.text, shown) if part)


def settle(name: str, problems: Iterable[Problem]) -> None:
    """Logs warnings and refuses errors.

    Raises:
        MedvisionError: If there are errors, with the option that leaves out what they are about.
    """
    problems = list(problems)
    if errors := [problem for problem in problems if problem.grade == "error"]:
        lines = "\n".join(f"  {problem}" for problem in errors)
        raise MedvisionError(
            f"{name} has errors:\n{lines}\nMend them, or leave out what is listed with data.exclude=[id,...] or "
            f"data.exclude=<text file>; python -m medvision.prepare data={name} writes such a file"
        )
    for problem in problems:
        if problem.grade == "warning":
            log.warning("%s: %s", name, problem)
