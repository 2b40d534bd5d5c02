"""A large plan is verified piece by piece: what is read before it is used, the rest meanwhile."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from plan_support import build_plan, phase, spec_of, write_run, write_three_tasks
from rich.console import Console

from megaphase.config.run import RunConfig
from megaphase.plan import built_folder, hashed_chunks
from megaphase.plan.background_check import BackgroundCheck
from megaphase.plan.build import ensure_built
from megaphase.plan.dataset import read_step
from megaphase.plan.load_plan import build_plan as open_built_plan
from megaphase.plan.plan import Plan
from megaphase.plan.verified_file import VerifiedArray, VerifiedFile
from megaphase.utils.errors import InputError

PIECE = 64
STEPS = 40


@pytest.fixture(autouse=True)
def _every_plan_is_large(monkeypatch):
    monkeypatch.setattr(built_folder, "SMALL_BYTES", 0)
    for module in (hashed_chunks, built_folder):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)


@pytest.fixture(params=["tokens", "documents"])
def config(request, tmp_path):
    _, written = write_three_tasks(tmp_path)
    phases = [
        phase("first", STEPS, {"proportional": True}) | {"cut": request.param},
        phase("second", STEPS, {"temperature": 3.0}),
    ]
    return write_run(tmp_path, list(written), phases=phases)


def steps_of(plan: Plan) -> list[list[bytes]]:
    """Read all steps: inputs and targets of each."""
    return [
        [part.numpy().tobytes() for part in (batch.inputs, batch.targets)]
        for number in range(len(plan.phases))
        for batch in [read_step(plan, number, step, 0, 1, 7) for step in range(STEPS)]
    ]


def stored_files(plan: Plan) -> list[Path]:
    return [file.path for file in plan.files if len(file.bytes)]


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def error_of_reading(config: RunConfig, expected: list[list[bytes]]) -> str | None:
    """Read all steps; return the error, or None if they are the expected ones."""
    try:
        steps = steps_of(build_plan(config))
    except InputError as error:
        return str(error)
    assert steps == expected
    return None


def test_a_byte_that_is_read_is_found_before_the_batch_is_used(config):
    """Some bytes of each file in turn: either the very same batches, or an error."""
    whole = build_plan(config)
    expected = steps_of(whole)
    random = np.random.default_rng(1)
    found = []
    for path in stored_files(whole):
        for position in random.integers(path.stat().st_size, size=3).tolist():
            flip(path, position)
            error = error_of_reading(config, expected)
            if error is None:  # a sample that no step reads
                flip(path, position)
                continue
            begin = position // PIECE * PIECE
            end = min(begin + PIECE, path.stat().st_size)
            found.append(path)
            assert f"{path}: was altered: the bytes" in error
            assert f"{begin:,} to {end - 1:,} are" in error or path.name == "starts"
            assert error.endswith("start again, and it will be built again")
            said: list[str] = []
            ensure_built(spec_of(config), config.output, say=said.append)
            told = f"{whole.folder}: {path.name} has been altered; building the plan again"
            assert said == ([told] if path.parent == whole.folder else [])
            assert error_of_reading(config, expected) is None
    most = "parts" if config.phases[0].cut == "documents" else "starts"
    assert {path.name for path in found} >= {"blend-0.tasks", "blend-1.counts", most}


def test_the_rest_is_verified_in_the_background(config):
    path, plan = stored_files(build_plan(config))[0], build_plan(config)
    read_step(plan, 0, 0, 0, 1, 7)
    with BackgroundCheck(plan.files) as check:
        check._thread.join()
        check.raise_fault()
    assert all(file.is_valid for file in plan.files)

    flip(path, path.stat().st_size - 1)
    with BackgroundCheck(build_plan(config).files) as check:
        check._thread.join()
        with pytest.raises(InputError, match=r"blend-0\.tasks: was altered: the bytes"):
            check.raise_fault()


def test_the_check_ends_with_its_block(config, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    files = build_plan(config).files

    def wait(file: VerifiedFile, pause) -> None:
        entered.set()
        leave.wait()
        assert pause(0.0)  # the block has been left

    monkeypatch.setattr(VerifiedFile, "check_rest", wait)
    with BackgroundCheck(files[:1]):
        entered.wait()
        threading.Timer(0.05, leave.set).start()


def test_everything_is_verified_at_once_if_asked(config):
    path = stored_files(build_plan(config))[-1]
    flip(path, path.stat().st_size // 2)
    said: list[str] = []
    ensure_built(spec_of(config), config.output, say=said.append)
    assert said == []
    plan = build_plan(config)
    if path.parent == plan.folder:
        ensure_built(spec_of(config), config.output, say=said.append, whole=True)
        assert said == [f"{plan.folder}: {path.name} has been altered; building the plan again"]


def test_index_and_tables_are_verified_at_once_if_asked(config):
    def opened(whole: bool) -> tuple[Plan, list[str]]:
        said: list[str] = []
        spec, console = spec_of(config), Console(file=io.StringIO())
        return open_built_plan(spec, config.output, console, said.append, whole=whole), said

    paths = stored_files(opened(False)[0])
    is_packed = config.phases[0].cut == "documents"
    assert {"parts", "first_parts", "positions"} <= {path.name for path in paths} or not is_packed
    for path in paths:
        before = path.read_bytes()
        flip(path, len(before) // 2)
        _, said = opened(True)
        assert said == [f"{path.parent}: {path.name} has been altered; building the plan again"]
        assert path.read_bytes() == before
    assert opened(True)[1] == []


def test_tables_that_are_built_after_an_early_end_are_verified_in_the_background(tmp_path):
    _, written = write_three_tasks(tmp_path)
    phases = [
        phase("first", STEPS, {"proportional": True}),
        phase("second", STEPS, {"temperature": 3.0}) | {"cut": "documents"},
    ]
    plan = build_plan(write_run(tmp_path, list(written), phases=phases))
    plan.open_phase(1)
    with BackgroundCheck(plan.files) as check:
        planned = {file.path for file in plan.files}
        plan.open_phase(1, plan.positions([7]))  # the first phase has ended early
        [path, *_] = [each for each in stored_files(plan) if each not in planned]
        flip(path, path.stat().st_size - 1)
        check.add(plan.files)
        check._thread.join()
        with pytest.raises(InputError, match=rf"{path}: was altered: the bytes"):
            check.raise_fault()
        assert all(file.is_valid for file in plan.files if file.path in planned)


def test_plans_with_larger_pieces_are_verified_whole(config, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(hashed_chunks, "PIECE_BYTES", 64 << 20)
        plan = build_plan(config)
    assert all(
        file.is_valid for file in build_plan(config).files if file.path.parent == plan.folder
    )
    flip(plan.folder / "starts", 3)
    said: list[str] = []
    ensure_built(spec_of(config), config.output, say=said.append)
    assert said == [f"{plan.folder}: starts has been altered; building the plan again"]


def test_only_what_is_read_is_verified(tmp_path):
    values = np.arange(100, dtype=np.int64).reshape(-1, 2)
    path = tmp_path / "values"
    with open(path, "wb", buffering=0) as file:
        writer = hashed_chunks.HashedChunkWriter(file.fileno(), 0, None)  # type: ignore[arg-type]
        writer.write(values)
        described = {"bytes": values.nbytes, "pieces": writer.finish()}
    flip(path, 100)  # in the piece of the rows 4 to 7
    array = VerifiedArray.of(VerifiedFile(path, described, verified=False), np.int64, 2)
    assert (array.rows(0, 4) == values[:4]).all()
    assert (array.at(np.array([49, 8, 0])) == values[[49, 8, 0]]).all()
    assert (array.part(8, 30).whole() == values[8:30]).all()
    for read in (lambda: array.rows(7, 9), lambda: array.at(np.array([30, 4])), array.whole):
        with pytest.raises(InputError, match="the bytes 64 to 127 are not those"):
            read()
