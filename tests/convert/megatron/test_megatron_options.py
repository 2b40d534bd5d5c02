"""Every option of the GPT comes back from Megatron-LM's arguments, or is refused by name."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from convert_support import write_random_checkpoint
from megatron_support import SHAPES

from megaphase.convert.megatron.arguments import expressed, load_options, megatron_args
from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.convert.megatron.given_arguments import shape_of
from megaphase.convert.megatron.names import Implementation
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.convert.source import open_source
from megaphase.model.config import RotaryConfig, RotaryScalingConfig
from megaphase.model.shape import NOT_ARCHITECTURE, GPTShape
from megaphase.utils.errors import InputError

BASE = GPTShape(vocab=101, seq_len=16, layers=4, hidden=32, heads=4, kv_heads=2, ffn=48)
WHERE = Path("checkpoint")
PATTERN: dict[str, Any] = {"sliding_window": 5, "attention_pattern": ("sliding", "full")}
# Values of the options that are neither switches nor words. Those of several options together
# belong to the last one.
VALUES: dict[str, list[Any]] = {
    "vocab": [77],
    "seq_len": [24],
    "layers": [3],
    "hidden": [64],
    "heads": [8],
    "kv_heads": [4],
    "ffn": [40],
    "rotary_base": [5000.0, 1234.5],
    "norm_eps": [1e-6],
    "head_dim": [12],
    "rotary_scaling": [
        RotaryScalingConfig(type="linear", factor=4.0),
        RotaryScalingConfig(type="linear", factor=2.5),
        RotaryScalingConfig(type="llama3", factor=8.0, original_seq_len=8192),
        RotaryScalingConfig(type="llama3", factor=8.0, original_seq_len=4096),
        RotaryScalingConfig(type="yarn", factor=4.0, original_seq_len=16),
    ],
    "no_rotary_interval": [2, 3],
    "embedding_multiplier": [4.0],
    "logit_softcap": [30.0],
    "sliding_window": [5],
    "attention_pattern": [
        PATTERN,
        PATTERN | {"attention_pattern": ("full", "sliding")},
        PATTERN | {"attention_pattern": ("sliding", "sliding", "sliding", "full")},
    ],
    "sliding_rotary": [PATTERN | {"sliding_rotary": RotaryConfig(base=123.0)}],
    "attention_scale": [0.2],
    "attention_softcap": [50.0],
    "rotary_dim": [4],
}
# All learned positions are written, so that `seq_len` comes back as their number; see
# test_positions_beyond_the_phase_are_written.
NOT_COMING_BACK = (*NOT_ARCHITECTURE, "learned_positions")
OPTIONS = [field for field in fields(GPTShape) if field.name not in NOT_COMING_BACK]


def values_of(field: Field[Any]) -> list[Any]:
    """All words of an option that is one, True for a switch; else those of VALUES."""
    kind = get_type_hints(GPTShape)[field.name]
    kinds = [each for each in (get_args(kind) or (kind,)) if each is not NoneType]
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return list(get_args(kinds[0]))
    return [True] if kinds == [bool] else VALUES[field.name]


def changed(field: Field[Any]) -> list[GPTShape]:
    return [
        replace(BASE, **(value if isinstance(value, dict) else {field.name: value}))
        for value in values_of(field)
    ]


def carried(shape: GPTShape) -> bool:
    """Whether Megatron-LM has this model."""
    try:
        expressed(shape, WHERE)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("field", OPTIONS, ids=lambda field: field.name)
def test_an_option_comes_back_or_is_refused_by_name(field: Field[Any], tmp_path: Path) -> None:
    for number, shape in enumerate(changed(field)):
        native = write_random_checkpoint(tmp_path / f"{number}", shape)
        there, back = tmp_path / f"{number}-there", tmp_path / f"{number}-back"
        if carried(shape):
            to_megatron(str(native), there, Target(1, "fp32"))
            from_megatron(there, back)
            found = open_source(str(back)).shape
            biases = shape.activation == "gelu"  # see test_gelu_without_bias
            assert found == (replace(shape, bias=True) if biases else shape)
        else:
            with pytest.raises(InputError, match=rf"model\.{field.name}[:.]"):
                to_megatron(str(native), there, Target(1, "fp32"))
            assert not there.exists()


def test_positions_beyond_the_phase_are_written(tmp_path: Path) -> None:
    shape = replace(BASE, position="learned", learned_positions=24)
    native = write_random_checkpoint(tmp_path / "native", shape)
    to_megatron(str(native), tmp_path / "there", Target(1, "fp32"))
    from_megatron(tmp_path / "there", tmp_path / "back")
    found = open_source(str(tmp_path / "back")).shape
    assert found == replace(shape, seq_len=24, learned_positions=None)


@pytest.mark.parametrize("field", OPTIONS, ids=lambda field: field.name)
def test_an_option_that_comes_back_is_compared_with_megatron_core(field: Field[Any]) -> None:
    """By the shapes of test_megatron.py."""
    sizes = field.default is MISSING
    if not sizes and any(map(carried, changed(field))):
        assert any(getattr(shape, field.name) != field.default for shape in SHAPES.values())


def arguments(**options: Any) -> Namespace:
    args = megatron_args(
        BASE,
        tensor=1,
        vocab_multiple=1,
        dtype=torch.float32,
        implementation=Implementation.LOCAL,
    )
    return Namespace(**vars(args) | options)


@pytest.mark.parametrize(
    ("skipped", "pattern"),
    [
        (None, None),
        (1, ("full",)),
        (2, ("sliding", "full")),
        (5, None),
        ([1, 1, 0, 1], ("sliding", "sliding", "full", "sliding")),
        ([1, 1, 1, 1], None),
        ([0, 0, 0, 0], ("full",)),
    ],
)
def test_layers_with_a_window(skipped: Any, pattern: Any) -> None:
    args = arguments(window_size=(4, 0), window_attn_skip_freq=skipped)
    expected = replace(BASE, sliding_window=5, attention_pattern=pattern)
    assert shape_of(args, BASE.vocab, WHERE) == expected


@pytest.mark.parametrize(
    ("bare", "interval"),
    [(None, None), (2, 2), ([0, 0, 1, 0], 3), ([0, 0, 0, 0], None), ([1, 1, 1, 1], 1)],
)
def test_layers_without_rotary_positions(bare: Any, interval: int | None) -> None:
    args = arguments(no_rope_freq=bare)
    assert shape_of(args, BASE.vocab, WHERE) == replace(BASE, no_rotary_interval=interval)


def test_options_that_are_printed() -> None:
    """Those that Megatron-LM does not read from a checkpoint."""
    options = load_options(
        arguments(window_size=(4, 0), window_attn_skip_freq=[1, 0, 1, 1], no_rope_freq=2)
    )
    assert '--window-size 4,0 --window-attn-skip-freq "[1,0,1,1]" --no-rope-freq 2' in options


@pytest.mark.parametrize("head_dim", [6, 10, 44, 48, 80, 92, 96, 128])
def test_any_part_of_a_head_is_rotated(head_dim: int) -> None:
    for rotary_dim in range(2, head_dim + 1, 2):
        assert carried(replace(BASE, head_dim=head_dim, rotary_dim=rotary_dim))


def test_exact_gelu() -> None:
    shape = replace(BASE, activation="gelu_erf", bias=True)
    args = arguments(swiglu=False, bias_gelu_fusion=False, add_bias_linear=True)
    assert shape_of(args, BASE.vocab, WHERE) == shape
    assert "--no-bias-gelu-fusion" in load_options(args)
    args.use_te_activation_func = True
    with pytest.raises(InputError, match="use_te_activation_func=True"):
        shape_of(args, BASE.vocab, WHERE)
