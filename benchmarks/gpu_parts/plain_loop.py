"""Hugging Face's Llama of the same size, compiled, in a plain torch loop."""

from __future__ import annotations

import importlib.util
import statistics

import torch
from throughput_sides import LlamaLoop, Settings

from gpu_parts.serving import Results
from gpu_parts.setups import (
    ROUNDS,
    base_case,
    card_flops,
    reset_peak,
    seconds_of,
)
from megaphase.model.parameters import train_flops_per_token


def plain(results: Results) -> None:
    if importlib.util.find_spec("transformers") is None:
        results.record("skipped", "transformers is not installed")
        return
    case = base_case(results.rehearse)
    settings = Settings(
        preset="gpt-1m" if results.rehearse else str(case.model["preset"]),
        vocab=case.vocab,
        seq_len=case.seq_len,
        batch=case.micro * case.accumulation,
        micro=case.micro,
        kv_heads=None,
        threads=torch.get_num_threads(),
        precision="bf16",
        device="cuda" if torch.cuda.is_available() else "cpu",
        checkpointing="none",
    )
    with torch.device(settings.device):  # the CPU would need long for the initial weights
        step = LlamaLoop(compiled=not results.rehearse).step(settings)
    batches = settings.batches()
    results.record("first_step_seconds", round(seconds_of(lambda: step(batches[0])), 1))
    reset_peak()
    step(batches[1])
    times = [seconds_of(lambda: [step(each) for each in batches[:3]]) / 3 for _ in range(ROUNDS)]
    seconds, peak = statistics.median(times), card_flops()
    flops = train_flops_per_token(settings.shape()) * settings.tokens_per_step
    speed = {
        "step_ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(settings.tokens_per_step / seconds),
        "mfu": None if peak is None else round(flops / seconds / peak, 4),
    }
    if torch.cuda.is_available():
        speed["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    results.record("speed", speed)
