"""The split into held-out and training documents, in streams, plans and translations."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_support import (
    FakeTokenizer,
    ReferenceStream,
    build_plan,
    contents,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
    write_three_tasks,
)
from translation_support import (
    EOD,
    TAG,
    Pairs,
    ReferencePackedStream,
    random_hashes,
    random_pairs,
    write_documents,
    write_pairs,
)

from megaphase.config.run import RunConfig
from megaphase.generation.pairs import held_out_pairs
from megaphase.plan.plan import Plan
from megaphase.plan.preview import subsample_sentences
from megaphase.plan.split import held_out_hashes, training_hashes
from megaphase.plan.stream import Stream
from megaphase.utils.errors import InputError

FRACTION, FILLER = 0.2, 59_999
SAMPLES = 160
LAST_HASH = 2**64 - 1
PHASES = [phase("one", 80, {"rates": {"en": 0.5, "en-fr": 0.5}})]
PAIRS = {"corpus": "en-fr", "kind": "translation"}


# --- ranges of hashes ---


FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
SUBSAMPLES = st.floats(0, 1, exclude_min=True)


@st.composite
def hashes_near(draw, limits: list[int]) -> np.ndarray:
    """Return arbitrary hashes, and hashes on both sides of the limits."""
    near = [limit + step for limit in limits for step in (-1, 0, 1) if 0 <= limit + step < 2**64]
    drawn = draw(st.lists(st.integers(0, LAST_HASH), max_size=20))
    return np.array([0, LAST_HASH, *near, *drawn], np.uint64)


def exact(number: float) -> Fraction:
    """Return the decimal number that Python, and YAML, write for it."""
    return Fraction(Decimal(str(number)))


@given(FRACTIONS, SUBSAMPLES, SUBSAMPLES, st.data())
def test_sides_are_disjoint_and_subsamples_nested(fraction, one, other, data):
    threshold = int(exact(fraction) * 2**64)
    ends = [threshold + exact(each) * (2**64 - threshold) for each in sorted([one, other])]
    hashes = data.draw(hashes_near([threshold, *(int(end) for end in ends)]))
    held_out = held_out_hashes(fraction).holds(hashes)
    assert held_out.tolist() == [each < threshold for each in hashes.tolist()]
    smaller, larger = (
        training_hashes(fraction, each).holds(hashes) for each in sorted([one, other])
    )
    for found, end in ((smaller, ends[0]), (larger, ends[1])):
        # Whole hashes only: the last one is taken where all of it is within the subsample.
        assert found.tolist() == [threshold <= each <= end - 1 for each in hashes.tolist()]
    assert not (smaller & ~larger).any()
    assert not (larger & held_out).any()
    assert (training_hashes(fraction).holds(hashes) == ~held_out).all()


# --- plans ---


@pytest.fixture
def written(tmp_path):
    pairs = write_pairs(tmp_path / "en-fr", random_pairs(90, 5, 1), seed=1, first_token=20_000)
    return write_corpus(tmp_path / "en", random_lengths(90, 30, 0), first_token=100), pairs


def run(folder: Path, texts: dict | None = None, pairs: dict | None = None) -> RunConfig:
    tasks = {"en": {"corpus": "en"} | (texts or {}), "en-fr": PAIRS | (pairs or {})}
    return write_run(folder, ["en"], tasks=tasks, phases=PHASES)


def read_inputs(plan: Plan) -> dict[int, list[list[int]]]:
    """Return the inputs of all samples of the first phase, by task."""
    samples = plan.samples(0, 0, 2 * SAMPLES)
    inputs, targets, documents = (np.zeros((2 * SAMPLES, 8), np.int64) for _ in range(3))
    plan.read(samples, inputs, targets, FILLER, documents)
    return {task: inputs[rows].tolist() for task, rows in samples.by_task()}


def documents_of(stream: Stream) -> set[int]:
    starts = stream.first_starts(stream.samples_per_epoch).tolist()
    return {document for start in starts for document, _, _ in stream.pieces(0, *start)}


@pytest.mark.parametrize("held_out", [None, 0.4])
@pytest.mark.parametrize("subsample", [0.25, 0.7, 1])
def test_a_plan_reads_what_the_references_read(tmp_path, written, held_out, subsample):
    texts, pairs = written
    fraction = held_out or FRACTION
    keys = {"subsample": subsample} | ({"held_out": held_out} if held_out else {})
    plan = build_plan(run(tmp_path, keys, keys))
    found = read_inputs(plan)
    of_texts = ReferenceStream("en", texts, 8, fraction, subsample=subsample)
    assert found[0] == [(sample + [FILLER] * 8)[:8] for sample in of_texts.first(SAMPLES)]
    packed = ReferencePackedStream("en-fr", pairs, 8, fraction, subsample=subsample)
    rows = [row for epoch in range(40) for row in packed.rows(packed.epoch(epoch), FILLER)]
    assert found[1] == [row.inputs for row in rows[:SAMPLES]]
    summary = plan.summary()["tasks"]
    for task, corpus, lengths in (
        ("en", texts, texts.lengths),
        ("en-fr", pairs, [len(each) for each in pairs.documents]),
    ):
        here = [
            length
            for length, read in zip(
                lengths, corpus.on_side(side="training", fraction=fraction, subsample=subsample),
                strict=True,
            )
            if read
        ]  # fmt: skip
        assert summary[task] == {
            "documents": len(here),
            "tokens": sum(here),
            "held_out_documents": sum(corpus.on_side(side="held out", fraction=fraction)),
            "text_bytes": 3 * sum(here),
        }


def test_a_smaller_subsample_is_part_of_a_larger_one_and_validation_stays(tmp_path, written):
    specs = [spec_of(run(tmp_path, keys, keys)) for keys in ({}, *subsamples(0.6, 0.2))]
    for task in ("en", "en-fr"):
        trained_on = [documents_of(spec.streams[task]) for spec in specs]
        held_out = [documents_of(spec.held_out[task]) for spec in specs]
        assert trained_on[0] > trained_on[1] > trained_on[2] > set()
        assert held_out[0] == held_out[1] == held_out[2]
        assert not trained_on[0] & held_out[0]
        assert len(trained_on[0] | held_out[0]) == 90


def subsamples(*fractions: float) -> list[dict]:
    return [{"subsample": each} for each in fractions]


def test_tasks_hold_out_what_they_say(tmp_path, written):
    usual, own = (spec_of(run(tmp_path, keys)) for keys in ({}, {"held_out": 0.5}))
    more, less = (documents_of(spec.held_out["en"]) for spec in (own, usual))
    assert more > less
    assert documents_of(own.held_out["en-fr"]) == documents_of(usual.held_out["en-fr"])
    pairs = documents_of(spec_of(run(tmp_path, pairs={"held_out": 0.5})).held_out["en-fr"])
    assert pairs > documents_of(usual.held_out["en-fr"])


def test_runs_that_say_nothing_keep_their_fingerprints(tmp_path):
    """As in checkpoints and plans from before these keys existed."""
    config, _ = write_three_tasks(tmp_path)
    spec = spec_of(config)
    assert spec.fingerprint == "426b27267d6189daf8a873e6dba7a10a"
    assert spec.stream_fingerprints == {
        "en": "8250eeacc762704c54628d2a8f2f2443",
        "hi": "d871addd9c90c344a588c20bfc609fca",
        "no": "e67c324dae0acde764b4bc04adaf3d89",
    }
    write_pairs(tmp_path / "en-fr", random_pairs(40, 5, 1), seed=1, first_token=20_000)
    spec = spec_of(write_run(tmp_path, ["en"], tasks={"en": {"corpus": "en"}, "en-fr": PAIRS}))
    assert spec.fingerprint == "75b2f16c02693aad557633fd9a60739f"
    assert spec.stream_fingerprints["en-fr"] == "1b105011040820a74d1c285b103f10a2"


def test_what_changes_the_documents_changes_the_names_of_plan_and_stream(tmp_path, written):
    cases = ({}, {"held_out": 0.3}, *subsamples(0.3, 0.5), {"held_out": 0.3, "subsample": 0.3})
    specs = [spec_of(run(tmp_path, keys)) for keys in cases]
    assert len({spec.fingerprint for spec in specs}) == len(cases)
    assert len({spec.stream_fingerprints["en"] for spec in specs}) == len(cases)
    assert len({spec.stream_fingerprints["en-fr"] for spec in specs}) == 1
    usual = spec_of(run(tmp_path, {"held_out": FRACTION, "subsample": 1}))
    assert usual.fingerprint == specs[0].fingerprint


def test_all_of_a_task_is_the_plan_of_the_task_without_a_subsample(tmp_path, written):
    first = build_plan(run(tmp_path))
    before = contents(first.folder)
    again = build_plan(run(tmp_path, {"subsample": 1.0}))
    assert again.folder == first.folder
    assert contents(again.folder) == before


def test_the_preview_names_subsamples(tmp_path, written):
    config = run(tmp_path, {"subsample": 0.25}, {"subsample": 1})
    facts = build_plan(config).summary()
    en = facts["tasks"]["en"]
    assert subsample_sentences(config, facts) == [
        f"en is trained on {en['documents']} documents of {en['tokens']} tokens, a subsample of "
        "0.25 of what is not held out"
    ]


# --- mistakes ---


def refused(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        build_plan(config)
    message = str(error.value)
    assert "\n" not in message
    assert not config.output.exists()
    return message


def test_a_subsample_that_leaves_too_little(tmp_path, written):
    config = run(tmp_path, {"subsample": 1e-9})
    assert refused(config) == (
        f"{config.path}: tasks.en.subsample: 1e-09 takes 0 of the 90 documents of {tmp_path}/en, "
        "and the 0 tokens that are left are fewer than one sample of seq_len + 1 = 9; raise it, "
        "add text or lower model.seq_len"
    )
    config = run(tmp_path, pairs={"subsample": 1e-9})
    assert refused(config) == (
        f"{config.path}: tasks.en-fr.subsample: 1e-09 takes 0 of the 90 documents of "
        f"{tmp_path}/en-fr, and none is left to train on; raise it or add text"
    )


def test_a_task_that_holds_out_too_little_or_too_much(tmp_path, written):
    config = run(tmp_path, {"held_out": 1e-9})
    assert refused(config) == (
        f"{config.path}: tasks.en.held_out: 1e-09 holds out none of the 90 documents of "
        f"{tmp_path}/en; raise it"
    )
    config = run(tmp_path, pairs={"held_out": 0.999999})
    assert refused(config).startswith(
        f"{config.path}: tasks.en-fr.held_out: 0.999999 holds out 90 of the 90 documents of "
    )


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"subsample": 0}, "subsample: must be greater than 0; found 0"),
        ({"subsample": 1.01}, "subsample: must be at most 1; found 1.01"),
        ({"held_out": 1}, "held_out: must be less than 1; found 1"),
        ({"held_out": 0}, "held_out: must be greater than 0; found 0"),
        ({"subsample": True}, "subsample: "),
    ],
)
def test_fractions_that_are_none(tmp_path, keys, problem):
    with pytest.raises(InputError) as error:
        run(tmp_path, keys)
    assert f"tasks.en.{problem}" in str(error.value)


def test_altered_lengths_are_found_under_a_subsample(tmp_path, written):
    path = tmp_path / "en.idx"
    data = bytearray(path.read_bytes())
    data[34:38] = np.int32(1000).tobytes()
    path.write_bytes(data)
    texts, _ = written
    message = refused(run(tmp_path, {"subsample": 0.5}))
    total = sum(texts.lengths)
    assert message == (
        f"{path}: its lengths sum to {total - texts.lengths[0] + 1000:,} tokens, the manifest says "
        f"{total:,}; tokenize again"
    )


# --- translations ---


class NumberTokenizer(FakeTokenizer):
    def decode(self, ids) -> str:
        return " ".join(str(token) for token in ids if token != EOD)


def test_translated_are_the_pairs_that_the_task_holds_out(tmp_path, written):
    _, pairs = written
    for keys, fraction in (({}, FRACTION), ({"held_out": 0.5, "subsample": 0.1}, 0.5)):
        config = run(tmp_path, pairs=keys)
        found = held_out_pairs(config, "en-fr", NumberTokenizer(), None)  # type: ignore[arg-type]
        here = pairs.on_side("held out", fraction)
        expected = sorted(zip(pairs.hashes, pairs.documents, here, strict=True))
        assert [pair.prompt for pair in found] == [
            document[: document.index(TAG) + 1] for _, document, read in expected if read
        ]
    with pytest.raises(InputError, match=r"tasks\.en-fr\.held_out: 1e-09 holds out none"):
        held_out_pairs(
            run(tmp_path, pairs={"held_out": 1e-9}), "en-fr", NumberTokenizer(), None  # type: ignore[arg-type]
        )  # fmt: skip


def test_pairs_of_the_test_split_have_the_highest_hashes(tmp_path, written):
    _, pairs = written
    config = run(tmp_path, pairs={"test": 0.3, "subsample": 0.1})
    found = held_out_pairs(config, "en-fr", NumberTokenizer(), None, "test")  # type: ignore[arg-type]
    expected = sorted(zip(pairs.hashes, pairs.documents, strict=True))
    assert [pair.prompt for pair in found] == [
        document[: document.index(TAG) + 1]
        for hashed, document in expected
        if hashed >= 2**64 - int(Fraction("0.3") * 2**64)
    ]
    with pytest.raises(InputError, match=r"test\.fraction: is missing: en-fr has no test split;"):
        held_out_pairs(run(tmp_path), "en-fr", NumberTokenizer(), None, "test")  # type: ignore[arg-type]


def test_all_targets_of_a_source_are_within_a_subsample_or_none(tmp_path):
    hashes = random_hashes(60, 4)
    pairs = Pairs(random_pairs(120, 4, 4), hashes * 2)
    write_documents(tmp_path / "en-fr", pairs.documents, pairs.hashes)
    write_corpus(tmp_path / "en", random_lengths(40, 30, 0), first_token=100)
    chosen = documents_of(spec_of(run(tmp_path, pairs={"subsample": 0.4})).streams["en-fr"])
    assert {document % 60 for document in chosen if document < 60} == {
        document % 60 for document in chosen if document >= 60
    }
    assert 0 < len(chosen) < 60
