"""Folders that Hugging Face `datasets` wrote with `save_to_disk`, here or in a store."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megaphase.utils.errors import InputError
from megaphase.utils.files import read_file
from megaphase.utils.remote_files import is_url, joined, list_folder, read_bytes

_DICT_FILE = "dataset_dict.json"  # of several splits, each in a folder of its own
_STATE_FILE = "state.json"
_INFO_FILE = "dataset_info.json"


def dataset_files(folder: str) -> list[str] | None:
    """Return the Arrow files of a dataset in the order of its rows, or None if the folder holds
    none.

    Raises:
        InputError: the folder has several splits, one of its files is damaged, or the rows are
            chosen or ordered by a separate file, as by versions of `datasets` before 2.0.
    """
    names = list_folder(folder) if is_url(folder) else os.listdir(folder)
    if _DICT_FILE in names:
        splits = _read(folder, _DICT_FILE, "splits")
        if len(splits) != 1:
            example = _place(folder, str(splits[0])) if splits else "another"
            known = ", ".join(map(str, splits)) or "none"
            raise InputError(folder, f"has the splits {known}", f"give one, such as {example}")
        return dataset_files(_place(folder, str(splits[0])))
    if _STATE_FILE not in names or _INFO_FILE not in names:
        return None
    if _read(folder, _STATE_FILE, "_indices_data_files", None):
        remedy = "save it again after dataset.flatten_indices()"
        raise InputError(folder, "chooses its rows by a separate file", remedy)
    return [_place(folder, str(file["filename"])) for file in _files(folder)]


def _files(folder: str) -> list[dict[str, Any]]:
    files = _read(folder, _STATE_FILE, "_data_files")
    if not all(isinstance(file, dict) and "filename" in file for file in files):
        raise _damaged(_place(folder, _STATE_FILE))
    return list(files)


def _read(folder: str, name: str, key: str, default: Any = ...) -> Any:
    """Return the list under a key of a JSON file of the folder."""
    place = _place(folder, name)
    data = read_bytes(place) if is_url(folder) else read_file(Path(place))
    try:
        content = json.loads(data)
        value = content[key] if default is ... else content.get(key, default)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(place) from None
    if value is not default and not isinstance(value, list):
        raise _damaged(place)
    return value


def _damaged(place: str) -> InputError:
    return InputError(place, "is not what datasets writes with save_to_disk", "save it again")


def _place(folder: str, name: str) -> str:
    return joined(folder, name) if is_url(folder) else os.path.join(folder, name)
