"""benchmarks/step_simulation.py: a host that launches and a device that follows."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaphase.rehearsal.fake_device import missing_for_rehearsal
from megaphase.rehearsal.recording import Kernel, Recording, Wait

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("step_simulation")


def kernel(name: str, *, nbytes: int = 0, flops: int = 0) -> Kernel:
    return Kernel(name=name, read=nbytes, written=0, flops=flops, stream=0)


def simulated(simulation: Any, *events: Any) -> Any:
    """On a device with 100 FLOP/s and 10 bytes/s, whose host needs a second for a launch."""
    card = simulation.Card(
        products=100, memory=10, attention_forward=50, attention_backward=25, smallest=0.5
    )
    host = simulation.Host(operator=0.75, formula=1.0, launch=0.25, collective=0.0, wait=0.5)
    return simulation.simulate(Recording(list(events)), card, host, attention_flops=100)


def test_a_kernel_takes_the_longer_of_its_bytes_and_flops(simulation: Any) -> None:
    products = simulated(
        simulation, kernel("mm", flops=200, nbytes=10), kernel("mm", flops=200, nbytes=30)
    )
    assert products.by_name == {"mm": (2, 2.0 + 3.0)}
    attention = simulated(
        simulation,
        kernel("_scaled_dot_product_flash_attention"),
        kernel("_scaled_dot_product_flash_attention_backward"),
    )
    assert attention.by_kind == {"attention": 100 / 50 + 250 / 25}
    assert simulated(simulation, kernel("add", nbytes=1)).busy == 0.5


def test_the_device_waits_for_a_slow_host(simulation: Any) -> None:
    found = simulated(simulation, *[kernel("add")] * 4)
    assert (found.seconds, found.busy, found.host) == (4 * 1.0 + 0.5, 4 * 0.5, 4 * 1.0)
    formulas = simulated(simulation, *[kernel("fused:_norm")] * 4)
    assert formulas.host == 4 * 2.0


def test_a_slow_device_hides_the_host_unless_it_waits(simulation: Any) -> None:
    slow = kernel("add", nbytes=100)
    assert simulated(simulation, slow, slow).seconds == 1.0 + 2 * 10
    # The host wakes up, and launches the second one.
    found = simulated(simulation, slow, Wait(kind="scalar read", place="here"), slow)
    assert found.seconds == 1.0 + 10 + 0.5 + 1.0 + 10


@pytest.mark.slow
@pytest.mark.skipif(missing_for_rehearsal() is not None, reason="a rehearsal needs g++")
def test_a_step_is_simulated() -> None:
    command = [sys.executable, str(BENCHMARKS / "step_simulation.py"), "--json"]
    options = ["--preset", "gpt-30m", "--accumulation", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Four products of a block and one of the head for each of 4 parts of the tokens, each with two
    # more backward, in 2 micro-batches.
    assert found["by_name"]["mm"][0] == 2 * 3 * (4 * 10 + 4)
    assert 0 < found["mfu"] < 1
    assert found["seconds"] >= found["busy"]
