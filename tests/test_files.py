import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision.errors import MedvisionError
from medvision.files import locked, read_json, replacing, writable_folder, write_json, write_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_json_survives_writing_and_reading(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "Größe µm²")
    assert (tmp_path / "text").read_bytes() == "Größe µm²".encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, {"dice": [-math.inf]}, {1, 2}])
def test_what_json_cannot_hold_is_refused_and_the_older_file_kept(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"dice": 0.5})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert read_json(path) == {"dice": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_midway_keeps_the_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="killed"), replacing(path) as temporary:
        assert temporary.parent == path.parent, "another disk could not be renamed from"
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"older"
        raise RuntimeError("killed")
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_fails_and_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"older")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_bytes() == b"older"


def test_a_reader_sees_only_whole_files(tmp_path: Path, in_processes: Callable[..., list[Any]]) -> None:
    path = tmp_path / "metrics.json"
    values = [[number] * 2000 for number in range(2)]
    write_json(path, values[0])

    def work(number: int) -> int:
        if number < 2:
            for _ in range(40):
                write_json(path, values[number])
            return 0
        return sum(json.loads(path.read_text()) not in values for _ in range(150))

    assert in_processes(3, work) == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"), [(None, "missing"), (b"{", "not JSON"), (b"", "not JSON"), (b"\xff\xfe", "not JSON")]
)
def test_json_that_is_missing_or_broken_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MedvisionError, match=f"{path}.*{words}"):
        read_json(path)


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert writable_folder(path, "MEDVISION_RUNS") == path
    assert list(path.iterdir()) == []
    (path / "kept").touch()
    writable_folder(path, "MEDVISION_RUNS")
    assert [file.name for file in path.iterdir()] == ["kept"]


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_a_folder_without_permission_names_the_cure(
    tmp_path: Path, unprivileged: Callable[[], AbstractContextManager[None]], below: str
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    with (
        unprivileged(),
        pytest.raises(MedvisionError, match=f"{folder / below}.*Permission denied.*MEDVISION_RUNS"),
    ):
        writable_folder(folder / below, "MEDVISION_RUNS")


def test_a_file_in_the_way_of_a_folder_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MedvisionError, match=f"{path}.*MEDVISION_RUNS"):
            writable_folder(path, "MEDVISION_RUNS")


def test_a_lock_is_refused_while_another_process_holds_it(
    tmp_path: Path, in_processes: Callable[..., list[Any]]
) -> None:
    path = tmp_path / ".lock"

    def work(_: int) -> str:
        try:
            with locked(path, "the run is busy"):
                return "held"
        except MedvisionError as error:
            return str(error)

    with locked(path):
        assert in_processes(1, work) == ["the run is busy"]
    assert in_processes(1, work) == ["held"]


def test_a_lock_without_a_word_waits(tmp_path: Path, in_processes: Callable[..., list[Any]]) -> None:
    def work(_: int) -> tuple[float, float]:
        with locked(tmp_path / ".lock"):
            begin = time.monotonic()
            time.sleep(0.05)
            return begin, time.monotonic()

    times = sorted(in_processes(3, work))
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(times))


def test_a_lock_ends_with_its_process_and_not_with_the_workers_of_it(tmp_path: Path) -> None:
    path, context = tmp_path / ".lock", multiprocessing.get_context("fork")
    ready, stop = context.Event(), context.Event()

    def holder() -> None:
        with locked(path):
            context.Process(target=stop.wait, args=(30,)).start()  # a worker that lives longer
            ready.set()
            os._exit(9)

    process = context.Process(target=holder)
    process.start()
    assert ready.wait(30)
    process.join()  # a time limit would wait for the worker, which holds the pipe that tells of the end
    try:
        with locked(path, "still held"):
            assert process.exitcode == 9 and not stop.is_set()
    finally:
        stop.set()


def test_a_lock_is_let_go_after_an_error(tmp_path: Path, in_processes: Callable[..., list[Any]]) -> None:
    path = tmp_path / ".lock"
    with pytest.raises(RuntimeError), locked(path):
        raise RuntimeError("in the block")

    def work(_: int) -> bool:
        with locked(path, "still held"):
            return True

    assert in_processes(1, work) == [True]
