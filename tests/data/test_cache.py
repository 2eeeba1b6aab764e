import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medvision.data import cache as cache_module
from medvision.data.alike import perceptual_hash
from medvision.data.cache import BrokenFiles, Cache, Sample
from medvision.data.images import resize_image
from medvision.data.source import Source
from medvision.errors import MedvisionError

SIZE = (8, 8)
FACTORS = [(1, 1), (2, 3), (3, 2), (4, 4), (1, 5)]


def draw(number: int) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """An image and two masks whose sides are multiples of the network's."""
    rng = np.random.default_rng(number)
    factors = FACTORS[number % len(FACTORS)]
    size = (SIZE[0] * factors[0], SIZE[1] * factors[1])
    return rng.integers(0, 256, (*size, 3), np.uint8), [np.uint8(255) * (rng.random(size) < 0.2) for _ in range(2)]


class Made(NamedTuple):
    root: Path
    files: dict[str, bytes]
    pack: Callable[..., Path]

    def samples(self, as_folder: bool = False) -> list[Sample]:
        """Every sample has two classes; the second is absent in the first sample."""
        source = Source(self.pack(self.root / "data", self.files, as_folder))
        by_name = {member.name: member for member in source.members()}
        ids = sorted(name.split("/")[0] for name in self.files if name.endswith("image.png"))

        def masks(i: str, which: str) -> Any:
            return tuple(member for name, member in by_name.items() if name.startswith(f"{i}/{which}"))

        return [Sample(i, by_name[f"{i}/image.png"], (masks(i, "mask"), masks(i, "extra"))) for i in ids]


@pytest.fixture
def made(tmp_path: Path, pack: Callable[..., Path], encode: Callable[..., bytes]) -> Made:
    files = {}
    for number in range(5):
        image, masks = draw(number)
        files[f"s{number}/image.png"] = encode(image)
        for part, mask in enumerate(masks):
            files[f"s{number}/mask{part}.png"] = encode(mask)
        if number:
            files[f"s{number}/extra.png"] = encode(masks[0])
    return Made(tmp_path, files, pack)


