"""Translation tasks in a plan: next to texts, over epochs and phases, rejected if invalid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import rewrite_manifest
from plan_support import (
    FakeTokenizer,
    ReferenceStream,
    build_plan,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
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
from megaphase.corpus import Corpus
from megaphase.plan.dataset import Batch, read_step
from megaphase.plan.stream import Stream
from megaphase.plan.trace import sample_texts, trace_step
from megaphase.utils.errors import InputError
from megaphase.utils.targets import IGNORED_TARGET

FILLER = 59_999
SEQ_LEN = 8
FRACTION = 0.2
STEPS = (15, 25)
PHASES = [
    phase("one", STEPS[0], {"rates": {"en": 0.5, "en-fr": 0.5}}),
    phase("two", STEPS[1], {"temperature": 3.3}),
]
PAIRS = {"corpus": "en-fr", "kind": "translation"}


def tasks(**of_pairs: Any) -> dict[str, Any]:
    return {"en": {"corpus": "en"}, "en-fr": PAIRS | of_pairs}


@pytest.fixture
def pairs(tmp_path) -> Pairs:
    return write_pairs(tmp_path / "en-fr", random_pairs(40, 5, 1), seed=1, first_token=20_000)


@pytest.fixture
def texts(tmp_path) -> Any:
    return write_corpus(tmp_path / "en", random_lengths(40, 30, 0), first_token=100)


def run(folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"tasks": tasks(), "phases": PHASES}
    return write_run(folder, ["en"], **settings | changes)


def numbers_of(batch: Batch) -> list[list[int]]:
    documents = batch.inputs * 0 if batch.documents is None else batch.documents
    return documents.tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_step_reads_texts_and_pairs_as_the_references_do(tmp_path, pairs, texts, ranks):
    plan = build_plan(run(tmp_path))
    packed = ReferencePackedStream("en-fr", pairs, SEQ_LEN, FRACTION)
    epochs = [packed.rows(packed.epoch(epoch), FILLER) for epoch in range(9)]
    expected_pairs = iter([row for epoch in epochs for row in epoch])
    expected_texts = iter(ReferenceStream("en", texts, SEQ_LEN, FRACTION).first(160))
    drawn = 0
    for number, steps in enumerate(STEPS):
        for step in range(steps):
            batches = [read_step(plan, number, step, r, ranks, FILLER) for r in range(ranks)]
            rows = zip(
                *(
                    [row for batch in batches for row in getter(batch)]
                    for getter in (_tasks, _inputs, _targets, numbers_of)
                ),
                strict=True,
            )
            for task, inputs, targets, numbers in rows:
                if task == 1:
                    row = next(expected_pairs)
                    assert (inputs, targets, numbers) == (row.inputs, row.targets, row.documents)
                    drawn += 1
                else:
                    sample = next(expected_texts)
                    assert inputs == (sample + [FILLER] * SEQ_LEN)[:SEQ_LEN]
                    assert targets == (sample[1:] + [IGNORED_TARGET] * SEQ_LEN)[:SEQ_LEN]
                    assert not any(numbers)
    assert drawn > 2 * len(epochs[0])  # the phases went through more than two epochs


def _tasks(batch: Batch) -> list[int]:
    return batch.tasks.tolist()


def _inputs(batch: Batch) -> list[list[int]]:
    return batch.inputs.tolist()


def _targets(batch: Batch) -> list[list[int]]:
    return batch.targets.tolist()


def test_a_plan_says_how_often_pairs_are_seen(tmp_path, pairs, texts):
    plan = build_plan(run(tmp_path))
    samples = len(ReferencePackedStream("en-fr", pairs, SEQ_LEN, FRACTION).in_token_order())
    facts = plan.summary()
    here = pairs.on_side("training", FRACTION)
    lengths = [len(each) for each, on_side in zip(pairs.documents, here, strict=True) if on_side]
    assert facts["tasks"]["en-fr"]["documents"] == len(lengths)
    assert facts["tasks"]["en-fr"]["tokens"] == sum(lengths)
    for each in facts["phases"]:
        shown = each["tasks"]["en-fr"]
        assert shown["epochs"] == shown["samples"] / samples
        assert shown["tokens"] == shown["samples"] * SEQ_LEN


def test_epochs_of_pairs_can_be_capped(tmp_path, pairs, texts):
    capped = [phase("one", 40, {"rates": {"en": 0.2, "en-fr": 0.8}, "max_epochs": 3})]
    plan = build_plan(run(tmp_path, phases=capped))
    assert plan.summary()["phases"][0]["tasks"]["en-fr"]["epochs"] == 3


class NumberTokenizer(FakeTokenizer):
    def decode(self, ids) -> str:
        return " ".join(str(token) for token in ids if token not in (EOD, TAG))


def test_a_trace_names_every_pair_of_a_sample(tmp_path, pairs, texts):
    plan = build_plan(run(tmp_path))
    packed = ReferencePackedStream("en-fr", pairs, SEQ_LEN, FRACTION)
    in_order, ordinal = packed.in_token_order(), 0
    for number, steps in enumerate(STEPS):
        for step in range(1, steps + 1):
            for sample in trace_step(plan, number, step):
                if sample.task != "en-fr":
                    continue
                found = [(each.document, each.first, each.last) for each in sample.pieces]
                assert found == in_order[sample.number]
                epoch, place = divmod(ordinal, len(in_order))
                assert (sample.ordinal, sample.epoch, sample.of) == (ordinal, epoch, len(in_order))
                assert found == packed.epoch(epoch)[place]
                ordinal += 1
                said = sample_texts(plan, sample, NumberTokenizer())  # type: ignore[arg-type]
                assert said == [expected_text(pairs, *piece) for piece in found]
    assert ordinal > 2 * len(in_order)


def expected_text(pairs: Pairs, document: int, first: int, last: int) -> str:
    sides: list[list[str]] = [[]]
    for token in pairs.documents[document][first:last]:
        if token == TAG:
            sides.append([])
        elif token != EOD:
            sides[-1].append(str(token))
    return " → ".join(" ".join(side) for side in sides)


def documents_of(stream: Stream) -> set[int]:
    starts = stream.first_starts(stream.samples_per_epoch).tolist()
    return {document for start in starts for document, _, _ in stream.pieces(0, *start)}


def test_the_split_goes_by_source(tmp_path):
    """The hash is that of the source: all its targets, in all corpora, are in one part."""
    hashes = random_hashes(60, 4)
    corpora = {
        "en-fr": Pairs(random_pairs(120, 4, 4), hashes * 2),
        "en-de": Pairs(random_pairs(60, 4, 9), hashes, 30_000),
    }
    for task, pairs in corpora.items():
        write_documents(tmp_path / task, pairs.documents, pairs.hashes)
    write_corpus(tmp_path / "en", random_lengths(40, 30, 0), first_token=100)
    spec = spec_of(run(tmp_path, tasks=tasks() | {"en-de": PAIRS | {"corpus": "en-de"}}))
    trained_on, held_out = (
        {
            task: [pairs.hashes[document] for document in documents_of(side[task])]
            for task, pairs in corpora.items()
        }
        for side in (spec.streams, spec.held_out)
    )
    assert set(held_out["en-fr"]) == set(held_out["en-de"])
    assert len(held_out["en-fr"]) == 2 * len(held_out["en-de"]) > 6
    assert set(trained_on["en-fr"]) == set(trained_on["en-de"])
    assert not set(trained_on["en-fr"]) & set(held_out["en-de"])


def refused(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        build_plan(config)
    message = str(error.value)
    assert "\n" not in message
    assert not config.output.exists()
    return message


def test_pairs_are_refused_as_texts_and_texts_as_pairs(tmp_path, pairs, texts):
    config = run(tmp_path, tasks=tasks(kind="lm"))
    assert refused(config) == (
        f"{config.path}: tasks.en-fr.kind: is lm, but {tmp_path}/en-fr holds translation pairs; "
        "write kind: translation, or name another corpus"
    )
    config = run(tmp_path, tasks=tasks() | {"en": {"corpus": "en", "kind": "translation"}})
    assert refused(config) == (
        f"{config.path}: tasks.en.kind: is translation, but {tmp_path}/en holds texts; "
        "write kind: lm, or name another corpus"
    )


def test_a_manifest_without_the_tag_is_refused(tmp_path, pairs, texts):
    rewrite_manifest(tmp_path / "en-fr", tag=None)
    assert refused(run(tmp_path)).startswith(f"{tmp_path / 'en-fr.json'}: ")


def test_too_few_pairs_to_hold_any_out_or_to_train_on(tmp_path, texts):
    write_documents(tmp_path / "en-fr", [[9, TAG, 9, EOD]] * 3, [2**64 - 1] * 3)
    config = run(tmp_path)
    assert refused(config) == (
        f"{config.path}: validation.fraction: 0.2 holds out none of the 3 documents of "
        f"{tmp_path}/en-fr; raise it"
    )
    for suffix in (".bin", ".idx", ".hash", ".sum", ".blocks", ".json"):
        (tmp_path / f"en-fr{suffix}").unlink()
    write_documents(tmp_path / "en-fr", [[9, TAG, 9, EOD]] * 3, [0] * 3)
    assert refused(config) == (
        f"{config.path}: validation.fraction: 0.2 holds out 3 of the 3 documents of "
        f"{tmp_path}/en-fr, and none is left to train on; lower it or add text"
    )


def test_held_out_pairs_without_a_target_are_refused(tmp_path, texts):
    write_documents(tmp_path / "en-fr", [[9, 9, 9, EOD], [9, TAG, 9, EOD]], [0, 2**64 - 1])
    config = run(tmp_path)
    assert refused(config) == (
        f"{config.path}: validation.fraction: 0.2 holds out 1 of the 2 documents of "
        f"{tmp_path}/en-fr, and none of the validation samples has a target; "
        "raise it, or tokenize again"
    )


def test_a_few_pairs_shorter_than_a_sample_are_enough(tmp_path, texts):
    write_documents(tmp_path / "en-fr", [[9, TAG, EOD], [8, TAG, EOD]], [0, 2**64 - 1])
    plan = build_plan(run(tmp_path))
    batch = read_step(plan, 0, 0, 0, 1, FILLER)
    rows = [row for row, task in enumerate(batch.tasks.tolist()) if task == 1]
    assert batch.inputs[rows].tolist() == [[8, TAG, EOD, *[FILLER] * 5]] * len(rows)
    ignored = IGNORED_TARGET
    assert batch.targets[rows].tolist() == [[ignored, EOD, *[ignored] * 6]] * len(rows)
    assert batch.documents is None  # one document a row needs no mask


def test_a_plan_belongs_to_the_tag_and_to_what_pairs_see(tmp_path, pairs, texts):
    def fingerprint(**of_pairs: Any) -> str:
        return spec_of(run(tmp_path, tasks=tasks(**of_pairs))).fingerprint

    first = fingerprint()
    assert fingerprint(attend_across_documents=False) == first
    assert fingerprint(attend_across_documents=True) != first
    rewrite_manifest(tmp_path / "en-fr", tag=TAG + 1)
    assert Corpus.open(tmp_path / "en-fr").manifest.tag == TAG + 1
    # The held-out pairs have another tag now, so none of their tokens is a target.
    with pytest.raises(InputError, match="none of the validation samples has a target"):
        fingerprint()


def test_pairs_may_see_each_other_and_texts_may_not(tmp_path, pairs, texts):
    seen = {"attend_across_documents": True}
    unseen = {"corpus": "en", "attend_across_documents": False}
    plan = build_plan(run(tmp_path, tasks={"en": unseen, "en-fr": PAIRS | seen}))
    numbers: dict[int, set[int]] = {0: set(), 1: set()}
    for step in range(STEPS[0]):
        batch = read_step(plan, 0, step, 0, 1, FILLER)
        for task, row in zip(batch.tasks.tolist(), numbers_of(batch), strict=True):
            numbers[task] |= set(row)
    assert numbers[1] == {0}
    assert numbers[0] > {0, 1}


def test_what_documents_see_must_be_yes_or_no(tmp_path):
    with pytest.raises(InputError, match=r"tasks\.en-fr\.attend_across_documents"):
        run(tmp_path, tasks=tasks(attend_across_documents="never"))
    with pytest.raises(InputError, match=r"tasks\.en-fr\.kind"):
        run(tmp_path, tasks=tasks(kind="translating"))
