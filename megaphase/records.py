"""Small JSON files that stand beside large ones, read into pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from megaphase.errors import InputError
from megaphase.files import read_file

Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, model: type[Record], remedy: str) -> Record:
    """Read a JSON file into `model`.

    Raises InputError, ending with `remedy`, where the file is missing, unreadable, not JSON, or
    does not fit the model; the message names the first field that does not.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        raise InputError(path, "no such file", remedy) from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", remedy) from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{field}: {first['msg']}" if field else first["msg"]
        raise InputError(path, problem, remedy) from None
