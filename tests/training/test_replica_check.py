"""Copies of a parameter on several ranks are compared, and a run whose copies are unequal ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RunningRanks, once, run_ranks
from engine_support import build_engine, global_batch, run_config, share
from rehearsal_support import PROCESSES, VOCAB, needs_compiler, run_file
from run_support import make_corpora, megaphase, read_rows, run_settings, timeless, write_run_file
from torch import Tensor

from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.training.replica_check import PARTS, ReplicaCheck, checksum

NORM, MATRIX = "blocks.1.feed_forward_norm.weight", "blocks.0.attention.out.weight"
RANKS = 4
# Tensor-parallel size, ZeRO stage, whether sequence-parallel, precision, the altered parameter,
# and the ranks that share a copy with the last rank.
CASES = [
    (2, 0, False, "fp32", NORM, [1, 2, 3]),
    (2, 1, True, "bf16", NORM, [2, 3]),
    (2, 2, False, "bf16", NORM, [2, 3]),
    (2, 3, True, "fp32", NORM, [2, 3]),
    (1, 0, False, "bf16", MATRIX, [0, 1, 2, 3]),
]


def alter(parameter: Any) -> None:
    """Change the last bit of the first value that this rank stores of a parameter."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    bits = part.detach().view(-1).view(torch.int16 if part.element_size() == 2 else torch.int32)
    bits[0] ^= 1


# The checksum.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, 100, PARTS + 1, 3 * PARTS + 7])
def test_any_changed_bit_changes_the_checksum(dtype: torch.dtype, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = checksum(values)
    assert torch.equal(checksum(values.clone()), before)
    for place in {0, count // 2, count - 1}:
        changed = values.clone()
        alter(changed[place:])
        assert not torch.equal(checksum(changed), before)


def test_changes_of_two_values_do_not_cancel() -> None:
    values = torch.arange(1.0, 9.0)
    before = checksum(values)
    assert not torch.equal(checksum(values.flip(0)), before)
    opposite = values.clone()
    bits = opposite.view(torch.int32)
    bits[2] += 1
    bits[5] -= 1
    assert not torch.equal(checksum(opposite), before)


# On ranks.


def compare(cases: list[tuple[Any, ...]]) -> list[tuple[list[bool], list[bool], str]]:
    """Run on a rank: for each case, what is found while all is well, what after the last rank's
    copy was altered, and the error."""
    with process_group():
        return [_compare(*case) for case in cases]


def _compare(
    tensor: int, zero: int, sequence: bool, precision: str, name: str, _: list[int]
) -> tuple[list[bool], list[bool], str]:
    config = run_config(tensor=tensor, zero=zero, sequence=sequence, precision=precision)
    config = _comparing(config, 1)
    engine = build_engine(config)
    replicas = ReplicaCheck(config, engine.module, engine.grid, ControlGroup())
    before = []
    for step in (1, 2, 3):
        engine.train_step(share(global_batch(step), engine.grid), 1e-2)
        replicas.begin(step)
        before.append(replicas.has_found(step))
    if engine.grid.rank == RANKS - 1:
        alter(dict(engine.module.named_parameters())[name])
    replicas.begin(4)
    after = [replicas.has_found(3)]
    replicas.begin(5)  # as in a run: before the one after step 4 is read
    after += [replicas.has_found(4), replicas.has_found(4)]
    return before, after, str(replicas.error("only"))


def _comparing(config: Any, steps: int) -> Any:
    faults = config.faults.model_copy(update={"compare_copies_steps": steps})
    return config.model_copy(update={"faults": faults})


@once
def found() -> list[list[tuple[list[bool], list[bool], str]]]:
    return run_ranks(compare, RANKS, CASES)


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number][:4]))
def test_an_altered_copy_is_found_and_named_on_every_rank(number: int) -> None:
    *_, name, holders = CASES[number]
    ranks = [by_case[number] for by_case in found()]
    assert [before for before, _, _ in ranks] == [[False] * 3] * RANKS
    # Said once, after the step whose comparison is read; ranks of other groups see nothing.
    expected = [[False, rank in holders, False] for rank in range(RANKS)]
    assert [after for _, after, _ in ranks] == expected
    (error,) = {error for _, _, error in ranks}
    # Two ranks cannot outvote each other.
    where = "between rank 2 and rank 3" if len(holders) < RANKS else "on rank 3 from ranks 0, 1, 2"
    start = "only step 4: copies of one parameter have become unequal"
    assert error.startswith(f"{start}: {name} differs {where}; a GPU")


