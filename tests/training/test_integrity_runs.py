"""Tokens found wrong while reading: all ranks end, one reports it, none trains on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_support import rehash
from distributed import launch
from run_support import make_corpora, megaphase, read_rows, run_settings, write_run_file

from megaphase.config.load import load_run_file
from megaphase.corpus import Corpus
from megaphase.corpus._checksums import block_checksums
from megaphase.corpus.batch import checksums
from megaphase.plan import built_folder, hashed_chunks
from megaphase.plan.build import ensure_built
from megaphase.plan.plan import Plan
from megaphase.plan.spec import plan_spec
from megaphase.plan.trace import TracedSample, trace_step
from megaphase.tokenizer import Tokenizer

pytestmark = pytest.mark.distributed

BLOCK_TOKENS = 512
VOCABULARY = 500
PIECE_BYTES = 64


def write_token(prefix: Path, position: int, token: int) -> None:
    """Write a token into a corpus with the matching checksums of a writer."""
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    tokens[position] = token
    tokens.tofile(f"{prefix}.bin")
    corpus = Corpus.open(prefix)
    sums = np.array(corpus.sums)
    sums["checksum"] = checksums(tokens, corpus.lengths, corpus.hashes, sums["text_bytes"])
    sums.tofile(f"{prefix}.sum")
    block_checksums(tokens.view(np.uint8)).tofile(f"{prefix}.blocks")
    rehash(prefix)


def blocks_of(plan: Plan, samples: list[TracedSample]) -> dict[tuple[str, int], int]:
    """Return the blocks from which samples are read, as (task, number), and a token in each."""
    found = {}
    for sample in samples:
        offsets = plan.spec.streams[sample.task].corpus.byte_offsets
        for piece in sample.pieces:
            begin = int(offsets[piece.document]) // 2
            for position in range(begin + piece.first, begin + piece.last):
                found[sample.task, position // BLOCK_TOKENS] = position
    return found


def held_out_blocks(plan: Plan, samples: int) -> set[tuple[str, int]]:
    found = set()
    for task, stream in plan.spec.held_out.items():
        starts = stream.first_starts(min(samples, stream.samples_per_epoch)).tolist()
        for slot, offset in starts:
            for document, first, tokens in stream.pieces(0, slot, offset):
                begin = int(stream.corpus.byte_offsets[document]) // 2 + first
                found |= {(task, at // BLOCK_TOKENS) for at in range(begin, begin + tokens)}
    return found


def first_step_that_only_one_half_reads(plan: Plan, samples: int) -> tuple[int, str, int]:
    """Return a step, a task and a token of a block that only the second half of that step's batch
    reads, and that nothing reads before."""
    size = plan.spec.phases[0].batch.samples_at(0)
    before = held_out_blocks(plan, samples)
    for step in range(1, plan.phases[0].steps + 1):
        traced = trace_step(plan, 0, step)
        halves = [
            blocks_of(plan, [each for each in traced if each.row // (size // 2) == half])
            for half in range(2)
        ]
        new = halves[1].keys() - halves[0].keys() - before
        if new and step > 1:
            task, block = min(new)
            return step, task, halves[1][task, block]
        before |= halves[0].keys() | halves[1].keys()
    raise AssertionError("every block is read by the first half")


@pytest.mark.parametrize("tensor", [1, 2])
def test_one_rank_speaks_and_all_end_before_the_step(tensor, tmp_path):
    """With tensor 1 a single rank finds it, and the others must be told; with tensor 2 both do."""
    corpora = make_corpora(tmp_path / "corpora")
    settings = run_settings(
        corpora,
        parallel={"tensor": tensor, "zero": 0},
        faults={"silent_seconds": 6.0},
        checkpoint={"every_steps": 100},
    )
    settings["validation"]["every_steps"] = 100
    run_file = write_run_file(tmp_path / "job", settings)
    config = load_run_file(run_file, (f"output={tmp_path / 'planned'}",))
    spec = plan_spec(config, Tokenizer.load(config.tokenizer))
    plan = Plan(spec, ensure_built(spec, config.output))
    step, task, position = first_step_that_only_one_half_reads(plan, config.validation.samples)
    prefix = corpora / "data" / task
    offsets = np.asarray(spec.streams[task].corpus.byte_offsets)
    document = int(np.searchsorted(offsets, 2 * position, side="right")) - 1
    write_token(prefix, position, VOCABULARY)

    results = launch(megaphase("train", run_file), 2)
    assert [result.returncode for result in results] == [2, 2]
    said = "".join(result.stderr for result in results)
    fault = (
        f"{prefix}.bin: document {document} has the token {VOCABULARY}, the vocabulary ends at "
        f"{VOCABULARY - 1}; tokenize again\n"
    )
    assert said.count("\n") == 1, said
    assert said.startswith("megaphase: rank 1 on " if tensor == 1 else f"megaphase: {prefix}")
    assert said.endswith(fault)
    steps = [row["step"] for row in read_rows(tmp_path / "job" / "run") if "loss" in row]
    assert steps == list(range(1, step))


def test_ids_beyond_the_vocabulary_among_held_out_documents_end_the_run(tmp_path):
    corpora = make_corpora(tmp_path / "corpora")
    run_file = write_run_file(tmp_path / "job", run_settings(corpora))
    prefix = corpora / "data" / "cimri"
    corpus = Corpus.open(prefix)
    document = int(np.flatnonzero(np.asarray(corpus.hashes) < int(0.1 * 2**64))[0])
    write_token(prefix, int(corpus.byte_offsets[document]) // 2, VOCABULARY + 7)
    [result] = launch(megaphase("train", run_file), 1)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"cimri.bin: document {document} has the token {VOCABULARY + 7}" in result.stderr


def treat_every_plan_as_large() -> None:
    """Verify plans piece by piece, where pieces are small."""
    built_folder.SMALL_BYTES = 0
    built_folder.PIECE_BYTES = hashed_chunks.PIECE_BYTES = PIECE_BYTES


def test_an_altered_plan_ends_the_run_on_all_ranks_and_is_built_again(tmp_path, monkeypatch):
    corpora = make_corpora(tmp_path / "corpora")
    run_file = write_run_file(tmp_path / "job", run_settings(corpora))
    config = load_run_file(run_file)
    spec = plan_spec(config, Tokenizer.load(config.tokenizer))
    with monkeypatch.context() as patched:
        patched.setattr(hashed_chunks, "PIECE_BYTES", PIECE_BYTES)
        altered = ensure_built(spec, config.output) / "blend-1.tasks"
    altered.write_bytes(altered.read_bytes()[:-1] + b"\xff")

    results = launch(megaphase("train", run_file), 2, prepare=treat_every_plan_as_large)
    assert [result.returncode for result in results] == [2, 2]
    said = "".join(result.stderr for result in results)
    assert said.count("\n") == 1, said
    assert f"{altered}: was altered: the bytes 128 to 143 are not those that were written" in said
    assert said.endswith("; start again, and it will be built again\n")

    command = megaphase("train", run_file, "checkpoint.end_after=1")
    [result] = launch(command, 1, prepare=treat_every_plan_as_large)
    assert result.returncode == 0, result.stderr
    again = f"{altered.parent}: {altered.name} has been altered; building the plan again"
    assert again in result.stdout