def blocks(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Mean over the block of pixels that become one."""
    height, width = pixels.shape[:2]
    cut = pixels.reshape(SIZE[0], height // SIZE[0], SIZE[1], width // SIZE[1], -1)
    return np.asarray(cut.mean((1, 3)))


def built(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_rows_are_the_files_decoded_merged_and_averaged(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    assert cache.images.shape == (5, *SIZE, 3) and cache.images.dtype == np.uint8
    assert cache.masks.shape == (5, *SIZE, 2) and cache.masks.dtype == np.uint8
    assert set(np.unique(cache.masks)) == {0, 1}
    for number in range(5):
        image, masks = draw(number)
        facts = cache.facts[number]
        assert facts["done"] and facts["size"].tolist() == [*image.shape[:2]]
        second = np.zeros(image.shape[:2], bool) if number == 0 else masks[0] > 0
        assert facts["pixels"].tolist() == [((masks[0] > 0) | (masks[1] > 0)).sum(), second.sum()]
        assert facts["between"] == 0
        assert facts["content"].decode() == hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        assert np.array_equal(facts["hash"], perceptual_hash(image))
        small = cache.images[number].astype(np.int64)
        assert np.array_equal(facts["sums"], [small.sum((0, 1)), (small**2).sum((0, 1))])
        assert np.abs(cache.images[number] - blocks(image)).max() <= 1
        union = blocks((masks[0] > 0) | (masks[1] > 0))[..., 0]
        assert np.array_equal(cache.masks[number, ..., 0], union >= 0.5)
        extra = blocks(masks[0] > 0)[..., 0] >= 0.5 if number else np.zeros(SIZE)
        assert np.array_equal(cache.masks[number, ..., 1], extra)
    assert np.array_equal(cache.images[0], draw(0)[0]), "nothing to resize"


def test_the_digest_is_that_of_ids_labels_images_and_masks(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    content = json.dumps([[f"s{number}" for number in range(5)], [[]] * 5]).encode()
    assert cache.digest == hashlib.sha256(content + cache.images.tobytes() + cache.masks.tobytes()).hexdigest()


def labelled(samples: list[Sample]) -> list[Sample]:
    return [dataclasses.replace(s, masks=(), labels=(number % 2,)) for number, s in enumerate(samples)]


def test_labels_need_no_masks_and_are_part_of_folder_and_digest(made: Made, tmp_path: Path) -> None:
    samples = labelled(made.samples())
    cache = Cache.build(tmp_path / "cache", samples, SIZE, 3)
    assert cache.masks.shape == (5, *SIZE, 0) and cache.facts["pixels"].shape == (5, 0)
    content = json.dumps([[f"s{number}" for number in range(5)], [[0], [1], [0], [1], [0]]]).encode()
    assert cache.digest == hashlib.sha256(content + cache.images.tobytes()).hexdigest()
    assert np.array_equal(cache.images, Cache.build(tmp_path / "cache", made.samples(), SIZE, 3).images)
    other = Cache.build(tmp_path / "cache", [dataclasses.replace(s, labels=(1,)) for s in samples], SIZE, 3)
    assert other.folder != cache.folder and other.digest != cache.digest


def test_groups_change_neither_folder_nor_digest(made: Made, tmp_path: Path) -> None:
    samples = made.samples()
    first = Cache.build(tmp_path / "cache", samples, SIZE, 3)
    again = Cache.build(tmp_path / "cache", [dataclasses.replace(s, group="g") for s in samples], SIZE, 3)
    assert again.folder == first.folder


def test_statistics_are_those_of_the_rows(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    for rows in (np.arange(5), np.array([1, 3])):
        mean, deviation = cache.statistics(rows)
        pixels = cache.images[rows].astype(np.float64) / 255
        assert np.abs(mean - pixels.mean((0, 1, 2))).max() < 1e-12
        assert np.abs(deviation - pixels.std((0, 1, 2))).max() < 1e-9


def test_images_of_one_colour_can_be_normalised(tmp_path: Path, pack: Any, encode: Any) -> None:
    files = {f"{n}.png": encode(np.full((8, 8, 3), 77, np.uint8)) for n in range(3)}
    samples = [Sample(m.name, m, labels=(0,)) for m in Source(pack(tmp_path / "data", files)).members()]
    mean, deviation = Cache.build(tmp_path / "cache", samples, SIZE, 3).statistics(np.arange(3))
    assert np.allclose(mean, 77 / 255) and (deviation == 0.5 / 255).all()


def test_grey_pixels_of_masks_are_counted(made: Made, tmp_path: Path, encode: Any) -> None:
    image, masks = draw(2)
    grey = masks[0].copy()
    grey[:2] = [[100], [200]]
    grey[-1] = 255
    made.files["s2/mask0.png"] = encode(grey)
    facts = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3).facts
    assert facts["between"].tolist() == [0, 0, 2 * image.shape[1], 0, 0]
    assert facts["pixels"][2, 0] == ((grey > 127) | (masks[1] > 127)).sum()


def test_look_alikes_are_found_once(made: Made, tmp_path: Path, encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made.files["s4/image.png"] = encode(np.kron(draw(0)[0], np.ones((4, 4, 1), np.uint8)))
    names = [name for name in made.files if name.startswith("s4/") and "image" not in name]
    made.files.update(dict.fromkeys(names, encode(np.zeros((32, 32), np.uint8))))
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    pairs = cache.pairs
    assert pairs[:, :2].tolist() == [[0, 4]] and pairs.shape == (1, 3)
    monkeypatch.setattr(cache_module, "alike", lambda *_: pytest.fail("compared again"))
    assert np.array_equal(Cache.open(cache.folder).pairs, pairs)


def test_grey_images_have_one_channel(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 1)
    assert cache.images.shape == (5, *SIZE, 1)
    grey = np.asarray(Image.fromarray(draw(0)[0]).convert("L"))
    assert np.array_equal(cache.images[0, ..., 0], grey)


def test_a_second_build_reads_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = made.samples()
    first = Cache.build(tmp_path / "cache", samples, SIZE, 3)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("a file was read"))
    second = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    assert second.folder == first.folder and second.digest == first.digest
    assert np.array_equal(second.images, first.images)
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


def test_other_sources_sizes_channels_and_orders_have_another_folder(
    made: Made, tmp_path: Path, encode: Callable[..., bytes]
) -> None:
    def folder(samples: list[Sample], size: tuple[int, int] = SIZE, channels: int = 3) -> Path:
        return Cache.build(tmp_path / "cache", samples, size, channels).folder

    samples = made.samples()
    folders = [
        folder(samples),
        folder(samples, (8, 4)),
        folder(samples, (4, 8)),
        folder(samples, channels=1),
        folder(samples[:-1]),
        folder(samples[::-1]),
        folder([Sample(f"{s.id}x", s.image, s.masks) for s in samples]),
        folder([Sample(s.id, s.image, s.masks[::-1]) for s in samples]),
    ]
    image, masks = draw(2)
    made.files["s2/mask0.png"] = encode(255 - masks[0])
    folders.append(folder(made.samples()))
    made.files["s2/image.png"] = encode(255 - image)
    folders.append(folder(made.samples()))
    assert len(set(folders)) == len(folders)
    assert built(tmp_path / "cache") == sorted(path.name for path in folders)


def test_archive_and_extracted_folder_have_the_same_digest(made: Made, tmp_path: Path) -> None:
    zipped = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    folder = Cache.build(tmp_path / "cache", made.samples(as_folder=True), SIZE, 3)
    assert zipped.folder != folder.folder and zipped.digest == folder.digest


@pytest.mark.parametrize("changed", ["image", "mask", "id"])
def test_the_digest_changes_with_the_data(
    made: Made, tmp_path: Path, encode: Callable[..., bytes], changed: str
) -> None:
    before = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3).digest
    image, masks = draw(0)
    image[3, 4, 1] ^= 1
    masks[0][0, 0] = masks[1][0, 0] = 255 - (masks[0] | masks[1])[0, 0]
    replaced = {"image": ("image", encode(image)), "mask": ("mask0", encode(masks[0]))}
    if changed == "id":
        made.files.update({name.replace("s0", "r0"): made.files.pop(name) for name in [*made.files] if "s0" in name})
    else:
        name, content = replaced[changed]
        made.files[f"s0/{name}.png"] = content
        if changed == "mask":
            made.files["s0/mask1.png"] = encode(masks[1])
    assert Cache.build(tmp_path / "cache", made.samples(), SIZE, 3).digest != before


def test_all_broken_files_are_named_at_once(made: Made, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    made.files["s1/image.png"] = made.files["s1/image.png"][:60]
    made.files["s2/mask1.png"] = encode(np.zeros((5, 6), np.uint8))
    made.files["s4/extra.png"] = b"no image"
    with pytest.raises(MedvisionError) as caught:
        Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    lines = str(caught.value).splitlines()
    archive = tmp_path / "data.zip"
    assert len(lines) == 4
    assert lines[0].startswith(f"{archive}: s1/image.png cannot be decoded") and "fetch it again" in lines[0]
    assert lines[1] == (
        f"{archive}: s2/mask1.png is 5x6, its image {archive}: s2/image.png is 24x16 (height x width); "
        "expected equal sizes: fetch both again"
    )
    assert lines[2].startswith(f"{archive}: s4/extra.png cannot be decoded")
    assert lines[3] == "or leave them out: data.exclude=[s1,s2,s4]"
    assert isinstance(caught.value, BrokenFiles)
    assert [*caught.value.messages] == ["s1", "s2", "s4"] and [*caught.value.messages.values()] == lines[:3]
    assert [name for name in built(tmp_path / "cache") if not name.endswith(".building")] == []


def test_a_long_list_of_broken_files_is_cut(tmp_path: Path, pack: Callable[..., Path]) -> None:
    source = Source(pack(tmp_path / "data", {f"{number:02}.png": b"no image" for number in range(13)}))
    samples = [Sample(member.name, member, ((),)) for member in source.members()]
    with pytest.raises(MedvisionError) as caught:
        Cache.build(tmp_path / "cache", samples, SIZE, 3)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-2] == "... and 3 more"
    assert lines[-1] == f"or leave them out: data.exclude=[{','.join(f'{number:02}.png' for number in range(10))}]"
    assert isinstance(caught.value, BrokenFiles) and len(caught.value.messages) == 13


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_midway_leaves_no_half_cache(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    calls = []

    def fail_on_the_third(image: Any, size: Any) -> Any:
        calls.append(size)
        if len(calls) == 3:
            raise error("midway")
        return original(image, size)

    original = cache_module.resize_image
    monkeypatch.setattr(cache_module, "resize_image", fail_on_the_third)
    with pytest.raises(error, match="midway"):
        Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    left = built(tmp_path / "cache")
    assert len(left) == 1 and left[0].endswith(".building")
    whole = Cache.build(tmp_path / "other", made.samples(), SIZE, 3)
    again = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    assert again.digest == whole.digest and built(tmp_path / "cache") == [whole.folder.name]


def test_what_a_killed_process_left_becomes_the_cache(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, folder = made.samples(), tmp_path / "cache"
    whole = Cache.build(tmp_path / "other", samples, SIZE, 3)
    process = os.fork()
    if process == 0:
        monkeypatch.setattr(cache_module, "resize_mask", lambda *_: os._exit(9))
        Cache.build(folder, samples, SIZE, 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    left = built(folder)
    assert len(left) == 1 and left[0].endswith(".building")
    assert Cache.build(folder, samples, SIZE, 3).digest == whole.digest
    assert built(folder) == [whole.folder.name]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were decoded from now on."""
    found: list[str] = []

    def note(member: Any, channels: int) -> Any:
        found.append(member.name.split("/")[0])
        return original(member, channels)

    original = cache_module.read_image
    monkeypatch.setattr(cache_module, "read_image", note)
    return found


@pytest.mark.parametrize("victim", [2, 3, 4])
def test_a_killed_build_is_continued(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int, reads: list[str]
) -> None:
    samples, folder = made.samples(), tmp_path / "cache"
    whole = Cache.build(tmp_path / "other", samples, SIZE, 3)
    assert sorted(reads) == [f"s{number}" for number in range(5)]
    process = os.fork()
    if process == 0:

        def die(image: Any, size: Any) -> Any:
            if np.array_equal(image, draw(victim)[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            return resize_image(image, size)

        monkeypatch.setattr(cache_module, "CHUNK", 2)
        monkeypatch.setattr(cache_module, "resize_image", die)
        Cache.build(folder, samples, SIZE, 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert [name.endswith(".building") for name in built(folder)] == [True]
    reads.clear()
    again = Cache.build(folder, samples, SIZE, 3)
    done = victim // 2 * 2
    assert sorted(reads) == [f"s{number}" for number in range(done, 5)], "finished rows are not decoded again"
    assert again.digest == whole.digest and built(folder) == [whole.folder.name]
    for name in ("images", "masks", "facts"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))


def test_after_broken_files_only_these_are_read_again(made: Made, tmp_path: Path, reads: list[str]) -> None:
    made.files["s1/mask0.png"] = b"no image"
    for expected in (["s0", "s1", "s2", "s3", "s4"], ["s1"]):
        reads.clear()
        with pytest.raises(BrokenFiles):
            Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
        assert sorted(reads) == expected


def test_what_was_left_of_other_data_goes(made: Made, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    whole = made.files["s1/mask0.png"]
    made.files["s1/mask0.png"] = b"no image"
    with pytest.raises(BrokenFiles):
        Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    made.files["s1/mask0.png"] = whole
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    assert built(tmp_path / "cache") == [cache.folder.name]


def test_a_build_killed_before_its_first_row_starts_anew(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every file that is reserved: what is left is no obstacle."""
    samples = made.samples()
    whole, reserve = Cache.build(tmp_path / "other", samples, SIZE, 3), cache_module._reserve
    for number in range(3):
        folder = tmp_path / f"cache{number}"
        process = os.fork()
        if process == 0:
            calls = iter(range(number + 1))

            def die(path: Path, *facts: Any, calls: Iterator[int] = calls, last: int = number) -> None:
                if next(calls) == last:
                    path.write_bytes(b"")
                    os.kill(os.getpid(), signal.SIGKILL)
                reserve(path, *facts)

            monkeypatch.setattr(cache_module, "_reserve", die)
            Cache.build(folder, samples, SIZE, 3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        assert Cache.build(folder, samples, SIZE, 3).digest == whole.digest


def test_processes_that_build_at_once_build_once(
    made: Made, tmp_path: Path, in_processes: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "reads"

    def slow(member: Any, channels: int) -> Any:
        with log.open("a") as handle:
            handle.write(f"{member.name}\n")
        time.sleep(0.02)
        return original(member, channels)

    original = cache_module.read_image
    monkeypatch.setattr(cache_module, "read_image", slow)
    samples = made.samples()

    def work(_: int) -> tuple[str, int]:
        cache = Cache.build(tmp_path / "cache", samples, SIZE, 3)
        return cache.digest, int(cache.images.sum(dtype=np.int64))

    found = in_processes(3, work)
    assert len(set(found)) == 1
    assert sorted(log.read_text().split()) == [f"s{number}/image.png" for number in range(5)]


def test_a_full_disk_is_foreseen(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 5 * 8 * 8 * (3 + 2)
    for free, enough in ((needed - 1, False), (needed + 4096, True)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if enough:
            Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
        else:
            words = f"needs 0.00 GB, {tmp_path / 'cache'} has 0.00 GB free.*MEDVISION_CACHE.*data.image_size"
            with pytest.raises(MedvisionError, match=words):
                Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
            assert built(tmp_path / "cache") == []


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.posix_fallocate", "numpy.save"])
def test_a_disk_that_fills_up_is_named(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(where, no_space)
    samples = made.samples() if where != "numpy.save" else labelled(made.samples())
    with pytest.raises(MedvisionError, match=f"{tmp_path / 'cache'}.*No space left on device.*MEDVISION_CACHE"):
        Cache.build(tmp_path / "cache", samples, SIZE, 3)
    assert built(tmp_path / "cache") == []


def test_the_disk_is_reserved_before_anything_is_read(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    for name in ("images", "masks"):
        facts = (cache.folder / f"{name}.npy").stat()
        assert facts.st_blocks * 512 >= facts.st_size


def test_a_cache_without_permission_names_the_cure(
    made: Made, tmp_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    samples, folder = made.samples(), tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o555)
    with (
        unprivileged(),
        pytest.raises(MedvisionError, match=f"cannot write to {folder} .*Permission denied.*MEDVISION_CACHE"),
    ):
        Cache.build(folder, samples, SIZE, 3)


def test_a_lock_of_another_user_names_the_cure(
    made: Made, tmp_path: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    samples, folder = made.samples(), tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / ".lock").touch(0o444)
    with unprivileged(), pytest.raises(MedvisionError, match=f"{folder}.*Permission denied.*MEDVISION_CACHE"):
        Cache.build(folder, samples, SIZE, 3)


def test_a_cache_travels_as_a_path_and_is_read_only(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    content = pickle.dumps(cache)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert np.array_equal(again.images, cache.images) and again.digest == cache.digest
    assert isinstance(again.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        again.images[0] = 0


def test_masks_are_read_at_the_size_of_their_files(made: Made) -> None:
    sample = made.samples()[3]
    image, masks = sample.read(3)
    expected, parts = draw(3)
    assert np.array_equal(image, expected)
    assert masks.dtype == np.uint8 and masks.shape == (*expected.shape[:2], 2)
    assert np.array_equal(masks[..., 0], (parts[0] | parts[1]) // 255)
    assert np.array_equal(masks[..., 1], parts[0] // 255)
    again, between = sample.read_masks(image.shape[:2])
    assert np.array_equal(again, masks) and between == 0
    with pytest.raises(MedvisionError, match=re.escape("is 32x32, its image") + ".*is 4x4"):
        sample.read_masks((4, 4))


def test_the_files_are_plain_arrays(made: Made, tmp_path: Path) -> None:
    cache = Cache.build(tmp_path / "cache", made.samples(), SIZE, 3)
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        *("cache.json", "facts.npy", "ids.json", "images.npy", "masks.npy")
    ]
    assert json.loads((cache.folder / "ids.json").read_text()) == [f"s{number}" for number in range(5)]
    images = np.load(io.BytesIO((cache.folder / "images.npy").read_bytes()), allow_pickle=False)
    assert np.array_equal(images, cache.images)
    assert json.loads((cache.folder / "cache.json").read_text()) == {
        "digest": cache.digest,
        "images": 5,
        "size": [8, 8],
    }
