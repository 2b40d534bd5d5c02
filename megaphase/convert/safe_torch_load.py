"""Read files of other programs that were written with torch.save, without running their code."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Self

import torch
from rich.console import Console

from megaphase.utils.errors import InputError
from megaphase.utils.progress import bytes_progress

# Objects of these packages are read as `UnreadStorage`: enums, settings, states of random
# generators. No conversion needs them, and none of the packages' code is imported or called.
_UNREAD = re.compile(r"(megatron|numpy|transformer_engine|apex|signal|pathlib|_io)\.")
_ZIP_MAGIC = b"PK\x03\x04"
_CHUNK_BYTES = 1 << 24
_NAMED_AT_MOST = 5


class UnreadStorage:
    """Replaces an object that is not needed: accepts and discards its data."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_pickle(path: Path, *, trust: bool) -> Any:
    """Return the content of a `torch.save` file on the CPU; tensors stay in the file until read.

    Only tensors, plain containers and `argparse.Namespace` are created, and `UnreadStorage` for
    objects that are known to be harmless. trust: whether to create any object, which may run code
    from the file.

    Raises:
        InputError: the file cannot be read, or contains other objects and is not trusted.
    """
    mapped = _is_zip(path)  # what torch before 1.6 has written is not one, and cannot be mapped
    if trust:
        return _load_anything(path, mapped)
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        unread = [name for name in unsafe if _UNREAD.match(name)]
        allowed: list[Any] = [Namespace, *((UnreadStorage, name) for name in unread)]
        refused = set(unsafe) - set(unread) - {f"{Namespace.__module__}.{Namespace.__qualname__}"}
        if refused:
            raise _untrusted(path, refused)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        if refused := set(re.findall(r"GLOBAL (\S+)", str(error))):
            raise _untrusted(path, refused) from None
        raise damaged(path) from None
    except Exception:  # whatever a damaged file makes of the unpickler
        raise damaged(path) from None


def load_bare_pickle(path: Path, allowed: Iterable[Callable[..., Any]], *, trust: bool) -> Any:
    """Return the content of a pickle that torch.save has not written.

    Only plain values and those of `allowed` (classes, and functions without effects) are created,
    and `UnreadStorage` for objects of torch.distributed, and others known to be harmless. trust:
    see `load_pickle`.

    Raises:
        InputError: as `load_pickle`.
    """
    kind = _TrustingUnpickler if trust else _RestrictedUnpickler
    try:
        with open(path, "rb") as file:
            unpickler = kind(file)
            if isinstance(unpickler, _RestrictedUnpickler):
                unpickler.allowed = {_name_of(each): each for each in allowed}
            return unpickler.load()
    except _RefusedError as error:
        raise _untrusted(path, [str(error)]) from None
    except OSError as error:
        raise InputError(
            path, f"cannot be read ({error.strerror})", "use another checkpoint"
        ) from None
    except Exception:  # whatever a damaged file makes of the unpickler
        raise damaged(path) from None


def check_archive(path: Path, advance: Callable[[int], object] = lambda count: None) -> None:
    """Verify a `torch.save` file with the checksums that it contains.

    Files of torch before 1.6, and those written with checksums switched off, have none. advance:
    called with the number of bytes of every chunk.

    Raises:
        InputError: the file is damaged.
    """
    if _is_zip(path):
        check_archive_in(path, 0, path.stat().st_size, advance)


def check_archive_in(
    path: Path, offset: int, length: int, advance: Callable[[int], object] = lambda count: None
) -> None:
    """Run `check_archive` on an archive that is a part of a file; offset, length: in bytes."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(_FilePart(file, offset, length)) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0 is what torch writes where they are switched off
                    with archive.open(record) as stream:
                        while chunk := stream.read(_CHUNK_BYTES):
                            advance(len(chunk))
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        raise damaged(path) from None


class _FilePart(io.BufferedIOBase):
    """A part of a file, for reading; offset, length: in bytes."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._offset + self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content


def check_archives(paths: Sequence[Path], console: Console | None) -> None:
    """Run `check_archive` on several files and show the progress."""
    total = sum(path.stat().st_size for path in paths)
    with bytes_progress(console, "verifying", total) as advance:
        for path in paths:
            check_archive(path, advance)


def _is_zip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(path, problem, "use another checkpoint") from None


class _TrustingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return `UnreadStorage` for a class that is not installed here."""
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return UnreadStorage


class _RefusedError(Exception):
    pass


class _RestrictedUnpickler(pickle.Unpickler):
    allowed: Mapping[str, Callable[..., Any]]

    def find_class(self, module: str, name: str) -> Any:
        """Return what is allowed, dtypes, and `UnreadStorage` for what is known to be harmless."""
        whole = f"{module}.{name}"
        if whole in self.allowed:
            return self.allowed[whole]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("torch.distributed.") or _UNREAD.match(whole):
            return UnreadStorage
        raise _RefusedError(whole)


def _name_of(what: Callable[..., Any]) -> str:
    return f"{what.__module__}.{what.__qualname__}"


def _load_anything(path: Path, mapped: bool) -> Any:
    trusting = SimpleNamespace(
        __name__=__name__,
        Unpickler=_TrustingUnpickler,
        load=lambda file, **options: _TrustingUnpickler(file, **options).load(),
    )
    try:
        return torch.load(
            path, map_location="cpu", mmap=mapped, weights_only=False, pickle_module=trusting
        )
    except Exception as error:  # whatever the file's own code raises
        problem = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise InputError(path, problem, "use another checkpoint") from None


def _untrusted(path: Path, names: Iterable[str]) -> InputError:
    names = sorted(names)
    shown = ", ".join(names[:_NAMED_AT_MOST]) + (" …" if len(names) > _NAMED_AT_MOST else "")
    return InputError(
        path,
        f"wants to call {shown} when it is loaded, which may run any code",
        "pass --trust-pickle only if you trust whoever made the file",
    )


def damaged(path: Path) -> InputError:
    """Return the error for a file that torch cannot load."""
    return InputError(path, "is damaged, or torch.save has not written it", "use another file")
