"""Read the chat template and the special tokens of a tokenizer's directory as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megaphase.utils.errors import InputError, file_fault

TEMPLATE_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"
_SPECIAL_TOKENS_NAME = "special_tokens_map.json"
# Objects with tokens of a model's own, by the names under which templates find them.
_NAMED_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")
_REMEDY = "put back the model's own"


def read_template(folder: Path) -> tuple[Path, str]:
    """Return the file with the template, and the template.

    Raises InputError if there is none, or a file is damaged.
    """
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE_NAME).is_file():
        files.setdefault("default", folder / TEMPLATE_NAME)
    if "default" in files:
        return files["default"], _read(files["default"])
    path = folder / CONFIG_NAME
    text = files or _object(path).get("chat_template")
    if text is None:
        remedy = f"put a {TEMPLATE_NAME} there: that of the model, or one for its control tokens"
        raise InputError(folder, "the tokenizer has no chat template", remedy)
    if isinstance(text, list):
        named = [each for each in text if isinstance(each, dict) and "name" in each]
        text = {str(each["name"]): each.get("template") for each in named}
    if isinstance(text, dict):
        if "default" not in text:
            problem = "has several chat templates, of which none is named default"
            raise InputError(folder, problem, f"put the one to use there as {TEMPLATE_NAME}")
        text = text["default"]
    if not isinstance(text, str):
        raise InputError(path, "chat_template: is not a text", _REMEDY)
    return path, text


def has_template(folder: Path) -> bool:
    """Return whether there is a chat template, however it is."""
    files = [folder / TEMPLATE_NAME, *(folder / MORE_TEMPLATES).glob("*.jinja")]
    config = _object(folder / CONFIG_NAME)
    return any(path.is_file() for path in files) or config.get("chat_template") is not None


def copy_more_templates(source: Path, folder: Path) -> None:
    """Copy the folder with the templates that are in files of their own, if there is one."""
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, folder / MORE_TEMPLATES)


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Return the text of every special token that has a name, such as `bos_token`, by its name.

    Raises InputError if a file is not a JSON object.
    """
    named = _object(folder / CONFIG_NAME)
    if "added_tokens_decoder" not in named:
        named = named | _object(folder / _SPECIAL_TOKENS_NAME)
    found = {name: value for name, value in named.items() if name.endswith("_token")}
    for key in _NAMED_TOKENS:
        if isinstance(named.get(key), dict):
            found |= named[key]
    texts = {name: _text(value) for name, value in found.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"is not valid JSON ({error})", _REMEDY) from None
    if not isinstance(value, dict):
        raise InputError(path, "is not a JSON object", _REMEDY)
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise InputError(path, problem, _REMEDY) from None
    except OSError as error:
        raise file_fault(path, error, _REMEDY) from None
