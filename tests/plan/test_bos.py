"""BOS at the start of documents: the rows of a slow reference, and where a run has it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import (
    Documents,
    FakeTokenizer,
    derived_key,
    member_key,
    permutation,
    phase,
    random_lengths,
    write_corpus,
    write_run,
)
from translation_support import random_pairs, write_pairs

from megaphase.convert.source_tokenizer import prompt_start
from megaphase.corpus import Corpus
from megaphase.plan.build import ensure_built
from megaphase.plan.dataset import read_step
from megaphase.plan.plan import Plan
from megaphase.plan.same_run import refuse_other_plan
from megaphase.plan.spec import PlanSpec, plan_spec
from megaphase.plan.stream import Stream
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, with_hash
from megaphase.utils.run_files import PLAN_FILE
from megaphase.utils.targets import IGNORED_TARGET

BOS = 59_000
FILLER = 59_999
SEQ_LEN = 8

Rows = list[tuple[list[int], list[int], list[int]]]


def expected_rows(documents: Documents, seed: int, *, separated: bool) -> Rows:
    """Return inputs, targets and documents of epoch 0's samples, in token order, with BOS."""
    family = derived_key(seed, "documents", "training", "en")
    order = permutation(len(documents.lengths), member_key(family, 0))
    joined = [(token, d, p) for d in order for p, token in enumerate(documents.tokens(d))]
    rows: Rows = []
    for start in range(0, len(joined) - 1, SEQ_LEN):
        sample = joined[start : start + SEQ_LEN + 1]
        row: tuple[list[int], list[int], list[int]] = ([], [], [])
        seen = list(dict.fromkeys(document for _, document, _ in sample))
        for (token, document, _), (target, of_target, place) in pairwise(sample):
            row[0].append(BOS if place == 0 else token)
            row[1].append(target)
            row[2].append(seen.index(of_target if place == 0 else document) if separated else 0)
        empty = SEQ_LEN - len(row[0])
        if empty:  # the last token of an epoch predicts nothing
            row[0].append(sample[-1][0])
            row[1].append(IGNORED_TARGET)
            row[2].append(seen.index(sample[-1][1]) if separated else 0)
            row[0].extend([FILLER] * (empty - 1))
            row[1].extend([IGNORED_TARGET] * (empty - 1))
            row[2].extend([row[2][-1]] * (empty - 1))
        rows.append(row)
    return rows


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=30).filter(lambda it: sum(it) > 9),
    seed=st.integers(0, 100),
    separated=st.booleans(),
)
def test_first_tokens_are_predicted_from_bos(tmp_path_factory, lengths, seed, separated):
    prefix = tmp_path_factory.mktemp("bos") / "en"
    documents = write_corpus(prefix, lengths, seed=seed, first_token=1)
    stream = Stream(
        *("en", Corpus.open(prefix)),
        **{"seed": seed, "seq_len": SEQ_LEN, "fraction": 0.0},
        **{"attend_across_documents": not separated, "bos": BOS},
    )
    samples = stream.samples_per_epoch
    inputs, targets = (np.empty((samples, SEQ_LEN), np.int64) for _ in range(2))
    numbers = np.zeros((samples, SEQ_LEN), np.int64)
    all_of_them = np.arange(samples)
    stream.read(
        *(stream.first_starts(samples), all_of_them, all_of_them, inputs, targets, FILLER, numbers)
    )
    found = list(zip(inputs.tolist(), targets.tolist(), numbers.tolist(), strict=True))
    assert found == expected_rows(documents, seed, separated=separated)
    # Every document's start has BOS but that of the first.
    assert (inputs == BOS).sum() == len(lengths) - 1


