"""The GPT's shape, presets, counts and attention, in this process."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from rounding import FP32_ROUNDOFF, assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaphase.config.run import RunConfig
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.model.attention import Attention
from megaphase.model.config import RotaryConfig
from megaphase.model.forward_context import ForwardContext
from megaphase.model.gpt import GPT, Block
from megaphase.model.parameters import parameter_count, train_flops_per_token
from megaphase.model.presets import PRESETS, build_shape
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups
INITIALIZER = Initializer(1, torch.float32)

LLAMA: dict[str, Any] = {
    "vocab": 101,
    "seq_len": 16,
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 4,
    "ffn": 48,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "grouped": LLAMA | {"kv_heads": 1},
    "wide heads": LLAMA | {"head_dim": 12, "kv_heads": 2, "qkv_bias": True},
    "normed heads": LLAMA | {"qk_norm": "head", "kv_heads": 2},
    "normed queries": LLAMA | {"qk_norm": "projection", "kv_heads": 2},
    "norms after": LLAMA | {"norm_position": "after"},
    "norms before and after": LLAMA | {"norm_position": "both"},
    "zero-centered norms": LLAMA | {"zero_centered_norms": True, "qk_norm": "head"},
    "geglu": LLAMA | {"activation": "geglu"},
    "xielu": LLAMA | {"activation": "xielu"},
    "parallel": LLAMA
    | {"parallel_residual": True, "rotary_dim": 2, "activation": "gelu_erf", "ffn_bias": True},
    "scaled embedding, capped logits": LLAMA
    | {"embedding_multiplier": 32**0.5, "logit_softcap": 30.0},
    "windows": LLAMA
    | {"sliding_window": 5, "attention_pattern": ["sliding", "full"], "kv_heads": 2},
    "capped": LLAMA | {"attention_softcap": 0.5, "attention_scale": 0.1},
    "windows with other positions": LLAMA
    | {
        "sliding_window": 5,
        "attention_pattern": ("sliding", "full"),
        "sliding_rotary": RotaryConfig(base=100.0),
    },
    "tied": LLAMA | {"tied_embeddings": True},
    "gpt2": LLAMA
    | {
        "tied_embeddings": True,
        "bias": True,
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu",
        "ffn": 128,
    },
    "swiglu with biases": LLAMA | {"bias": True, "kv_heads": 2, "norm": "layernorm"},
}
# Without embeddings up to 30m, where they are most of a model; larger ones as in the GPT-3 paper.
NAMED_PARAMETERS = {
    "gpt-1m": 1e6,
    "gpt-3m": 3e6,
    "gpt-6m": 6e6,
    "gpt-14m": 14e6,
    "gpt-30m": 30e6,
    "gpt-125m": 125e6,
    "gpt-350m": 350e6,
    "gpt-760m": 760e6,
    "gpt-1.3b": 1.3e9,
    "gpt-2.7b": 2.7e9,
    "gpt-6.7b": 6.7e9,
    "gpt-13b": 13e9,
}


def build(shape: GPTShape) -> GPT:
    return GPT(shape, INITIALIZER, ALONE)


def run_config(model: dict[str, Any], **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": "run",
            "tokenizer": "tok",
            "tasks": {"en": {"corpus": "en"}},
            "model": {"seq_len": 16} | model,
            "parallel": parallel,
            "batch": {"samples": 8},
            "phases": [
                {
                    "name": "only",
                    "steps": 1,
                    "mixture": {"rates": {"en": 1.0}},
                    "learning_rate": {"peak": 1e-3},
                }
            ],
        }
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_as_many_as_the_shape_says(name: str) -> None:
    shape = GPTShape(**SHAPES[name])
    assert sum(each.numel() for each in build(shape).parameters()) == parameter_count(shape)


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_of_the_matrix_products(name: str) -> None:
    """torch counts two operations for each multiplication in a matrix product."""
    shape = GPTShape(**SHAPES[name])
    model, tokens = build(shape), torch.zeros((3, shape.seq_len), dtype=torch.int64)
    # This backend also computes the scores that are masked, as the formula does but for those
    # before a window.
    windows = (shape.of_block(block).window for block in range(shape.layers))
    before = sum(shape.seq_len - window for window in windows if window is not None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens)[0].backward()
    expected = train_flops_per_token(shape) + 3 * 4 * shape.attention_width * before
    if shape.attention_softcap is not None:  # scores are computed again
        expected += 2 * shape.attention_width * shape.seq_len * shape.layers
    assert counter.get_total_flops() == expected * tokens.numel()


def test_every_preset_is_named() -> None:
    assert PRESETS.keys() == NAMED_PARAMETERS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_and_has_the_size_of_its_name(name: str) -> None:
    shape = build_shape(run_config({"preset": name, "seq_len": 2048}), 50_000)
    with FakeTensorMode():
        model = build(shape)
    parameters = sum(each.numel() for each in model.parameters())
    assert parameters == parameter_count(shape)
    embedding = shape.vocab * shape.hidden
    counted = parameters - (2 if NAMED_PARAMETERS[name] < 1e8 else 1) * embedding
    assert counted == pytest.approx(NAMED_PARAMETERS[name], rel=0.15)


def test_preset_sizes_can_be_changed() -> None:
    shape = build_shape(
        run_config({"preset": "gpt-1m", "kv_heads": 2, "norm": "layernorm", "vocab": 128}), 100
    )
    assert (shape.layers, shape.hidden, shape.heads) == (4, 128, 4)
    assert (shape.kv_heads, shape.norm, shape.vocab, shape.seq_len) == (2, "layernorm", 128, 16)


@pytest.mark.parametrize(
    ("activation", "ffn"), [("swiglu", 384), ("geglu", 384), ("gelu", 512), ("xielu", 512)]
)
def test_feed_forward_size_has_a_default(activation: str, ffn: int) -> None:
    sizes = {"layers": 1, "hidden": 128, "heads": 4, "activation": activation}
    assert build_shape(run_config(sizes), 100).ffn == ffn


SIZES = {"layers": 1, "hidden": 32, "heads": 4}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "unknown preset": ({"preset": "gpt-125"}, {}, ["model.preset", "gpt-125m"]),
    "no such preset at all": ({"preset": "zzz"}, {}, ["model.preset", "gpt-13b"]),
    "missing size": ({"layers": 1, "hidden": 32}, {}, ["model.heads", "missing", "preset"]),
    "vocabulary below the tokenizer's": (SIZES | {"vocab": 99}, {}, ["model.vocab", "99", "100"]),
    "heads do not divide hidden": (SIZES | {"heads": 5}, {}, ["model.heads", "5", "32"]),
    "odd head size": (SIZES | {"hidden": 36}, {}, ["model.heads", "even", "9"]),
    "odd head_dim": (SIZES | {"head_dim": 9}, {}, ["model.head_dim", "even", "9"]),
    "scaled learned positions": (
        SIZES | {"position": "learned", "rotary_scaling": {"type": "linear", "factor": 2.0}},
        {},
        ["model.rotary_scaling", "learned"],
    ),
    "odd rotary_dim": (SIZES | {"rotary_dim": 3}, {}, ["model.rotary_dim", "3", "8"]),
    "wide rotary_dim": (SIZES | {"rotary_dim": 10}, {}, ["model.rotary_dim", "10", "8"]),
    "rotated learned positions": (
        SIZES | {"position": "learned", "rotary_dim": 4},
        {},
        ["model.rotary_dim", "learned"],
    ),
    "zero-centered layer norms": (
        SIZES | {"norm": "layernorm", "zero_centered_norms": True},
        {},
        ["model.zero_centered_norms", "layernorm"],
    ),
    "learned positions of windows": (
        SIZES | {"position": "learned", "sliding_window": 4, "sliding_rotary": {"base": 100.0}},
        {},
        ["model.sliding_rotary", "learned"],
    ),
    "kv_heads do not divide heads": (SIZES | {"kv_heads": 3}, {}, ["model.kv_heads", "3", "4"]),
    "tensor does not divide heads": (
        SIZES | {"hidden": 36, "heads": 3, "ffn": 64},
        {"tensor": 2},
        ["model.heads", "parallel.tensor 2", "3"],
    ),
    "tensor does not divide kv_heads": (
        SIZES | {"kv_heads": 1},
        {"tensor": 2},
        ["model.kv_heads", "parallel.tensor 2", "1"],
    ),
    "tensor does not divide ffn": (
        SIZES | {"ffn": 49},
        {"tensor": 2},
        ["model.ffn", "parallel.tensor 2", "49"],
    ),
    "tensor does not divide the sequence": (
        SIZES | {"seq_len": 17},
        {"tensor": 2, "sequence": True},
        ["model.seq_len", "parallel.tensor 2", "17"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_fit_are_refused(case: str) -> None:
    model, parallel, words = REFUSED[case]
    with pytest.raises(InputError) as refusal:
        build_shape(run_config(model, **parallel), 100)
    message = str(refusal.value)
    assert message.startswith("run.yaml: model.")
    assert "\n" not in message
    assert refusal.value.remedy
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "ntk", "factor": 2.0}, "type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.5}, "factor"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3.0}, "linear has no beta_fast"),
        ({"type": "llama3", "factor": 2.0}, "llama3 needs original_seq_len"),
        (
            {"type": "llama3", "factor": 2.0, "original_seq_len": 64, "low_freq_factor": 4.0},
            "high_freq_factor is not above low_freq_factor",
        ),
        ({"type": "yarn", "factor": 2.0}, "yarn needs original_seq_len"),
        (
            {"type": "yarn", "factor": 2.0, "original_seq_len": 64, "beta_fast": 1.0},
            "beta_fast is not above beta_slow",
        ),
    ],
)
def test_scalings_of_rotary_positions_that_are_none(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_config(SIZES | {"rotary_scaling": scaling})


SAYING_NOTHING = {
    "head_dim": 8,
    "qkv_bias": False,
    "ffn_bias": False,
    "rotary_dim": 8,
    "parallel_residual": False,
    "zero_centered_norms": False,
    "embedding_multiplier": 1.0,
}


def test_options_that_say_nothing_are_not_recorded() -> None:
    """A checkpoint of an earlier version has no such keys, and its model is the same."""
    plain = build_shape(run_config(SIZES), 100)
    explicit = build_shape(run_config(SIZES | SAYING_NOTHING), 100)
    assert explicit == plain
    assert {"rotary_scaling", *SAYING_NOTHING}.isdisjoint(plain.architecture())
    assert GPTShape.from_architecture(plain.architecture()) == plain


@pytest.mark.parametrize(
    ("pattern", "layers", "found"),
    [
        (["sliding", "full"], 4, ("sliding", "full")),
        (["sliding", "full"] * 3, 4, ("sliding", "full")),
        (["sliding", "sliding", "full"], 2, None),
        (["sliding", "sliding", "full"], 4, ("sliding", "sliding", "full")),
        (["sliding"], 4, None),
        (["full", "full", "sliding", "sliding"], 4, ("full", "full", "sliding", "sliding")),
    ],
)
def test_patterns_are_recorded_in_the_shortest_form(
    pattern: list[str], layers: int, found: tuple[str, ...] | None
) -> None:
    sizes = SIZES | {"layers": layers, "sliding_window": 5}
    shape = build_shape(run_config(sizes | {"attention_pattern": pattern}), 100)
    assert shape.attention_pattern == found
    assert [shape.slides(i) for i in range(layers)] == [
        pattern[i % len(pattern)] == "sliding" for i in range(layers)
    ]
    recorded = json.loads(json.dumps(shape.architecture()))
    assert GPTShape.from_architecture(recorded) == shape


def test_a_window_that_no_block_has_is_none() -> None:
    options = {"sliding_window": 5, "attention_pattern": ["full"]}
    assert build_shape(run_config(SIZES | options), 100) == build_shape(run_config(SIZES), 100)
    same = {"sliding_window": 5, "sliding_rotary": {"base": 10_000.0}}
    assert build_shape(run_config(SIZES | same), 100).sliding_rotary is None
    with pytest.raises(ValueError, match="attention_pattern needs sliding_window"):
        run_config(SIZES | {"attention_pattern": ["full"]})


def test_a_window_as_long_as_the_sequence_changes_no_bit() -> None:
    tokens = torch.arange(32).reshape(2, 16)
    logits = build(GPTShape(**LLAMA))(tokens)
    assert torch.equal(build(GPTShape(**LLAMA | {"sliding_window": 16}))(tokens), logits)
    assert not torch.equal(build(GPTShape(**LLAMA | {"sliding_window": 15}))(tokens), logits)


def test_options_come_back_from_a_record() -> None:
    scaling = {"type": "yarn", "factor": 4, "original_seq_len": 64}
    options = {
        "head_dim": 12,
        "qkv_bias": True,
        "rotary_scaling": scaling,
        "layers": 2,
        "sliding_window": 5,
        "attention_pattern": ["full", "sliding"],
        "sliding_rotary": {"base": 100.0, "scaling": {"type": "linear", "factor": 2.0}},
        "attention_scale": 0.3,
        "attention_softcap": 30.0,
    }
    shape = build_shape(run_config(SIZES | options), 100)
    recorded = json.loads(json.dumps(shape.architecture()))
    assert recorded["rotary_scaling"]["attention_factor"] == pytest.approx(1 + 0.1 * math.log(4))
    assert GPTShape.from_architecture(recorded) == shape
    for damaged in ({**recorded, "other": 1}, {k: v for k, v in recorded.items() if k != "ffn"}):
        with pytest.raises(TypeError, match="other fields"):
            GPTShape.from_architecture(damaged)


def test_a_vocabulary_that_tensor_does_not_divide_is_no_error() -> None:
    assert build_shape(run_config(SIZES, tensor=2), 101).vocab == 101


def attention_by_loops(x: Tensor, attention: Attention, shape: GPTShape) -> Tensor:
    """Compute every head, position and earlier position separately."""
    batch, seq, hidden = x.shape
    size = shape.head_size
    q, k, v = (x @ attention.qkv.weight.T).split(shape.qkv_segments, -1)
    heads = torch.zeros(batch, seq, hidden)
    for row in range(batch):
        for head in range(shape.heads):
            mine = slice(head * size, (head + 1) * size)
            group = head * shape.kv_heads // shape.heads
            shared = slice(group * size, (group + 1) * size)
            for here in range(seq):
                scores = [
                    math.exp(float(q[row, here, mine] @ k[row, there, shared]) / math.sqrt(size))
                    for there in range(here + 1)
                ]
                for there, score in enumerate(scores):
                    heads[row, here, mine] += score / sum(scores) * v[row, there, shared]
    return heads @ attention.out.weight.T


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_grouped_queries(kv_heads: int) -> None:
    shape = GPTShape(**LLAMA | {"kv_heads": kv_heads, "init_std": 0.3})
    attention = Attention(shape, LayerBuilder(INITIALIZER, TensorRegion(ALONE, sequence=False)))
    x = torch.randn((2, 6, shape.hidden), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attention_by_loops(x, attention, shape)
        assert_close(attention(x, ForwardContext()), expected)


def test_halves_share_the_cast_weights_and_sum_their_gradients_in_the_weights_type() -> None:
    shape = GPTShape(**LLAMA)
    block = Block(shape, LayerBuilder(INITIALIZER, TensorRegion(ALONE, sequence=False)))
    sizes = [each.numel() for each in block.parameters() if each.dim() == 2]
    halves = torch.randn((2, 3, 6, shape.hidden), generator=torch.Generator().manual_seed(0))
    kept: set[int] = set()

    def note(saved: Tensor) -> Tensor:
        if saved.numel() in sizes and saved.dtype == torch.bfloat16:
            kept.add(saved.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        outputs = block([ForwardContext()] * 2, *halves.bfloat16())
    assert len(kept) == len(sizes) == 4
    torch.stack(outputs).float().square().sum().backward()
    together = {name: each.grad for name, each in block.named_parameters()}

    block.zero_grad()
    for half in halves.bfloat16():
        block([ForwardContext()], half)[0].float().square().sum().backward()
    for name, each in block.named_parameters():
        assert each.grad is not None
        assert_close(together[name], each.grad, 4 * FP32_ROUNDOFF, name)


def test_cast_weights_do_not_outlive_what_shares_them() -> None:
    region = TensorRegion(ALONE, sequence=False)
    module = torch.nn.Linear(2, 2, bias=False)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(module.weight, value)
        with region.shared(module):
            assert region.cast(module.weight, torch.bfloat16).tolist() == [[value] * 2] * 2


@pytest.mark.parametrize("name", SHAPES)
def test_no_token_sees_a_later_one(name: str) -> None:
    shape = GPTShape(**SHAPES[name])
    model = build(shape)
    tokens = torch.arange(shape.seq_len).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 9] = 77
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.equal(before[0, 9], after[0, 9])


def test_seed_and_name_alone_decide_a_weight() -> None:
    shape = GPTShape(**LLAMA)
    deeper = GPTShape(**LLAMA | {"layers": 3, "tied_embeddings": True})
    one, two = (dict(build(each).named_parameters()) for each in (shape, deeper))
    other = dict(GPT(shape, Initializer(2, torch.float32), ALONE).named_parameters())
    name = "blocks.1.feed_forward.up.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])
