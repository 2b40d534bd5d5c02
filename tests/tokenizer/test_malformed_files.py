"""Values of a tokenizer's files that are of no use end in one line, and null counts as missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from existing_tokenizers import llama_directory, write_json
from tokenizer_json_kinds import mistral
from warm_commands import run

from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    llama, gemma = llama_directory(folder / "sentencepiece"), mistral(folder / "json")
    return {"sentencepiece": llama, "json": gemma}


def changed(source: Path, folder: Path, name: str, **changes: Any) -> Path:
    """Copy a tokenizer, with other values in one of its files; those of its `model` by its keys."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    inner = {key[7:]: value for key, value in changes.items() if key[:7] == "model__"}
    outer = {key: value for key, value in changes.items() if key[:7] != "model__"}
    if inner:
        outer["model"] = content["model"] | inner
    write_json(path, content | outer)
    return folder


CONFIG, WHOLE = "tokenizer_config.json", "tokenizer.json"


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
@pytest.mark.parametrize("key", ["tokenizer_class", "add_bos_token", "pad_token", "bos_token"])
def test_null_counts_as_missing(kind: str, key: str, made: dict[str, Path], tmp_path: Path) -> None:
    null = changed(made[kind], tmp_path / "null", CONFIG, **{key: None})
    missing = changed(made[kind], tmp_path / "missing", CONFIG)
    config = json.loads((missing / CONFIG).read_text())
    config.pop(key, None)
    write_json(missing / CONFIG, config)
    assert Tokenizer.load(null).record == Tokenizer.load(missing).record


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": ["</s>"]}, 'eos_token: is ["</s>"], not the text of a token; copy the tok'),
        ({"eos_token": 2}, "eos_token: is 2, not the text of a token"),
        ({"bos_token": {"content": 1}}, 'bos_token: is {"content": 1}, not the text of a token'),
        ({"pad_token": {"text": "a"}}, 'pad_token: is {"text": "a"}, not the text of a token'),
        ({"add_bos_token": "yes"}, 'add_bos_token: is "yes", not true or false'),
    ],
)
def test_values_of_the_wrong_kind(
    kind: str, changes: dict[str, Any], message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(made[kind], tmp_path / "wrong", CONFIG, **changes)
    with pytest.raises(InputError, match=re.escape(f"{folder / CONFIG}: {message}")):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("kind", "name", "changes", "message"),
    [
        ("sentencepiece", CONFIG, {"tokenizer_class": 5}, "tokenizer_class: is 5, not a name"),
        ("sentencepiece", "config.json", {"model_type": ["a"]}, 'model_type: is ["a"], not a name'),
        ("json", "special_tokens_map.json", {"mask_token": [1]}, "mask_token: is [1], not the te"),
        ("json", WHOLE, {"post_processor": "x"}, "post_processor: is not in the format of the tok"),
        ("json", WHOLE, {"post_processor": {"type": "A", "single": [5]}}, "post_processor: is not"),
        ("json", WHOLE, {"post_processor": {"type": "A", "cls": []}}, "post_processor: is not in"),
        ("json", WHOLE, {"pre_tokenizer": ["x"]}, "pre_tokenizer: is not in the format of the"),
        ("json", WHOLE, {"normalizer": {"a": 1}}, "normalizer: is not in the format of the tok"),
        ("json", WHOLE, {"normalizer": {"type": "Sequence", "normalizers": 3}}, "normalizer: is n"),
        ("json", WHOLE, {"model": "x"}, "its tokens are not in the format of transformers"),
        ("json", WHOLE, {"model__vocab": {"a": "b"}}, "its tokens are not in the format of trans"),
        ("json", WHOLE, {"model__unk_token": ["<unk>"]}, "is not a tokenizer; copy the tokenizer"),
        ("json", WHOLE, {"model__merges": [5]}, "is not a tokenizer; copy the tokenizer again"),
        ("json", WHOLE, {"model__merges": [["a", 1]]}, "is not a tokenizer; copy the tokenizer ag"),
        ("json", WHOLE, {"added_tokens": [{"id": 1, "content": 5}]}, "its tokens are not in the"),
    ],
)
def test_malformed_files(
    kind: str,
    name: str,
    changes: dict[str, Any],
    message: str,
    made: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = changed(made[kind], tmp_path / "wrong", name, **changes)
    if name == "config.json":  # read where no class is named
        write_json(folder / CONFIG, {"eos_token": "</s>"})
    with pytest.raises(InputError, match=re.escape(message)) as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(str(folder))


def test_the_command_says_it_in_one_line(made: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(made["json"], tmp_path / "wrong", CONFIG, eos_token=["</s>"])
    result = run("tokenizer", "inspect", folder)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "tokenizer_config.json: eos_token: is" in result.stderr


def test_a_file_that_cannot_be_read(made: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(made["json"], tmp_path / "wrong", "special_tokens_map.json")
    (folder / "special_tokens_map.json").unlink()
    (folder / "special_tokens_map.json").mkdir()
    with pytest.raises(InputError, match=r"special_tokens_map\.json: cannot be read \(Is a dir"):
        Tokenizer.load(folder)
