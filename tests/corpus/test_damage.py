"""Random damage to the files of a corpus, a plan or a run is found, or changes nothing."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_support import read_everything, write_pairs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plan_support import FakeTokenizer, phase, random_lengths, write_corpus, write_run

from megaphase.config.load import load_run_file
from megaphase.corpus import integrity
from megaphase.distributed.all_ranks import result_or_fault
from megaphase.plan.branch import Branch
from megaphase.plan.build import ensure_built
from megaphase.plan.origin import read_origin
from megaphase.plan.plan import Plan
from megaphase.plan.same_run import refuse_other_run
from megaphase.plan.spec import plan_spec, verified_corpora
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import InputError, RunError

USED = {"en": 7, "en-fr": 2}


def files_to_damage(folder: Path) -> list[Path]:
    """Return, in a fixed order, all files that a run reads, except the run file."""
    left_out = ("run.yaml", "metrics.jsonl", ".lock")
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name not in left_out
    )


def _flip(data: bytes, draw: random.Random) -> bytes:
    position = draw.randrange(len(data))
    changed = data[position] ^ (1 << draw.randrange(8))
    return data[:position] + bytes([changed]) + data[position + 1 :]


def _replace(data: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(data))
    new = draw.randbytes(draw.randint(1, 64))
    return (data[:first] + new + data[first + len(new) :])[: len(data)]


def _zero(data: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(data))
    size = min(draw.randint(1, 4096), len(data) - first)
    return data[:first] + bytes(size) + data[first + size :]


def _swap_digits(data: bytes, draw: random.Random) -> bytes:
    """Replace one digit of a text by another, so that it stays well-formed."""
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not digits:
        return _flip(data, draw)
    position = draw.choice(digits)
    return data[:position] + draw.choice(b"0123456789").to_bytes() + data[position + 1 :]


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _extend(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, 64))


def _move(data: bytes, draw: random.Random) -> bytes:
    """Write a piece of the file over another place in it."""
    size = draw.randint(1, min(2048, len(data)))
    source, target = (draw.randrange(len(data) - size + 1) for _ in range(2))
    return data[:target] + data[source : source + size] + data[target + size :]


DAMAGE = [_flip, _replace, _zero, _swap_digits, _truncate, _extend, _move]


def damage(path: Path, seed: int) -> str:
    """Alter a file; return how."""
    draw = random.Random(seed)
    change = draw.choice(DAMAGE)
    data = path.read_bytes()
    if not data:
        change = _extend
    path.write_bytes(change(data, draw))
    return change.__name__.removeprefix("_")


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """Make two corpora and the directory of a run over them that has started as a branch."""
    folder = tmp_path_factory.mktemp("damage") / "whole"
    folder.mkdir()
    write_corpus(folder / "en", random_lengths(60, 60, 1), seed=1)
    write_pairs(folder / "en-fr", 70)
    write_run(
        folder,
        ["en"],
        tasks={"en": {"corpus": "en"}, "en-fr": {"corpus": "en-fr", "kind": "translation"}},
        model={"preset": "gpt-3m", "seq_len": 32},
        phases=[
            phase("one", 10, {"rates": {"en": 0.5, "en-fr": 0.5}}),
            phase("two", 20, {"temperature": 3.3}),
        ],
    )
    Branch("elsewhere@one", folder / "none", 12, 99, USED, {}, is_new=True).record(folder / "run")
    read_run(folder)
    return folder


def read_run(folder: Path) -> list[list[tuple]]:
    """Start a run as training does, and read everything for its training and validation."""
    config = load_run_file(folder / "run.yaml")
    verified_corpora(config)
    used = read_origin(config.output).used
    spec = plan_spec(config, FakeTokenizer(), used)  # type: ignore[arg-type]
    directory = RunDirectory(config.output)
    refuse_other_run(config.output, config)
    plan = Plan(spec, ensure_built(spec, config.output, say=lambda text: None))
    directory.claim(config, plan.summary())
    return read_everything(plan)


def is_found_or_harmless(
    whole: Path, folder: Path, seed: int, use: Callable[[Path], object], expected: object
) -> str:
    """Damage one file of a copy and use it; return the result."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, symlinks=True)
    files = files_to_damage(folder)
    path = folder / files[seed % len(files)]
    how = damage(path, seed)
    outcome = result_or_fault(lambda: use(folder))
    if isinstance(outcome, InputError | RunError):
        assert str(folder) in str(outcome), f"{how} of {path}: {outcome}"
        assert "\n" not in str(outcome)
        return "found"
    assert outcome == expected, f"{how} of {path} was not found, and changed the result"
    return "harmless"


SETTINGS = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}


@settings(max_examples=150, **SETTINGS)
@given(seed=st.integers(0, 2**40), small=st.booleans())
def test_damage_to_a_corpus_or_a_plan_is_found_or_changes_nothing(planned, seed, small):
    """Both with each .bin compared as a whole at the start, and with its blocks verified on
    reading."""
    with pytest.MonkeyPatch.context() as patch:
        if not small:
            patch.setattr(integrity, "SMALL_BIN_BYTES", 0)
        is_found_or_harmless(planned, planned.parent / "copy", seed, read_run, read_run(planned))


@pytest.mark.slow
def test_much_damage_to_corpora_and_plans(planned):
    outcomes = Counter()
    expected = read_run(planned)
    for seed in range(3000):
        with pytest.MonkeyPatch.context() as patch:
            if seed % 2:
                patch.setattr(integrity, "SMALL_BIN_BYTES", 0)
            copy = planned.parent / "copy"
            outcomes[is_found_or_harmless(planned, copy, seed, read_run, expected)] += 1
    print(dict(outcomes))
    assert outcomes["found"] > 1000
