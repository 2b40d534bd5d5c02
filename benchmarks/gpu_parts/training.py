"""Training steps of the run's own engine: speed, memory, waits, kernels, and what changes them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.serving import Results
from gpu_parts.setups import (
    LEARNING_RATE,
    Case,
    base_case,
    measured_steps,
    with_engine,
)
from gpu_parts.tracing import kernels_of, waits_of
from megaphase.estimate.available_memory import available_bytes
from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import setup_of
from megaphase.rehearsal.fake_device import missing_for_rehearsal
from megaphase.training.engine import Engine

REHEARSED = Path(__file__).with_name("rehearsed_step.json")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DEEPSPEED_PREFETCH_BUCKET = 50_000_000
OF_CARD = 0.9  # of the card's memory, for what the estimate may allow itself
OF_HOST = 0.85  # of the machine's memory


def step(results: Results) -> None:
    """The main figure: 1.3b under ZeRO 1 with micro-batches of 4."""
    case = base_case(results.rehearse)

    def measure(engine: Engine) -> None:
        results.record("backends", str(engine.backends))
        results.record("speed", measured_steps(case, engine))
        results.record("waits", waits_of(one_step(case, engine)))
        results.record("kernels", kernels_of(one_step(case, engine)))

    if results.rehearse:
        results.record("rehearsed", rehearsed_now())
    else:
        results.record("rehearsed", json.loads(REHEARSED.read_text()))
    with_engine(case, measure)


def rehearsed_now() -> dict[str, Any] | str:
    """Kernels and waits of the full-size step, counted on a fake GPU by a process of its own."""
    if missing := missing_for_rehearsal():
        return f"a rehearsal needs {missing}"
    program = Path(__file__).parents[1] / "step_simulation.py"
    done = subprocess.run(
        [sys.executable, str(program), "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return rehearsal_of(json.loads(done.stdout))


def rehearsal_of(simulated: dict[str, Any]) -> dict[str, Any]:
    """What a measured step is compared with."""
    names = ("kernels", "seconds", "mfu", "waits")
    found = {name: simulated[name] for name in names}
    return found | {"number": {name: each[0] for name, each in simulated["by_name"].items()}}


def one_step(case: Case, engine: Engine) -> Callable[[], object]:
    """A step on a batch that is there already."""
    batch = case.batch()
    return lambda: engine.train_step(batch, LEARNING_RATE, 1)


def speed_of(case: Case, steps: int = 3) -> dict[str, Any]:
    return with_engine(case, lambda engine: measured_steps(case, engine, steps))


def variants(results: Results) -> None:
    """The same step with one thing changed at a time; the unchanged one first and last."""
    base = base_case(results.rehearse)
    speeds: dict[str, Any] = {}
    for name, case, backend in variants_of(base, results.rehearse):
        try:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                speeds[name] = speed_of(case)
        except Exception as error:  # the others follow
            speeds[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            results.expect(False, f"{name} failed")
        results.record("speeds", speeds)


def variants_of(base: Case, rehearse: bool) -> Iterator[tuple[str, Case, SDPBackend | None]]:
    yield "base", base, None
    yield (
        "micro 8 × 2",
        replace(base, micro=2 * base.micro, accumulation=base.accumulation // 2),
        None,
    )
    yield "kernels: eager", base.with_changes(parts={"kernels": "eager"}), None
    for name in ("throughput timer", "immediate_grad_update"):
        yield f"{name} switched", replace(base, settings=SWITCHES[name]), None
    for name, backend in BACKENDS.items():
        if not rehearse:  # the CPU has one
            yield f"attention: {name}", base, backend
    selective = base.with_changes(model={"activation_checkpointing": "selective"})
    yield "activation_checkpointing: selective", selective, None
    yield "base again", base, None


def _switch_timer(settings: dict[str, Any]) -> None:
    timers = settings.setdefault("timers", {}).setdefault("throughput", {"enabled": True})
    timers["enabled"] = not timers.get("enabled", True)


def _switch_immediate(settings: dict[str, Any]) -> None:
    bf16 = settings["bf16"]
    if bf16["enabled"]:
        bf16["immediate_grad_update"] = not bf16.get("immediate_grad_update", False)


def _small_prefetch_bucket(settings: dict[str, Any]) -> None:
    settings["zero_optimization"]["stage3_prefetch_bucket_size"] = DEEPSPEED_PREFETCH_BUCKET


SWITCHES = {"throughput timer": _switch_timer, "immediate_grad_update": _switch_immediate}


def zero(results: Results) -> None:
    """The other stages; alone on a GPU they partition nothing, and show what they cost."""
    base = base_case(results.rehearse)
    three = base.with_changes(parallel={"zero": 3})
    cases = {
        "ZeRO 0": base.with_changes(parallel={"zero": 0}),
        "ZeRO 3": three,
        "ZeRO 3, DeepSpeed's prefetch bucket": replace(three, settings=_small_prefetch_bucket),
    }
    for name, case in cases.items():
        results.record(name, speed_of(case))


def small(results: Results) -> None:
    """Models whose steps the host may bound."""
    for preset in ("gpt-125m", "gpt-350m"):
        case = base_case(results.rehearse, preset)

        def measure(engine: Engine, case: Case = case) -> tuple[dict[str, Any], dict[str, Any]]:
            speed = measured_steps(case, engine, steps=10)
            return speed, kernels_of(one_step(case, engine))

        speed, kernels = with_engine(case, measure)
        results.record(preset, speed)
        chosen = ("kernels", "number", "milliseconds", "span_ms", "idle_share")
        results.record(f"{preset}, kernels", {name: kernels[name] for name in chosen})


def larger(results: Results) -> None:
    """2.7b with the largest micro-batch up to 4, and then the least recomputation, that fit."""
    base = base_case(results.rehearse, "gpt-2.7b")
    case = next(each for each in fitting(base, results.rehearse))
    config = case.config()
    chosen = {"micro": case.micro, "recomputed": config.model.activation_checkpointing}
    results.record("chosen", chosen | {"zero": config.parallel.zero})
    results.record("speed", speed_of(case, steps=2))


def fitting(base: Case, rehearse: bool) -> Iterator[Case]:
    memory = 1 << 40 if rehearse else torch.cuda.get_device_properties(0).total_memory
    samples = base.micro * base.accumulation
    for micro in (4, 2, 1):
        for recomputed in ("none", "selective", "full"):
            model = {"activation_checkpointing": recomputed}
            case = replace(base, micro=micro, accumulation=samples // micro)
            case = case.with_changes(model=model)
            setup = setup_of(case.config(), case.shape(), 1, "cuda")
            if estimate(setup).total <= OF_CARD * memory:
                yield case


def offload(results: Results) -> None:
    """6.7b with masters and moments on the CPU; fewer layers where its memory is too small."""
    base = base_case(results.rehearse, "gpt-6.7b")
    case = replace(base, accumulation=1).with_changes(
        parallel={"zero": 1, "offload": "cpu"}, model={"activation_checkpointing": "selective"}
    )
    room = OF_HOST * (available_bytes() or 0)
    layers = case.shape().layers
    while layers > 1 and _host_bytes(_with_layers(case, layers)) > room:
        layers -= 1
    case = _with_layers(case, layers)
    results.record("chosen", {"layers": layers, "host_gb_available": round(room / 1e9, 1)})
    results.record("speed", speed_of(case, steps=1))


def _with_layers(case: Case, layers: int) -> Case:
    return case.with_changes(model={"layers": layers})


def _host_bytes(case: Case) -> int:
    return sum(estimate(setup_of(case.config(), case.shape(), 1, "cuda")).host.values())
