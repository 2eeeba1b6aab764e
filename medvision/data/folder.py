"""A user's own data: a table, or `images/` and `masks/`, or a folder for each class."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medvision.data.base import ImageDataModule, Splits
from medvision.data.cache import Sample
from medvision.data.source import Member, Source
from medvision.data.tables import as_flag, read_table
from medvision.errors import MedvisionError
from medvision.spec import DataSpec

ENDINGS = r"\.(?:png|jpe?g|tiff?|bmp|webp)$"
STEM = re.compile(rf"(?:^|/)([^/.][^/]*?){ENDINGS}", re.IGNORECASE)  # not ._1.png, which macOS leaves behind
SUFFIX = re.compile(r"[_-](?:mask|masks|seg|segmentation|gt|label|labels)$", re.IGNORECASE)  # of a mask's name
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ClassFolders(ImageDataModule):
    """Images in a folder for each class, these in a folder for each split or not: `train/ants/1.jpg`, `ants/1.jpg`.

    A binary data set has two folders, its class and what is not.
    """

    def class_folders(self, members: Iterable[Member]) -> dict[str, list[Sample]]:
        """Labels each image by its folder.

        Raises:
            MedvisionError: If the folders are not the classes of the spec.
        """
        splits: dict[str, list[Sample]] = {}
        pattern, stray, folders = re.compile(rf"([^/]+)/([^/.][^/]*){ENDINGS}", re.IGNORECASE), [], set[str]()
        members = list(members)
        above = {name for member in members for name in member.name.split("/")[:-2]} - {*self.spec.classes}
        for member in members:
            match = pattern.search(member.name)
            if match is None or match[1] in above:  # beside the folders of classes
                stray.append(member)
                continue
            folders.add(match[1])
            split = SPLITS.get("".join(member.name.split("/")[-3:-2]).lower(), "train")
            labels = tuple(k for k, name in enumerate(self.spec.classes) if name == match[1])
            splits.setdefault(split, []).append(Sample(f"{match[1]}/{match[2]}", member, labels=labels))
        binary = self.spec.kind == "binary"
        if not folders >= {*self.spec.classes} or len(folders) != (2 if binary else len(self.spec.classes)):
            names = sorted(folders)
            one = f"; if one is the absence of the other: {_typed(names[1:])} data.spec.kind=binary"
            raise MedvisionError(
                f"{self.spec.name}: folders with images are {names}, data.spec.classes is {list(self.spec.classes)}; "
                f"if the folders are the classes: {_typed(names)}"
                + (" data.spec.kind=multiclass" if binary else "")
                + (one if len(names) == 2 else "")
            )
        self.stray(stray)
        return {name: splits[name] for name in ("train", "val", "test") if name in splits}


class Folder(ClassFolders):
    """A folder or zip of one's own, in one of three layouts.

    - A table with a header, named by `table`: columns `image`, and `mask` (or one mask column for each class) or
      `label` (a class's name; or for each class a column of its name, of 0 and 1), and perhaps `split` (train, val,
      test) and `group` (what must stay in one split, as a patient). Files are named relative to the root, perhaps
      without ending.
    - `images/` and `masks/` with equal names, masks perhaps with `_mask` or `_segmentation` behind; for several
      classes `masks/<class>/`. `train/images/` and so on make splits.
    - A folder for each class, perhaps below `train/`, `val/`, `test/`.

    Args:
        spec: The facts of the data set.
        root: The folder or the zip file.
        cache: Folder for what is derived.
        table: The table's file name in the root, or None.
        **options: As for every data set.
    """

    page = "wherever your data is"

    def __init__(
        self, spec: DataSpec, root: Path | str, cache: Path | str, table: str | None = None, **options: Any
    ) -> None:
        super().__init__(spec, root, cache, **options)
        self.table = table

    def index(self) -> Splits:
        """Reads whichever layout is there.

        Raises:
            MedvisionError: If there is nothing, or the layout is not that of the spec's target.
        """
        if not self.root.is_dir() and not self.root.is_file():
            raise MedvisionError(
                f"{self.spec.name}: {self.root.resolve()} is not there; name your folder or zip with data.root=<path>"
            )
        members = Source(self.root).members()
        if self.table is not None:
            files = {m.name: m for m in members}
            bare = Counter(map(_without_ending, files))
            files |= {stem: m for m in files.values() if bare[stem := _without_ending(m.name)] == 1}
            return self._tabled(files, self.root / self.table)
        return _told_apart(self.class_folders(members) if self.spec.target == "label" else self._masked(members))

    def _masked(self, members: Iterable[Member]) -> Splits:
        """Pairs `images/` and `masks/`."""
        files: dict[tuple[str, str], list[Member]] = {}
        place = re.compile(rf"(?:^|/)(?:([^/]+)/)?(images?|masks?)/(?:([^/]+)/)?[^/.][^/]*{ENDINGS}", re.IGNORECASE)
        stray, folders = [], set[str]()
        for member in members:
            match = place.search(member.name)
            if match is None:
                stray.append(member)
                continue
            split = SPLITS.get((match[1] or "").lower(), "train")
            kind = "image" if match[2].lower().startswith("image") else f"mask/{match[3] or ''}"
            if kind != "image":
                folders.add(match[3] or "")
            files.setdefault((split, kind), []).append(member)
        self.stray(stray)
        expected = {""} if len(self.spec.classes) == 1 and folders <= {""} else set(self.spec.classes)
        if folders != expected:
            names = sorted(folders - {""})
            tables = [m.name for m in stray if m.name.lower().endswith(".csv")]
            raise MedvisionError(
                f"{self.spec.name}: {self.root} has "
                + (f"masks of {names}" if names else "no masks/<class>/ folders" if folders else "no masks/ folder")
                + f", data.spec.classes is {list(self.spec.classes)}; expected images/ and masks/, or masks/<class>/ "
                + "for several classes"
                + (f": {_typed(names)}" if names else "")
                + (" data.spec.kind=multilabel" if len(names) > 1 else "")
                + ("" if folders else ". A folder of images for each class is data=folder_labels")
                + (f". A table is named by data.table={tables[0]}" if tables else "")
            )
        kinds = ["mask/"] if folders == {""} else [f"mask/{name}" for name in self.spec.classes]
        splits = {}
        for split in [name for name in ("train", "val", "test") if any(key[0] == name for key in files)]:
            images = self.by_id(files.get((split, "image"), []), STEM)
            spelled = {i.casefold(): i for i in images}
            masks = [
                self.by_id(files.get((split, kind), []), STEM, key=lambda stem: _image_of(stem, spelled))
                for kind in kinds
            ]
            splits[split] = self.pair(split, images, *masks)
        return splits

    def _tabled(self, members: Mapping[str, Member], path: Path) -> Splits:
        """Reads a table of images; `members` has them by name, with ending and without."""
        header, *rows = read_table(path) or [[]]
        columns = {name.lower(): k for k, name in enumerate(header)}
        masked = self.spec.target == "mask"
        target = [f"mask_{name}".lower() if masked else name.lower() for name in self.spec.classes]
        if masked and len(target) == 1 and target[0] not in columns:
            target = ["mask"]
        if not masked and ("label" in columns or columns.keys().isdisjoint(target)):
            target = ["label"]
        if missing := [name for name in ("image", *target) if name not in columns]:
            raise MedvisionError(
                f"{path} has the columns {header}; {', '.join(missing)} is missing. Expected image, mask (or "
                "mask_<class> for each class) for data=folder, or label (or for each class a column of 0 and 1) for "
                f"data=folder_labels, where data.spec.classes is {list(self.spec.classes)}; perhaps split and group"
            )
        wanted = Counter(map(str.lower, header)) | Counter(target)
        if twice := [name for name, times in wanted.items() if name and times > 1]:
            raise MedvisionError(f"{path}: {', '.join(twice)} names two columns; expected names that differ in letters")
        splits: dict[str, list[Sample]] = {}
        absent: list[str] = []
        for number, row in enumerate(rows, 2):
            cell = {name: row[k] if k < len(row) else "" for name, k in columns.items()}
            split = SPLITS.get(cell.get("split", "").lower() or "train")
            if split is None:
                raise MedvisionError(f"{path}, row {number}: split {cell['split']!r}; expected train, val or test")
            files = [cell["image"], *(cell[name] for name in target if masked and cell[name])]
            if lost := [name for name in files if name not in members]:
                absent += lost
                continue
            labels = () if masked else self._labels({name: cell[name] for name in target}, f"{path}, row {number}")
            files_of = tuple((members[cell[name]],) if cell[name] else () for name in target) if masked else ()
            image = members[cell["image"]]
            i = image.name.rpartition(".")[0] or image.name
            splits.setdefault(split, []).append(Sample(i, image, files_of, labels, cell.get("group") or None))
        if absent:
            self.problem("warning", "rows without files", absent, f"{path.name} names them; they are left out")
        return {name: splits[name] for name in ("train", "val", "test") if name in splits}

    def _labels(self, cells: Mapping[str, str], where: str) -> tuple[int, ...]:
        """Class numbers of a row: of the names in its cell of labels, or of the classes whose cells are flags."""
        found = self._named(cells["label"], where) if [*cells] == ["label"] else self._flagged(cells, where)
        if self.spec.kind == "multiclass" and len(found) != 1:
            shown = ", ".join(f"{name} {word!r}" for name, word in cells.items())
            raise MedvisionError(
                f"{where}: {shown}; expected one of {list(self.spec.classes)}, or data.spec.kind=multilabel"
            )
        return found

    def _named(self, words: str, where: str) -> tuple[int, ...]:
        """Of one name, or several between | or spaces; for a binary data set also of 0 and 1."""
        flags = {"0": (), "0.0": (), "1": (0,), "1.0": (0,)} if self.spec.kind == "binary" else {}
        if words in flags:
            return flags[words]
        between = r"\s*\|\s*" if "|" in words else r"\s+"  # names may hold spaces
        names = [words] if words in self.spec.classes else [word for word in re.split(between, words) if word]
        if unknown := [name for name in names if name not in self.spec.classes]:
            raise MedvisionError(f"{where}: label {unknown[0]!r}; expected one of {list(self.spec.classes)}")
        return tuple(sorted(self.spec.classes.index(name) for name in names))

    def _flagged(self, cells: Mapping[str, str], where: str) -> tuple[int, ...]:
        """Of a flag for each class."""
        flags = {name: as_flag(word) for name, word in cells.items()}
        if unknown := [name for name, flag in flags.items() if flag is None]:
            raise MedvisionError(f"{where}: {unknown[0]} {cells[unknown[0]]!r}; expected 0 or 1")
        return tuple(k for k, flag in enumerate(flags.values()) if flag)


def _without_ending(name: str) -> str:
    return re.sub(ENDINGS, "", name, flags=re.IGNORECASE)


def _typed(names: Sequence[str]) -> str:
    """The overrides for these classes, as a shell and Hydra read them."""
    classes = f"data.spec.classes=[{','.join(names)}]"
    plain = re.compile(r"(?!(?:true|false|null)$)[a-z_][\w-]*|\d", re.ASCII | re.IGNORECASE)  # stays what it is
    if not all(map(plain.fullmatch, names)):
        words = ",".join("'" + name.replace("'", "\\'") + "'" for name in names)
        classes = shlex.quote(f"data.spec.classes=[{words}]")
    return f"{classes} data.spec.num_outputs={len(names)}"


def _told_apart(splits: Splits) -> Splits:
    """Ids that several splits have, as numbered files do, with the split before them."""
    times = Counter(i for samples in splits.values() for i in {s.id for s in samples})
    return {
        split: [s if times[s.id] == 1 else replace(s, id=f"{split}/{s.id}") for s in samples]
        for split, samples in splits.items()
    }


def _image_of(stem: str, images: Mapping[str, str]) -> str:
    """The id of the image that a mask's name means; `images` has each id by its spelling in lower case."""
    short = SUFFIX.sub("", stem)
    return images.get(stem.casefold()) or images.get(short.casefold(), short)
