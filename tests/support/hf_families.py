"""Small configs of Hugging Face families with all of their options on, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_support import gpt2

VOCAB, SEQ_LEN = 301, 64  # an odd vocabulary, which tensor parallelism pads
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ_LEN,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,  # transformers gives its embedding no gradient
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
}
# Reached by the small models' scores and logits.
GEMMA_CAPS: dict[str, Any] = {
    "sliding_window": 9,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 3.0,
}


def _of_kinds(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"full_attention": full, "sliding_attention": sliding}


def _of(name: str, **changes: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        return getattr(transformers, f"{name}Config")(**SIZES | changes)

    return config


def _of_gpt_neox(**changes: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        return transformers.GPTNeoXConfig(**sizes | changes)

    return config


FAMILY_CONFIGS: dict[str, Callable[[], Any]] = {
    "Llama 2": _of("Llama", num_key_value_heads=4),
    "Llama 3": _of("Llama", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    "Llama 3.1": _of("Llama", rope_parameters=LLAMA3_ROPE),
    "Llama 3.2": _of("Llama", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=16),
    "Llama, linear, biases": _of(
        "Llama", rope_parameters=LINEAR_ROPE, attention_bias=True, mlp_bias=True
    ),
    "Llama, YaRN": _of("Llama", rope_parameters=YARN_ROPE),
    "Llama, YaRN of DeepSeek": _of(
        "Llama",
        rope_parameters=YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    ),
    "Llama, biases of attention": _of("Llama", attention_bias=True),
    "Llama, biases of feed-forward layers": _of("Llama", mlp_bias=True),
    "Mistral": _of("Mistral", sliding_window=None, num_key_value_heads=4, head_dim=12),
    "Mistral 0.1": _of("Mistral", sliding_window=9),
    "Qwen 2": _of("Qwen2", num_key_value_heads=4, tie_word_embeddings=True),
    "Qwen 2.5, YaRN": _of("Qwen2", rope_parameters=YARN_ROPE),
    "Qwen 2, windows in upper layers": _of(
        "Qwen2", use_sliding_window=True, sliding_window=10, max_window_layers=1
    ),
    "Qwen 3": _of("Qwen3", num_key_value_heads=4, head_dim=16),
    "Qwen 3, YaRN": _of("Qwen3", rope_parameters=YARN_ROPE, head_dim=8, tie_word_embeddings=True),
    "OLMo 2": _of("Olmo2"),
    "OLMo 2, all heads": _of("Olmo2", num_key_value_heads=4, rope_parameters=LLAMA3_ROPE),
    "OLMo 2, tied": _of("Olmo2", tie_word_embeddings=True),
    "OLMo 3": _of(
        "Olmo3",
        num_key_value_heads=4,
        num_hidden_layers=5,
        sliding_window=9,
        rope_parameters=_of_kinds(YARN_ROPE, {"rope_type": "default", "rope_theta": 1_000.0}),
    ),
    "OLMo 3, windows in all layers": _of(
        "Olmo3",
        layer_types=["sliding_attention"] * 2,
        sliding_window=5,
        rope_parameters=_of_kinds(LINEAR_ROPE, LLAMA3_ROPE),
    ),
    "Gemma 2": _of("Gemma2", num_hidden_layers=3, num_key_value_heads=4, head_dim=12, **GEMMA_CAPS),
    "Gemma 2, untied, no caps": _of(
        "Gemma2",
        layer_types=["full_attention", "sliding_attention"],
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
    "Gemma 3": _of(
        "Gemma3Text",
        num_hidden_layers=4,
        num_key_value_heads=4,
        sliding_window_pattern=3,
        head_dim=16,
        sliding_window=9,
        query_pre_attn_scalar=24,
        rope_parameters=_of_kinds(
            LINEAR_ROPE | {"rope_theta": 1_000_000.0},
            {"rope_type": "default", "rope_theta": 10_000.0},
        ),
        final_logit_softcapping=2.0,
    ),
    "Gemma 3, by default": _of("Gemma3Text", num_hidden_layers=6, head_dim=8, sliding_window=9),
    "SmolLM 3": _of(
        "SmolLM3", num_hidden_layers=3, num_key_value_heads=4, no_rope_layer_interval=2
    ),
    "SmolLM 3, windows": _of(
        "SmolLM3",
        num_hidden_layers=3,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=7,
    ),
    "SmolLM 3, untied, biases": _of(
        "SmolLM3",
        num_hidden_layers=3,
        no_rope_layers=[0, 0, 0],
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        head_dim=12,
    ),
    "Apertus": _of("Apertus", rope_parameters=LLAMA3_ROPE | {"rope_theta": 12_000_000.0}),
    "Apertus, tied, biases": _of(
        "Apertus", num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True
    ),
    "GPT-NeoX": _of_gpt_neox(),
    "GPT-NeoX, one after the other": _of_gpt_neox(
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters=LINEAR_ROPE | {"partial_rotary_factor": 0.5},
    ),
    "GPT-2": lambda: gpt2(vocab_size=VOCAB, n_positions=SEQ_LEN),
}
# Variants that `make test-slow` computes in several processes, and `make test` in one.
SLOW = {
    "Llama, linear, biases",
    "Llama, YaRN",
    "Mistral",
    "Llama 3",
    "Llama 3.1",
    "Llama, biases of feed-forward layers",
    "Qwen 2.5, YaRN",
    "OLMo 2, all heads",
    "GPT-NeoX, one after the other",
    "Llama, biases of attention",
    "Apertus, tied, biases",
    "Llama, YaRN of DeepSeek",
    "Qwen 2, windows in upper layers",
    "Qwen 3, YaRN",
    "OLMo 2, tied",
    "OLMo 3, windows in all layers",
    "Gemma 2, untied, no caps",
    "Gemma 3, by default",
    "SmolLM 3, windows",
    "SmolLM 3, untied, biases",
    "Llama 2",
    "Llama 3.2",
    "OLMo 2",
    "Mistral 0.1",
    "Qwen 2",
    "Gemma 2",
    "OLMo 3",
    "Apertus",
    "SmolLM 3",
    "GPT-2",
}
