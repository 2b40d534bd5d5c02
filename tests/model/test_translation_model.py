"""Packed rows in the model: every document gets the attention and loss that it would get alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_gpt import IGNORED, PlainGPT, PlainShape
from rounding import assert_close
from torch import Tensor

from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.model.document_mask import (
    DocumentBounds,
    own_document_mask,
    positions_in_document,
)
from megaphase.model.gpt import GPT
from megaphase.model.shape import GPTShape
from megaphase.plan.dataset import Batch
from megaphase.utils.targets import IGNORED_TARGET

ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups
INITIALIZER = Initializer(1, torch.float32)
VOCAB, SEQ_LEN = 101, 24
SHAPE: dict[str, Any] = {
    "vocab": VOCAB, "seq_len": SEQ_LEN, "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4,
    "ffn": 48, "init_std": 0.2,
}  # fmt: skip
SHAPES = {
    "rotary": SHAPE,
    "grouped": SHAPE | {"kv_heads": 2},
    "learned": SHAPE | {"position": "learned", "bias": True, "norm": "layernorm"},
    "checkpointed": SHAPE | {"position": "learned", "activation_checkpointing": "full"},
}
LENGTHS = [[7, 5, 9, 4], [25], [3, 3, 3, 3, 3, 3], [2, 23], [1, 1, 20, 1]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=6, max_size=6), min_size=1, max_size=3))
def test_masks_and_positions_are_those_of_loops(lengths):
    numbers = [[n for n, length in enumerate(row) for _ in range(length)][:6] for row in lengths]
    documents = torch.tensor(numbers)
    mask, positions = own_document_mask(documents), positions_in_document(documents)
    assert mask.shape == (len(numbers), 1, 6, 6)
    for row, of in enumerate(numbers):
        for here in range(6):
            seen = [there for there in range(here + 1) if of[there] == of[here]]
            assert mask[row, 0, here].nonzero().flatten().tolist() == seen
            assert positions[row, here] == here - seen[0]


def packed_batch(lengths: list[list[int]]) -> Batch:
    """Return rows of at most seq_len + 1 tokens; the second half of every document are targets."""
    random = torch.Generator().manual_seed(3)
    shape = len(lengths), SEQ_LEN + 1
    tokens = torch.randint(VOCAB, shape, generator=random)
    targets = torch.full(shape, IGNORED_TARGET)
    documents = torch.zeros(shape, dtype=torch.int64)
    for row, of_row in enumerate(lengths):
        start = 0
        for number, length in enumerate(of_row):
            scored = slice(start + (length + 1) // 2, start + length)
            targets[row, scored] = tokens[row, scored]
            documents[row, start:] = number
            start += length
    inputs = tokens[:, :-1].contiguous()
    tasks = torch.zeros(len(lengths), dtype=torch.int64)
    return Batch(inputs, targets[:, 1:].contiguous(), tasks, documents[:, :-1].contiguous())


def build(shape: GPTShape) -> GPT:
    return GPT(shape, INITIALIZER, ALONE)


def losses_of(model: GPT, *batch: torch.Tensor) -> torch.Tensor:
    _, losses = model(*batch)
    return losses


def documents_alone(
    batch: Batch, lengths: list[list[int]]
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Return row, place, inputs and targets of every document, in its own row without padding."""
    for row, of_row in enumerate(lengths):
        start = 0
        for length in of_row:
            place = slice(start, min(start + length - 1, SEQ_LEN))
            if length > 1:
                inputs, targets = (x[row : row + 1, place] for x in (batch.inputs, batch.targets))
                yield row, place, inputs.contiguous(), targets.contiguous()
            start += length


def losses_alone(model: GPT | PlainGPT, batch: Batch, lengths: list[list[int]]) -> Tensor:
    """Return the losses of every document in its own row, at its place in `batch`."""
    found = torch.zeros(batch.inputs.shape, dtype=torch.float64)
    for row, place, inputs, targets in documents_alone(batch, lengths):
        if isinstance(model, PlainGPT):
            losses = model.losses(inputs, targets.where(targets >= 0, IGNORED))
        else:
            losses = losses_of(model, inputs, targets)
        found[row, place] = losses[0].double()
    return found


def plain(model: GPT) -> PlainGPT:
    shape = model.shape
    layernorm, gelu = shape.norm == "layernorm", shape.activation == "gelu"
    kinds = PlainShape(shape.layers, shape.heads, shape.kv_heads, layernorm, gelu)
    return PlainGPT({name: each.detach() for name, each in model.named_parameters()}, kinds)


