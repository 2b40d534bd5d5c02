"""Named shapes, and the way from the run file's `model` section to a checked shape."""

from __future__ import annotations

import difflib
from typing import Any

from megaphase.config.run import RunConfig
from megaphase.model.config import ModelConfig
from megaphase.model.shape import GATED, GPTShape
from megaphase.utils.errors import InputError


def _sizes(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, int]:
    return {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}


# Names give the parameters, roughly: up to 30m without embeddings, from 125m on as GPT-3 counts
# them (Brown et al. 2020, table 2.1), with one embedding of 50,000 tokens. From there on layers,
# hidden size and heads follow GPT-3, too, but 13b, whose heads are 128 wide as in Llama; ffn is
# 8/3 of the hidden size for SwiGLU (Shazeer 2020), rounded up to a multiple of 128.
PRESETS: dict[str, dict[str, int]] = {
    "gpt-1m": _sizes(4, 128, 4, 384),
    "gpt-3m": _sizes(4, 256, 4, 704),
    "gpt-6m": _sizes(6, 288, 6, 768),
    "gpt-14m": _sizes(8, 384, 6, 1024),
    "gpt-30m": _sizes(10, 512, 8, 1408),
    "gpt-125m": _sizes(12, 768, 12, 2048),
    "gpt-350m": _sizes(24, 1024, 16, 2816),
    "gpt-760m": _sizes(24, 1536, 16, 4096),
    "gpt-1.3b": _sizes(24, 2048, 16, 5504),
    "gpt-2.7b": _sizes(32, 2560, 32, 6912),
    "gpt-6.7b": _sizes(32, 4096, 32, 11008),
    "gpt-13b": _sizes(40, 5120, 40, 13696),
}
REQUIRED = ("layers", "hidden", "heads")


def default_ffn(hidden: int, activation: str) -> int:
    """4 times the hidden size, or 8/3 rounded up to a multiple of 128 where a gate is added."""
    return -(-hidden * 8 // 3 // 128) * 128 if activation in GATED else 4 * hidden


def _refuse(config: RunConfig, key: str, problem: str, remedy: str) -> InputError:
    return InputError(config.where(f"model.{key}"), problem, remedy)


def build_shape(config: RunConfig, tokenizer_vocab: int) -> GPTShape:
    """The shape that the run file asks for, checked against itself and the tensor-parallel size.

    Raises:
        InputError: an unknown preset, a missing size, or sizes that do not divide.
    """
    shape = _shape(config, config.model, tokenizer_vocab)
    _check_divisions(config, shape)
    _check_sequence(config, shape, "model.seq_len")
    return shape


def phase_shapes(config: RunConfig, tokenizer_vocab: int) -> list[GPTShape]:
    """The shape of every phase: all have the same parameters, and a sequence length and rotary
    positions of their own.

    Raises as `build_shape` does.
    """
    whole = build_shape(config, tokenizer_vocab)
    return [_of_phase(config, number, whole) for number in range(len(config.phases))]


def _of_phase(config: RunConfig, number: int, whole: GPTShape) -> GPTShape:
    if config.phases[number].model is None:
        return whole
    asked = config.phase_model(number)
    shape = _shape(config, asked, whole.vocab, learned_positions=whole.position_rows)
    _check_sequence(config, shape, f"phases[{number}].model.seq_len")
    return shape


def _shape(config: RunConfig, asked: ModelConfig, tokenizer_vocab: int, **more: Any) -> GPTShape:
    sizes: dict[str, Any] = {}
    if asked.preset is not None:
        if asked.preset not in PRESETS:
            near = difflib.get_close_matches(asked.preset, PRESETS, n=1, cutoff=0.3)
            names = ", ".join(PRESETS)
            hint = f"did you mean {near[0]}? " if near else ""
            raise _refuse(
                config, "preset", f"no preset {asked.preset!r}", f"{hint}the presets are {names}"
            )
        sizes |= PRESETS[asked.preset]
    sizes |= {k: v for k, v in asked if v is not None and k not in ("preset", "vocab")}
    for key in REQUIRED:
        if key not in sizes:
            raise _refuse(config, key, "this size is missing", "give it, or name a preset")
    sizes.setdefault("kv_heads", sizes["heads"])
    sizes.setdefault("ffn", default_ffn(sizes["hidden"], sizes.get("activation", "swiglu")))
    vocab = asked.vocab or tokenizer_vocab
    if vocab < tokenizer_vocab:
        raise _refuse(
            config,
            "vocab",
            f"{vocab:,} is smaller than the tokenizer's {tokenizer_vocab:,}",
            "leave it out or raise it; with a published model, give the tokenizer that `convert "
            "from-hf` wrote",
        )
    return GPTShape(vocab=vocab, **sizes | more)


def _check_divisions(config: RunConfig, shape: GPTShape) -> None:
    tensor = config.parallel.tensor
    if shape.head_dim is None and shape.hidden % shape.heads:
        raise _refuse(
            config,
            "heads",
            f"{shape.heads} heads do not divide hidden {shape.hidden}",
            "change one, or give head_dim",
        )
    if shape.position == "rotary" and shape.rotary_dim is None and shape.head_size % 2:
        given = shape.head_dim is not None
        raise _refuse(
            config,
            "head_dim" if given else "heads",
            f"rotary positions need an even head size, not {shape.head_size}",
            "change it" if given else "change hidden or heads",
        )
    for key in ("rotary_scaling", "no_rotary_interval", "sliding_rotary", "rotary_dim"):
        if getattr(shape, key) is not None and shape.position != "rotary":
            raise _refuse(config, key, f"positions are {shape.position}", "leave it out")
    if shape.rotary_dim is not None and (
        shape.rotary_dim % 2 or shape.rotary_dim > shape.head_size
    ):
        problem = f"{shape.rotary_dim} is odd, or larger than a head of {shape.head_size}"
        raise _refuse(config, "rotary_dim", problem, "change it")
    if shape.zero_centered_norms and shape.norm != "rmsnorm":
        problem = f"norms are {shape.norm}"
        raise _refuse(config, "zero_centered_norms", problem, "leave it out, or use rmsnorm")
    if shape.heads % shape.kv_heads:
        raise _refuse(
            config,
            "kv_heads",
            f"{shape.kv_heads} does not divide the {shape.heads} heads",
            "change one",
        )
    for key, size in (("heads", shape.heads), ("kv_heads", shape.kv_heads), ("ffn", shape.ffn)):
        if size % tensor:
            raise _refuse(
                config, key, f"parallel.tensor {tensor} does not divide {key} {size}", "change one"
            )


def _check_sequence(config: RunConfig, shape: GPTShape, key: str) -> None:
    tensor = config.parallel.tensor
    if config.parallel.sequence and shape.seq_len % tensor:
        raise InputError(
            config.where(key),
            f"with parallel.sequence, parallel.tensor {tensor} must divide seq_len {shape.seq_len}",
            "change one",
        )