def spec_with(folder: Path, tokenizer: FakeTokenizer, **changes: Any) -> PlanSpec:
    if not (folder / "en.bin").exists():
        write_corpus(folder / "en", random_lengths(40, 30, 0), first_token=100)
        write_pairs(folder / "en-fr", random_pairs(40, 5, 1), seed=1, first_token=20_000)
    tasks = {"en": {"corpus": "en"}, "en-fr": {"corpus": "en-fr", "kind": "translation"}}
    phases = [phase("one", 20, {"rates": {"en": 0.5, "en-fr": 0.5}})]
    config = write_run(folder, ["en"], **{"tasks": tasks, "phases": phases} | changes)
    return plan_spec(config, tokenizer)  # type: ignore[arg-type]


WITH_BOS = FakeTokenizer(bos=BOS, adds_bos=True)
WITHOUT = FakeTokenizer(bos=BOS)


def test_a_step_has_bos_in_texts_and_none_in_pairs(tmp_path):
    spec = spec_with(tmp_path, WITH_BOS)
    plan = Plan(spec, ensure_built(spec, tmp_path / "run"))
    with_bos = dict.fromkeys((0, 1), 0)
    for step in range(20):
        batch = read_step(plan, 0, step, 0, 1, FILLER)
        for task, inputs in zip(batch.tasks.tolist(), batch.inputs, strict=True):
            with_bos[task] += int((inputs == BOS).sum())
    assert with_bos[0] > 0
    assert with_bos[1] == 0
    assert plan.summary()["bos"] == BOS


@pytest.mark.parametrize(
    ("tokenizer", "key", "bos"),
    [
        (WITH_BOS, {}, BOS),
        (WITH_BOS, {"bos": False}, None),
        (WITHOUT, {}, None),
        (WITHOUT, {"bos": True}, BOS),
        (FakeTokenizer(), {}, None),
    ],
)
def test_the_run_file_says_it_or_the_tokenizer_does(tmp_path, tokenizer, key, bos):
    spec = spec_with(tmp_path, tokenizer, **key)
    assert spec.bos == bos
    # Where samples begin does not depend on it, so a branch may have another one than its parent.
    none = spec_with(tmp_path, FakeTokenizer())
    assert spec.stream_fingerprints == none.stream_fingerprints
    assert (spec.fingerprint == none.fingerprint) == (bos is None)


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run\.yaml: bos: is true, but .* leave it out"):
        spec_with(tmp_path, FakeTokenizer(), bos=True)


@pytest.mark.parametrize(("began", "remedy"), [(None, "write bos: false"), (7, "write bos: true")])
def test_a_run_that_began_otherwise_is_refused(tmp_path, began, remedy):
    now = BOS if began is None else None
    spec = spec_with(tmp_path, FakeTokenizer(bos=now, adds_bos=now is not None))
    config = write_run(tmp_path, ["en"])
    summary = {"fingerprint": "another"} | ({} if began is None else {"bos": began})
    (tmp_path / "run").mkdir()
    atomic_write_json(tmp_path / "run" / PLAN_FILE, with_hash(summary))
    with pytest.raises(InputError, match=f"run.yaml: bos: .*{remedy}"):
        refuse_other_plan(tmp_path / "run", config, spec.fingerprint, spec.bos)


@pytest.mark.parametrize(
    ("state", "tokenizer", "start"),
    [
        ({"origin": {}}, WITH_BOS, [BOS]),  # imported
        ({"origin": {}}, WITHOUT, []),
        ({"plan": "0", "bos": BOS}, WITHOUT, [BOS]),
        ({"plan": "0", "bos": None}, WITH_BOS, []),
        ({"plan": "0"}, WITH_BOS, []),  # of an earlier version
    ],
)
def test_prompts_begin_as_documents_do(state, tokenizer, start):
    assert prompt_start(SimpleNamespace(state=state), tokenizer) == start  # type: ignore[arg-type]


def test_json_of_the_plan_has_no_bos_without_one(tmp_path):
    spec = spec_with(tmp_path, WITHOUT)
    plan = Plan(spec, ensure_built(spec, tmp_path / "run"))
    assert "bos" not in json.loads(json.dumps(plan.summary()))
