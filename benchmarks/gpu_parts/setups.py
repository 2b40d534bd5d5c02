"""Sizes, run configurations and engines of the parts, and how their steps are timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaphase.config.run import RunConfig
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.parameter_spec import Normal, ParameterSpec
from megaphase.distributed.process_grid import ProcessGrid, device, start_process_grid
from megaphase.estimate.gpu_specs import card_of_device
from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import setup_of
from megaphase.model.parameters import train_flops_per_token
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.plan.dataset import Batch
from megaphase.training import engine as engine_module
from megaphase.training.engine import Engine

T = TypeVar("T")

ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # nothing is sent
LEARNING_RATE = 1e-4
WARM_UP_STEPS = 2
ROUNDS = 3
TINY = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128}


@dataclass(frozen=True)
class Case:
    """A model and its batch; `changes` are sections of the run file with the keys that differ.

    settings: changes DeepSpeed's configuration before the engine gets it.
    """

    model: Mapping[str, Any]
    seq_len: int = 2048
    vocab: int = 50304
    micro: int = 4
    accumulation: int = 4
    changes: Mapping[str, Mapping[str, Any]] | None = None
    settings: Callable[[dict[str, Any]], None] = lambda settings: None

    def with_changes(self, **sections: Mapping[str, Any]) -> Case:
        """The same with other keys in some sections of the run file."""
        merged = {key: dict(value) for key, value in (self.changes or {}).items()}
        for section, keys in sections.items():
            merged[section] = merged.get(section, {}) | dict(keys)
        return replace(self, changes=merged)

    def config(self) -> RunConfig:
        phase = {"name": "only", "steps": 1, "mixture": {"rates": {"text": 1.0}}}
        run: dict[str, Any] = {
            "output": "none",
            "tokenizer": "none",
            "tasks": {"text": {"corpus": "none"}},
            "model": {**self.model, "seq_len": self.seq_len, "vocab": self.vocab},
            "parallel": {"zero": 1},
            "batch": {"samples": self.micro * self.accumulation, "micro": self.micro},
            "phases": [phase | {"learning_rate": {"peak": LEARNING_RATE}}],
        }
        for section, keys in (self.changes or {}).items():
            # Keys of the whole file, such as precision, are in the section "".
            run |= dict(keys) if not section else {section: run.get(section, {}) | dict(keys)}
        return RunConfig.model_validate(run)

    def shape(self) -> GPTShape:
        return build_shape(self.config(), self.vocab)

    def batch(self, seed: int = 0) -> Batch:
        """Random tokens, in pinned memory where there is a GPU, as the trainer has them."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.micro * self.accumulation
        tokens = torch.randint(0, self.vocab, (rows, self.seq_len + 1), generator=generator)
        batch = Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.zeros(rows, dtype=torch.int64),
        )
        return batch.pinned() if torch.cuda.is_available() else batch


def base_case(rehearse: bool, preset: str = "gpt-1.3b") -> Case:
    """A preset at 4 micro-batches of 4 × 2,048 tokens; tiny in a rehearsal."""
    if rehearse:
        # torch.compile for the CPU takes longer than all else, and formulas have their own part.
        tiny = Case(TINY, seq_len=32, vocab=256, micro=2, accumulation=2)
        return tiny.with_changes(parts={"kernels": "eager"})
    return Case({"preset": preset})


@contextmanager
def weights_drawn_on_the_device() -> Iterator[None]:
    """Draw random initial weights where they will be: the CPU needs minutes for billions."""

    def draw(self: Initializer, name: str, spec: ParameterSpec) -> Tensor:
        if not isinstance(spec.init, Normal):
            return torch.full(spec.shape, spec.init.value, dtype=self.dtype, device=self.device)
        values = torch.empty(spec.shape, dtype=self.dtype, device=self.device)
        return values.normal_(0, spec.init.std)

    usual = Initializer.draw
    Initializer.draw = draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        Initializer.draw = usual  # type: ignore[method-assign]


def with_engine(case: Case, work: Callable[[Engine], T], *, drawn_on_the_device: bool = True) -> T:
    """What `work` returns for the case's engine, whose memory is free again afterwards."""
    free_memory()  # of an engine that has failed
    usual = engine_module.deepspeed_config

    def changed(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        settings = usual(*arguments, **keywords)
        case.settings(settings)
        return settings

    engine_module.deepspeed_config = changed
    drawn = weights_drawn_on_the_device() if drawn_on_the_device else nullcontext()
    engine = None
    try:
        arguments = case.config(), case.shape(), start_process_grid(1), 1
        with drawn:
            engine = Engine(*arguments)
        reset_peak()
        return work(engine)
    finally:
        engine_module.deepspeed_config = usual
        if engine is not None:
            engine._engine.destroy()
        del engine
        free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def seconds_of(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call of several that follow each other without a wait."""
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - began) / repeats


def median_seconds(work: Callable[[], object], repeats: int = 1, rounds: int = ROUNDS) -> float:
    """Of some rounds of `seconds_of`; the first call of all is not counted."""
    work()
    return statistics.median(seconds_of(work, repeats) for _ in range(rounds))


def card_flops() -> float | None:
    """The GPU's bf16 FLOP/s by its data sheet; None for the CPU and unknown GPUs."""
    if not torch.cuda.is_available():
        return None
    card = card_of_device(torch.cuda.get_device_name())
    return None if card is None else card.peak_tflops * 1e12


def measured_steps(case: Case, engine: Engine, steps: int = 3) -> dict[str, Any]:
    """Warm up, then time rounds of `steps` optimizer steps: speed, MFU and memory."""
    batches = [case.batch(seed) for seed in range(2)]
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        engine.train_step(batches[taken % 2], LEARNING_RATE, taken)

    first = seconds_of(step)
    reset_peak()  # compiling and tuning kernels takes memory of its own
    for _ in range(WARM_UP_STEPS):
        step()
    times = [seconds_of(step, steps) for _ in range(ROUNDS)]
    seconds = statistics.median(times)
    tokens = case.micro * case.accumulation * case.seq_len
    flops, peak = train_flops_per_token(case.shape()) * tokens, card_flops()
    return {
        "step_ms": round(1e3 * seconds, 2),
        "step_ms_of_rounds": [round(1e3 * each, 2) for each in times],
        "first_step_seconds": round(first, 2),
        "tokens_per_second": round(tokens / seconds),
        "mfu": None if peak is None else round(flops / seconds / peak, 4),
        **memory(case),
    }


def memory(case: Case) -> dict[str, Any]:
    """The most memory of the GPU since the last reset, beside the estimate."""
    estimated = estimate(setup_of(case.config(), case.shape(), 1, "cuda"))
    found: dict[str, Any] = {
        "estimated_gb": round(estimated.total / 1e9, 2),
        "estimated_moment": estimated.moment,
        "estimated_host_gb": round(sum(estimated.host.values()) / 1e9, 2),
    }
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        found["peak_gb"] = round(peak / 1e9, 2)
        found["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        found["peak_of_estimate"] = round(peak / estimated.total, 3)
    return found


def device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
