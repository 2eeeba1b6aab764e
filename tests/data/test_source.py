import io
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision.data import source as source_module
from medvision.data.source import Source
from medvision.errors import MedvisionError

FILES = {"b/two.png": b"22", "a/one.png": b"1" * 5000, "three": b"", "b/ä ö.txt": bytes(range(256))}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Members that are stored, not compressed, so that their bytes can be damaged one by one."""
    path = tmp_path / "stored.zip"
    with zipfile.ZipFile(path, "w") as handle:
        for name, content in FILES.items():
            handle.writestr(name, content)
    return path


@given(st.dictionaries(st.text("abc", min_size=1, max_size=4).map(lambda s: f"{s}/x.bin"), st.binary(), max_size=4))
def test_archive_and_folder_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, pack: Callable[..., Path], files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("both")
    (root / "folder").mkdir()
    for found in (Source(pack(root / "data", files)), Source(pack(root / "folder", files, as_folder=True))):
        assert found.names == sorted(files)
        assert {member.name: member.read() for member in found.members()} == files


def test_find_takes_the_folder_first_then_the_archive(tmp_path: Path, pack: Callable[..., Path]) -> None:
    assert Source.find(tmp_path, "data") is None
    archive = pack(tmp_path / "data", FILES)
    found = Source.find(tmp_path, "data")
    assert found is not None and found.path == archive
    folder = pack(tmp_path / "data", {"only": b"1"}, as_folder=True)
    found = Source.find(tmp_path, "data")
    assert found is not None and found.path == folder and found.names == ["only"]


def test_folders_inside_are_no_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as handle:
        handle.mkdir("a")
        handle.writestr("a/x", b"1")
    (tmp_path / "folder/a/empty").mkdir(parents=True)
    (tmp_path / "folder/a/x").write_bytes(b"1")
    assert Source(tmp_path / "data.zip").names == Source(tmp_path / "folder").names == ["a/x"]


def test_a_member_is_named_with_its_archive(archive: Path) -> None:
    assert next(str(member) for member in Source(archive).members()) == f"{archive}: a/one.png"


def test_every_truncation_is_named(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    broken = tmp_path / "broken.zip"
    for length in {0, 1, 4, 30, len(content) // 2, *range(len(content) - 60, len(content))}:
        broken.write_bytes(content[:length])
        with pytest.raises(MedvisionError, match=f"{broken} is not a whole zip archive.*fetch it again"):
            Source(broken)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><title>Sign in</title>", b"PK\x03\x04" + b"\0" * 400])
def test_what_is_no_zip_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(content)
    with pytest.raises(MedvisionError, match=f"{path} is not a whole zip archive.*fetch it again"):
        Source(path)


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:/x.png", "C:\\x.png", "..\\x.png", "\\x.png", "a/.."]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as handle:
        handle.writestr("good.png", b"1")
        handle.writestr(name, b"1")
    with pytest.raises(MedvisionError, match=f"{path} holds {re.escape(repr(name))}.*leads out.*do not use it"):
        Source(path)


@pytest.mark.parametrize("name", ["a:b.png", "..x.png", "a/..b/x.png", "a/b:c.png", "./x.png"])
def test_names_that_only_look_odd_are_decided(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as handle:
        handle.writestr(name, b"1")
    if name == "a:b.png":
        with pytest.raises(MedvisionError, match="leads out"):
            Source(path)
    else:
        assert Source(path).read(name) == b"1"


def test_a_member_without_a_name_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as handle:
        handle.writestr(".", b"1")
    with pytest.raises(MedvisionError, match=r"holds '\.'"):
        Source(archive)


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    path, info = tmp_path / "data.zip", zipfile.ZipInfo("link.png")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as handle:
        handle.writestr(info, b"/etc/passwd")
    with pytest.raises(MedvisionError, match=f"{path} holds the link 'link.png'; do not use it"):
        Source(path)


def test_an_encrypted_archive_is_named(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(MedvisionError, match=f"{archive} is encrypted.*decrypt it first"):
        Source(archive)


def test_a_member_that_is_too_large_is_refused_before_reading(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_MEMBER", 4999)
    with pytest.raises(MedvisionError, match=f"{archive} holds 'a/one.png' of 5,000 bytes; more than 4,999"):
        Source(archive)
    monkeypatch.setattr(source_module, "MAX_MEMBER", 5000)
    assert len(Source(archive).names) == len(FILES)


def test_a_damaged_member_is_named_and_the_others_are_read(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[content.index(b"1" * 5000) + 2500] ^= 1
    archive.write_bytes(content)
    found = Source(archive)
    with pytest.raises(MedvisionError, match=f"{archive}: a/one.png cannot be read.*CRC.*fetch it again"):
        found.read("a/one.png")
    assert found.read("b/two.png") == b"22"


@pytest.mark.parametrize("bit", [1, 4, 128])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_single_damaged_byte_gives_wrong_contents(tmp_path: Path, bit: int, compression: int) -> None:
    path = tmp_path / "data.zip"
    files = {"a/one.png": b"one" * 9, "two.png": b"two"}
    with zipfile.ZipFile(path, "w", compression) as handle:
        for name, text in files.items():
            handle.writestr(zipfile.ZipInfo(name), text, compression)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        try:
            found = Source(path)
            assert all(found.read(name) == files[name] for name in files if name in found.names), position
        except MedvisionError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(whole) // 3


def test_a_folder_names_files_that_are_gone(tmp_path: Path, pack: Callable[..., Path]) -> None:
    folder = pack(tmp_path / "data", FILES, as_folder=True)
    found = Source(folder)
    (folder / "three").unlink()
    with pytest.raises(MedvisionError, match=f"{folder}: three cannot be read"):
        found.read("three")


def test_an_archive_that_was_replaced_names_files_that_are_gone(archive: Path, pack: Callable[..., Path]) -> None:
    found = Source(archive)
    pack(archive.with_suffix(""), {"other": b"1"})
    with pytest.raises(MedvisionError, match=f"{archive}: three cannot be read"):
        found.read("three")


def test_a_broken_link_in_a_folder_is_named_when_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.png").symlink_to(tmp_path / "nowhere")
    found = Source(tmp_path / "data")
    assert found.names == ["x.png"]
    with pytest.raises(MedvisionError, match=r"x\.png cannot be read"):
        found.read("x.png")


@pytest.fixture(params=[False, True], ids=["zip", "folder"])
def many(request: pytest.FixtureRequest, tmp_path: Path, pack: Callable[..., Path]) -> tuple[Source, dict[str, bytes]]:
    files = {f"{number}.bin": np.random.default_rng(number).bytes(20_000 + number) for number in range(40)}
    return Source(pack(tmp_path / "many", files, request.param)), files


def test_threads_read_at_once(many: tuple[Source, dict[str, bytes]]) -> None:
    found, files = many
    with ThreadPoolExecutor(8) as pool:
        names = [*files] * 10
        assert all(a == files[b] for a, b in zip(pool.map(found.read, names), names, strict=True))


def test_forked_processes_read_at_once(
    many: tuple[Source, dict[str, bytes]], in_processes: Callable[..., list[Any]]
) -> None:
    found, files = many
    assert found.read("0.bin") == files["0.bin"], "the archive is open when the processes fork"

    def work(number: int) -> int:
        order = [*[*files][number::3], *files]
        return sum(found.read(name) == files[name] for _ in range(5) for name in order) - 5 * len(order)

    assert in_processes(3, work) == [0, 0, 0]


def test_a_member_travels_to_another_process(many: tuple[Source, dict[str, bytes]]) -> None:
    found, files = many
    found.read("0.bin")
    member = pickle.loads(pickle.dumps(found.members()[3]))
    assert member.read() == files[member.name]
    assert member.signature == found.members()[3].signature


def test_a_read_only_root_is_enough(
    tmp_path: Path, pack: Callable[..., Path], unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    pack(tmp_path / "data", FILES).chmod(0o444)
    pack(tmp_path / "folder", FILES, as_folder=True).chmod(0o555)
    tmp_path.chmod(0o555)
    with unprivileged():
        with pytest.raises(PermissionError):
            (tmp_path / "proof").touch()
        for stem in ("data", "folder"):
            found = Source.find(tmp_path, stem)
            assert found is not None and {name: found.read(name) for name in found.names} == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.zip", "folder"]


@pytest.mark.parametrize("what", ["data.zip", "folder", "folder/inner", "folder/x.png"])
def test_what_may_not_be_read_is_named(
    tmp_path: Path,
    pack: Callable[..., Path],
    unprivileged: Callable[[], AbstractContextManager[None]],
    what: str,
) -> None:
    files = {"inner/y.png": b"1", "x.png": b"2"}
    pack(tmp_path / "data", files)
    pack(tmp_path / "folder", files, as_folder=True)
    (tmp_path / what).chmod(0)
    try:
        with unprivileged(), pytest.raises(MedvisionError, match=f"{re.escape(what)}.*Permission denied|x.png cannot"):
            found = Source.find(tmp_path, what.split("/")[0].removesuffix(".zip"))
            assert found is not None
            for member in found.members():
                member.read()
    finally:
        (tmp_path / what).chmod(0o755)


def test_signatures_change_with_the_file_only(tmp_path: Path, pack: Callable[..., Path]) -> None:
    def signatures(path: Path) -> dict[str, str]:
        return {member.name: member.signature for member in Source(path).members()}

    before = signatures(pack(tmp_path / "data", {"a": b"1", "b": b"2"}))
    after = signatures(pack(tmp_path / "data", {"b": b"2", "a": b"3", "c": b""}))
    assert before["b"] == after["b"] and before["a"] != after["a"]

    folder = pack(tmp_path / "data", {"a": b"1", "b": b"2"}, as_folder=True)
    before = signatures(folder)
    assert signatures(folder) == before
    facts = (folder / "a").stat()
    (folder / "a").write_bytes(b"3")
    os.utime(folder / "a", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert signatures(folder)["a"] != before["a"] and signatures(folder)["b"] == before["b"]


METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflated": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


class Unseekable(io.RawIOBase):
    """A pipe: an archive that is written to it has sizes and checksums behind each file."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.content += content
        return len(content)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zip64", [False, True], ids=["zip32", "zip64"])
