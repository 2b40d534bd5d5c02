"""The tokenizer of a Hugging Face model directory, written and taken.

What is written gives the same ids in transformers as in megaphase: no BOS or EOD is added, and
control tokens come from ids only, never from text (`split_special_tokens`), so that a document
that holds "</s>" does not end there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from megaphase.convert.tokenizer_json import tokenizer_json
from megaphase.errors import InputError
from megaphase.files import write_json_whole, write_text_whole
from megaphase.tokenizer import MODEL_NAME, RECORD_NAME, SPACE_SYMBOL, Tokenizer
from megaphase.tokenizer_files import HUGGING_FACE_MODEL_NAMES

_CONFIG_NAME = "tokenizer_config.json"
_FILE_NAMES = (
    *HUGGING_FACE_MODEL_NAMES,
    RECORD_NAME,
    _CONFIG_NAME,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write the files by which `transformers.AutoTokenizer` and `Tokenizer.load` read a tokenizer.
    """
