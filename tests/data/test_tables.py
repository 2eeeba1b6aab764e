import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision.data.tables import read_flags, read_table
from medvision.errors import MedvisionError


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """`table("a,0")`: a file with this text."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "table.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("header", ["image_id,melanoma,keratosis\n", "id,a,b\n", ",,\n", ""], ids=str)
def test_tables_are_read_with_or_without_header(
    table: Callable[..., Path], mark: str, delimiter: str, end: str, header: str
) -> None:
    text = mark + header + "ISIC_1,0.0,1.0\nISIC_2,1.0,0.0\n\nISIC_3,0.0,0.0\nISIC_4,1,1"
    path = table(text.replace(",", delimiter).replace("\n", end))
    assert read_flags(path, 2) == [("ISIC_1", (1,)), ("ISIC_2", (0,)), ("ISIC_3", ()), ("ISIC_4", (0, 1))]


@pytest.mark.parametrize(
    ("word", "present"),
    [
        *((word, False) for word in ("benign", "Benign", " BENIGN ", "0", "0.0", "0.00", "no", "False", "absent")),
        *((word, True) for word in ("malignant", "MALIGNANT", '"malignant"', "1", "1.0", "yes", "true", "present")),
    ],
)
def test_words_and_numbers_are_flags(table: Callable[..., Path], word: str, present: bool) -> None:
    assert read_flags(table(f"ISIC_1,{word}\nISIC_2,benign\n"), 1) == [("ISIC_1", (0,) * present), ("ISIC_2", ())]


@pytest.mark.parametrize("word", ["maybe", "2", "-1", "0.5", "nan", "inf", "", "benign malignant"])
def test_other_words_are_named(table: Callable[..., Path], word: str) -> None:
    path = table(f"ISIC_1,benign\nISIC_2,{word}\n")
    with pytest.raises(MedvisionError) as caught:
        read_flags(path, 1)
    assert str(caught.value).startswith(f"{path}, row 2: ") and "benign/malignant or 0/1" in str(caught.value)


@pytest.mark.parametrize("row", ["ISIC_2", "ISIC_2,1", "ISIC_2,1,"])
def test_short_rows_are_named(table: Callable[..., Path], row: str) -> None:
    path = table(f"id,a,b\nISIC_1,0,1\n{row}\nISIC_3,0,0\n")
    with pytest.raises(MedvisionError, match=r"table\.csv, row 3: \['ISIC_2'.*expected an id and 2 of"):
        read_flags(path, 2)


def test_further_columns_are_not_read(table: Callable[..., Path]) -> None:
    assert read_flags(table("ISIC_1,1,0,what,ever\n"), 2) == [("ISIC_1", (0,))]


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "id,melanoma\n", ",,,\n"])
def test_a_table_without_rows_is_named(table: Callable[..., Path], content: str) -> None:
    with pytest.raises(MedvisionError, match=r"table\.csv has no rows of an id and 1 of .*fetch it again"):
        read_flags(table(content), 1)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"PK\x03\x04\x14\x00\x00\x00",
        b"ISIC_1,0\nISIC_2,\x00\n",
        b"ISIC_1,\xff\xfe\n",
        "ISIC_1,0\n".encode("utf-16"),
        b'ISIC_1,"' + b"0" * 200_000,
    ],
    ids=["png", "zip", "zero byte", "latin", "utf-16", "a huge cell"],
)
def test_what_is_no_text_is_named(table: Callable[..., Path], content: bytes) -> None:
    path = table(content)
    for read in (read_table, lambda path: read_flags(path, 1)):
        with pytest.raises(MedvisionError, match=r"table\.csv cannot be read as a table .*fetch it again"):
            read(path)


def test_a_missing_table_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(MedvisionError, match="cannot be read as a table"):
            read_table(path)


CELLS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"], exclude_characters="\ufeff")
)


@given(st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]))
def test_what_was_written_is_read(tmp_path: Path, rows: list[list[str]], delimiter: str) -> None:
    rows = [["first", "second", "third"], *rows]
    path = tmp_path / "written.csv"
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows(rows)
    assert read_table(path) == [row for row in rows if any(row)]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(content)
    for read in (read_table, lambda path: read_flags(path, 2)):
        try:
            assert all(row for row in read(path))
        except MedvisionError as error:
            assert str(path) in str(error)
