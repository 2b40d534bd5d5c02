"""Small tokenizers in the `tokenizers` library's format, of the kinds that are published.

Vocabularies are trained on the texts at hand; regular expressions, normalizers, added tokens and
post-processors are those of the published files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from existing_tokenizers import STRANGE, TEXTS, write_json
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DECOMPOSED = "e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT} \N{ANGSTROM SIGN}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def ordinary(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=False) for text in texts]


def byte_level_bpe(
    split: str | None,
    *,
    ignore_merges: bool = False,
    first: Sequence[str] = (),
    size: int = 500,
    removes_others: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE with a regular expression, or GPT-2's.

    removes_others: whether the step says what is kept, not where texts are divided.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        tokenizer.pre_tokenizer = by_bytes
    else:
        how = "removed" if removes_others else "isolated"
        by_regex = pre_tokenizers.Split(Regex(split), how, invert=removes_others)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_regex, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *STRANGE] * 4, trainer)
    return tokenizer


def metaspace_bpe(first: Sequence[str], *, prepend: bool) -> Tokenizer:
    """Train a BPE with byte fallback whose texts have U+2581 for spaces."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prepend else "never")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*first, *BYTES], show_progress=False
    )
    trained.train_from_iterator(TEXTS * 4, trainer)
    whole = json.loads(trained.to_str())["model"]
    model = models.BPE(
        vocab=whole["vocab"], merges=[tuple(pair) for pair in whole["merges"]],
        byte_fallback=True, fuse_unk=True, unk_token="<unk>",
    )  # fmt: skip
    return Tokenizer(model)


def starting_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    number = tokenizer.token_to_id(token)
    return processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, number)],
    )  # fmt: skip


def saved(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        **config,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    return folder


def gpt2(folder: Path) -> Path:
    tokenizer = byte_level_bpe(None)
    tokenizer.add_special_tokens(special("<|endoftext|>"))
    end = "<|endoftext|>"
    return saved(tokenizer, folder, bos_token=end, eos_token=end, unk_token=end,
                 add_prefix_space=False, model_max_length=1024)  # fmt: skip


def gpt_neox(folder: Path) -> Path:
    tokenizer = byte_level_bpe(None, first=["<|endoftext|>", "<|padding|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(
        [AddedToken(" " * n, special=False, normalized=True) for n in range(9, 1, -1)]
    )
    end = "<|endoftext|>"
    return saved(tokenizer, folder, bos_token=end, eos_token=end, unk_token=end)


def olmo2(folder: Path) -> Path:
    tokenizer = byte_level_bpe(LLAMA_3, removes_others=True)
    tokenizer.add_special_tokens(special("<|endoftext|>", "<|fim_prefix|>", "<|pad|>"))
    tokenizer.add_tokens(ordinary("|||IP_ADDRESS|||"))
    end = "<|endoftext|>"
    return saved(tokenizer, folder, bos_token=end, eos_token=end, unk_token=end,
                 pad_token="<|pad|>", add_bos_token=False)  # fmt: skip


def llama3(folder: Path) -> Path:
    tokenizer = byte_level_bpe(LLAMA_3, ignore_merges=True)
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(4)]
    tokenizer.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|eot_id|>", *reserved[2:])
    )
    template = starting_with("<|begin_of_text|>", tokenizer)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )
    return saved(tokenizer, folder, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def llama3_instruct(folder: Path) -> Path:
    llama3(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"eos_token": "<|eot_id|>"})
    return folder


def qwen3(folder: Path) -> Path:
    tokenizer = byte_level_bpe(QWEN)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens(ordinary("<tool_call>", "</tool_call>", "<think>", "</think>"))
    return saved(tokenizer, folder, bos_token=None, eos_token="<|endoftext|>",
                 pad_token="<|endoftext|>", add_bos_token=False)  # fmt: skip


def apertus(folder: Path) -> Path:
    first = ["<unk>", "<s>", "</s>", "<pad>", *(f"<SPECIAL_{n}>" for n in range(20, 25))]
    tokenizer = byte_level_bpe(TEKKEN, ignore_merges=True, first=first)
    tokenizer.post_processor = starting_with("<s>", tokenizer)
    return saved(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                 pad_token="<pad>")  # fmt: skip


def gemma3(folder: Path) -> Path:
    tokenizer = metaspace_bpe(["<pad>", "<eos>", "<bos>", "<unk>"], prepend=False)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(ordinary("\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>"))
    tokenizer.add_tokens(ordinary("<unused0>", "<unused1>"))
    tokenizer.add_special_tokens(special("<start_of_turn>", "<end_of_turn>"))
    tokenizer.post_processor = starting_with("<bos>", tokenizer)
    return saved(tokenizer, folder, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                 pad_token="<pad>", add_bos_token=True)  # fmt: skip


def mistral(folder: Path) -> Path:
    tokenizer = metaspace_bpe(["<unk>", "<s>", "</s>"], prepend=True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", left=1)]
    )  # fmt: skip
    tokenizer.add_special_tokens(special("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    tokenizer.post_processor = starting_with("<s>", tokenizer)
    return saved(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                 add_bos_token=True)  # fmt: skip


KINDS: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        gpt2, gpt_neox, olmo2, llama3, llama3_instruct, qwen3, apertus, gemma3, mistral
    )
}  # fmt: skip
