"""Plans whose phases have different sequence lengths: samples, ranks, early ends, branches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from length_changes import ReferenceDraws, ReferencePackedDraws
from plan_support import (
    Documents,
    ReferenceStream,
    as_rows,
    build_plan,
    contents,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
)
from rich.console import Console
from translation_support import Pairs, ReferencePackedStream, random_pairs, write_pairs

from megaphase.plan.dataset import StepReader, read_step
from megaphase.plan.origin import RunOrigin
from megaphase.plan.plan import Plan
from megaphase.plan.position import StreamPosition
from megaphase.plan.preview import plan_table
from megaphase.plan.trace import trace_step
from megaphase.utils.targets import IGNORED_TARGET

FILLER, FRACTION, WINDOW = 59_999, 0.2, 16
TASKS = {
    "en": {"corpus": "en"},
    "hi": {"corpus": "hi", "attend_across_documents": False},
    "en-hi": {"corpus": "en-hi", "kind": "translation"},
}
# (steps, seq_len): down and up again within the epochs of all tasks.
LENGTHS = [(9, 8), (7, 16), (5, 4), (40, 32)]

Written = tuple[dict[str, Documents], Pairs]


def phases_of(lengths: list[tuple[int, int]], first: int = 0) -> list[dict[str, Any]]:
    return [
        phase(f"phase-{first + number}", steps, {"rates": {"en": 0.5, "hi": 0.25, "en-hi": 0.25}})
        | ({} if seq_len == 8 else {"model": {"seq_len": seq_len}})
        for number, (steps, seq_len) in enumerate(lengths)
    ]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr("megaphase.plan.stream.SAMPLE_WINDOW", WINDOW)


@pytest.fixture
def written(tmp_path) -> Written:
    texts = {
        "en": write_corpus(tmp_path / "en", random_lengths(60, 30, 0), seed=0),
        "hi": write_corpus(tmp_path / "hi", random_lengths(30, 30, 1), seed=1, first_token=9000),
    }
    return texts, write_pairs(tmp_path / "en-hi", random_pairs(80, 6, 3), seed=2)


def planned(folder: Path, lengths: list[tuple[int, int]] = LENGTHS, **changes: Any) -> Plan:
    changes = {"phases": phases_of(lengths), "tasks": TASKS} | changes
    return build_plan(write_run(folder, list(TASKS), **changes))


def draws_of(written: Written) -> dict[str, ReferenceDraws | ReferencePackedDraws]:
    texts, pairs = written
    found: dict[str, ReferenceDraws | ReferencePackedDraws] = {
        "en-hi": ReferencePackedDraws(ReferencePackedStream("en-hi", pairs, 8, FRACTION))
    }
    for task, documents in texts.items():
        here = documents.on_side("training", FRACTION)
        tokens = sum(n for n, read in zip(documents.lengths, here, strict=True) if read)
        reference = ReferenceStream(task, documents, 8, FRACTION)
        found[task] = ReferenceDraws(tokens - 1, WINDOW, reference)
    return found


def joined(reference: ReferenceStream, epoch: int, known: dict[int, list[int]]) -> list[int]:
    """Return the tokens of an epoch, which are stored in `known`."""
    if epoch in known:
        return known[epoch]
    parts = reference.in_token_order(epoch)
    known[epoch] = [parts[0][0], *(token for sample in parts for token in sample[1:])]
    return known[epoch]


def check_phase(
    plan: Plan, number: int, steps: int, draws: dict[str, Any], starts: list[StreamPosition] | None
) -> None:
    """Compare a phase's first steps with the next samples of the references, by trace."""
    seq_len, known = plan.spec.phases[number].kind.seq_len, {}  # type: ignore[var-annotated]
    for step in range(steps):
        batch = read_step(plan, number, step, 0, 1, FILLER, starts)
        assert batch.inputs.shape == (4, seq_len)
        halves = [read_step(plan, number, step, r, 2, FILLER, starts) for r in range(2)]
        assert [row for half in halves for row in as_rows(half)] == as_rows(batch)
        for sample in sorted(trace_step(plan, number, step + 1, starts), key=lambda s: s.ordinal):
            [(epoch, expected)] = draws[sample.task].draw(seq_len, 1)
            assert sample.epoch == epoch
            pieces = [(piece.document, piece.first, piece.last) for piece in sample.pieces]
            if sample.task == "en-hi":
                assert pieces == expected
                continue
            documents = draws[sample.task].stream.documents
            tokens = joined(draws[sample.task].stream, epoch, known.setdefault(sample.task, {}))
            wanted = {tokens[p + 1] for p in expected}
            traced = {t for d, a, b in pieces for t in documents.tokens(d)[a:b]}
            assert wanted <= traced
            targets = [t for t in batch.targets[sample.row].tolist() if t != IGNORED_TARGET]
            if sample.task == "en":
                assert targets == [tokens[p + 1] for p in expected]
            assert set(targets) <= wanted


