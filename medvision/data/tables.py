"""Tables beside the images: with or without a header, in the spellings of the challenges."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from medvision.errors import MedvisionError

#: Words for absent and present, in lower case; numbers are read as numbers.
FLAGS: Mapping[str, int] = {
    **dict.fromkeys(("benign", "no", "false", "negative", "absent"), 0),
    **dict.fromkeys(("malignant", "yes", "true", "positive", "present"), 1),
}


def read_table(path: Path) -> list[list[str]]:
    """Rows of a CSV file with commas, semicolons or tabs; cells without surrounding space, empty rows left out.

    Raises:
        MedvisionError: If the file cannot be read or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
        first = text.lstrip().split("\n", 1)[0]
        delimiter = max(",;\t", key=first.count)
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter)]
    except (OSError, ValueError, csv.Error) as error:
        raise MedvisionError(f"{path} cannot be read as a table ({error}); fetch it again") from None
    return [row for row in rows if any(row)]


def read_flags(path: Path, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """Rows of an id and a flag for each class.

    Args:
        path: A CSV file with `id, flag, ...`; the first row may be a header.
        columns: Number of classes.

    Returns:
        For each row the id and the numbers of the classes that are present.

    Raises:
        MedvisionError: If a row is too short or a word is no flag.
    """
    found = []
    for number, row in enumerate(read_table(path)):
        flags = [as_flag(word) for word in row[1 : columns + 1]]
        if len(flags) == columns and None not in flags:
            found.append((row[0], tuple(k for k, flag in enumerate(flags) if flag)))
        elif number:  # the first one is a header
            raise MedvisionError(
                f"{path}, row {number + 1}: {row}; expected an id and {columns} of benign/malignant or 0/1"
            )
    if not found:
        raise MedvisionError(f"{path} has no rows of an id and {columns} of benign/malignant or 0/1; fetch it again")
    return found


def as_flag(word: str) -> int | None:
    """0 or 1, from a number or one of `FLAGS` in either case; None if it is neither."""
    if word.lower() in FLAGS:
        return FLAGS[word.lower()]
    try:
        return {0.0: 0, 1.0: 1}.get(float(word))
    except ValueError:
        return None
