"""Files in object stores and on web servers (`s3://`, `gs://`, `hf://`, `https://` …).

fsspec reads and writes them; this module adds deadlines, retries and errors of one line, see
`remote_calls`. Reading is streamed: memory does not grow with the file.
"""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from megaphase.utils.errors import InputError
from megaphase.utils.files import fsync_path, new_hash
from megaphase.utils.remote_calls import (
    Pending,
    Progress,
    file_system,
    protocol_of,
    with_retries,
)

BLOCK_BYTES = 4 << 20
# Read one after the other, or alternately at a few places, as of the columns of a Parquet file.
_BLOCKS_KEPT = 4
_MOST_PARTS = 9_000  # of an upload to S3, which takes 10,000
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4

# In which a file's folder must be there first; in the others, that would create a bucket.
_WITH_FOLDERS = ("file", "local", "sftp", "ssh", "hdfs", "smb", "ftp")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FINGERPRINTS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "sha256", "checksum")
_TIMES = ("LastModified", "Last-Modified", "updated", "mtime", "modified", "created")


def is_url(text: str) -> bool:
    """Return whether a text names a remote file or folder, as in `s3://bucket/key`."""
    return _URL.match(text) is not None


def names_bucket(url: str) -> bool:
    """Return whether a URL names a bucket or a server, or a folder on this machine."""
    return not re.fullmatch(r"[^:]+:/*", url) and (
        protocol_of(url) in ("file", "local") or not url.partition("://")[2].startswith("/")
    )


def joined(url: str, *names: str) -> str:
    """Return the URL of something in the folder `url`."""
    return "/".join([url.rstrip("/"), *names])


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when it was listed.

    Attributes:
        size: in bytes.
        version: differs where the store knows that the content differs: its checksum, or the time
            of the last change; empty where it tells neither.
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(self.url.partition("://")[2]).name

    @property
    def suffix(self) -> str:
        """The extension of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading, at any position.

        Raises:
            InputError: the file is gone or has no right to be read; or, at the end of the block, it
                is another one than when it was listed.
            RemoteError: it could not be read, also when it was tried again.
        """
        yield cast(BinaryIO, RemoteReader(self))
        now = describe(self.url)
        if (now.size, now.version) != (self.size, self.version):
            problem = "has changed while it was read"
            raise InputError(self.url, problem, "run the same command again")


def describe(url: str) -> RemoteFile:
    """Return the file at a URL.

    Raises:
        InputError: there is none, it is a folder, or the server does not tell its size.
        RemoteError: see `with_retries`.
    """
    fs = file_system(url)
    info = with_retries(url, "cannot be read", lambda _: fs.info(_path(fs, url)))
    if info.get("type") == "directory":
        raise InputError(url, "is a folder", "give the files in it, or a pattern")
    return _described(url, info)


def kind_of_url(url: str) -> str | None:
    """Return "file" or "directory", or None if there is nothing."""
    fs = file_system(url)

    def look(_: Progress) -> str | None:
        try:
            kind: str = fs.info(_path(fs, url))["type"]
            return kind
        except FileNotFoundError:
            return None

    return with_retries(url, "cannot be read", look)


def find(pattern: str) -> list[RemoteFile]:
    """Return the files that match a pattern (*, ?, [...], ** for any folders), sorted by URL."""
    fs = file_system(pattern)

    def glob(_: Progress) -> dict[str, Any]:
        found: dict[str, Any] = fs.glob(_path(fs, pattern), detail=True)
        return found

    found = with_retries(pattern, "cannot be listed", glob)
    urls = {_url(fs, pattern, path): info for path, info in found.items()}
    return [
        _described(url, info) for url, info in sorted(urls.items()) if info["type"] != "directory"
    ]


def list_folder(url: str) -> dict[str, str]:
    """Return the kind ("file", "directory") of everything in a folder, by name; empty if there is
    no folder."""
    fs = file_system(url)

    def names(_: Progress) -> dict[str, str]:
        try:
            entries = fs.ls(_path(fs, url), detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in entries}

    return with_retries(url, "cannot be listed", names)


def read_bytes(url: str) -> bytes:
    """Return the content of a small file."""
    fs = file_system(url)

    def read(_: Progress) -> bytes:
        return bytes(fs.cat_file(_path(fs, url)))

    return with_retries(url, "cannot be read", read)


def write_bytes(url: str, data: bytes) -> None:
    """Write a small file."""
    fs = file_system(url)

    def write(_: Progress) -> None:
        if protocol_of(url) in _WITH_FOLDERS:
            fs.makedirs(fs._parent(_path(fs, url)), exist_ok=True)
        fs.pipe_file(_path(fs, url), data)

    with_retries(url, "cannot be written", write)


def remove(url: str) -> None:
    """Remove a file, if it is there."""
    fs = file_system(url)

    def remove_file(_: Progress) -> None:
        try:
            fs.rm_file(_path(fs, url))
        except FileNotFoundError:
            return

    with_retries(url, "cannot be removed", remove_file)


