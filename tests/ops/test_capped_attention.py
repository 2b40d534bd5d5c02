"""Capped, scaled and windowed attention against loops over the tokens, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rounding import FP32_ROUNDOFF, assert_close
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from megaphase.model.attention_rule import AttentionRule
from megaphase.model.document_mask import _Capped, _Flex, attend_before, attend_within
from megaphase.ops import capped_attention
from megaphase.ops.capped_attention import block_mask, causal_block_mask

ROWS, HEADS, SEQ, WIDTH = 3, 4, 9, 16
DOCUMENTS = torch.tensor(
    [[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0]]
)
RULES = {
    "scale": AttentionRule(scale=0.7),
    "window": AttentionRule(window=3),
    "short window": AttentionRule(window=2),
    "cap": AttentionRule(softcap=0.8),
    "cap and scale": AttentionRule(scale=1.3, softcap=2.0),
    "all": AttentionRule(window=4, scale=0.6, softcap=1.1),
}


def by_loops(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, rule: AttentionRule) -> Tensor:
    """One query and one key at a time, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = WIDTH**-0.5 if rule.scale is None else rule.scale
    out = []
    for row in range(ROWS):
        for head in range(HEADS):
            shared = head * k.shape[1] // HEADS
            for here in range(SEQ):
                seen = [
                    there
                    for there in range(here + 1)
                    if documents[row, there] == documents[row, here]
                    and (rule.window is None or here - there < rule.window)
                ]
                scores = [scale * (q[row, head, here] @ k[row, shared, there]) for there in seen]
                if rule.softcap is not None:
                    scores = [rule.softcap * (s / rule.softcap).tanh() for s in scores]
                weights = torch.stack(scores).softmax(0)
                out.append(weights @ v[row, shared, seen])
    return torch.stack(out).reshape(ROWS, HEADS, SEQ, WIDTH)


def inputs(kv_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, and the gradient of what becomes of them; stored as projected."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn((ROWS, SEQ, heads, WIDTH), generator=generator).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads, HEADS)
    )


def with_gradients(function: Any, *tensors: Tensor) -> list[Tensor]:
    *arguments, grad = tensors
    leaves = [each.detach().requires_grad_() for each in arguments]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_outputs_and_gradients_are_those_of_loops(name: str, packed: bool, kv_heads: int) -> None:
    rule, tensors = RULES[name], inputs(kv_heads)
    documents = DOCUMENTS if packed else torch.zeros_like(DOCUMENTS)
    attend = attend_before(documents, torch.float32, rule)
    if packed:
        attend = attend_within(documents, torch.float32, None, rule)
    found = with_gradients(attend, *tensors)
    expected = with_gradients(lambda *x: by_loops(*x, documents, rule), *tensors)
    for each, wanted in zip(found, expected, strict=True):
        assert_close(each, wanted, 16 * FP32_ROUNDOFF)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention as torch computes it without a compiler, so that the CPU can differentiate."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(capped_attention, "compiled_flex", lambda: flex.flex_attention)
    monkeypatch.setattr(capped_attention, "compiled_block_mask", lambda: flex.create_block_mask)
    causal_block_mask.cache_clear()
    torch.compiler.reset()  # of the constants of another test
    yield
    causal_block_mask.cache_clear()


@pytest.mark.filterwarnings("ignore:.*flex_attention")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cap", "all"])
def test_flex_attention_computes_the_same(name: str, packed: bool) -> None:
    rule, tensors = RULES[name], inputs(2)
    mask = causal_block_mask(SEQ, rule.window, torch.device("cpu"))
    attend = attend_before(DOCUMENTS, torch.float32, rule)
    if packed:
        mask = block_mask(DOCUMENTS, rule.window)
        attend = attend_within(DOCUMENTS, torch.float32, None, rule)
    found = with_gradients(_Flex(mask, rule), *tensors)
    for each, wanted in zip(found, with_gradients(attend, *tensors), strict=True):
        assert_close(each, wanted, 16 * FP32_ROUNDOFF)


@pytest.mark.parametrize("most", [HEADS * SEQ * SEQ, SEQ * SEQ])
def test_parts_of_the_rows_and_heads_change_nothing(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all scores at once were too many, or those of a row."""
    tensors = inputs(2)
    attend = attend_before(DOCUMENTS, torch.float32, RULES["all"])
    together = with_gradients(attend, *tensors)
    monkeypatch.setattr(capped_attention, "SCORES_AT_ONCE", most)
    parts = list(capped_attention._parts(*tensors[:2]))
    assert len(parts) == ROWS * (1 if most > SEQ * SEQ else 2)
    for each, wanted in zip(with_gradients(attend, *tensors), together, strict=True):
        assert_close(each, wanted)


def test_nothing_of_the_scores_is_saved() -> None:
    q, k, v, _ = inputs(4)
    attend = attend_before(DOCUMENTS, torch.float32, RULES["cap"])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend(q.requires_grad_(), k, v)
    assert sum(each.numel() for each in kept) == 3 * math.prod(q.shape) + SEQ * SEQ


def test_only_training_compiles_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring and generation have too many shapes."""
    compiled: list[int] = []
    monkeypatch.setattr(
        "megaphase.model.document_mask.causal_block_mask",
        lambda seq, window, device: compiled.append(seq),
    )
    monkeypatch.setattr("megaphase.model.document_mask._row_mask", lambda *_: torch.ones(1))
    tokens = torch.zeros((1, SEQ), dtype=torch.int64, device="meta")
    monkeypatch.setattr(Tensor, "device", torch.device("cuda", 0))
    attend_before(tokens, torch.bfloat16, RULES["cap"])
    assert compiled == [SEQ]
    with torch.inference_mode():
        assert isinstance(attend_before(tokens, torch.bfloat16, RULES["cap"]), _Capped)
    assert compiled == [SEQ]
