"""Read files of other programs that were written with torch.save, without running their code."""

from __future__ import annotations

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

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
        raise _damaged(path) from None
    except Exception:  # whatever a damaged file makes of the unpickler
        raise _damaged(path) from None


def check_archive(path: Path, advance: Callable[[int], object] = lambda count: None) -> None:
    """Verify a `torch.save` file with the checksums that it contains.

    Files of torch before 1.6, and those written with checksums switched off, have none. advance:
    called with the number of bytes of every chunk.

    Raises:
        InputError: the file is damaged.
    """
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0 is what torch writes where they are switched off
                    with archive.open(record) as stream:
                        while chunk := stream.read(_CHUNK_BYTES):
                            advance(len(chunk))
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        raise _damaged(path) from None


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


def _damaged(path: Path) -> InputError:
    return InputError(path, "is damaged, or torch.save has not written it", "use another file")
