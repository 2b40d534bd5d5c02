"""Every key of a family's config class, changed one by one, is refused or means the same to us.

The model that transformers builds from the changed config is imported. Either the import is refused
by the key's name, or both compute the same logits: the key changes them in both, or in neither.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import FAMILY_CONFIGS, SEQ_LEN, VOCAB
from hf_support import make_transformers_model, megaphase_logits, random_tokens, take
from rounding import FP32, deviation
from slow_cases import marked

from megaphase.utils.errors import InputError

CONFIGS = {
    "llama": FAMILY_CONFIGS["Llama, YaRN"],
    "mistral": FAMILY_CONFIGS["Mistral"],
    "mistral with windows": FAMILY_CONFIGS["Mistral 0.1"],
    "qwen2": FAMILY_CONFIGS["Qwen 2, windows in upper layers"],
    "qwen3": FAMILY_CONFIGS["Qwen 3"],
    "olmo2": FAMILY_CONFIGS["OLMo 2"],
    "olmo3": FAMILY_CONFIGS["OLMo 3"],
    "gemma2": FAMILY_CONFIGS["Gemma 2"],
    "gemma3": FAMILY_CONFIGS["Gemma 3"],
    "smollm3": FAMILY_CONFIGS["SmolLM 3"],
    "apertus": FAMILY_CONFIGS["Apertus"],
    "gpt_neox": FAMILY_CONFIGS["GPT-NeoX"],
    "gpt2": FAMILY_CONFIGS["GPT-2"],
}
SLOW = ("mistral with windows", "qwen2", "qwen3", "olmo2", "gemma2", "smollm3")
# Of PreTrainedConfig, and no part of a model: names, and what is returned beside the logits.
NOT_CHANGED = {
    "model_type": "makes it another family",
    "architectures": "names the class that is built here",
    "dtype": "of the weights; fp32 in this test",
    "quantization_config": "needs other weights",
    "is_encoder_decoder": "transformers builds no such model of this class",
    "return_dict": "transformers returns a tuple",
    "transformers_version": "transformers writes its own",
    "_name_or_path": "transformers writes its own",
}
OTHERS: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "swish"],
    "hidden_activation": ["gelu", "silu"],
    "activation_function": ["relu", "gelu_pytorch_tanh"],
    "sliding_window": [8, 80],
    "layer_types": [
        ["sliding_attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["full_attention"] * 2,
        ["sliding_attention"] * 3,
        ["chunked_attention"] * 2,
    ],
    "hidden_size": [48],
    "n_embd": [48],
    "vocab_size": [320],
    "num_key_value_heads": [1, 2, 4],
    "num_attention_heads": [2, 8],
    "n_head": [2, 8],
    "head_dim": [6],
    "no_rope_layers": [[1, 0, 1], [0, 0, 1], [1, 1, 1]],
    "no_rope_layer_interval": [3],
    "n_inner": [72],
    "pruned_heads": [{}],
    "bos_token_id": [3],
    "eos_token_id": [3],
    "pad_token_id": [3],
    "sep_token_id": [3],
    "num_labels": [3],
    "id2label": [{0: "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "beta_slow": 2.0},
    ],
}


def changed(key: str, value: Any) -> Iterator[Any]:
    """Other values of a key."""
    if key in OTHERS:
        yield from (each for each in OTHERS[key] if each != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 2
    elif isinstance(value, float):
        yield value * 2 + 1e-3
    elif isinstance(value, str):
        yield "other"


def changed_rope(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same with one number changed, in one of its dictionaries."""
    for key, value in rope.items():
        if isinstance(value, dict):
            yield from (rope | {key: new} for new in changed_rope(value))
        elif rope.get("rope_type") != "default" or key == "rope_theta":
            yield from (rope | {key: new} for new in changed(key, value))


def all_changes(family: str) -> Iterator[tuple[str, Any]]:
    config = CONFIGS[family]()
    for key, value in {"sliding_window": None, **config.to_dict()}.items():
        if key not in NOT_CHANGED and (hasattr(config, key)):
            yield from ((key, other) for other in changed(key, value))
            if key == "rope_parameters":
                yield from ((key, new) for new in changed_rope(value))


@pytest.mark.parametrize("family", marked(CONFIGS, SLOW))
def test_every_key(
    family: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    caplog.set_level(logging.ERROR)
    counts = {"refused": 0, "the same logits": 0, "transformers refuses": 0}
    tokens = random_tokens(VOCAB, seq=SEQ_LEN)
    for number, (key, value) in enumerate(all_changes(family)):
        config = CONFIGS[family]()
        try:
            config = type(config)(**copy.deepcopy(config.to_dict()) | {key: value})
            model = make_transformers_model(config).eval()
            with torch.no_grad():
                expected = model(tokens).logits
            model.save_pretrained(tmp_path / str(number))
        except Exception:  # of any kind: it has no such model
            counts["transformers refuses"] += 1
            continue
        refusal = None
        ours = tmp_path / f"{number}-ours"
        try:
            take(tmp_path / str(number), ours)
        except InputError as refused:
            refusal = str(refused)
        if refusal is not None:
            assert key in refusal, value
            counts["refused"] += 1
            continue
        found = megaphase_logits(ours, tokens)
        assert deviation(found, expected) < FP32, (key, value)
        counts["the same logits"] += 1
    for outcome, count in counts.items():
        record_property(outcome, count)  # for benchmarks/families.py
    assert counts["the same logits"] > 12
    assert counts["transformers refuses"] < 12
