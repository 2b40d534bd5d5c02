"""Pickles of other programs: harmless ones are read, nothing else without --trust-pickle."""

from __future__ import annotations

import enum
import io
import random
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from pickle_support import Payload

from megaphase.convert.safe_torch_load import UnreadStorage, check_archive, load_pickle
from megaphase.utils.errors import InputError


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_arguments(tmp_path, zipped) -> None:
    path = tmp_path / "model.pt"
    content = {"args": Namespace(layers=2, params_dtype=torch.bfloat16), "w": torch.randn(3, 4)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    check_archive(path)
    found = load_pickle(path, trust=False)
    assert found["args"] == content["args"]
    assert torch.equal(found["w"], content["w"])


@pytest.fixture
def nothing_allowed():
    """As in a process that has not imported Megatron-LM, which allows its own classes."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


def test_harmless_objects_are_not_read(tmp_path, nothing_allowed) -> None:
    path = tmp_path / "model.pt"
    random_state = {"python": random.getstate(), "numpy": np.random.get_state()}
    args = Namespace(exit_signal=signal.SIGTERM, path=tmp_path, layers=2)
    torch.save({"args": args, "rng_state": [random_state], "extra": io.BytesIO(b"x")}, path)
    found = load_pickle(path, trust=False)
    assert isinstance(found["args"].exit_signal, UnreadStorage)
    assert isinstance(found["args"].path, UnreadStorage)
    assert found["args"].layers == 2
    assert found["rng_state"][0]["python"] == random_state["python"]


def test_harmless_objects_of_programs_that_are_not_installed(tmp_path) -> None:
    """Neither way needs Megatron-LM."""
    path = tmp_path / "model.pt"
    script = (
        "import sys, types, enum, torch\n"
        "module = sys.modules['megatron.odd'] = types.ModuleType('megatron.odd')\n"
        "sys.modules['megatron'] = types.ModuleType('megatron')\n"
        "module.Kind = enum.Enum('Kind', 'A B', module='megatron.odd')\n"
        f"torch.save({{'kind': module.Kind.B, 'n': 3}}, {str(path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    for trust in (False, True):
        found = load_pickle(path, trust=trust)
        assert isinstance(found["kind"], UnreadStorage)
        assert found["n"] == 3


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_does_not_run_unless_trusted(tmp_path, zipped) -> None:
    path, victim = tmp_path / "model.pt", tmp_path / "was here"
    torch.save(
        {"a": Payload(Path("'" + str(victim) + "'"))}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(InputError) as refused:
        load_pickle(path, trust=False)
    assert "posix.system" in str(refused.value)
    assert "--trust-pickle" in str(refused.value)
    assert not victim.exists()
    load_pickle(path, trust=True)
    assert victim.exists()


def test_unknown_classes_are_named(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"colour": Colour.RED, "n": 3}, path)
    with pytest.raises(InputError, match=r"test_safe_torch_load\.Colour"):
        load_pickle(path, trust=False)
    assert load_pickle(path, trust=True)["colour"] is Colour.RED


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "pickle of its own"])
def test_other_files(tmp_path, trust, damage) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.randn(1000)}, path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "text": b"no pickle at all",
                "truncated": content[:2000],
                "pickle of its own": b"\x80\x04K\x01.",
            }[damage]
        )
    with pytest.raises(InputError, match=r"model\.pt"):
        load_pickle(path, trust=trust)


def test_altered_bytes_are_found(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(10_000)}, path)
    seen: list[int] = []
    check_archive(path, seen.append)
    assert sum(seen) > 40_000
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        check_archive(path)
