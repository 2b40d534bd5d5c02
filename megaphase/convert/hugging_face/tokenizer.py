"""Write and read the tokenizer of a Hugging Face model directory.

The written files give the same ids in transformers as in Megaphase, apart from BOS: transformers
puts it before every text if the model was trained with it, Megaphase only where a document begins.
EOD is not added. Control tokens come from ids only, never from text (`split_special_tokens`), so
that a document that contains "</s>" does not end there. Where there is a chat template,
`apply_chat_template` needs the opposite: text that spells a control token becomes it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megaphase.chats.template import ChatTemplate
from megaphase.chats.template_files import copy_more_templates
from megaphase.chats.turn_ends import turn_ends
from megaphase.convert.hugging_face.smaller_tokenizer import leave_out, tokens_beyond
from megaphase.convert.hugging_face.tokenizer_json import tokenizer_json
from megaphase.tokenizer import (
    MODEL_NAME,
    RECORD_NAME,
    SPACE_SYMBOL,
    TOKENIZER_JSON_NAME,
    Tokenizer,
)
from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles
from megaphase.tokenizer.sentencepiece_files import (
    HUGGING_FACE_MODEL_NAMES,
    model_file,
    read_proto,
)
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, atomic_write_text, read_json

_CONFIG_NAME = "tokenizer_config.json"
_FILE_NAMES = (
    *HUGGING_FACE_MODEL_NAMES,
    RECORD_NAME,
    _CONFIG_NAME,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
)


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write the files with which `transformers.AutoTokenizer` and `Tokenizer.load` read `folder`.

    A tokenizer from a Hugging Face directory, also an extended one, and one of the `tokenizers`
    library is copied. For any other, a `tokenizer.json` is made from the sentencepiece model
    (transformers 4.45 or later) and stored with the model itself and, for a tokenizer made by
    Megaphase, its record.

    Args:
        tokenizer: loaded from a path that still exists.
        folder: an existing directory.
        max_length: the longest text of the model, in tokens; transformers warns beyond it.

    Raises InputError if the sentencepiece model has features that `tokenizers` cannot express.
    """
    path = tokenizer.path
    if tokenizer.record.library == "tokenizers":
        copy_tokenizer(path, folder)
        _let_chat_template_name_tokens(folder)
        return
    is_own = path.is_dir() and (path / RECORD_NAME).exists() and not tokenizer.record.extends
    if path.is_dir() and not is_own and _class_name(path):
        copy_tokenizer(path, folder)
        return
    source, proto = model_file(path), read_proto(path)
    model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    if tokenizer.vocab_size > model.get_piece_size():
        problem = "has tokens beyond its sentencepiece model's and names no tokenizer_class"
        raise InputError(path, problem, f"name it in {_CONFIG_NAME}")
    whole = tokenizer_json(proto, path, spells_space_symbol=_spells_space_symbol(tokenizer))
    config = _config(model, whole["added_tokens"], tokenizer, max_length)
    if tokenizer.adds_bos:
        whole["post_processor"] = _puts_first(config["bos_token"], tokenizer.bos)
    atomic_write_text(folder / "tokenizer.json", json.dumps(whole, ensure_ascii=False))
    atomic_write_json(folder / _CONFIG_NAME, config)
    shutil.copyfile(source, folder / MODEL_NAME)
    if (path / RECORD_NAME).exists():
        shutil.copyfile(path / RECORD_NAME, folder / RECORD_NAME)


def take_tokenizer(source: Path, folder: Path, rows: int | None = None) -> list[str] | None:
    """Copy the tokenizer of a Hugging Face model directory, for a run file's `tokenizer: folder`.

    Args:
        source: the model's directory.
        folder: an existing directory.
        rows: of the model's embedding; tokens beyond them that no text encodes to are left out.

    Returns the tokens that were left out. Returns None if `source` has neither a sentencepiece
    model nor a `tokenizer.json`; then nothing is copied.

    Raises InputError if Megaphase cannot use it, see `Tokenizer.load`, or the model has no rows for
    tokens that it needs.
    """
    names = (*HUGGING_FACE_MODEL_NAMES, TOKENIZER_JSON_NAME)
    if not any((source / name).is_file() for name in names):
        return None
    tokenizer = Tokenizer.load(source)
    beyond = [] if rows is None else tokens_beyond(tokenizer, rows)
    copy_tokenizer(source, folder)
    if "eos" not in HuggingFaceFiles(folder).roles():
        # The model's configuration names it, which is not copied.
        atomic_write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eod})
    if rows is not None and tokenizer.vocab_size > rows:
        leave_out(beyond, folder, rows)
    turn_ends(tokenizer)  # warns now of what would otherwise be found after the training
    return beyond


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files from which a tokenizer is loaded; both are directories."""
    for name in _FILE_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    copy_more_templates(source, folder)


def _let_chat_template_name_tokens(folder: Path) -> None:
    """Leave out `split_special_tokens` where there is a chat template, whose text `transformers`
    would split as well."""
    path = folder / _CONFIG_NAME
    if path.is_file() and ChatTemplate.find(folder) is not None:
        config = read_json(path)
        if config.pop("split_special_tokens", None):
            atomic_write_json(path, config)


def _class_name(directory: Path) -> str | None:
    """Return the class with which transformers loads a directory, or None."""
    path = directory / _CONFIG_NAME
    return read_json(path).get("tokenizer_class") if path.exists() else None


def _spells_space_symbol(tokenizer: Tokenizer) -> bool:
    return tokenizer.decode(tokenizer.encode(SPACE_SYMBOL)) == SPACE_SYMBOL


def _config(
    model: SentencePieceProcessor,
    added_tokens: list[dict[str, Any]],
    tokenizer: Tokenizer,
    max_length: int,
) -> dict[str, Any]:
    """The value of `tokenizer_config.json`."""
    described = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in added_tokens
    }
    bos = model.bos_id() if tokenizer.bos is None else tokenizer.bos
    roles = {"eos": tokenizer.eod, "unk": model.unk_id(), "bos": bos, "pad": model.pad_id()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": model.id_to_piece(i) for role, i in roles.items() if i >= 0},
        **({"add_bos_token": True} if tokenizer.adds_bos else {}),
        "added_tokens_decoder": described,
        # Text that looks like a control token stays text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }


def _puts_first(text: str, token: int | None) -> dict[str, Any]:
    """Return the post-processor of `tokenizer.json` that puts a token before every text."""
    first = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": text, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }
