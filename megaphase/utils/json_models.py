"""Read and write small JSON files as pydantic models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from megaphase.utils.errors import InputError, file_fault
from megaphase.utils.files import (
    AlteredError,
    atomic_write_json,
    read_file,
    with_hash,
    without_hash,
)

Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, model: type[Record], remedy: str) -> Record:
    """Read a JSON file into `model`.

    Raises InputError, ending with `remedy`, if the file is missing, unreadable or not JSON, has
    been altered, or does not fit the model; the message names the first wrong field.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        raise InputError(path, "no such file", remedy) from None
    except OSError as error:
        raise file_fault(path, error, remedy) from None
    try:
        value = json.loads(text)
        if isinstance(value, dict) and "hash" in value:
            text = json.dumps(without_hash(value)).encode()
    except RecursionError:
        raise InputError(path, "is nested too deeply", remedy) from None
    except AlteredError:
        raise InputError(path, "has been altered: its hash does not match", remedy) from None
    except ValueError:
        pass  # not JSON: the model's error has the position
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{field}: {first['msg']}" if field else first["msg"]
        raise InputError(path, problem, remedy) from None


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record atomically, with a hash by which an alteration is found."""
    atomic_write_json(path, with_hash(record.model_dump(mode="json")))
