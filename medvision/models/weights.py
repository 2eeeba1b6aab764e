"""Weights made elsewhere: ImageNet downloads, encoder files, and the published networks' own state dicts.

Weights are either what was asked for or an error, never silently random.
"""

import difflib
import logging
import pickle
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import huggingface_hub.constants
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from medvision.errors import MedvisionError

logger = logging.getLogger(__name__)

# What libraries raise for models and files that they cannot make or read.
BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Where training scripts put the state dict inside what they save.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
# The same tensors under other names: published PVTv2 and timm's, and timm's own spelling under features_only.
_SPELLINGS = {
    re.compile(pattern): replacement
    for pattern, replacement in {
        r"^(\w*[a-z])_(\d+)\.": r"\1.\2.",
        r"\.dwconv\.dwconv\.": ".dwconv.",
        r"^patch_embed1\.": "patch_embed.",
        **{rf"^patch_embed{n}\.": f"stages.{n - 1}.downsample." for n in (2, 3, 4)},
        **{rf"^block{n}\.": f"stages.{n - 1}.blocks." for n in (1, 2, 3, 4)},
        **{rf"^norm{n}\.": f"stages.{n - 1}.norm." for n in (1, 2, 3, 4)},
    }.items()
}
_BACKBONE = "encoder.backbone."
_SMALLEST_SHARE = 0.9
_PREFIX_DEPTH = 4


@dataclass(frozen=True)
class WeightReport:
    """What became of a weight file.

    Attributes:
        matched: the model's keys that were loaded.
        missing: the model's keys that keep their initial values.
        unexpected: the file's keys that were not used.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@runtime_checkable
class PublishedNames(Protocol):
    """A network that knows the key names of its published implementation."""

    def published_prefixes(self) -> dict[str, str | None]:
        """Published prefix -> prefix here; None for what is knowingly left out."""
        ...


def unknown_encoder(name: str, known: Iterable[str], option: str = "encoder") -> MedvisionError:
    """The error for a name that no library knows, with near matches; `option` is where it was given."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`timm.list_models()` lists the names."
    return MedvisionError(f"Unknown model.{option}={name!r}: {hint}")


