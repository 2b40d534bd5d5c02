"""Files in object stores: reading, listing, uploads, and what happens when a store fails."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from remote_support import BUCKET, FaultyProxy, s3_server

from megaphase.utils import remote_calls, remote_files
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_file
from megaphase.utils.remote_calls import RemoteError, first_failure_said
from megaphase.utils.remote_files import (
    RemoteReader,
    describe,
    download,
    find,
    hash_remote,
    is_url,
    joined,
    kind_of_url,
    list_folder,
    read_bytes,
    remove,
    upload,
    write_bytes,
)

DATA = random.Random(1).randbytes(1_000_003)
URL = f"s3://{BUCKET}/a/b.bin"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyProxy]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        yield proxy


@pytest.fixture
def s3(server: FaultyProxy) -> Iterator[FaultyProxy]:
    """The server, which does not fail yet, with DATA at URL."""
    server.fail(None)
    write_bytes(URL, DATA)
    server.requests.clear()
    yield server
    server.fail(None)


def test_urls_are_told_from_paths() -> None:
    assert all(map(is_url, ["s3://b/k", "memory://x", "HTTPS://h/x", "git+x://h"]))
    assert not any(map(is_url, ["a/b", "/a//b", "c:/x", "s3:/b", "-", "://x", "a b://c"]))
    assert joined("s3://b/", "x", "y") == joined("s3://b", "x", "y") == "s3://b/x/y"


@pytest.mark.parametrize("block", [1, 7, 100, 4096, 1 << 20])
def test_a_reader_gives_what_a_file_gives(block: int) -> None:
    data, chance = DATA[:3_000], random.Random(block)
    write_bytes("memory://reader/x", data)
    reader, local = RemoteReader(describe("memory://reader/x"), block), io.BytesIO(data)
    for _ in range(60):
        if chance.random() < 0.4:
            whence = chance.randrange(3)
            offset = chance.randrange(3_300) if whence == 0 else -chance.randrange(50)
            if local.tell() + offset < 0:
                continue
            assert reader.seek(offset, whence) == local.seek(offset, whence)
        size = chance.choice([0, 1, 5, 999, -1])
        assert reader.read(size) == local.read(size)
        assert reader.tell() == local.tell()
    reader.seek(10)
    assert io.BufferedReader(reader).readline() == data[10 : data.index(b"\n", 10) + 1]


def test_s3_files_are_listed_read_written_and_removed(s3: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(DATA)
    url = f"s3://{BUCKET}/list/c.bin"
    upload(tmp_path / "up", url)
    write_bytes(f"s3://{BUCKET}/list/deep/d.txt", b"d")
    file = describe(url)
    assert (file.size, file.name, file.suffix, str(file)) == (len(DATA), "c.bin", ".bin", url)
    assert hash_remote(file) == hash_file(tmp_path / "up")
    assert download(file, tmp_path / "down") == hash_file(tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == DATA
    assert find(f"s3://{BUCKET}/list/*") == [file]
    assert [it.url for it in find(f"s3://{BUCKET}/list/**")] == [
        url,
        f"s3://{BUCKET}/list/deep/d.txt",
    ]
    assert list_folder(f"s3://{BUCKET}/list") == {"c.bin": "file", "deep": "directory"}
    assert list_folder(f"s3://{BUCKET}/nothing") == {}
    kinds = [kind_of_url(f"s3://{BUCKET}/{name}") for name in ("list", "list/c.bin", "list/no")]
    assert kinds == ["directory", "file", None]
    remove(url)
    remove(url)
    assert list_folder(f"s3://{BUCKET}/list") == {"deep": "directory"}


def test_an_upload_in_parts_is_whole(s3: FaultyProxy, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(remote_files, "_PART_BYTES", 5 << 20)
    data = random.Random(2).randbytes(11 << 20)
    (tmp_path / "up").write_bytes(data)
    sent: list[int] = []
    s3.fail("cut request", times=1, method="PUT", part="partNumber=2")
    upload(tmp_path / "up", f"s3://{BUCKET}/parts", sent.append)
    assert read_bytes(f"s3://{BUCKET}/parts") == data
    assert s3.count("PUT", "partNumber=2") == 2
    assert sum(sent) >= len(data)


@pytest.mark.parametrize("fault", [500, 503, "cut answer", "hang"])
def test_a_fault_that_passes_changes_nothing(s3: FaultyProxy, fault: int | str) -> None:
    file = describe(URL)
    s3.fail(fault, times=2, method="GET")
    with file.open() as content:
        assert content.read() == DATA
    assert s3.count("GET") == 3


@pytest.mark.parametrize("fault", [503, "cut answer", "hang"])
def test_a_fault_that_stays_is_one_error(s3: FaultyProxy, fault: int | str) -> None:
    file = describe(URL)
    s3.fail(fault, method="GET")
    with pytest.raises(
        RemoteError, match=r"b\.bin: cannot be read \(.+\), tried 3 times; che"
    ) as e:
        hash_remote(file)
    assert "\n" not in str(e.value)
    assert s3.count("GET") == 3


@pytest.mark.parametrize(
    ("fault", "notice_seconds", "said"),
    [
        (503, 60.0, "; trying again, 3 times in all"),
        ("hang", 0.1, ": no answer for 0.1 s; still waiting"),
    ],
)
def test_the_first_failure_is_said(
    s3: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    fault: int | str,
    notice_seconds: float,
    said: str,
) -> None:
    monkeypatch.setattr(remote_calls.RETRIES, "notice_seconds", notice_seconds)
    lines: list[str] = []
    s3.fail(fault, times=2, method="GET")
    with first_failure_said(lines.append):
        assert read_bytes(URL) == DATA
    assert len(lines) == 1
    assert lines[0].startswith(URL)
    assert lines[0].endswith(said)
    s3.fail(503, times=1, method="GET")
    assert read_bytes(URL) == DATA
    assert len(lines) == 1


def test_what_no_repetition_mends_is_not_repeated(s3: FaultyProxy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.bin: no such file, folder or bucket; check the URL"):
        describe(f"s3://{BUCKET}/no.bin")
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(InputError, match=r"s3://other/x: no such file, folder or bucket"):
        upload(tmp_path / "x", "s3://other/x")
    s3.requests.clear()
    s3.fail(403, method="GET")
    with pytest.raises(InputError, match=r"b\.bin: cannot be read \(.*; check the URL and, for a"):
        read_bytes(URL)
    assert s3.count("GET") == 1


def test_a_file_that_changes_while_it_is_read_is_refused(s3: FaultyProxy) -> None:
    file = describe(URL)
    opened = file.open()
    assert opened.__enter__().read(10) == DATA[:10]
    write_bytes(URL, DATA[::-1])
    with pytest.raises(InputError, match=r"b\.bin: has changed while it was read"):
        opened.__exit__(None, None, None)


def test_an_unknown_protocol_and_a_missing_package_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"^nope://x: cannot be used \(.*; fsspec knows s3"):
        describe("nope://x")
    with pytest.raises(InputError, match=r"^gs://b/x: gs:// needs a package.*install 'gcsfs'"):
        describe("gs://b/x")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    monkeypatch.setattr(remote_calls, "_file_systems", {})
    with pytest.raises(InputError, match=r"pip install 'megaphase\[fsspec\]'"):
        describe("s3://b/x")


class NoParts(SimpleHTTPRequestHandler):
    """Python's own server: it ignores which part of a file is asked for."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_is_read_if_it_gives_parts_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(DATA)
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(NoParts, directory=str(tmp_path)))
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    file = describe(f"http://127.0.0.1:{web.server_port}/x")
    assert file.size == len(DATA)
    assert hash_remote(file) == hash_file(tmp_path / "x")  # in one block
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 1000)
    with pytest.raises(InputError, match=r"the server gives no parts of a file; download it"):
        hash_remote(file)
    web.shutdown()
    web.server_close()


def test_versions_tell_contents_apart() -> None:
    assert fsspec.filesystem("memory") is not None
    write_bytes("memory://versions/a", b"one")
    first = describe("memory://versions/a")
    assert first == describe("memory://versions/a") == find("memory://versions/*")[0]
    write_bytes("memory://versions/a", b"two")
    assert describe("memory://versions/a").version != first.version
