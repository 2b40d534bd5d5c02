"""Small tokenizers like those of other projects."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind 1984 foxes.",
    "Der schnelle braune Fuchs springt über den faulen Hund, und den Hund stört es nicht.",
    "Le vif renard brun saute par-dessus le chien paresseux ; le chien n'en a cure.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर से कूद जाती है और कुत्ते को परवाह नहीं है।",
    "Azeri kastaina azkarrak zakur alferraren gainetik salto egiten du.",
]
STRANGE = ["", " ", "  two  spaces ", "\n", "a\tb\nc", "日本 😀", "</s> <unk> <tag> <0x41>", "ﬁ ①"]


def train_model(path: Path, texts: Sequence[str] = TEXTS, **options: object) -> Path:
    """Train a sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts] * 20),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def t5_directory(folder: Path) -> Path:
    """Make one like T5's: unigram, normalized, no bytes, sentinels added after the model."""
    model = train_model(
        folder / "spiece.model",
        vocab_size=260, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()
    added = {str(size + i): {"content": f"<extra_id_{4 - i}>", "special": True} for i in range(5)}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>",
         "pad_token": "<pad>", "extra_ids": 5, "added_tokens_decoder": added},
    )  # fmt: skip
    return folder


def llama_directory(folder: Path) -> Path:
    """Make one like Llama's: BPE, not normalized, bytes, a space before every text."""
    train_model(
        folder / "tokenizer.model",
        vocab_size=520, model_type="bpe", unk_id=0, bos_id=1, eos_id=2, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        control_symbols=["<tag>"],
    )  # fmt: skip
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>",
         "bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": False, "legacy": False},
    )  # fmt: skip
    return folder