@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_row_loses_what_its_documents_lose_alone(name: str) -> None:
    model, batch = build(GPTShape(**SHAPES[name])), packed_batch(LENGTHS)
    losses = losses_of(model, batch.inputs, batch.targets, batch.documents).double()
    for reference in (model, plain(model)):
        alone = losses_alone(reference, batch, LENGTHS)
        assert_close(losses, alone)
    together = losses_of(model, batch.inputs, batch.targets).double()
    assert (together - losses).abs().max() > 0.01


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_the_documents_alone(name: str) -> None:
    model, batch = build(GPTShape(**SHAPES[name])), packed_batch(LENGTHS)
    parameters = list(model.parameters())
    total, _ = model(batch.inputs, batch.targets, batch.documents)
    packed = torch.autograd.grad(total, parameters)
    each = documents_alone(batch, LENGTHS)
    totals = [model(inputs, targets)[0] for _, _, inputs, targets in each]
    alone = torch.autograd.grad(torch.stack(totals).sum(), parameters)
    for native, reference in zip(packed, alone, strict=True):
        assert_close(native, reference)


def test_rows_whose_documents_see_each_other_are_the_same_beside_others() -> None:
    model, batch = build(GPTShape(**SHAPE)), packed_batch(LENGTHS)
    documents = batch.documents.clone()
    documents[1:] = 0
    mixed = losses_of(model, batch.inputs, batch.targets, documents)
    assert_close(mixed[1:], losses_of(model, batch.inputs[1:], batch.targets[1:]))
    one_more = losses_of(model, batch.inputs[:1], batch.targets[:1], batch.documents[:1])
    assert_close(mixed[:1], one_more)


def test_ignored_tokens_have_no_gradient() -> None:
    """Neither before the output projection, nor after the last target of a document."""
    shape = GPTShape(**SHAPE)
    model, batch = build(shape), packed_batch([[7, 5, 4]])
    batch.targets[0, 7:] = IGNORED_TARGET  # the second and third document, and the filler
    normed: list[Tensor] = []

    def keep(module: object, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        output[1].retain_grad()
        normed.append(output[1])

    model.norm.register_forward_hook(keep)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), embedded.append(output))[1]
    )
    model(batch.inputs, batch.targets, batch.documents)[0].backward()
    gradient = normed[0].grad[0].abs().sum(-1)
    assert ((gradient > 0) == (batch.targets[0] != IGNORED_TARGET)).all()
    gradient = embedded[0].grad[0].abs().sum(-1)
    last_scored = int((batch.targets[0] != IGNORED_TARGET).nonzero().max())
    assert (gradient[: last_scored + 1] > 0).all()
    assert (gradient[last_scored + 1 :] == 0).all()


def test_a_split_batch_masks_only_where_a_row_needs_it() -> None:
    batch = packed_batch([[25], [25], [7, 5], [25]])
    pieces = list(batch.split(2))
    assert pieces[0].documents is None
    assert torch.equal(pieces[1].documents, batch.documents[2:])
    assert [len(piece) for piece in batch.split(3)] == [3, 1]
    without = Batch(batch.inputs, batch.targets, batch.tasks)
    assert all(piece.documents is None for piece in without.split(1))


def test_a_pinned_batch_knows_what_training_needs_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch = packed_batch([[25], [10, 8], [7, 5], [25], [3, 3, 3]])
    pinned = batch.pinned()
    for piece, plain in zip(pinned.split(2), batch.split(2), strict=True):
        assert torch.equal(piece.scored, (plain.targets != IGNORED_TARGET).sum(1))
        assert piece.bounds is not None
        expected = DocumentBounds.of(plain.documents)
        assert torch.equal(piece.bounds.starts - piece.bounds.starts[0], expected.starts)
        assert piece.bounds.rows == expected.rows
    assert pinned[:1].bounds is None  # one document


def test_the_causal_kernel_is_kept_where_no_row_needs_a_mask(monkeypatch) -> None:
    seen: list[tuple[object, object]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, mask=None, *, is_causal=False, **options):
        seen.append((mask, is_causal))
        return attend(q, k, v, mask, is_causal=is_causal, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    model, batch = build(GPTShape(**SHAPE)), packed_batch(LENGTHS)
    model(batch.inputs, batch.targets)
    assert seen == [(None, True)] * 2
    seen.clear()
    model(batch.inputs, batch.targets, batch.documents)
    assert [is_causal for _, is_causal in seen] == [False] * 2
    assert seen[0][0] is seen[1][0]  # made once, not for every block