@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\n" * 9], ids=["", "behind a script"])
def test_archives_of_every_kind_are_read(tmp_path: Path, method: str, zip64: bool, piped: bool, prefix: bytes) -> None:
    pipe, path = Unseekable(), tmp_path / "data.zip"
    target: Any = pipe if piped else path
    with zipfile.ZipFile(target, "w", METHODS[method]) as handle:
        for name, content in FILES.items():
            with handle.open(name, "w", force_zip64=zip64) as stream:
                stream.write(content)
    path.write_bytes(prefix + (bytes(pipe.content) if piped else path.read_bytes()))
    assert {member.name: member.read() for member in Source(path).members()} == FILES
    found = Source(path)
    path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"PK\7\7"))
    with pytest.raises(MedvisionError, match=f"{path}: three cannot be read.*fetch it again"):
        found.read("three")


@pytest.mark.parametrize("method", METHODS)
def test_no_changed_member_gives_other_contents(tmp_path: Path, method: str) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as handle:
        handle.writestr("a.bin", b"one " * 30, METHODS[method])
    found, whole = Source(path), path.read_bytes()
    flipped = [whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :] for n in range(len(whole))]
    refused = 0
    for content in [*flipped, *(whole[:n] for n in range(len(whole)))]:
        path.write_bytes(content)
        try:
            assert found.read("a.bin") == b"one " * 30
        except MedvisionError as error:
            assert f"{path}: a.bin cannot be read" in str(error)
            refused += 1
    assert refused > 2 * whole.index(b"PK\1\2") - 40


def test_an_archive_that_changes_after_opening_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"

    def write(content: bytes) -> None:
        with zipfile.ZipFile(path, "w") as handle:
            handle.writestr("a.bin", content)

    write(b"first")
    member = Source(path).members()[0]
    for content in (b"other", b"longer than before", b""):
        write(content)
        with pytest.raises(MedvisionError, match=f"{path}: a.bin cannot be read"):
            member.read()
    path.unlink()
    with pytest.raises(MedvisionError, match=r"a\.bin cannot be read.*No such file"):
        member.read()
    write(b"first")
    assert member.read() == b"first"


def test_a_method_that_is_not_known_is_named(archive: Path) -> None:
    content = archive.read_bytes()
    header = content.index(b"PK\1\2")
    archive.write_bytes(content[: header + 10] + b"\x63\0" + content[header + 12 :])
    found = Source(archive)
    with pytest.raises(MedvisionError, match=f"{archive}: .* cannot be read .*compression"):
        found.read("b/two.png")


def test_a_name_that_was_not_listed_is_named(archive: Path) -> None:
    with pytest.raises(MedvisionError, match=f"{archive}: nothing cannot be read"):
        Source(archive).read("nothing")