@pytest.mark.rehearse
@needs_compiler
@pytest.mark.parametrize(
    ("group", "layout"),
    [
        ("tensor", {"zero": 1, "tensor": 8}),
        ("tensor", {"zero": 3, "tensor": 8, "sequence": True}),
        ("data", {"zero": 0, "tensor": 1}),
    ],
    ids=str,
)
def test_a_comparison_is_one_small_collective_and_the_host_waits_for_nothing(
    group: str, layout: dict[str, Any]
) -> None:
    case = {"run": run_file(**layout), "vocab": VOCAB, "processes": PROCESSES}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "rehearsed_comparison"],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["waits"] == []
    (collective,) = report["collectives"]
    assert (collective["group"], collective["count"]) == (group, 1)
    assert collective["elements"] < 100


# In a run.


def alter_in_step(step: int, altered: int) -> None:
    """Prepare a run's processes: one rank's copy of a norm changes after a step."""
    from megaphase.training.engine import Engine

    train = Engine.train_step

    def altering(engine: Engine, *arguments: Any) -> Any:
        result = train(engine, *arguments)
        if engine.grid.rank == altered and arguments[2] == step:
            alter(dict(engine.module.named_parameters())[NORM])
        return result

    Engine.train_step = altering  # type: ignore[method-assign]


def run_two(run_file: Path, prepare: Any = None) -> list[Any]:
    with RunningRanks(megaphase("train", run_file), 2, prepare=prepare) as ranks:
        return ranks.wait(600)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("step", "interval"),
    [(8, 2), (8, 1000), (10, 1000), (12, 1000)],
    ids=["a save, compared anyway", "a save", "a validation", "the phase's end"],
)
def test_what_is_altered_in_the_step_of_a_checkpoint_does_not_get_into_it(
    step: int, interval: int, tmp_path: Path
) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    layout = {"tensor": 2, "zero": 0}
    run_file = write_run_file(
        tmp_path,
        run_settings(corpora, parallel=layout, faults={"compare_copies_steps": interval}),
    )
    results = run_two(run_file, partial(alter_in_step, step, 0))  # whose copy would be saved
    assert [rank.returncode for rank in results] == [1, 1]
    said = "".join(rank.stderr for rank in results)
    where = f"{NORM} differs between rank 0 and rank 1"
    assert f"pretrain step {step}: copies of one parameter have become unequal: {where}" in said
    saved = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert "latest" in saved
    assert not [name for name in saved if name.endswith(f"{step:08d}")]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_with_unequal_copies_ends_and_resumes_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    layout = {"tensor": 2, "zero": 1}
    whole, faulty = (
        write_run_file(
            tmp_path / name,
            run_settings(corpora, parallel=layout, faults={"compare_copies_steps": steps}),
        )
        for name, steps in (("whole", 0), ("faulty", 3))
    )
    assert [rank.returncode for rank in run_two(whole)] == [0, 0]
    results = run_two(faulty, partial(alter_in_step, 6, 1))
    assert [rank.returncode for rank in results] == [1, 1]
    said = "".join(rank.stderr for rank in results)
    assert said.count(f"pretrain step 6: copies of one parameter have become unequal: {NORM}") == 1
    assert "Traceback" not in said
    assert [rank.returncode for rank in run_two(faulty)] == [0, 0]
    rows = [timeless(read_rows(file.parent / "run")) for file in (whole, faulty)]
    assert rows[0] == rows[1]
