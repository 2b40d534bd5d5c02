"""The test split of a run file: its documents, and what it changes and leaves alone."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_support import phase, random_lengths, spec_of, write_corpus, write_run
from translation_support import random_pairs, write_pairs

from megaphase.config.run import RunConfig
from megaphase.plan.plan import Plan
from megaphase.plan.preview import subsample_sentences
from megaphase.plan.spec import PlanSpec
from megaphase.plan.split import hashes_of_test_split, held_out_hashes, training_hashes
from megaphase.plan.stream import Stream
from megaphase.plan.task_corpora import open_streams
from megaphase.utils.errors import InputError

DOCUMENTS, FRACTION = 90, 0.2
TASKS = ("en", "en-fr")
FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
LAST_HASH = 2**64 - 1


def exact(number: float) -> Fraction:
    """Return the decimal number that Python, and YAML, write for it."""
    return Fraction(Decimal(str(number)))


@given(FRACTIONS, FRACTIONS, st.floats(0, 1, exclude_min=True), st.data())
def test_the_parts_are_disjoint_and_none_is_lost(validation, test, subsample, data):
    assume(exact(validation) + exact(test) < 1)
    first, end = int(exact(validation) * 2**64), 2**64 - int(exact(test) * 2**64)
    stop = first + int(exact(subsample) * (end - first))
    near = [at + step for at in (first, end, stop) for step in (-1, 0, 1)]
    drawn = data.draw(st.lists(st.integers(0, LAST_HASH), max_size=20))
    hashes = [0, LAST_HASH, *(each for each in near if 0 <= each <= LAST_HASH), *drawn]
    parts = [
        each.holds(np.array(hashes, np.uint64)).tolist()
        for each in (
            held_out_hashes(validation),
            training_hashes(validation, subsample, test),
            hashes_of_test_split(test),
        )
    ]
    assert parts[0] == [each < first for each in hashes]
    assert parts[1] == [first <= each < stop for each in hashes]
    assert parts[2] == [each >= end for each in hashes]


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "en-fr", random_pairs(DOCUMENTS, 5, 1), seed=1, first_token=20_000)
    write_corpus(tmp_path / "en", random_lengths(DOCUMENTS, 30, 0), first_token=100)
    return tmp_path


def run(folder: Path, texts: dict | None = None, pairs: dict | None = None, **keys: Any) -> Any:
    tasks = {
        "en": {"corpus": "en"} | (texts or {}),
        "en-fr": {"corpus": "en-fr", "kind": "translation"} | (pairs or {}),
    }
    phases = [phase("one", 80, {"rates": {"en": 0.5, "en-fr": 0.5}})]
    return write_run(folder, ["en"], tasks=tasks, phases=phases, **keys)


def documents_of(stream: Stream) -> set[int]:
    starts = stream.first_starts(stream.samples_per_epoch).tolist()
    return {document for start in starts for document, _, _ in stream.pieces(0, *start)}


def parts_of(spec: PlanSpec, task: str) -> list[set[int]]:
    """Return the documents for validation, training and test."""
    return [documents_of(each[task]) for each in (spec.held_out, spec.streams, spec.test)]


def test_training_and_validation_never_see_the_test_split(corpora: Path) -> None:
    usual = spec_of(run(corpora))
    assert not usual.test
    for subsample in ({}, {"subsample": 0.5}):
        spec = spec_of(run(corpora, subsample, subsample, test={"fraction": 0.3}))
        for task in TASKS:
            validation, training, test = parts_of(spec, task)
            assert test
            assert not test & (training | validation)
            assert not training & validation
            assert validation == documents_of(usual.held_out[task])
            assert training < documents_of(usual.streams[task])
            if not subsample:
                assert len(validation | training | test) == DOCUMENTS


def test_a_larger_fraction_takes_documents_from_training_alone(corpora: Path) -> None:
    spec = spec_of(run(corpora, test={"fraction": 0.2}))
    more_test = spec_of(run(corpora, test={"fraction": 0.3}))
    more_validation = spec_of(run(corpora, test={"fraction": 0.2}, validation={"fraction": 0.4}))
    for task in TASKS:
        validation, training, test = parts_of(spec, task)
        larger = parts_of(more_test, task)
        assert larger[0] == validation
        assert larger[1] < training
        assert larger[2] > test
        larger = parts_of(more_validation, task)
        assert larger[0] > validation
        assert larger[1] < training
        assert larger[2] == test


def test_a_task_may_have_its_own_fraction(corpora: Path) -> None:
    only = spec_of(run(corpora, {"test": 0.4}))
    assert list(only.test) == ["en"]
    both = spec_of(run(corpora, {"test": 0.4}, test={"fraction": 0.2}))
    assert documents_of(both.test["en"]) == documents_of(only.test["en"])
    assert list(both.test) == list(TASKS)


def first_rows(stream: Stream) -> list[list[int]]:
    return [[d, *piece] for start in stream.first_starts(12).tolist()
            for d, *piece in stream.pieces(0, *start)]  # fmt: skip


def test_neither_seed_nor_subsample_changes_the_test_samples(corpora: Path) -> None:
    keys = {"fraction": 0.3}
    specs = [
        spec_of(run(corpora, subsample, subsample, test=keys, seed=seed))
        for seed, subsample in [(1, {}), (2, {}), (1, {"subsample": 0.5})]
    ]
    for task in TASKS:
        found = [first_rows(spec.test[task]) for spec in specs]
        assert found[0] == found[1] == found[2]


def test_the_sample_of_training_documents_is_the_same_for_all_seeds(corpora: Path) -> None:
    def sample(config: RunConfig) -> tuple[PlanSpec, dict[str, Stream]]:
        spec = spec_of(config)
        corpora = {task: stream.corpus for task, stream in spec.streams.items()}
        return spec, open_streams(config, corpora, spec.bos, "training sample")

    keys = {"fraction": 0.3}
    (spec, one), (_, other), (zero, at_zero) = (
        sample(run(corpora, test=keys, seed=seed)) for seed in (1, 2, 0)
    )
    for task in TASKS:
        assert first_rows(one[task]) == first_rows(other[task]) == first_rows(at_zero[task])
        assert documents_of(one[task]) == documents_of(spec.streams[task])
        # Not the order in which a run of that seed reads them.
        assert first_rows(zero.streams[task]) != first_rows(at_zero[task])


def test_the_test_split_is_part_of_the_fingerprints(corpora: Path) -> None:
    usual = spec_of(run(corpora))
    split = spec_of(run(corpora, test={"fraction": 0.3}))
    of_task = spec_of(run(corpora, {"test": 0.3}))
    samples = spec_of(run(corpora, test={"samples": 7}))
    assert len({usual.fingerprint, split.fingerprint, of_task.fingerprint}) == 3
    assert samples.fingerprint == usual.fingerprint
    assert split.stream_fingerprints["en"] == of_task.stream_fingerprints["en"]
    assert split.stream_fingerprints["en"] != usual.stream_fingerprints["en"]
    assert of_task.stream_fingerprints["en-fr"] == usual.stream_fingerprints["en-fr"]


def test_the_plan_tells_its_size(corpora: Path, tmp_path: Path) -> None:
    from plan_support import build_plan

    plan: Plan = build_plan(run(corpora, {"test": 0.4, "subsample": 0.5}))
    facts = plan.summary()["tasks"]
    assert facts["en"]["test_documents"] == len(documents_of(plan.spec.test["en"]))
    assert "test_documents" not in facts["en-fr"]
    [sentence] = subsample_sentences(run(corpora, {"test": 0.4, "subsample": 0.5}), plan.summary())
    assert sentence.endswith("subsample of 0.5 of what is not held out or in the test split")


def refused(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        spec_of(config)
    return str(error.value)


def test_a_split_that_is_empty_or_leaves_nothing_is_refused(corpora: Path) -> None:
    path = corpora / "run.yaml"
    assert refused(run(corpora, test={"fraction": 1e-9})) == (
        f"{path}: test.fraction: 1e-09 takes for the test split none of the {DOCUMENTS} documents "
        f"of {corpora}/en; raise it"
    )
    with pytest.raises(InputError) as error:
        run(corpora, {"test": 0.8})
    assert str(error.value) == (
        f"{path}: tasks.en.test: is 0.8, and validation.fraction is 0.2: nothing of en is left to "
        "train on; lower one of them"
    )
    message = refused(run(corpora, {"test": 0.7999999}))
    assert message.startswith(f"{path}: validation.fraction: 0.2 holds out ")
    assert ", tasks.en.test takes 0.8 of them for the test split, and the 0 tokens" in message
