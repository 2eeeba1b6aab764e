"""Segmentation networks: torch modules that answer logits for images of any size.

The names are those of `medvision.models.public`. They are imported when one is first asked for, since Python imports
this package before `python -m medvision.models`, whose quick answers need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvision.models.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name (PEP 562)."""
    if name.startswith("_") or name not in (public := import_module("medvision.models.public")).__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)
