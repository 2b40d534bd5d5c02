"""Tokens per second of greedy generation, with and without the key-value cache, in one run.

Lower bound: a step reads every weight that multiplies a token once, for any batch; the keys and
values are few in comparison here. Without the cache, every token of the prefix goes through the
model again. Weights are random, and no token is treated as EOD.

    python benchmarks/generation.py --preset gpt-14m --batch 1 --batch 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import measure_machine

from megaphase.decoding.generate import generate
from megaphase.decoding.options import Decoding
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.model.gpt import GPT
from megaphase.model.parameters import matmul_parameters, parameter_count
from megaphase.model.presets import PRESETS
from megaphase.model.shape import GPTShape

NO_EOD = -1
TURNS = 3
Way = Callable[[GPT, list[list[int]], int], list[list[int]]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="gpt-14m")
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    asked = parser.parse_args()
    dtype = DTYPES[asked.dtype]
    shape = _shape(asked.preset, asked.vocab, asked.prompt_tokens + asked.new_tokens)
    alone = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]
    model = GPT(shape, Initializer(1, dtype), alone, compute_dtype=dtype).eval()
    machine = measure_machine(device(), dtype)
    floor_seconds = dtype.itemsize * matmul_parameters(shape) / machine.memory_bytes_per_second
    print(
        f"{asked.preset}, {parameter_count(shape) / 1e6:.1f} million parameters, {asked.dtype}, on "
        f"{device().type}; prompts of {asked.prompt_tokens} tokens, {asked.new_tokens} new ones"
    )
    print(
        f"memory {machine.memory_bytes_per_second / 1e9:.1f} GB/s: a step of at least "
        f"{1e3 * floor_seconds:.2f} ms"
    )
    for batch in asked.batch or [1, 16]:
        prompts = torch.randint(shape.vocab, (batch, asked.prompt_tokens)).tolist()
        tokens = batch * asked.new_tokens
        times, texts = zip(
            *(
                _quickest(way, model, prompts, new_tokens)
                for way, new_tokens in (
                    (_cached, 1),
                    (_cached, asked.new_tokens),
                    (_uncached, asked.new_tokens),
                )
            ),
            strict=True,
        )
        begun, cached, plain = times
        agree = sum(one == other for one, other in zip(*texts[1:], strict=True))
        step = (cached - begun) / (asked.new_tokens - 1)
        print(
            f"batch {batch}: prompts {begun:.2f} s, then {1e3 * step:.2f} ms a step, "
            f"{step / floor_seconds:.1f} × the floor; with all, cached {tokens / cached:,.0f} "
            f"tokens/s, without the cache {tokens / plain:,.0f}; ratio {plain / cached:.1f}; "
            f"{agree} of {batch} texts the same",
            flush=True,
        )


def _shape(preset: str, vocab: int, seq_len: int) -> GPTShape:
    sizes = PRESETS[preset]
    return GPTShape(vocab=vocab, seq_len=seq_len, kv_heads=sizes["heads"], **sizes)


def _cached(model: GPT, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    found = generate(model, prompts, Decoding(new_tokens), NO_EOD, batch=len(prompts))
    return [each.tokens for each in found]


@torch.inference_mode()
def _uncached(model: GPT, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    tokens = torch.tensor(prompts, device=device())
    for _ in range(new_tokens):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, -new_tokens:].tolist()


def _quickest(way: Way, *arguments: Any) -> tuple[float, list[list[int]]]:
    """Return the time of the fastest of several runs in seconds, and its result."""
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        found = way(*arguments)  # ends with the tokens on the CPU
        seconds.append(time.perf_counter() - began)
    return min(seconds), found


if __name__ == "__main__":
    main()
