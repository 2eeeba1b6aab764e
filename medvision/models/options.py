"""Impossible values of a model's options, refused by name."""

from collections.abc import Iterable

from medvision.errors import MedvisionError


def one_of(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is none of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise MedvisionError(f"Unknown model.{option}={value!r}: choose of {', '.join(choices)}.")


def whole_number(option: str, value: object) -> None:
    """Refuse what is no whole number of 1 or more."""
    if not isinstance(value, int) or value < 1:
        raise MedvisionError(f"model.{option}={value!r} is impossible: expected a whole number of 1 or more.")


def share(option: str, value: object) -> None:
    """Refuse what is no number from 0 to below 1."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise MedvisionError(f"model.{option}={value!r} is impossible: expected a share from 0 to below 1.")
