"""Which parts there are, in their order of importance. Imports nothing large."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the measurement: the function `name` of the module `gpu_parts.<module>`.

    seconds: it is expected to take on an H100; with less time left it is skipped
    limit: after so many seconds it is killed
    """

    name: str
    module: str
    seconds: int
    limit: int
    title: str


PARTS = (
    Part("device", "device", 8, 40, "versions, device, ceilings of products and copies"),
    Part("step", "training", 50, 130, "1.3b, ZeRO 1, micro-batch 4: speed, memory, waits, kernels"),
    Part("fp32", "numerics", 25, 90, "fp32 losses and gradients beside the CPU's"),
    Part("documents", "numerics", 12, 60, "attention within documents: variable length and mask"),
    Part("rules", "numerics", 40, 120, "attention with windows and capped scores"),
    Part("twice", "repetition", 20, 80, "20 steps twice: bit for bit the same?"),
    Part("deterministic", "repetition", 20, 80, "20 steps twice with deterministic: true"),
    Part("resume", "resume", 50, 150, "save, SIGKILL, resume with `megaphase train`"),
    Part("greedy", "numerics", 20, 80, "greedy tokens beside the CPU's"),
    Part("variants", "training", 100, 200, "1.3b with one thing changed at a time"),
    Part("zero", "training", 35, 100, "1.3b with ZeRO 0 and ZeRO 3"),
    Part("plain", "plain_loop", 70, 150, "Hugging Face Llama, compiled, in a plain loop, alone"),
    Part("generation", "generating", 25, 80, "tokens/s of generation, 1.3b"),
    Part("formulas", "formulas", 20, 80, "bytes/s of each compiled formula"),
    Part("small", "training", 25, 80, "125m and 350m, where launches may bound the step"),
    Part("larger", "training", 30, 100, "2.7b with the micro-batch that the estimate allows"),
    Part("offload", "training", 80, 170, "6.7b with the optimizer on the CPU"),
)
