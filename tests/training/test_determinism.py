"""`deterministic: true`: what it sets, what it refuses, and that runs with it resume exactly."""

import os
import re

import pytest
import torch
from engine_support import build_engine, fp32_weights, global_batch, run_config, share
from run_support import make_corpora, read_rows, run_settings, timeless, write_run_file
from warm_commands import run_killed, run_well

from megaphase.training.config import BackendsConfig
from megaphase.training.determinism import (
    CUBLAS_VARIABLE,
    NVLS_VARIABLE,
    check_environment,
    choose_algorithms,
    set_environment,
)
from megaphase.utils.errors import InputError


def configured(deterministic, **changes):
    return run_config(**changes).model_copy(update={"deterministic": deterministic})


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Take back what is set for the process."""
    for variable in (CUBLAS_VARIABLE, NVLS_VARIABLE):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_and_its_compiler_are_told_and_untold() -> None:
    choose_algorithms(configured(True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory
    choose_algorithms(configured(False))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch._inductor.config.deterministic


def test_on_a_gpu_the_libraries_are_told_and_other_settings_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_environment(configured(False))
    assert CUBLAS_VARIABLE not in os.environ
    set_environment(configured(True))
    assert (os.environ[CUBLAS_VARIABLE], os.environ[NVLS_VARIABLE]) == (":4096:8", "0")
    check_environment(configured(True))
    for variable, value in ((CUBLAS_VARIABLE, ":0:0"), (NVLS_VARIABLE, "1")):
        with monkeypatch.context() as changed:
            changed.setenv(variable, value)
            set_environment(configured(True))
            with pytest.raises(InputError, match=f"deterministic: does not hold where {variable}"):
                check_environment(configured(True))
            check_environment(configured(False))


@pytest.mark.parametrize(
    ("zero", "precision", "kernels"),
    [
        pytest.param(0, "fp32", "compile", marks=pytest.mark.slow),
        pytest.param(1, "bf16", "eager", marks=pytest.mark.slow),
        pytest.param(2, "fp32", "eager", marks=pytest.mark.slow),
        (3, "bf16", "eager"),
    ],
)
def test_every_operation_of_a_step_has_a_deterministic_form(zero, precision, kernels) -> None:
    """With document masks, dropout and an evaluation; on the CPU the numbers are the same."""
    curves = []
    for deterministic in (True, False):
        layout = {"zero": zero, "tensor": 1, "precision": precision}
        config = configured(deterministic, model={"dropout": 0.1}, **layout)
        config = config.model_copy(update={"parts": BackendsConfig(kernels=kernels)})
        engine = build_engine(config)
        losses = []
        for step in range(3):
            batch = share(global_batch(step, packed=True), engine.grid)
            losses.append(engine.train_step(batch, 1e-2, step).losses.mean)
        losses.append(engine.evaluate(batch).mean)
        curves.append((losses, fp32_weights(engine)))
    (losses, weights), (expected, expected_weights) = curves
    assert losses == expected
    assert all(torch.equal(weights[name], each) for name, each in expected_weights.items())


def test_a_run_says_so_and_may_be_resumed_with_or_without_it(tmp_path) -> None:
    corpora = make_corpora(tmp_path / "corpora")
    settings = run_settings(corpora, deterministic=True)
    whole, killed = (write_run_file(tmp_path / name, settings) for name in "ab")
    assert re.search(r"ZeRO 0[,;] (.*, )?deterministic\n", run_well("train", whole))
    run_killed(killed, before_step=11)
    assert "deterministic" not in run_well("train", killed, "deterministic=false")
    rows = [timeless(read_rows(file.parent / "run")) for file in (whole, killed)]
    assert rows[0] == rows[1]
