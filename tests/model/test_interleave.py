"""Halves that take turns: who is computed when."""

from __future__ import annotations

import torch

from megaphase.model.interleave import Steps, interleave


def computation(name: str, steps: int, log: list[str]) -> Steps:
    for number in range(steps):
        log.append(f"{name}{number}")
        yield
    return torch.tensor(float(ord(name)))


def run(names: str, steps: int) -> tuple[list[str], list[float]]:
    log: list[str] = []
    results = interleave([computation(name, steps, log) for name in names])
    return log, [float(result) for result in results]


def test_a_step_of_the_other_comes_between_two_steps_and_the_first_is_one_ahead() -> None:
    log, results = run("ab", 4)
    assert log == ["a0", "a1", "b0", "a2", "b1", "a3", "b2", "b3"]
    assert results == [97.0, 98.0]


def test_one_alone_goes_through() -> None:
    assert run("a", 3) == (["a0", "a1", "a2"], [97.0])


def test_without_steps_there_are_results() -> None:
    assert run("ab", 0) == ([], [97.0, 98.0])
