"""Finding files and pairing them: what the index of every data set is written with."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from medvision.data.cache import Sample
from medvision.data.problems import Grade, Problem
from medvision.data.source import Member, Source, find_path
from medvision.data.tables import read_flags
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

NOTHING = re.compile(r"(?!)")
#: What operating systems and archives leave behind.
LITTER = re.compile(
    r"(^|/)(__MACOSX/|\._|\.DS_Store$|Thumbs\.db$|desktop\.ini$|(license|readme|attribution)[^/]*$)", re.I
)


class Indexing:
    """Files of a data set by id; what is wrong with them goes to `problem`.

    Args:
        spec: The facts of the data set.
        root: Folder with what was downloaded.
    """

    page: str
    """The official page to get the data from."""

    def __init__(self, spec: DataSpec, root: Path) -> None:
        self.spec, self.root = spec, root
        self.noted: list[Problem] = []

    def problem(self, grade: Grade, kind: str, items: Iterable[str] = (), text: str = "") -> None:
        """Notes something that is wrong with the data."""
        self.noted.append(Problem(grade, kind, tuple(items), text))

    def find(self, stem: str) -> Source | None:
        """The folder or archive `stem` below the root, if it is there."""
        return Source.find(self.root, stem)

    def expect(self, what: str, official: int, found: int) -> None:
        """Warns where the number of images is not the official one."""
        if found != official:
            self.problem("warning", "not the official number", (), f"{found} {what} images, officially {official}")

    def stray(self, members: Iterable[Member], ignore: re.Pattern[str] = NOTHING) -> None:
        """Notes files that are no part of the data set, unless `ignore` or a habit of systems explains them."""
        if names := [str(m) for m in members if not (LITTER.search(m.name) or ignore.search(m.name))]:
            self.problem("warning", "stray files", names, "They are left out")

    def by_id(
        self,
        members: Iterable[Member],
        pattern: re.Pattern[str],
        ignore: re.Pattern[str] = NOTHING,
        key: Callable[[str], str] = str,
    ) -> dict[str, Member]:
        """Files by the id that the first group of `pattern` finds in their names, spelled by `key`.

        What `pattern` does not find is stray. Of two files with one id neither can be trusted: an error.
        """
        found: dict[str, Member] = {}
        twice: dict[str, list[str]] = {}
        stray = []
        for member in members:
            if not (match := pattern.search(member.name)):
                stray.append(member)
            elif (i := key(match[1])) in found:
                twice.setdefault(i, [str(found[i])]).append(str(member))
            else:
                found[i] = member
        if twice:
            files = "; ".join(" and ".join(names) for names in [*twice.values()][:5])
            self.problem("error", "two files for one image", twice, f"{files}: remove one of each")
        self.stray(stray, ignore)
        return found

    def pair(
        self, split: str, images: Mapping[str, Member], *masks: Mapping[str, Member], official: int | None = None
    ) -> list[Sample]:
        """Samples of the images that have a mask of every class; the others are problems."""
        complete = set(images).intersection(*masks)
        if lone := sorted(set(images) - complete):
            self.problem(
                "error", f"{split}: images without masks", lone, "Fetch the masks again, or exclude the images"
            )
        if lone := sorted(set().union(*masks) - set(images)):
            self.problem("warning", f"{split}: masks without images", lone, "They are left out; fetch the images again")
        if official is not None:
            self.expect(split, official, len(complete))
        return [Sample(i, images[i], tuple((m[i],) for m in masks)) for i in sorted(complete)]

    def labelled(
        self, split: str, images: Mapping[str, Member], labels: Mapping[str, tuple[int, ...]], official: int
    ) -> list[Sample]:
        """Samples of the images that have a row in a table; the others, and rows without an image, are problems."""
        if lone := sorted(images.keys() - labels.keys()):
            text = "Fetch the table again, or exclude the images"
            self.problem("error", f"{split}: images without rows", lone, text)
        if lone := sorted(labels.keys() - images.keys()):
            text = "They are left out; fetch the images again"
            self.problem("warning", f"{split}: rows without images", lone, text)
        both = sorted(images.keys() & labels.keys())
        self.expect(split, official, len(both))
        return [Sample(i, images[i], labels=labels[i]) for i in both]

    def flags(self, path: Path, key: Callable[[str], str] = str) -> dict[str, tuple[int, ...]]:
        """Classes of each id, spelled by `key`, in a table of ids and flags; conflicting rows are problems."""
        found: dict[str, tuple[int, ...]] = {}
        conflicting = set()
        for i, labels in read_flags(path, len(self.spec.classes)):
            if found.setdefault(key(i), labels) != labels:
                conflicting.add(key(i))
        if conflicting:
            text = f"{path.name} has several rows of them that disagree"
            self.problem("error", "conflicting labels", sorted(conflicting), text)
        return found

    def file(self, name: str) -> Path:
        """A file below the root, or one folder deeper; letters in either case.

        Raises:
            MedvisionError: If it is missing, naming the page to get it from.
        """
        found = self.find_file(name)
        if found is None:
            raise MedvisionError(
                f"{self.spec.name}: no {name} in {self.root.resolve()}. Get it from {self.page} and put it there"
            )
        return found

    def find_file(self, name: str) -> Path | None:
        """A file below the root, if it is there."""
        return find_path(self.root, name)

    def source(self, stem: str) -> Source:
        """The folder or archive `stem` below the root.

        Raises:
            MedvisionError: If it is missing, naming the page to get it from.
        """
        found = self.find(stem)
        if found is None:
            raise MedvisionError(
                f"{self.spec.name}: neither {stem}.zip nor a folder {stem} in {self.root.resolve()}. "
                f"Get it from {self.page} and put it there, or set MEDVISION_DATA to the folder that holds "
                f"{self.root.name}/. data=phantom needs no download."
            )
        return found
