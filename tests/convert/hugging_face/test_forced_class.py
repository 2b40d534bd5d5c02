"""Model types for which AutoTokenizer takes a class of its own: to-hf says which one to load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from convert_support import write_random_checkpoint
from data_support import make_tokenizer
from existing_tokenizers import TEXTS
from hf_support import SHAPES
from tokenizer_json_kinds import KINDS, byte_level_bpe, saved, special
from tokenizers import normalizers
from warm_commands import run

from megaphase.convert.hugging_face.to_hf import Written, to_hf
from megaphase.tokenizer import Tokenizer

QWEN2_SHAPE = replace(SHAPES["llama grouped"], qkv_bias=True)
HARD = [*TEXTS, "It's 12345 o'CLOCK\n\n  don'T  x=1234;;\n cafe\u0301 \u212b 'RE  "]


def qwen_by_another_name(folder: Path) -> Path:
    """Make Qwen's tokenizer but for the digits, of which three may be in a token."""
    from tokenizer_json_kinds import LLAMA_3

    tokenizer = byte_level_bpe(LLAMA_3)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(special("<|endoftext|>"))
    return saved(tokenizer, folder, eos_token="<|endoftext|>")


MAKERS = {
    **{name: KINDS[name] for name in ("qwen3", "llama3", "gpt2", "olmo2", "mistral")},
    "digits": qwen_by_another_name,
    "sentencepiece": make_tokenizer,
}


def exported(tokenizer: Path, folder: Path, model: str = "qwen2") -> Written:
    shape = QWEN2_SHAPE if model == "qwen2" else SHAPES["llama grouped"]
    checkpoint = write_random_checkpoint(folder / "native", shape)
    return to_hf(
        str(checkpoint), folder / "hf", precision=None, tokenizer=tokenizer,
        max_shard_bytes=10**9, workers=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("model", ["qwen2", "llama"])
def test_the_named_class_gives_the_ids(kind: str, model: str, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "tok"
    path = MAKERS[kind](folder)
    written = exported(path, tmp_path, model)
    assert written.family.model_type == model
    assert (written.tokenizer_class is None) == (kind == "qwen3" or model == "llama")
    loader = getattr(transformers, written.tokenizer_class or "AutoTokenizer")
    reference, native = loader.from_pretrained(tmp_path / "hf"), Tokenizer.load(path)
    for text in HARD:
        assert reference.encode(text, add_special_tokens=False) == native.encode(text)


def test_the_command_says_it(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", QWEN2_SHAPE)
    path = make_tokenizer(tmp_path / "tok")
    result = run(
        "convert", "to-hf", checkpoint, "--tokenizer", path, "--out", tmp_path / "hf"
    )  # fmt: skip
    assert result.returncode == 0
    assert "load it with transformers.PreTrainedTokenizerFast.from_pretrained(" in result.stderr
