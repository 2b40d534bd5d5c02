"""Rows for the tokens of an extended tokenizer: values, layouts, and what stays as it was.

The expected rows are computed here with numpy.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_support import RandomWeights, write_random_checkpoint
from tokenizer_json_kinds import llama3

from megaphase.convert.extend_vocab import ExtendedWeights, NewTokens, extended_shape
from megaphase.convert.partition import Layout
from megaphase.convert.reshape import reshape
from megaphase.convert.source import open_source
from megaphase.model.parameters import parameter_count
from megaphase.model.shape import GPTShape

SHAPE = GPTShape(vocab=50, seq_len=8, layers=1, hidden=16, heads=4, kv_heads=2, ffn=24)
VOCAB_MATRICES = ("embedding.weight", "head.weight")
# 150 tokens are more than one portion of them.
MANY = NewTokens(50, [[i % 50, (7 * i) % 50, i % 3][: 1 + i % 3] for i in range(150)])
FEW = NewTokens(44, [[3, 4], [5], [43, 0, 43]])
LAYOUTS = [None, Layout(2, 2, 3), Layout(4, 1, 1), Layout(1, 3, 0)]


def checkpoint(folder: Path, shape: GPTShape, layout: Layout | None) -> Path:
    whole = write_random_checkpoint(folder / "portable", shape)
    if layout is None:
        return whole
    reshape(str(whole), folder / "laid-out", layout, weights_only=True, workers=2)
    return folder / "laid-out"


def extended(
    folder: Path, tokens: NewTokens, shape: GPTShape = SHAPE, *, init: str = "mean", seed: int = 1
) -> ExtendedWeights:
    source = open_source(str(folder))
    return ExtendedWeights(source.weights, extended_shape(shape, tokens), tokens, init, seed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_means_of_those_that_they_replace(
    tied: bool, layout: Layout | None, tmp_path: Path
) -> None:
    shape = replace(SHAPE, kv_heads=4, tied_embeddings=tied)
    found = extended(checkpoint(tmp_path, shape, layout), MANY, shape)
    before = RandomWeights(shape)
    assert ("head.weight" in before.layouts) is not tied
    for name in before.layouts:
        whole, old = found.whole(name, "weight"), before.whole(name, "weight")
        if name not in VOCAB_MATRICES:
            assert torch.equal(whole, old)
            continue
        assert whole.shape == (200, 16)
        assert torch.equal(whole[:50], old)
        rows = old.numpy().astype(np.float64)
        expected = [rows[tokens].mean(axis=0).astype(np.float32) for tokens in MANY.replaced]
        np.testing.assert_allclose(whole[50:].numpy(), expected, rtol=2**-23, atol=1e-12)


def test_rows_that_no_token_has_are_taken_first(tmp_path: Path) -> None:
    found = extended(checkpoint(tmp_path, SHAPE, None), FEW)
    before = RandomWeights(SHAPE)
    assert extended_shape(SHAPE, FEW) == SHAPE
    for name in VOCAB_MATRICES:
        whole, old = found.whole(name, "weight"), before.whole(name, "weight")
        assert torch.equal(whole[:44], old[:44])
        assert torch.equal(whole[47:], old[47:])
        assert torch.equal(whole[45], old[5])
        np.testing.assert_allclose(whole[44].numpy(), old[3:5].numpy().mean(0), rtol=2**-22)


def test_some_new_tokens_may_need_more_rows_than_are_free(tmp_path: Path) -> None:
    tokens = NewTokens(48, [[1], [2], [3], [4]])
    whole = extended(checkpoint(tmp_path, SHAPE, None), tokens).whole("embedding.weight", "weight")
    old = RandomWeights(SHAPE).whole("embedding.weight", "weight")
    assert torch.equal(whole, torch.cat([old[:48], old[1:5]]))


def test_random_rows_have_the_distribution_of_the_old_ones(tmp_path: Path) -> None:
    shape = replace(SHAPE, vocab=400)
    tokens = NewTokens(400, [[0]] * 20_000)
    folder = checkpoint(tmp_path, shape, None)
    found = extended(folder, tokens, shape, init="random")
    for name in VOCAB_MATRICES:
        old = RandomWeights(shape).whole(name, "weight").numpy().astype(np.float64)
        whole = found.whole(name, "weight")
        new = whole[400:].numpy().astype(np.float64)
        assert torch.equal(whole[:400], RandomWeights(shape).whole(name, "weight"))
        # Five standard errors of the mean and of the standard deviation.
        bound = 5 * old.std(axis=0) / np.sqrt(len(new))
        assert (np.abs(new.mean(axis=0) - old.mean(axis=0)) < bound).all()
        assert (np.abs(new.std(axis=0) - old.std(axis=0)) < bound).all()
    rows = {name: found.whole(name, "weight")[400:] for name in VOCAB_MATRICES}
    assert not torch.equal(rows["embedding.weight"], rows["head.weight"])


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_random_rows_depend_on_the_seed_and_not_on_the_layout(
    layout: Layout, tmp_path: Path
) -> None:
    shape = replace(SHAPE, kv_heads=4)
    whole = checkpoint(tmp_path / "one", shape, None)
    laid_out = checkpoint(tmp_path / "other", shape, layout)
    for name in VOCAB_MATRICES:
        rows = [
            extended(folder, MANY, shape, init="random", seed=seed).whole(name, "weight")
            for folder, seed in ((whole, 1), (laid_out, 1), (whole, 2))
        ]
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0], rows[2])


# In a process of its own; without the memory that it needs to be there at all.
MEASURE = """
import sys
from pathlib import Path
from megaphase.convert.extend_vocab import NewTokens, write_extended
from megaphase.utils.heap import prepare_for_large_tensors
from megaphase.convert.source import open_source
from megaphase.tokenizer import Tokenizer

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

prepare_for_large_tensors()
source, tokenizer = open_source(sys.argv[1]), Tokenizer.load(Path(sys.argv[2]))
tokens = NewTokens(source.shape.vocab, [[i, i + 1] for i in range(2_000)])
before = peak()
write_extended(source, tokens, Path(sys.argv[3]), init=sys.argv[4], seed=1,
               tokenizer=tokenizer, workers=4)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("init", ["mean", "random"])
def test_memory_is_bounded_by_the_largest_parameter(init: str, tmp_path: Path) -> None:
    shape = GPTShape(vocab=20_000, seq_len=8, layers=12, hidden=768, heads=4, kv_heads=4, ffn=3072)
    largest, constant = 4 * (shape.vocab + 2_000) * shape.hidden, 48 << 20
    write_random_checkpoint(tmp_path / "random", shape)
    llama3(tmp_path / "tokenizer")
    arguments = [tmp_path / "random", tmp_path / "tokenizer", tmp_path / "out", init]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True
    )
    used = int(found.stdout.split()[-1])
    assert used < 2 * largest + constant < 4 * parameter_count(shape) / 2
