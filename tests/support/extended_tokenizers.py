"""Small tokenizers, extended by tokens of two more languages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_support import write_jsonl
from existing_tokenizers import TEXTS, llama_directory, t5_directory, write_json
from tokenizer_json_kinds import KINDS

from megaphase.data_tools.tokenizers.extend import extend_tokenizer
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Tokenizer

ADDED = 120


def _sentences(characters: str, seed: int) -> list[str]:
    """Return sentences of 60 random words of these characters."""
    dice = random.Random(seed)
    words = ["".join(dice.choices(characters, k=dice.randint(2, 7))) for _ in range(60)]
    return [" ".join(dice.choices(words, k=9)) + "." for _ in range(200)]


# Greek letters, which no vocabulary of TEXTS has, and Latin ones, of which it has most.
NEW_TEXTS = {"el": _sentences("αβγδεζηθικλμνό", 1), "pl": _sentences("aeioustrnmłśćz", 2)}


def new_files(folder: Path) -> dict[str, list[Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    return {
        language: [write_jsonl(folder / f"{language}.jsonl", texts)]
        for language, texts in NEW_TEXTS.items()
    }


def extend(base: Path, folder: Path, add: int = ADDED) -> Path:
    """Extend a tokenizer by Greek and Polish; return the directory `folder`/extended."""
    out = folder / "extended"
    extend_tokenizer(base, new_files(folder / "text"), out, add=add)
    return out


def own(folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "text.jsonl", TEXTS * 20)
    train_tokenizer(
        {"xx": [source]}, folder / "tok", tags=("fr",), reserved_tags=2, user_symbols=("<b>",),
        **options,
    )  # fmt: skip
    return folder / "tok"


def llama_with_json(folder: Path) -> Path:
    """Make one like Llama 2's: a model of sentencepiece, the same as tokenizer.json, and a token
    added after both, with a gap before it."""
    import transformers

    llama_directory(folder)
    reference = transformers.LlamaTokenizer.from_pretrained(folder)
    reference.save_pretrained(folder)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    size = len(whole["model"]["vocab"])
    token = {"id": size, "content": "<|im_start|>", "special": True, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    whole["added_tokens"].append(token)
    write_json(path, whole)
    return folder


def exported(folder: Path) -> Path:
    """Make one that `to-hf` has written, from the model of sentencepiece alone."""
    from megaphase.convert.hugging_face.tokenizer import write_hf_tokenizer

    model = llama_directory(folder / "llama") / "tokenizer.model"
    out = folder / "hf"
    out.mkdir()
    write_hf_tokenizer(Tokenizer.load(model), out, max_length=512)
    return out


BASES: dict[str, Callable[[Path], Path]] = {
    **KINDS,
    "t5": t5_directory,
    "llama2": llama_directory,
    "llama2_json": llama_with_json,
    "model": lambda folder: llama_directory(folder) / "tokenizer.model",
    "exported": exported,
    "own_unigram": lambda folder: own(folder, vocab_size=360),
    "own_bpe": lambda folder: own(folder, vocab_size=500, model_type="bpe"),
    "own_byte_level": lambda folder: own(folder, vocab_size=400, library="tokenizers"),
}
