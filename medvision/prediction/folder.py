"""A folder of predictions: what is written for each image, and what of it is already there."""

import contextlib
import csv
import glob
import io
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medvision.data.images import Pixels, read_image
from medvision.decision import Decision
from medvision.errors import MedvisionError
from medvision.figures import heated, overlay
from medvision.files import as_csv, locked, read_json, replacing, writable_folder, write_json
from medvision.inputs import SHOWN, Inputs
from medvision.metrics import decide
from medvision.prediction.predictor import Predictor

log = logging.getLogger(__name__)

LINE_EVERY = 10  # seconds between two lines of progress where there is no terminal
WORDLESS = re.compile(r"[^\w.-]")  # what a class's name may have and a file's should not


class PredictionFolder:
    """What is written for each image, so that an interrupted prediction goes on.

    An image's rows in `predictions.csv` come first and its pictures after them, each whole or not at all. It is
    finished when all are there; a file of an image without rows is someone else's.

    Args:
        path: The folder.
        target: `mask` or `label`.
        classes: The K names.
        decision: What makes masks and labels of probabilities, which come calibrated.
        probabilities: Whether masks come with their probabilities.
        heat: By which method the heat is found that is drawn over each image; None: there is none.
        settings: All else that a prediction depends on, as plain values for `prediction.json`.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        classes: Sequence[str],
        decision: Decision,
        probabilities: bool = False,
        heat: str | None = None,
        **settings: Any,
    ) -> None:
        self.path, self.target, self.classes = path, target, list(classes)
        self.decision, self.probabilities, self.heat = decision, probabilities, heat
        own = {"target": target, "classes": self.classes, "probabilities": probabilities, "heat": heat}
        self.settings = settings | own | decision.entries() | {"threshold": list(decision.threshold)}
        self.rows: dict[str, list[list[str]]] = {}

    @property
    def table(self) -> Path:
        """A row for each image and class."""
        return self.path / "predictions.csv"

    @property
    def record(self) -> Path:
        """The settings."""
        return self.path / "prediction.json"

    @property
    def header(self) -> list[str]:
        """The columns of the table."""
        of_target = ["area", "share", "components"] if self.target == "mask" else ["probability", "decision"]
        return ["file", "class", "threshold", *of_target]

    def pictures(self, name: str) -> dict[str, list[Path]]:
        """Where the pictures of an image lie: `mask` and perhaps `probability` of each class, `overlay`; `heat`.

        Args:
            name: Of the image, relative to the root of the inputs.
        """
        stem = self.path / Path(name).with_suffix("")
        heat = {"heat": [stem.with_name(f"{stem.name}_heat.png")]} if self.heat else {}
        if self.target != "mask":
            return heat
        kinds = ["mask", "probability"] if self.probabilities else ["mask"]
        words = [f"{WORDLESS.sub('_', name)}_" for name in self.classes] if len(self.classes) > 1 else [""]
        places = {kind: [stem.with_name(f"{stem.name}_{word}{kind}.png") for word in words] for kind in kinds}
        return places | {"overlay": [stem.with_name(f"{stem.name}_overlay.png")]} | heat

    def masks(self, name: str) -> NDArray[np.bool_]:
        """The masks of a finished image, bool (K, H, W)."""
        return np.stack([np.asarray(Image.open(path)) > 0 for path in self.pictures(name)["mask"]])

    def finished(self, name: str) -> bool:
        """Whether rows and pictures of an image are there."""
        return name in self.rows and all(path.exists() for path in self._pictures(name))

    @contextlib.contextmanager
    def open(self, names: Sequence[str], overwrite: bool = False) -> Iterator[None]:
        """Reads what is there, keeps other processes out, and at the end sorts the table.

        Args:
            names: Of the images.
            overwrite: Remove an earlier prediction, and write over files of others.

        Raises:
            MedvisionError: If two images would be written to one file, the folder holds a prediction with other
                settings or files of others, or another process writes there.
        """
        self._require_distinct(names)
        writable_folder(self.path, "output=<folder>")
        with locked(self.path / ".lock", busy=f"another process predicts into {self.path}; wait for it or stop it"):
            if overwrite:
                self._remove()
            self._take_up(names, overwrite)
            yield
            self._write_table()

    def add(
        self, name: str, image: Pixels, probability: NDArray[np.float32], heat: NDArray[np.float32] | None = None
    ) -> None:
        """Writes the answer to an image.

        Args:
            name: Of the image.
            image: uint8 (H, W, C).
            probability: (K, H, W) for masks, (K,) for labels.
            heat: (H, W) in [0, 1], where the folder is to hold heat.

        Raises:
            MedvisionError: If it cannot be written.
        """
        try:
            if self.target == "mask":
                masks = self.decision.masks(probability)
                self._append(name, [_measured(mask) for mask in masks])
            else:
                decided, masks = decide(probability[None], self.decision.threshold)[0], None
                self._append(name, [[float(p), int(d)] for p, d in zip(probability, decided, strict=True)])
            self._draw(name, image, probability, masks, heat)
        except OSError as error:
            raise MedvisionError(f"cannot write to {self.path} ({error}); make room, and run again to go on") from None

    def _append(self, name: str, values: Sequence[Sequence[float]]) -> None:
        thresholds = [str(value) for value in self.decision.threshold] or [""] * len(self.classes)
        columns = zip(self.classes, thresholds, values, strict=True)
        self.rows[name] = [[str(v) for v in (name, label, at, *found)] for label, at, found in columns]
        with self.table.open("ab") as handle:
            handle.write(_encoded(self.rows[name]))

    def _draw(
        self,
        name: str,
        image: Pixels,
        probability: NDArray[np.float32],
        masks: NDArray[np.bool_] | None,
        heat: NDArray[np.float32] | None,
    ) -> None:
        drawn: dict[str, Iterable[NDArray[Any]]] = {"heat": [] if heat is None else [heated(image, heat)]}
        if masks is not None:
            drawn |= {"mask": masks * np.uint8(255), "overlay": [overlay(image, masks)]}
        if self.probabilities:
            drawn["probability"] = np.round(probability * 65535).astype(np.uint16)
        for kind, paths in self.pictures(name).items():
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path, pixels in zip(paths, drawn[kind], strict=True):
                with replacing(path) as temporary:
                    Image.fromarray(pixels).save(temporary, "PNG")

    def _pictures(self, name: str) -> list[Path]:
        return [path for paths in self.pictures(name).values() for path in paths]

    def _require_distinct(self, names: Sequence[str]) -> None:
        owner: dict[Path, str] = {}
        for name in names:
            for path in self._pictures(name):
                if (other := owner.setdefault(path, name)) != name:
                    raise MedvisionError(
                        f"{other} and {name} would both be written to {path.relative_to(self.path)}; rename one, or "
                        "predict them into different folders"
                    )

    def _take_up(self, names: Sequence[str], overwrite: bool) -> None:
        """Refuses what is not this prediction; reads its rows, or begins it."""
        if self.record.exists():
            then = self._recorded()
            if changes := [
                f"{key}: {then.get(key)} -> {self.settings.get(key)}"
                for key in dict.fromkeys([*self.settings, *then])
                if then.get(key) != self.settings.get(key)
            ]:
                raise MedvisionError(
                    f"{self.path} holds a prediction with other settings:\n  "
                    + "\n  ".join(changes)
                    + "\nChoose another output, or begin anew with overwrite=true"
                )
            self._read_table()
        if not overwrite:
            pictures = (path for name in names if name not in self.rows for path in self._pictures(name))
            begun = [] if self.record.exists() else [self.table]
            if foreign := [str(path) for path in [*begun, *pictures] if path.exists()]:
                more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
                raise MedvisionError(
                    f"these files are of no prediction that is known here: {', '.join(foreign[:SHOWN])}{more}; choose "
                    "another output, or write over them with overwrite=true"
                )
        for path in (path for name in self.rows if not self.finished(name) for path in self._pictures(name)):
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
                left.unlink()
        self._write_table()
        write_json(self.record, self.settings)

    def _recorded(self) -> dict[str, Any]:
        settings: dict[str, Any] = read_json(self.record)
        if not isinstance(settings, dict) or not {"target", "classes", "threshold", "probabilities"} <= settings.keys():
            raise MedvisionError(f"{self.record} is no record of a prediction; choose another output, or remove it")
        return settings

    def _read_table(self) -> None:
        """Reads the rows of images that have them all: a process that was killed may have left a part of a line."""
        text = self.table.read_bytes().decode(errors="surrogateescape") if self.table.exists() else ""
        whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
        header, *rows = csv.reader(whole) if text else [self.header]
        if header != self.header:
            raise MedvisionError(
                f"{self.table} has the columns {header}, expected {self.header}; remove it, and begin anew with "
                "overwrite=true"
            )
        found: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            found.setdefault(row[0], {})[row[1]] = row  # the last one, if an image was predicted again
        self.rows = {name: [*of.values()] for name, of in found.items() if [*of] == self.classes}

    def _write_table(self) -> None:
        rows = [row for name in sorted(self.rows) for row in self.rows[name]]
        with replacing(self.table) as temporary:
            temporary.write_bytes(_encoded([self.header, *rows]))

    def _remove(self) -> None:
        """Deletes an earlier prediction: what its settings and its table say that it wrote."""
        if not self.record.exists():
            return
        then = self._recorded()
        what = then["target"], then["classes"], Decision(()), then["probabilities"], then.get("heat")
        before = PredictionFolder(self.path, *what)
        before._read_table()
        for name in before.rows:
            for path in before._pictures(name):
                path.unlink(missing_ok=True)
        self.table.unlink(missing_ok=True)
        self.record.unlink()


def predict(
    predictor: Predictor,
    inputs: Inputs,
    folder: PredictionFolder,
    overwrite: bool = False,
    heat: Callable[[Pixels, NDArray[np.float32], str], NDArray[np.float32]] | None = None,
) -> dict[str, str]:
    """Predicts the images that are not finished.

    Args:
        predictor: Answers.
        inputs: The images.
        folder: Where the answers go.
        overwrite: Begin anew.
        heat: Finds heat (H, W) of an image with its probabilities and its name.

    Returns:
        What is wrong with each image that could not be predicted, by name.

    Raises:
        MedvisionError: If the folder is refused, before anything is predicted, or cannot be written to.
    """
    broken: dict[str, str] = {}
    names = [member.name for member in inputs.images]
    with folder.open(names, overwrite):
        left = [member for member in inputs.images if not folder.finished(member.name)]
        if len(left) < len(names):
            log.info("%d of %d images are already there", len(names) - len(left), len(names))
        said = time.monotonic()
        with tqdm(left, "predicting", disable=None, delay=2, leave=False) as progress:
            for n, member in enumerate(progress):
                if progress.disable and time.monotonic() - said >= LINE_EVERY:
                    log.info("%d of %d images", n, len(left))
                    said = time.monotonic()
                try:
                    image = read_image(member, predictor.channels)
                    probability = predictor(image, member.name)
                    hot = None if heat is None else heat(image, probability, member.name)
                except MedvisionError as error:
                    broken[member.name] = str(error)
                else:
                    folder.add(member.name, image, probability, hot)
    return broken


def _measured(mask: NDArray[np.bool_]) -> list[float]:
    """Area in pixels, share of the image, number of 8-connected components."""
    area = int(np.count_nonzero(mask))
    return [area, area / mask.size, cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1]


def _encoded(rows: Iterable[Sequence[str]]) -> bytes:
    return as_csv(rows).encode(errors="surrogateescape")  # names of files need not be UTF-8
