"""benchmarks/train_throughput.py: sides take turns, each with the plain loop, one in memory."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = "--preset gpt-1m --vocab 128 --seq-len 16 --batch 2 --micro 2 --steps 1 --rounds 2"
SIDES = "--zero 0 1 --kernels eager --peers eager --device cpu --json"


def train(seed: int, between: Any) -> list[Tensor]:
    """Two steps of a small model, and something between them; its parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        if step:
            between(model, optimizer)
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return [each.detach() for each in model.parameters()]


def test_tensors_move_away_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    moved_away = importlib.import_module("moved_away")

    def between(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        moments = [each["exp_avg"] for each in optimizer.state.values()]
        view = parameters[0].detach()[1:]
        before = [each.detach().clone() for each in (*parameters, *moments, view)]
        addresses = {each.untyped_storage().data_ptr() for each in (*parameters, *moments)}
        addresses |= {each.grad.untyped_storage().data_ptr() for each in parameters}
        moved = moved_away.MovedAway(lambda each: each.untyped_storage().data_ptr() in addresses)
        # fp32 parameters, gradients and one moment.
        assert moved.leave() == 3 * 4 * sum(each.numel() for each in parameters)
        assert all(each.untyped_storage().nbytes() == 0 for each in (*parameters, view))
        moved.come_back()
        for each, old in zip((*parameters, *moments, view), before, strict=True):
            assert torch.equal(each, old)

    with FakeTensorMode():
        described = torch.empty(4)  # as torch.compile leaves behind
    found, expected = train(1, between), train(1, lambda model, optimizer: None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert described.shape == (4,)


@pytest.mark.slow
def test_every_side_has_its_rounds_with_the_plain_loop() -> None:
    command = [sys.executable, str(BENCHMARKS / "train_throughput.py")]
    done = subprocess.run(
        [*command, *TINY.split(), *SIDES.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["sides"]) == [
        "megaphase ZeRO 0, eager",
        "megaphase ZeRO 1, eager",
        "HF Llama",
    ]
    assert found["peer"] == "HF Llama"
    assert found["sides"]["HF Llama"]["ratio"]["median"] == 1
    assert all(side["peak_bytes"] > 0 for side in found["sides"].values())
