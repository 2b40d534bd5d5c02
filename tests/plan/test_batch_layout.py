"""Batches that the processes cannot share are refused when a run is planned, as when it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_support import FakeTokenizer, phase, random_lengths, spec_of, write_corpus, write_run
from typer.testing import CliRunner

from megaphase.config.run import RunConfig
from megaphase.plan.batch_layout import check_batches, check_batches_beforehand
from megaphase.plan.commands import plan_app
from megaphase.plan.load_plan import preview_plan
from megaphase.utils.errors import InputError

EN: dict[str, Any] = {"rates": {"en": 1.0}}
RAMP = {"samples": 8, "micro": 4, "ramp": {"from": 2, "step": 2, "tokens": 10_000}}
OWN = {"batch": {"samples": 4}}
# Samples have 8 tokens, so 7 steps of 4 samples are the first that reach half of the ramp; then
# come 6 samples, which are no multiple of micro.
LONG = {"samples": 8, "micro": 4, "ramp": {"from": 4, "step": 2, "tokens": 400}}
CASES = [
    # The ramp begins in the second phase, as the first has a batch of its own.
    (RAMP, [("one", {"steps": 3} | OWN), ("two", {"steps": 30})], "2 samples, .* of two .* 1 on,"),
    (RAMP, [("one", {"tokens": 96} | OWN), ("two", {"steps": 30})], "2 samples, .* of two .* 1 on"),
    # The ramp continues in the second phase.
    (LONG, [("one", {"steps": 5}), ("two", {"steps": 30})], "6 samples, .* of two .* step 3 on,"),
]


def run_of(folder: Path, batch: dict[str, Any], phases: list[tuple[str, Any]]) -> RunConfig:
    if not (folder / "en.bin").exists():
        write_corpus(folder / "en", random_lengths(60, 30, 0))
    each = [phase(name, 0, EN) | {"steps": None} | length for name, length in phases]
    return write_run(folder, ["en"], batch=batch, phases=each)


@pytest.mark.parametrize(("batch", "phases", "said"), CASES)
def test_a_ramp_is_checked_in_every_phase(
    tmp_path: Path, batch: dict[str, Any], phases: list[tuple[str, Any]], said: str
) -> None:
    config = run_of(tmp_path, batch, phases)
    with pytest.raises(InputError, match=rf"run\.yaml: batch\.ramp: {said}"):
        check_batches_beforehand(config, 1)
    config = run_of(tmp_path, batch | {"micro": 2}, phases)
    check_batches_beforehand(config, 1)


def test_a_ramp_that_ends_before_a_batch_is_reached_needs_no_share_of_it(tmp_path: Path) -> None:
    config = run_of(tmp_path, LONG, [("one", {"steps": 5}), ("two", {"steps": 2})])
    check_batches_beforehand(config, 1)
    check_batches(config, spec_of(config), 1)


# The first phase's length is known only with its corpus.
UNKNOWN = [("one", {"epochs": {"en": 0.05}} | OWN), ("two", {"steps": 30})]


def test_the_plan_is_checked_where_the_run_file_does_not_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path, RAMP, UNKNOWN)
    check_batches_beforehand(config, 1)
    refused = r"batch\.ramp: 2 samples, the batch of two from its step 1 on, is not a multiple of"
    with pytest.raises(InputError, match=refused):
        preview_plan(config, FakeTokenizer(), processes=1)  # type: ignore[arg-type]
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: FakeTokenizer())
    result = CliRunner().invoke(plan_app, [str(tmp_path / "run.yaml")])
    assert "batch.ramp: 2 samples, the batch of two from its step 1 on" in str(result.exception)
    assert not config.output.exists()
