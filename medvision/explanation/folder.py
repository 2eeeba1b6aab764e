"""A folder of explanations: arrays, overlays and a figure for each image, and a table of scores."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from medvision.data.folder import ENDINGS, STEM, SUFFIX
from medvision.data.images import Pixels, read_mask, resize_mask
from medvision.data.source import Source
from medvision.errors import MedvisionError
from medvision.explanation.heat import Explanation, Target, explain, maps_of, row
from medvision.explanation.trust import area, deletion_and_insertion, inside, likeness, randomised
from medvision.figures import Tile, gallery, heated
from medvision.files import as_csv, replacing

SCORES = ("deletion", "insertion", "likeness", "inside")
CHANCE = "random heat"

Bools = NDArray[np.bool_]


class MaskFiles:
    """Masks in files of their own, named after the images, perhaps with `_segmentation`, `_mask` or the like behind.

    Args:
        place: A folder or a zip archive.
        names: Of the images.

    Raises:
        MedvisionError: If it is not there, or has a mask of none of them.
    """

    def __init__(self, place: Path, names: Iterable[str]) -> None:
        if not place.exists():
            raise MedvisionError(f"masks={place} is not there; expected a folder or a zip archive")
        stems = ((member, STEM.search(member.name)) for member in Source(place).members())
        there = {SUFFIX.sub("", stem[1]): member for member, stem in stems if stem}
        self.files = {name: there[stem] for name in names if (stem := Path(without_ending(name)).name) in there}
        if not self.files:
            raise MedvisionError(
                f"masks={place} has {len(there)} images, none named after one of those that are explained; expected "
                "names as theirs, perhaps with _mask or _segmentation behind"
            )

    def of(self, name: str, size: tuple[int, int]) -> Bools | None:
        """The mask of an image at a size, bool (H, W); None where there is none."""
        return resize_mask(read_mask(self.files[name])[0], size) if name in self.files else None


def without_ending(name: str) -> str:
    """The name of an image without that of its format; an id with a dot stays what it is."""
    return re.sub(ENDINGS, "", name, flags=re.IGNORECASE)


class ExplanationFolder:
    """Writes what is found of an image, over what was found before.

    Args:
        path: The folder.
        layers: Those that are explained.
    """

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        self.path, self.layers = path, layers

    def heat(self, name: str, image: Pixels, found: Explanation, mask: Bools | None = None) -> None:
        """Writes the heat of each method, as an array at network size, over the image, and as one figure.

        Args:
            name: Of the image; its files begin with it.
            image: uint8 (H, W, C).
            found: Of this image alone.
            mask: bool (h, w) at network size, drawn over the image where labels are explained.
        """
        choice, size = found.choices[0], image.shape[1::-1]
        shown = mask if choice.where is None else choice.where.cpu().numpy() > 0
        if shown is not None and shown.sum() == 1:  # a point, made large enough to be seen
            shown = cv2.dilate(shown.astype(np.uint8), np.ones((1 + 2 * (min(shown.shape) // 32),) * 2)) > 0
        masks = [] if shown is None else [cv2.resize(shown.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0]
        caption = f"{found.probability[0]:.3f} {choice.name}"  # a name may be long, and is whole in the title
        for method, heat in found.heat.items():
            maps = heat[0].cpu().numpy()
            of_layers = dict(zip(maps_of(method, self.layers), maps, strict=True))
            self._save(name, f"{method}.npy", maps)
            for layer, one in of_layers.items():
                grey = (255 * cv2.resize(one, size).clip(0, 1)).round().astype(np.uint8)
                for kind, pixels in (("heat", grey), ("overlay", heated(image, one))):
                    with replacing(self._place(name, f"{method}_{layer}_{kind}.png")) as temporary:
                        Image.fromarray(pixels).save(temporary, "PNG")
            tiles = row(image, of_layers, caption, np.array(masks, bool))
            gallery(self._place(name, f"{method}.png"), tiles, [], f"{name}: {method} of {choice.name}", len(tiles))

    def activations(self, name: str, found: Mapping[str, Tensor]) -> None:
        """Writes what layers answer to an image, as an array and as a figure.

        Args:
            name: Of the image; its files begin with it.
            found: For each layer (1, ...).
        """
        for layer, answer in found.items():
            values = answer[0].float().cpu().numpy()
            self._save(name, f"activation_{layer}.npy", values)
            shape = "x".join(map(str, values.shape))
            title = f"{name}: {layer} ({shape}), the channels that vary most, each from its least to its greatest value"
            gallery(self._place(name, f"activation_{layer}.png"), channels(values), [], title)

    def _save(self, name: str, ending: str, values: NDArray[np.float32]) -> None:
        with replacing(self._place(name, ending)) as temporary, temporary.open("wb") as handle:
            np.save(handle, values)

    def _place(self, name: str, ending: str) -> Path:
        path = self.path / f"{without_ending(name)}_{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def channels(values: NDArray[np.float32], count: int = 18) -> list[Tile]:
    """Pictures of the channels of an answer that vary most, as grey from the least value to the greatest.

    Args:
        values: (C, h, w); what has another shape is one picture of its numbers.
        count: How many.
    """
    maps = values if values.ndim == 3 else np.atleast_2d(values).reshape(1, -1, values.shape[-1])
    shown = np.sort(np.argsort(-maps.std((1, 2)), kind="stable")[:count])
    tiles = []
    for number in shown:
        low, high = float(maps[number].min()), float(maps[number].max())
        grey = ((maps[number] - low) / (high - low or 1) * 255).astype(np.uint8)[..., None]
        tiles.append(Tile(f"{number}: {low:.3g} to {high:.3g}", grey, np.zeros((0, *grey.shape[:2]), bool)))
    return tiles


class Scores:
    """Scores of the heat of each image, method and layer, beside heat drawn at random.

    `deletion` and `insertion` are areas under curves of probability; `likeness` is the rank correlation with the heat
    of the network with random weights; `inside` is the share of heat inside the mask.

    Args:
        network: The trained network, in evaluation mode.
        layers: Those that are explained.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self.network, self.layers, self.random = network, layers, randomised(network)
        self.draw = torch.Generator().manual_seed(0)
        self.rows: list[tuple[str, str, str, str, list[float]]] = []

    def add(self, name: str, seen: Tensor, found: Explanation, target: Target, mask: Bools | None) -> None:
        """Scores an image.

        Args:
            name: Of the image.
            seen: (1, C, H, W), normalised.
            found: Its explanation.
            target: What chose it.
            mask: bool (H, W); None, or an empty one, where there is none.
        """
        [choice] = found.choices

        def probability(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return torch.tensor([choice.probability(values) for values in target.activate(self.network(images))])

        other = explain(self.random, seen, self.layers, [*found.heat], target, [choice]).heat
        maps = [
            (method, *both)
            for method, heat in found.heat.items()
            for both in zip(maps_of(method, self.layers), heat[0], other[method][0], strict=True)
        ]
        noise = torch.rand(2, *seen.shape[-2:], generator=self.draw).to(seen.device)
        for method, layer, heat, of_random in [*maps, (CHANCE, "", noise[0], noise[1])]:
            curves = deletion_and_insertion(probability, seen[0], heat)
            within = inside(heat, mask) if mask is not None and mask.any() else float("nan")
            self.rows.append(
                (name, choice.name, method, layer, [*map(area, curves), likeness(heat, of_random), within])
            )

    def means(self) -> list[list[str]]:
        """Method, layer and the mean of each score over images, and over how many where not all have it."""
        grouped: dict[tuple[str, str], list[list[float]]] = {}
        for _, _, method, layer, values in self.rows:
            grouped.setdefault((method, layer), []).append(values)
        lines = []
        for words, found in grouped.items():
            columns = [[v for v in column if v == v] for column in zip(*found, strict=True)]  # without NaN
            lines.append([*words, *(_mean(column, len(found)) for column in columns)])
        return lines

    def table(self) -> str:
        """The scores of each image as CSV."""
        rows = ([*words, *("" if v != v else v for v in values)] for *words, values in self.rows)
        return as_csv([["file", "class", "method", "layer", *SCORES], *rows])


def _mean(values: Sequence[float], images: int) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.3f}" + (f" of {len(values)}" if len(values) < images else "")