def test_phases_continue_the_streams_of_the_references(tmp_path, written):
    plan, draws = planned(tmp_path), draws_of(written)
    for number, (steps, _) in enumerate(LENGTHS):
        check_phase(plan, number, steps, draws, None)


def test_phases_that_end_early_leave_what_they_did_not_take(tmp_path, written):
    plan, draws = planned(tmp_path), draws_of(written)
    actual = [4, 7, 1]
    for number in range(4):
        starts = plan.positions(actual[:number])
        steps = [*actual, 40][number]
        check_phase(plan, number, steps, draws, starts)
    reader = StepReader(plan, 3, rank=0, ranks=1, pad_token_id=FILLER, starts=starts)
    rows = [as_rows(batch) for batch in reader.steps(2, 5)]
    assert rows == [as_rows(read_step(plan, 3, s, 0, 1, FILLER, starts)) for s in range(2, 5)]
    with pytest.raises(ValueError, match="several lengths"):
        plan.samples(3, 0, 4, np.zeros(3, np.int64))


@pytest.mark.parametrize("done", [[9], [4, 7], [9, 7, 2]])
def test_a_branch_continues_the_streams(tmp_path, written, done):
    plan, draws = planned(tmp_path), draws_of(written)
    for number, steps in enumerate(done):
        check_phase(plan, number, steps, draws, plan.positions(done[:number]))
    # As origin.json records it; a plain number counts samples of the model section's length.
    at = dict(zip(plan.tasks, plan.positions(done), strict=True))
    used = {task: start.samples for task, start in at.items()}
    segments = {task: start for task, start in at.items() if not start.is_plain(plan.spec.kind)}
    origin = RunOrigin(sum(done), used, 1, "a@b", tmp_path, segments)
    assert ("segments" in origin.to_json()) == (len(done) > 1)
    again = RunOrigin.from_json(origin.to_json())
    config = write_run(tmp_path, list(TASKS), phases=phases_of(LENGTHS[3:], 3), tasks=TASKS)
    branch = build_plan(config, again.positions)  # type: ignore[arg-type]
    assert branch.spec.used == used
    assert branch.first_ordinals([]).tolist() == list(used.values())
    check_phase(branch, 0, 40, draws, None)


def test_the_table_shows_lengths_and_counts_epochs_by_positions(tmp_path, written):
    plan = planned(tmp_path)
    summary = plan.summary()
    assert [each["seq_len"] for each in summary["phases"]] == [8, 16, 4, 32]
    tokens, used = plan.spec.streams["en"].tokens, 0
    draws = draws_of(written)["en"]
    for number, (steps, seq_len) in enumerate(LENGTHS):
        samples = draws.draw(seq_len, 2 * steps)
        used += sum(len(positions) for _, positions in samples)
        figures = summary["phases"][number]["tasks"]["en"]
        assert figures["tokens"] == 2 * steps * seq_len
        assert figures["epochs_so_far"] == pytest.approx(used / (tokens - 1))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(plan_table(summary))
    header, *_ = [line for line in capture.get().splitlines() if "requested" in line]
    assert header.split()[:5] == ["phase", "task", "steps", "seq_len", "tokens"]


def test_a_plan_of_one_length_has_the_index_and_fingerprint_of_earlier_versions(
    tmp_path, monkeypatch
):
    """The hashes are those of the version before phases had lengths."""
    monkeypatch.undo()
    write_corpus(tmp_path / "en", random_lengths(40, 30, 0), seed=0)
    write_corpus(tmp_path / "hi", random_lengths(30, 30, 1), seed=1, first_token=9000)
    write_pairs(tmp_path / "en-hi", random_pairs(60, 6, 3), seed=2)
    unimax = {"unimax": True, "max_epochs": 1.5, "over": list(TASKS)}
    config = write_run(
        tmp_path,
        list(TASKS),
        tasks=TASKS,
        phases=[phase("one", 12, {"rates": {"en": 0.75, "hi": 0.25}}), phase("two", 20, unimax)],
    )
    for used, fingerprint, starts in [
        (None, "a05597e5a4dcaa65021233e72888c2c1", "6452f1367d20054c"),
        ({"en": 70, "en-hi": 5}, "5f5ef9e6ad5bd093f8348c4a5f323b86", "0ac8526f3f8429a9"),
    ]:
        plan = build_plan(config, used)
        assert plan.spec.fingerprint == fingerprint
        assert hashlib.sha256(contents(plan.folder)["starts"]).hexdigest()[:16] == starts
    assert spec_of(config).stream_fingerprints["en"] == "8250eeacc762704c54628d2a8f2f2443"
