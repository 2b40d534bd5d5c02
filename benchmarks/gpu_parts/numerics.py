"""The GPU's numbers beside the CPU's, which another process computes meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_parts.serving import Results
from gpu_parts.setups import ALONE, free_memory
from megaphase.decoding.generate import generate
from megaphase.decoding.options import Decoding
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import device
from megaphase.model.attention_rule import PLAIN, AttentionRule
from megaphase.model.document_mask import attend_before, attend_within, own_document_mask
from megaphase.model.gpt import GPT
from megaphase.model.shape import GPTShape
from megaphase.ops.attention import attention
from megaphase.ops.capped_attention import capped_attention
from megaphase.ops.kernels import Kernels

NO_EOD = -1
# Sums of up to thousands of terms, added in another order.
LARGEST_DIFFERENCE = 1e-4
LARGEST_BF16_DIFFERENCE = 3e-2
# Larger than at the start of training, with which every loss would be near log(vocab).
INIT_STD = 0.05


def shape_of(rehearse: bool) -> GPTShape:
    sizes = (256, 32, 2, 64, 2, 128) if rehearse else (8192, 512, 4, 768, 12, 2048)
    vocab, seq_len, layers, hidden, heads, ffn = sizes
    return GPTShape(
        vocab=vocab, seq_len=seq_len, layers=layers, hidden=hidden, heads=heads,
        kv_heads=heads // 2, ffn=ffn, init_std=INIT_STD,
    )  # fmt: skip


def model_of(rehearse: bool, *, compiled: bool, dtype: torch.dtype = torch.float32) -> GPT:
    """The same weights on every device."""
    torch.set_float32_matmul_precision("highest")
    init = Initializer(1, torch.float32)
    kernels = Kernels(compiled=compiled)
    return GPT(shape_of(rehearse), init, ALONE, compute_dtype=dtype, kernels=kernels)


def gradients(
    rehearse: bool, *, compiled: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Loss of every token and gradient of every parameter for two random rows; on the CPU."""
    model = model_of(rehearse, compiled=compiled, dtype=dtype)
    shape = model.shape
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, shape.vocab, (2, shape.seq_len + 1), generator=generator)
    inputs, targets = (part.to(device()) for part in (tokens[:, :-1], tokens[:, 1:]))
    total, losses = model(inputs, targets.contiguous())
    (total / losses.numel()).backward()
    named = model.named_parameters()
    found = {name: each.grad.float().cpu() for name, each in named if each.grad is not None}
    return {"losses": losses.detach().cpu()} | found


def greedy_tokens(rehearse: bool, *, compiled: bool = False) -> dict[str, Tensor]:
    """Continuations of prompts of several lengths."""
    model = model_of(rehearse, compiled=compiled).eval()
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 7, 12) if rehearse else (1, 33, 120, 200)
    prompts = [
        torch.randint(0, model.shape.vocab, (n,), generator=generator).tolist() for n in lengths
    ]
    found = generate(model, prompts, Decoding(8 if rehearse else 64), NO_EOD, batch=2)
    return {str(i): torch.tensor(each.tokens) for i, each in enumerate(found)}


class CPUReference:
    """A function of this module, computed by a process that sees no GPU."""

    def __init__(self, function: str, results: Results) -> None:
        self._path = results.folder / f"{function}.pt"
        code = (
            f"import sys; sys.path[:0] = {sys.path[:2]!r}\n"
            f"import torch\nfrom gpu_parts import numerics\n"
            f"torch.save(numerics.{function}({results.rehearse}), {str(self._path)!r})"
        )
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen([sys.executable, "-c", code], env=environment)

    def get(self) -> dict[str, Tensor]:
        if self._process.wait() != 0:
            raise SystemExit("the reference on the CPU failed; see above")
        found: dict[str, Tensor] = torch.load(Path(self._path))
        return found


