"""Numbers of corpora are found once, and the corpora are verified before documents are visited."""

from __future__ import annotations

import pytest
from plan_support import PLAN_PHASES, FakeTokenizer, write_run, write_three_tasks

from megaphase.config.run import RunConfig
from megaphase.plan import load_plan
from megaphase.plan.corpus_counts import COUNTS_FILE, CorpusCounts
from megaphase.plan.held_out_noise import held_out_warnings
from megaphase.plan.plan import Plan


@pytest.fixture
def verified(monkeypatch) -> list[str]:
    """Gets an entry whenever the corpora are verified; all of them count as large."""
    found: list[str] = []
    monkeypatch.setattr(load_plan, "SMALL_BYTES", -1)
    monkeypatch.setattr(load_plan, "check_files", lambda corpora: found.append("verified"))
    return found


def shown(config: RunConfig, **options: bool) -> tuple[Plan, list[object]]:
    """Open the plan as `megaphase plan` does; return it and what that command shows of it."""
    plan = load_plan.preview_plan(config, FakeTokenizer(), **options)
    figures = [plan.summary(), held_out_warnings(config, plan.spec)]
    plan.store_counts()
    return plan, figures


def test_a_plan_that_is_built_is_shown_without_visiting_documents(tmp_path, verified):
    config, written = write_three_tasks(tmp_path)
    _, expected = shown(config)
    assert verified == ["verified"]
    plan, figures = shown(config)
    assert verified == ["verified"]
    assert figures == expected

    plan.spec.streams["en"].first_starts(1)
    plan.spec.held_out["hi"].first_starts(1)
    assert verified == 2 * ["verified"]  # once for all documents that are visited
    shown(config, whole=True)
    assert verified == 3 * ["verified"]

    for path in plan.folder.iterdir():
        path.unlink()
    plan.folder.rmdir()
    assert shown(config)[1] == expected  # the index is built of verified corpora
    assert verified == 4 * ["verified"]

    other = write_run(
        tmp_path, list(written), phases=PLAN_PHASES, validation={"fraction": 0.3}, output="other"
    )
    shown(other)
    assert verified == 5 * ["verified"]


@pytest.mark.parametrize("content", ["{", "[]", '{"counts": {}}', '{"counts": {"a": [1]}}'])
def test_a_damaged_file_of_counts_is_not_used(tmp_path, verified, content):
    config, _ = write_three_tasks(tmp_path)
    plan, expected = shown(config)
    stored = plan.folder.parent / COUNTS_FILE
    whole = stored.read_bytes()
    stored.write_text(content)
    assert shown(config)[1] == expected
    assert verified == 2 * ["verified"]
    assert stored.read_bytes() == whole


def test_what_is_not_used_any_more_is_not_stored(tmp_path):
    counts = CorpusCounts({"old": [1.0]})
    assert counts.of(["documents", "en"], lambda: [3, 2.5]) == [3, 2.5]
    counts.store(tmp_path)
    stored = CorpusCounts.stored(tmp_path)
    assert list(stored.known.values()) == [[3, 2.5]]
    assert stored.of(["documents", "en"], lambda: pytest.fail("it is known")) == [3, 2.5]
