"""Fetch a checkpoint from an object store into a cache on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaphase.checkpoint.remote import RemoteRun
from megaphase.checkpoint.state import MANIFEST_FILE, STATE_FILE
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import (
    file_damage,
    hash_json,
    os_errors_named,
    publish_directory,
    read_file,
    remove_directory_at_once,
    size_damage,
)
from megaphase.utils.locks import exclusive_lock
from megaphase.utils.remote_calls import first_failure_said
from megaphase.utils.remote_files import (
    describe,
    download,
    joined,
    list_folder,
    names_bucket,
    read_bytes,
)
from megaphase.utils.run_files import CHECKPOINTS
from megaphase.utils.set_aside import say_on_standard_error

CACHE_VARIABLE = "MEGAPHASE_CACHE"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def cache_folder() -> Path:
    """Return the folder for fetched checkpoints: MEGAPHASE_CACHE, or `megaphase` in
    XDG_CACHE_HOME, by default ~/.cache."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaphase"


def fetch_checkpoint(text: str) -> Path:
    """Return the directory in the cache with the checkpoint that `URL@NAME`, or the URL of a
    checkpoint, names. It is fetched unless the same one is there, with files of the right sizes;
    each file that is fetched is compared with the manifest.

    Raises:
        InputError: there is no such checkpoint.
        RunError: it cannot be fetched, what lies there differs from its manifest, or the disk has
            too little space.
    """
    with first_failure_said(say_on_standard_error):
        return _fetched(text)


def _fetched(text: str) -> Path:
    run, name = _find(text)
    url = run.folder(name)
    manifest = read_bytes(joined(url, MANIFEST_FILE))
    final = cache_folder() / hash_json(run.url)[:16] / CHECKPOINTS / name
    files = _files(url, manifest)
    if _is_that(final, manifest, files):
        return final
    lock = final.with_name(f".{name}.lock")
    with os_errors_named(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process, which fetches {url}"
        with exclusive_lock(lock, lambda: say_on_standard_error(waiting)):
            if not _is_that(final, manifest, files):
                _fetch(url, manifest, files, final)
    return final


def remedy_for_damage(folder: Path) -> str:
    """Return what to do about a damaged checkpoint; one in the cache can be fetched again."""
    if cache_folder() in folder.absolute().parents:
        return f"remove {folder}: it is then fetched again"
    return "use another checkpoint"


def _find(text: str) -> tuple[RemoteRun, str]:
    if not names_bucket(text.rpartition("@")[0] or text):
        raise InputError(text, "names no bucket", "give s3://BUCKET/RUN@NAME")
    text = text.rstrip("/")
    parent, _, name = text.rpartition("/")
    folder, _, last = parent.rpartition("/")
    if last == CHECKPOINTS and "@" not in name and MANIFEST_FILE in list_folder(text):
        return RemoteRun(folder), name
    url, separator, name = text.rpartition("@")
    if not separator or "://" not in url:
        remedy = "give URL@NAME, or the URL of a step-… folder in checkpoints"
        raise InputError(text, "this is not a checkpoint", remedy)
    run = RemoteRun(url)
    return run, run.find(name)


def _is_that(folder: Path, manifest: bytes, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the folder holds the checkpoint, by its manifest and the sizes of its files;
    whoever reads it compares the hashes."""
    try:
        if read_file(folder / MANIFEST_FILE) != manifest:
            return False
        return not any(size_damage(folder / name, each["bytes"]) for name, each in files.items())
    except OSError:
        return False


def _fetch(url: str, manifest: bytes, files: Mapping[str, dict[str, Any]], final: Path) -> None:
    aside = final.with_name(f".{final.name}.partial")
    aside.mkdir(exist_ok=True)
    # What an earlier call has fetched completely is not fetched again.
    left = {name: each for name, each in files.items() if file_damage(aside / name, each)}
    needed, free = sum(each["bytes"] for each in left.values()), shutil.disk_usage(aside).free
    if needed > free:
        raise RunError(
            f"{aside}: the checkpoint needs {needed / 1e9:,.3f} GB, the disk has "
            f"{free / 1e9:,.3f} GB left; {CACHE_VARIABLE} names another folder"
        )
    say_on_standard_error(f"fetching {url} ({needed / 1e9:,.3f} GB) into {final}")
    for name, described in left.items():
        file = describe(joined(url, name))
        if file.size != described["bytes"] or download(file, aside / name) != described["hash"]:
            (aside / name).unlink(missing_ok=True)
            raise RunError(f"{file}: is not what its manifest describes; use another checkpoint")
    for path in aside.iterdir():
        if path.name not in files:
            path.unlink()
    (aside / MANIFEST_FILE).write_bytes(manifest)
    remove_directory_at_once(final)
    publish_directory(aside, final)


def _files(url: str, manifest: bytes) -> dict[str, dict[str, Any]]:
    """Return the manifest's descriptions of files; their names lead to no other folder."""
    try:
        files = json.loads(manifest)["files"]
        found = {name: {"bytes": int(f["bytes"]), "hash": f["hash"]} for name, f in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = {}
    if STATE_FILE not in found or not all(map(_FILE_NAME.fullmatch, found)):
        where = joined(url, MANIFEST_FILE)
        raise InputError(where, "is damaged", "use another checkpoint")
    return found