@contextmanager
def imagenet_download(encoder: str) -> Iterator[None]:
    """Turn failures of the download inside into a MedvisionError, soon.

    Offline the hub's client retries for 20 to 50 s. One short request tells; then only its cache is used.
    """
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise MedvisionError(
            f"The ImageNet weights of encoder {encoder!r} could not be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Without a network, give a file: "
            "model.encoder_weights=<file>; or train from random weights: model.encoder_weights=null."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(url: str, timeout: float = 5.0) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # The client brings its own certificates; a quarrel about them here says nothing about it.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def chosen(weights: str | Path | None) -> str | Path | None:
    """What ``encoder_weights`` asks for; None for ``"none"``."""
    return None if weights == "none" else weights


def read_state_dict(path: str | Path, option: str = "encoder_weights") -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of anything `torch.save` wrote that holds plain values.

    Args:
        path: file, or the folder of a run, whose best epoch is meant; wrappers such as ``{"state_dict": ...}`` are
            opened.
        option: where it was given, for messages.

    Raises:
        MedvisionError: no such file, not a weight file, pickled objects inside, or no tensors.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder, path = path, path / "checkpoints" / "best.ckpt"
        if not path.is_file():
            raise MedvisionError(
                f"Weights {str(folder)!r}: a folder without checkpoints/best.ckpt; expected a file, or a run with a "
                "finished epoch."
            )
    if not path.is_file():
        raise MedvisionError(
            f"Weights {str(path)!r}: no such file. Give model.{option}=null, a file or a run folder"
            + (", or imagenet." if option == "encoder_weights" else ".")
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*BUILD_ERRORS, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        if "Unsupported global" in str(error):
            raise MedvisionError(
                f"Weights {str(path)!r} hold pickled Python objects, which could run any code when read. If "
                "you trust the file, save its tensors alone: torch.save(model.state_dict(), file)."
            ) from error
        raise MedvisionError(
            f"Weights {str(path)!r} cannot be read: expected a whole file of torch.save, or of safetensors "
            "under the suffix .safetensors."
        ) from error
    return _tensors(content, str(path))


def _tensors(content: object, name: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _tensors(content[key], name)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            return tensors
    raise MedvisionError(
        f"Weights {name!r} hold no state dict: expected tensors by name, bare or under one of {_WRAPPERS}."
    )


def _spell(key: str) -> str:
    """One spelling of a tensor's name, whoever wrote it."""
    for pattern, replacement in _SPELLINGS.items():
        key = pattern.sub(replacement, key)
    return key


def load_encoder_weights(encoder: nn.Module, path: str | Path, name: str = "") -> WeightReport:
    """Load pretrained weights from a file into an encoder, in place.

    Understood are timm, torchvision and published PVTv2 names, under whatever prefix fits most tensors
    (``module.``, ``backbone.``, ``model.encoder.`` ...), so a run folder may be of any network around the same
    encoder. Names and shapes must agree; heads and decoders are left over.

    Args:
        encoder: a timm or segmentation_models_pytorch encoder.
        path: see `read_state_dict`.
        name: of the encoder, for messages.

    Returns:
        What was loaded, what was missing, what was left over; logged as well.

    Raises:
        MedvisionError: unreadable file, or under 90 % of the encoder's parameters and buffers found in it.
    """
    state = read_state_dict(path)
    own = encoder.state_dict()
    # smp keeps a timm encoder in a module `model`.
    wrapper = "model." if all(key.startswith("model.") for key in own) else ""
    targets = {_spell(key.removeprefix(wrapper)): key for key in own}

    candidates: dict[str, dict[str, str]] = {}
    for key in state:
        parts = key.split(".")
        for depth in range(min(_PREFIX_DEPTH + 1, len(parts))):
            target = targets.get(_spell(".".join(parts[depth:])))
            if target is not None:
                candidates.setdefault(".".join(parts[:depth]), {})[target] = key
    named = max(candidates.values(), key=len, default={})
    matched = {target: key for target, key in named.items() if state[key].shape == own[target].shape}
    used = set(matched.values())
    report = WeightReport(
        matched=tuple(key for key in own if key in matched),
        missing=tuple(key for key in own if key not in matched and _counts(key)),
        unexpected=tuple(key for key in state if key not in used),
    )
    misfits = [_misfit(key, state[named[key]], own[key]) for key in report.missing if key in named]
    found = sum(map(_counts, report.matched))
    total = found + len(report.missing)
    details = f"missing {_some(report.missing)}; not used {_some(report.unexpected)}; other shapes {_some(misfits)}"
    if found < _SMALLEST_SHARE * total:
        raise MedvisionError(
            f"Weights {str(path)!r} fit {found} of {total} parameters and buffers ({found / total:.1%}) of encoder "
            f"{name or type(encoder).__name__}, expected at least {_SMALLEST_SHARE:.0%}: {details}. Give a file made "
            "for this very model.encoder."
        )
    # Not the encoder's own method: some of smp's expect a classifier's head to remove.
    nn.Module.load_state_dict(encoder, {target: state[key] for target, key in matched.items()}, strict=False)
    log = logger.warning if report.missing else logger.info
    log("Encoder weights %s: loaded %d of %d; %s", path, found, total, details)
    return report


def load_published(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> WeightReport:
    """Load weights saved by the published implementation of U-Net v2 or U-Net++, in place and strictly.

    For `UNetV2` a published PVTv2 classifier is understood as well and fills the encoder alone. Left out
    knowingly are what no output depends on, heads that a `UNetV2` without deep supervision has not, and
    the classifier's head.

    Args:
        model: a `UNetV2` or `UNetPP` of the same size, outputs and (U-Net++) deep supervision.
        source: a state dict in the published names, or a file of one (see `read_state_dict`).

    Returns:
        What was loaded; ``missing`` names the rest of the model where only the encoder was filled.

    Raises:
        MedvisionError: another model, an unreadable file, or keys or shapes other than expected.
    """
    if not isinstance(model, PublishedNames):
        raise MedvisionError(f"load_published loads into UNetV2 or UNetPP, not into {type(model).__name__}.")
    state = _tensors(source, "given") if isinstance(source, Mapping) else read_state_dict(source, "published_weights")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    names = model.published_prefixes()
    own = model.state_dict()
    expected = list(own)
    if "patch_embed1.proj.weight" in state and _BACKBONE in names:
        state = {_BACKBONE + key: value for key, value in state.items()}
        expected = [key for key in own if key.startswith("encoder.")]

    spelled = {_spell_encoder(key): key for key in expected}
    loaded: dict[str, Tensor] = {}
    ignored, unknown, misfits = [], [], []
    for key, value in state.items():
        prefix = max((prefix for prefix in names if key.startswith(prefix)), key=len, default=None)
        name = None if prefix is None else names[prefix]
        if prefix is None:
            unknown.append(key)
        elif name is None:
            ignored.append(key)
        elif (target := spelled.get(_spell_encoder(name + key.removeprefix(prefix)))) is None:
            unknown.append(key)
        elif value.shape != own[target].shape:
            misfits.append(_misfit(key, value, own[target]))
            loaded[target] = value
        else:
            loaded[target] = value
    missing = [key for key in expected if key not in loaded and _counts(key)]
    if unknown or missing or misfits:
        raise MedvisionError(
            f"These published weights do not fit this {type(model).__name__}: of {len(state)} entries "
            f"{len(unknown)} are unknown ({_some(unknown)}) and {len(misfits)} have another shape "
            f"({_some(misfits)}); {len(missing)} of {len(expected)} expected ones are missing "
            f"({_some(missing)}). Check the file and the model's encoder, channels, in_channels, num_outputs "
            "and deep_supervision."
        )
    model.load_state_dict(loaded, strict=False)
    logger.info("Published weights: loaded %d of %d; left out %s", len(loaded), len(own), _some(ignored))
    rest = tuple(key for key in own if key not in loaded and _counts(key))
    return WeightReport(matched=tuple(loaded), missing=rest, unexpected=tuple(ignored))


def _spell_encoder(key: str) -> str:
    inner = key.removeprefix("encoder.")
    return key if inner == key else "encoder." + _spell(inner)


def _counts(key: str) -> bool:
    """Whether an entry is needed: old files (torch < 0.4.1) count no batches, and no output depends on it."""
    return not key.endswith("num_batches_tracked")


def _misfit(key: str, given: Tensor, own: Tensor) -> str:
    text = f"{key} {tuple(given.shape)} in the file, {tuple(own.shape)} in the model"
    if given.ndim == own.ndim == 4 and given.shape[1] == 3 != own.shape[1] and given.shape[0] == own.shape[0]:
        text += f" (the file was made for 3 input channels, the model has in_channels={own.shape[1]})"
    return text


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest or "none"
