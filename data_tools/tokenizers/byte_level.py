"""Train a byte-level BPE with the Hugging Face `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megaphase.chats.template_files import TEMPLATE_NAME
from megaphase.tokenizer import TOKENIZER_JSON_NAME
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, atomic_write_text

CONFIG_NAME = "tokenizer_config.json"

_BYTES = 256
# Merges never cross the matches of this expression, that of Qwen 2 with combining marks as parts of
# words, which those of Indic scripts are.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|NUMBER|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_level(
    sentences: Iterable[str],
    vocab_size: int,
    control: Sequence[str],
    user_symbols: Sequence[str],
    split_digits: bool,
) -> str:
    """Train and return the text of a tokenizer.json.

    Args:
        vocab_size: number of ids, of which bytes, control tokens and user symbols take
            256 + len(control) + len(user_symbols).
        control: the texts of the control tokens, in the order of their ids, from 0 on.

    Raises InputError if the vocabulary is too small, or larger than the text supports.
    """
    least = _BYTES + len(control) + len(user_symbols)
    if vocab_size < least:
        problem = f"{vocab_size:,} has no room for the bytes, tags and symbols"
        raise InputError("--vocab-size", problem, f"choose {least} or more")
    # The library's threads would live on in the process that is forked for the training.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE())
    number = r"\p{N}" if split_digits else r"\p{N}{1,3}"
    by_words = pre_tokenizers.Split(Regex(_SPLIT.replace("NUMBER", number)), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_words, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*control, *user_symbols],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        problem = f"{vocab_size:,} is more than this text supports"
        remedy = f"give more text or choose {found} or less"
        raise InputError("--vocab-size", problem, remedy)
    whole = json.loads(tokenizer.to_str())
    for token in whole["added_tokens"]:
        token["special"] = token["content"] in control
    return json.dumps(whole, ensure_ascii=False)


def write_byte_level(directory: Path, text: str, eod: str, chat_template: str | None) -> None:
    """Write the files with which `transformers.AutoTokenizer` gives the same ids."""
    atomic_write_text(directory / TOKENIZER_JSON_NAME, text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "add_bos_token": False,
        # Text that looks like a control token stays text, but for that of a chat template.
        **({} if chat_template else {"split_special_tokens": True}),
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        atomic_write_text(directory / TEMPLATE_NAME, chat_template)
    atomic_write_json(directory / CONFIG_NAME, config)
