"""The tokens of requests against those of `lm_eval --model hf` with the exported tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from existing_tokenizers import llama_directory
from harness_support import transformers_language_model
from hf_tokenizer_support import pair_of
from run_support import make_corpora
from tokenizer_json_kinds import gemma3, llama3, qwen3

from megaphase.harness.language_model import ServedModel

KINDS: dict[str, Callable[[Path], Path]] = {
    "own": lambda folder: make_corpora(folder) / "tok",
    "llama": llama_directory,
    "llama3": llama3,
    "qwen3": qwen3,
    "gemma3": gemma3,
}
TEXTS = ("a cat sat", " the sea", "ends ", "", "two\nlines", "das Meer, über")


@pytest.mark.parametrize("kind", list(KINDS))
def test_requests_have_the_tokens_of_the_exported_model(kind: str, tmp_path: Path) -> None:
    pair = pair_of(KINDS[kind](tmp_path / "made"), tmp_path / "exported")
    model_of_lm_eval: Any = transformers_language_model()
    theirs = object.__new__(model_of_lm_eval)
    theirs.tokenizer, theirs.add_bos_token = pair.reference, None
    theirs.custom_prefix_token_id, theirs.backend = None, "causal"
    service: Any = SimpleNamespace(tokenizer=pair.native)
    ours = ServedModel(service)
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text in TEXTS:
        if kind == "llama" and text.startswith(" "):
            continue  # transformers drops a space before the first word, sentencepiece does not
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        bare = theirs.tok_encode(text, add_special_tokens=False)
        assert ours.tok_encode(text, add_special_tokens=False) == bare
        if text:
            assert ours._encode_pair(text, " more") == theirs._encode_pair(text, " more")
