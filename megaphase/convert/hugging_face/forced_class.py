"""Exports whose tokenizer `transformers.AutoTokenizer` does not load as its files say.

For some model types, version 5 of transformers takes the model's own tokenizer class whatever
`tokenizer_class` says (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` of `tokenization_auto.py`); of
the families here, for Qwen 2. Of a tokenizer.json that class reads the vocabulary and merges, and
splits texts as Qwen's tokenizer does, so that another tokenizer gives other ids. Likewise
LlamaTokenizer, where the files name it: it writes spaces its own way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megaphase.tokenizer import TOKENIZER_JSON_NAME
from megaphase.tokenizer.hugging_face_files import read_object, steps_of

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_STEPS: list[dict[str, Any]] = [
    {
        "type": "Split",
        "pattern": {"Regex": _QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    },
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
_FORCED, _LLAMA = {"qwen2": "Qwen2Tokenizer"}, "LlamaTokenizer"
_FILE_CLASS = "PreTrainedTokenizerFast"  # reads a tokenizer.json as it is


class OtherClass(NamedTuple):
    """Classes of transformers: the one that AutoTokenizer takes, and the one to be loaded."""

    taken: str
    right: str


def class_to_load(folder: Path, model_type: str) -> OtherClass | None:
    """Return the class of transformers that gives the ids of the tokenizer in an exported folder,
    if AutoTokenizer would give others; else None."""
    forced = _FORCED.get(model_type)
    whole = read_object(folder / TOKENIZER_JSON_NAME)
    config = read_object(folder / "tokenizer_config.json")
    named = config.get("tokenizer_class")
    short = named.removesuffix("Fast") if isinstance(named, str) else None
    if forced is not None:
        if whole and _is_qwen2(whole):
            return None
        is_other = short is not None and short != forced
        return OtherClass(forced, str(named) if is_other and not whole else _FILE_CLASS)
    if short == _LLAMA and whole and not _is_llama(whole, config):
        return OtherClass(_LLAMA, _FILE_CLASS)
    return None


def _is_llama(whole: dict[str, Any], config: dict[str, Any]) -> bool:
    """Return whether LlamaTokenizer encodes as a tokenizer.json does; transformers does not take it
    for one of bytes."""
    steps = steps_of(whole.get("pre_tokenizer"))
    if any(step["type"] == "ByteLevel" for step in steps):
        return True
    scheme = "never" if config.get("add_prefix_space") is False else "first"
    wanted = {"type": "Metaspace", "prepend_scheme": scheme, "split": False}
    return (
        not steps_of(whole.get("normalizer"))
        and len(steps) == 1
        and all(steps[0].get(key) == value for key, value in wanted.items())
    )


def _is_qwen2(whole: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json encodes as Qwen2Tokenizer does with its vocabulary."""
    model, steps = whole.get("model") or {}, steps_of(whole.get("pre_tokenizer"))
    return (
        model.get("type") == "BPE"
        and not (model.get("ignore_merges") or model.get("byte_fallback"))
        and [step["type"] for step in steps_of(whole.get("normalizer"))] == ["NFC"]
        and len(steps) == len(_QWEN2_STEPS)
        and all(
            step.get(key) == value
            for step, wanted in zip(steps, _QWEN2_STEPS, strict=True)
            for key, value in wanted.items()
        )
    )
