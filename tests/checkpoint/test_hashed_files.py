"""Files that are hashed while they are written, and while their tensors are read in order."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.checkpoint import hashed_file, sequential_reader
from megaphase.checkpoint.hashed_file import CachedFile, DirectFile
from megaphase.checkpoint.hashed_reading import HashedReading, Place, in_file_order, most_at_once
from megaphase.checkpoint.sequential_reader import SequentialReader
from megaphase.utils.errors import InputError
from megaphase.utils.files import describe_file

MB = 1 << 20
NOT_SUPPORTED = OSError(errno.EINVAL, "Invalid argument")


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.frombuffer(Random(seed).randbytes(count), np.uint8)


def without_direct_access(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let this call of the system fail for files that are opened or written directly."""
    call: Callable[..., Any] = getattr(os, name)

    def refused(first: Any, second: Any, *rest: Any) -> Any:
        if name == "open" and second & os.O_DIRECT:
            raise NOT_SUPPORTED
        if name != "open" and os.O_DIRECT & flags_of(first):
            raise NOT_SUPPORTED
        return call(first, second, *rest)

    monkeypatch.setattr(os, name, refused)


def flags_of(descriptor: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("flags:")).split()[1], 8)


@pytest.mark.parametrize("missing", [None, "open", "pwrite"])
@pytest.mark.parametrize("kind", [CachedFile, DirectFile])
@pytest.mark.parametrize(
    "sizes",
    [[], [1], [4096], [40_000, 100, 0, 90_000], [3 * MB + 5, 7, 2 * MB], [MB], [MB - 1, 1, 4096]],
)
def test_a_file_holds_what_was_written(
    sizes: list[int], kind: type, missing: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if missing is not None:
        without_direct_access(monkeypatch, missing)
    parts = [random_bytes(size, number) for number, size in enumerate(sizes)]
    file = kind(tmp_path / "file")
    for part in parts:
        file.write(part)
    described = file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(part.tobytes() for part in parts)
    assert described == describe_file(tmp_path / "file")


def test_files_of_several_threads_are_written_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bool] = []
    pwrite = os.pwrite

    def noted(descriptor: int, content: Any, place: int) -> int:
        written.append(bool(flags_of(descriptor) & hashed_file.DIRECT))
        return pwrite(descriptor, content, place)

    monkeypatch.setattr(os, "pwrite", noted)
    files = [DirectFile(tmp_path / str(number)) for number in range(6)]
    parts = [[random_bytes(700_001, 10 * n + i) for i in range(4)] for n in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for i in range(4):
            list(pool.map(lambda n, i=i: files[n].write(parts[n][i]), range(6)))
    for number, file in enumerate(files):
        assert file.close() == describe_file(tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == b"".join(p.tobytes() for p in parts[number])
    assert written.count(True) > written.count(False) == 6  # the ends alone go through it


def test_a_failed_write_is_raised_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: Any, place: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    good, bad = DirectFile(tmp_path / "good"), DirectFile(tmp_path / "bad")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        bad.write(random_bytes(MB))
        with pytest.raises(OSError, match="No space left"):
            bad.close()
    bad.abandon()
    good.write(random_bytes(MB))
    assert good.close() == describe_file(tmp_path / "good")


@given(st.randoms(use_true_random=False), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_most_bytes_are_read_in_order(random: Random, count: int) -> None:
    places, end = [], random.randint(0, 3)
    for number in range(count):
        begin = end + random.choice([0, 0, 2])
        end = begin + random.randint(0, 5)
        places.append(Place(str(number), begin, end))
    random.shuffle(places)
    found = in_file_order(places)
    choices = (c for n in range(count + 1) for c in combinations(places, n))
    follow = [c for c in choices if all(a.end <= b.begin for a, b in pairwise(c))]
    assert tuple(found) in follow
    assert size(found) == max(map(size, follow))


def size(places: Any) -> int:
    return sum(place.end - place.begin for place in places)


def test_files_that_are_read_at_once_are_counted() -> None:
    portable = [[Place("", 0, 1, turn), Place("", 1, 2, turn + 1)] for turn in range(0, 20, 2)]
    assert most_at_once(portable) == 1
    assert most_at_once([*portable, [Place("", 0, 1, 3), Place("", 1, 2, 9)], []]) == 2
    assert most_at_once([]) == 0


@contextmanager
def reading_of(path: Path, planned: list[Place]) -> Iterator[tuple[HashedReading, list[int]]]:
    counted: list[int] = []
    with ThreadPoolExecutor(2) as disk:
        reader = SequentialReader(path, path.stat().st_size, disk, 1)
        yield HashedReading(reader, path, planned, counted.append, lambda: None), counted


@pytest.mark.parametrize("missing", [None, "open", "preadv"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("length", [1, 5000, 4 * MB + 4097, 4 * MB])
def test_the_hash_is_that_of_the_file(
    length: int, cached: bool, missing: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, content = tmp_path / "file", random_bytes(length)
    path.write_bytes(content.tobytes())
    described = describe_file(path)
    if not cached:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if missing is not None:
        without_direct_access(monkeypatch, missing)
    first = Place("first", length // 7, length // 3)
    second = Place("second", length // 2, length - length // 5)
    with reading_of(path, [first, second]) as (reading, counted):
        for place in (first, second):
            out = np.empty(place.end - place.begin, np.uint8)
            assert reading.wait_for(place.name, place.begin)
            reading.read_into(out)
            reading.done(place.name)
            assert np.array_equal(out, content[place.begin : place.end])
        assert not reading.wait_for("first", first.begin)
        assert not reading.wait_for("unknown", 0)
        assert reading.finish(length) == described["hash"]
        assert sum(counted) == length


def test_tensors_wait_for_their_turn_and_not_for_one_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random_bytes(3000).tobytes())
    planned = [Place(str(n), 1000 * n, 1000 * (n + 1)) for n in range(3)]
    with reading_of(path, planned) as (reading, _), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(reading.wait_for, str(n), 1000 * n) for n in (1, 2)]
        assert reading.wait_for("0", 0)
        reading.read_into(np.empty(1000, np.uint8))
        assert not any(each.done() for each in waiting)
        reading.done("0")
        assert waiting[0].result()
        reading.give_up()
        with pytest.raises(CancelledError):
            waiting[1].result()
        reading.close()


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random_bytes(5 * MB).tobytes())
    with reading_of(path, []) as (reading, _):
        os.truncate(path, 4 * MB)
        with pytest.raises(InputError, match="file: is truncated"):
            reading.finish(5 * MB)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random_bytes(9 * MB).tobytes())
    before = len(os.listdir("/proc/self/fd"))
    with reading_of(path, [Place("a", 0, MB)]) as (reading, _):
        assert reading.wait_for("a", 0)
        reading.read_into(np.empty(10, np.uint8))
        assert len(os.listdir("/proc/self/fd")) > before
        reading.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert sequential_reader.DIRECT == hashed_file.DIRECT