def upload(path: Path, url: str, advance: Callable[[int], object] = lambda count: None) -> None:
    """Copy a file to a store.

    advance: called with the number of bytes of every part sent, again where it is sent again.
    """
    fs = file_system(url)
    options: dict[str, Any] = {}
    if protocol_of(url) in ("s3", "s3a"):
        part = max(_PART_BYTES, -(-path.stat().st_size // _MOST_PARTS))
        options = {"chunksize": part, "max_concurrency": _PARTS_AT_ONCE}

    def put(progress: Progress) -> None:
        if protocol_of(url) in _WITH_FOLDERS:
            fs.makedirs(fs._parent(_path(fs, url)), exist_ok=True)
        fs.put_file(str(path), _path(fs, url), callback=_callback(progress), **options)

    with_retries(url, "cannot be written", put, advance=advance)


def hash_remote(file: RemoteFile, advance: Callable[[int], object] = lambda count: None) -> str:
    """Return the hex digest of a file's content, as `hash_file` does of a local one."""
    digest = new_hash()
    with file.open() as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return str(digest.hexdigest())


def download(
    file: RemoteFile, path: Path, advance: Callable[[int], object] = lambda count: None
) -> str:
    """Copy a file to a local path and return the hex digest of its content."""
    digest = new_hash()
    with file.open() as content, open(path, "wb") as out:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
            out.write(block)
            advance(len(block))
    fsync_path(path)
    return str(digest.hexdigest())


class RemoteReader(io.RawIOBase):
    """Reads blocks of a file, each with retries; while it reads forwards, the next one is fetched
    in advance."""

    def __init__(self, file: RemoteFile, block_bytes: int | None = None) -> None:
        self._file, self._fs = file, file_system(file.url)
        self._path = _path(self._fs, file.url)
        self._block_bytes = block_bytes or BLOCK_BYTES
        self._position = 0
        self._blocks: dict[int, bytes] = {}  # the one used last is the last
        self._ahead: tuple[int, Pending[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer up to the end of a block."""
        data = self._read_some(len(memoryview(buffer).cast("B")))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return `size` bytes, fewer only at the end of the file."""
        left = self._file.size - self._position
        if size is not None and size >= 0:
            left = min(left, size)
        pieces = []
        while left > 0:
            piece = self._read_some(left)
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_some(self, size: int) -> bytes:
        if size <= 0 or self._position >= self._file.size:
            return b""
        number, offset = divmod(self._position, self._block_bytes)
        data = self._block(number)[offset : offset + size]
        self._position += len(data)
        return data

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            data = self._blocks.pop(number)
        else:
            ahead, self._ahead = self._ahead, None
            if ahead is not None and ahead[0] == number:
                data = ahead[1].result()
            else:
                data = self._fetch(number)
            is_forward = number == 0 or number - 1 in self._blocks
            if is_forward and (number + 1) * self._block_bytes < self._file.size:
                self._ahead = number + 1, Pending(lambda: self._fetch(number + 1))
        self._blocks[number] = data
        while len(self._blocks) > _BLOCKS_KEPT:
            del self._blocks[next(iter(self._blocks))]
        return data

    def _fetch(self, number: int) -> bytes:
        begin = number * self._block_bytes
        end = min(begin + self._block_bytes, self._file.size)

        def read(_: Progress) -> bytes:
            data = bytes(self._fs.cat_file(self._path, start=begin, end=end))
            if len(data) > end - begin:
                problem = "the server gives no parts of a file"
                raise InputError(self._file.url, problem, "download it, and give the local file")
            if len(data) < end - begin:
                raise OSError(f"{len(data)} bytes came instead of {end - begin}")
            return data

        return with_retries(self._file.url, "cannot be read", read)


def _callback(progress: Progress) -> Any:
    """Return fsspec's form of a Progress."""
    from fsspec.callbacks import Callback

    class Moved(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            progress.moved(inc)

    return Moved()


def _path(fs: Any, url: str) -> Any:
    return fs._strip_protocol(url)


def _url(fs: Any, like: str, path: str) -> str:
    """Return the URL of a path in fsspec's form."""
    if is_url(path):
        return path
    return f"{protocol_of(like)}://{path.lstrip('/')}"


def _described(url: str, info: Mapping[str, Any]) -> RemoteFile:
    size = info.get("size")
    if size is None:
        problem = "the server does not tell its size"
        raise InputError(url, problem, "download it, and give the local file")
    return RemoteFile(url, int(size), _version(info))


def _version(info: Mapping[str, Any]) -> str:
    known = [str(info[key]).strip('"') for key in _FINGERPRINTS if info.get(key)]
    if known:
        return known[0]
    for time in (info[key] for key in _TIMES if info.get(key)):
        is_date = isinstance(time, datetime.datetime)
        return repr(time.timestamp()) if is_date else str(time)
    return ""
