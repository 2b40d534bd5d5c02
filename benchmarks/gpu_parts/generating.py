"""Tokens per second of greedy generation."""

from __future__ import annotations

import torch

from gpu_parts.serving import Results
from gpu_parts.setups import ALONE, TINY, median_seconds, weights_drawn_on_the_device
from megaphase.decoding.generate import generate
from megaphase.decoding.options import Decoding
from megaphase.distributed.initialization import Initializer
from megaphase.model.gpt import GPT
from megaphase.model.parameters import matmul_parameters
from megaphase.model.presets import PRESETS
from megaphase.model.shape import GPTShape

NO_EOD = -1


def generation(results: Results) -> None:
    """Of batches of 1 and 16 prompts; a step reads every weight once, which is the floor."""
    sizes = TINY if results.rehearse else PRESETS["gpt-1.3b"]
    prompt, new, vocab = (8, 8, 256) if results.rehearse else (128, 128, 50304)
    shape = GPTShape(vocab=vocab, seq_len=prompt + new, kv_heads=sizes["heads"], **sizes)
    dtype = torch.bfloat16
    with weights_drawn_on_the_device():
        model = GPT(shape, Initializer(1, dtype), ALONE, compute_dtype=dtype).eval()
    results.record("bytes_read_a_step", dtype.itemsize * matmul_parameters(shape))
    for batch in (1, 16):
        prompts = torch.randint(shape.vocab, (batch, prompt)).tolist()

        def seconds(tokens: int, prompts: list[list[int]] = prompts) -> float:
            how = Decoding(tokens)
            return median_seconds(lambda: generate(model, prompts, how, NO_EOD, batch=len(prompts)))

        first, whole = seconds(1), seconds(new)
        results.record(
            f"batch {batch}",
            {
                "prompts_seconds": round(first, 4),
                "ms_a_step": round(1e3 * (whole - first) / (new - 1), 3),
                "tokens_per_second": round(batch * new / whole, 1),
            },
        )
