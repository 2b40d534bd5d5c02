"""Keys of published config.json files that transformers ignores: the value that is true of the
model is accepted, and every other value is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from existing_tokenizers import write_json
from hf_families import FAMILY_CONFIGS

from megaphase.convert.hugging_face.config import read_config
from megaphase.utils.errors import InputError

UNSLOTH: dict[str, Any] = {"unsloth_fixed": True, "unsloth_version": "2025.2.15"}
GPT2_OLD: dict[str, Any] = {
    "n_ctx": 48, "n_special": 0, "predict_special_tokens": True, "output_past": True,
    "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
}  # fmt: skip
# As they are in the files of Apertus 8B, Qwen 2.5 7B, SmolLM2 1.7B, GPT-2 medium, DistilGPT-2,
# GPT-NeoX 20B, Gemma 2 27B, Vicuna 7B and uploads by others.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Apertus": (
        "Apertus",
        {"hidden_dropout": 0.0, "mlp_bias": False, "post_norm": False, "qk_norm": True},
    ),
    "Qwen 2.5": ("Qwen 2", {"use_mrope": False, "max_window_layers": 28}),
    "Qwen 3": ("Qwen 3", {"use_mrope": False}),
    "SmolLM2": (
        "Llama 2",
        {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
         "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "Vicuna": ("Llama 2", {"max_sequence_length": 2048}),
    "Llama of unsloth": ("Llama 3.1", UNSLOTH),
    "Gemma 2": ("Gemma 2", {"sliding_window_size": 4096, "hidden_act": "gelu_pytorch_tanh"}),
    "Mistral, fine-tuned": ("Mistral", {"_flash_attn_2_enabled": True}),
    "GPT-2 medium": ("GPT-2", GPT2_OLD),
    "DistilGPT-2": ("GPT-2", {"_num_labels": 1}),
    "GPT-NeoX 20B": (
        "GPT-NeoX", {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}
    ),
    "Dolly": ("GPT-NeoX", {"custom_pipelines": {"text-generation": {"impl": "a.B"}}}),
}  # fmt: skip


def config_of(family: str, folder: Path, **more: Any) -> Path:
    """Write a config.json as transformers does, with more keys; return its folder."""
    config = FAMILY_CONFIGS[family]().to_dict() | more
    folder.mkdir()
    write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_that_transformers_does_not_read(name: str, tmp_path: Path) -> None:
    family, more = PUBLISHED[name]
    _, plain = read_config(config_of(family, tmp_path / "plain"))
    found, shape = read_config(config_of(family, tmp_path / "published", **more))
    assert shape == plain
    written = found.config(shape)
    assert not (more.keys() - {"pretraining_tp"}) & written.keys()


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("Apertus", "mlp_bias", True),
        ("Apertus", "post_norm", True),
        ("Apertus", "qk_norm", False),
        ("Qwen 2", "use_mrope", True),
        ("Llama 2", "rope_interleaved", True),
        ("OLMo 2", "clip_qkv", 8.0),
    ],
)
def test_other_values_are_refused(family: str, key: str, value: object, tmp_path: Path) -> None:
    folder = config_of(family, tmp_path / "published", **{key: value})
    with pytest.raises(InputError, match=rf"config\.json: {key}: is (true|false|8\.0); "):
        read_config(folder)


def test_all_unknown_keys_are_named_at_once(tmp_path: Path) -> None:
    folder = config_of("Llama 2", tmp_path / "published", some_multiplier=2.0, other_scale=1.0)
    message = (
        "config.json: some_multiplier, other_scale: are not keys that megaphase knows in such "
        "models; remove them if the logits do not depend on them, or use another model"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        read_config(folder)