def difference(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over that of what is expected, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def fp32(results: Results) -> None:
    """Losses and gradients, eager and compiled, beside the CPU's; and how far bf16 is from them."""
    reference = CPUReference("gradients", results)
    found = {"eager": gradients(results.rehearse)}
    found["compiled"] = gradients(results.rehearse, compiled=True)
    found["bf16, compiled"] = gradients(results.rehearse, compiled=True, dtype=torch.bfloat16)
    expected = reference.get()
    for name, tensors in found.items():
        apart = {key: difference(tensors[key], expected[key]) for key in expected}
        worst = max(apart, key=lambda key: apart[key])
        limit = LARGEST_BF16_DIFFERENCE if "bf16" in name else LARGEST_DIFFERENCE
        results.record(name, {"losses": apart["losses"], "worst": worst, "by": apart[worst]})
        results.expect(apart["losses"] <= limit, f"{name}: losses differ by {apart['losses']:.1e}")
        if "bf16" not in name:
            results.expect(apart[worst] <= limit, f"{name}: {worst} differs by {apart[worst]:.1e}")


def greedy(results: Results) -> None:
    """Whether the GPU chooses the same tokens as the CPU."""
    reference = CPUReference("greedy_tokens", results)
    found = {"eager": greedy_tokens(results.rehearse)}
    found["compiled"] = greedy_tokens(results.rehearse, compiled=True)
    expected = reference.get()
    for name, tokens in found.items():
        same = {key: same_beginning(tokens[key], expected[key]) for key in expected}
        results.record(name, {"tokens_alike": same, "of": len(expected["0"])})
        alike = all(same[key] == len(expected[key]) for key in expected)
        results.expect(alike, f"{name}: other tokens than on the CPU")


def same_beginning(one: Tensor, other: Tensor) -> int:
    """How many tokens are alike before the first that is not."""
    unlike = (one != other).nonzero()
    return int(unlike[0]) if len(unlike) else len(one)


def documents(results: Results) -> None:
    """Attention within documents in bf16, beside the masked one in fp32: results and gradients."""
    apart = attention_apart(results, PLAIN)
    results.record("differences", apart)
    for name, by in apart.items():
        results.expect(by <= LARGEST_BF16_DIFFERENCE, f"{name} differs by {by:.1e}")


def rules(results: Results) -> None:
    """The same with windows and with capped scores, in packed rows and in rows of one document."""
    window = 8 if results.rehearse else 512
    found = {
        f"{name}, {'documents' if packed else 'rows'}": attention_apart(results, rule, packed)
        for name, rule in (
            ("window", AttentionRule(window=window)),
            ("cap", AttentionRule(scale=0.2, softcap=2.0)),
            ("window and cap", AttentionRule(window=window, scale=0.2, softcap=2.0)),
        )
        for packed in (True, False)
    }
    results.record("differences", found)
    for case, apart in found.items():
        for name, by in apart.items():
            results.expect(by <= LARGEST_BF16_DIFFERENCE, f"{case}: {name} differs by {by:.1e}")


def attention_apart(results: Results, rule: AttentionRule, packed: bool = True) -> dict[str, float]:
    """Differences of attention in bf16, by kernels for that, from masked formulas in fp32."""
    rows, heads, kv_heads, seq, width = (
        (2, 2, 1, 32, 16) if results.rehearse else (4, 16, 8, 2048, 128)
    )
    generator = torch.Generator().manual_seed(4)
    begins = torch.rand(rows, seq, generator=generator) < (8 / seq if packed else 0)
    numbers = begins.long().cumsum(1).to(device())
    inputs = [
        torch.randn(rows, n, seq, width, generator=generator).bfloat16()
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    attend = attend_within if packed else attend_before
    kernel: Any = attend(numbers, torch.bfloat16, rule=rule)
    results.record(f"{rule}, {'documents' if packed else 'rows'}", type(kernel).__name__)
    found: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        *qkv, gradient = (each.to(device(), dtype, copy=True) for each in inputs)
        leaves = [each.requires_grad_() for each in qkv]
        y = kernel(*leaves) if dtype == torch.bfloat16 else masked(*leaves, numbers, rule)
        y.backward(gradient)
        found[dtype] = [y.detach(), *(each.grad for each in leaves if each.grad is not None)]
        free_memory()
    pairs = zip(("output", "q", "k", "v"), *found.values(), strict=True)
    return {name: difference(bf16.cpu(), wide.cpu()) for name, bf16, wide in pairs}


def masked(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, rule: AttentionRule) -> Tensor:
    """Attention by a mask of all pairs of tokens."""
    mask = own_document_mask(numbers, rule.window)
    if rule.softcap is not None:
        return capped_attention(q, k, v, mask, rule.scale, rule.softcap)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return attention(q, k, v, mask, rule.scale)
