"""Model types for which AutoTokenizer takes a class of its own: to-hf says which one to load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from convert_support import write_random_checkpoint
from data_support import make_tokenizer
from existing_tokenizers import TEXTS
from hf_support import SHAPES
from tokenizer_json_kinds import KINDS, byte_level_bpe, metaspace_bpe, saved, special
from tokenizers import normalizers, pre_tokenizers
from warm_commands import run

from megaphase.convert.hugging_face.to_hf import Written, to_hf
from megaphase.tokenizer import Tokenizer

QWEN2_SHAPE = replace(SHAPES["llama grouped"], qkv_bias=True)
HARD = [
    *TEXTS,
    " ",
    "  two spaces before",
    "It's 12345 o'CLOCK\n\n  don'T  x=1234;;\n cafe\u0301 \u212b 'RE  ",
]


def qwen_by_another_name(folder: Path) -> Path:
    """Make Qwen's tokenizer but for the digits, of which three may be in a token."""
    from tokenizer_json_kinds import LLAMA_3

    tokenizer = byte_level_bpe(LLAMA_3)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(special("<|endoftext|>"))
    return saved(tokenizer, folder, eos_token="<|endoftext|>")


def named_llama(folder: Path, *, legacy: bool) -> Path:
    """Make a tokenizer.json of a LlamaTokenizer, as releases before 4.45 or since then write it."""
    tokenizer = metaspace_bpe(["<unk>", "<s>", "</s>"], prepend=True)
    tokenizer.add_special_tokens(special("<unk>", "<s>", "</s>"))
    if legacy:
        spelled = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(spelled)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return saved(
        tokenizer, folder, tokenizer_class="LlamaTokenizer",
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False,
    )  # fmt: skip


MAKERS = {
    **{name: KINDS[name] for name in ("qwen3", "llama3", "gpt2", "olmo2", "mistral")},
    "digits": qwen_by_another_name,
    "sentencepiece": make_tokenizer,
    "legacy": lambda folder: named_llama(folder, legacy=True),
    "metaspace": lambda folder: named_llama(folder, legacy=False),
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
    differs = kind != "qwen3" and (model == "qwen2" or kind == "legacy")
    assert (written.other_class is not None) == differs
    loader = getattr(
        transformers, written.other_class.right if written.other_class else "AutoTokenizer"
    )
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
