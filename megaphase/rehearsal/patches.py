"""Replaces what cannot run without a device's values: compiled formulas, attention, initial
weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaphase.distributed.initialization import Initializer, Uninitialized
from megaphase.distributed.parameter_spec import ParameterSpec
from megaphase.ops import capped_attention, kernels
from megaphase.rehearsal.fake_device import note_wait
from megaphase.rehearsal.fake_gpu import FakeGPU, tensors_of

_NO_DROPOUT = 0.0


def join_fake_group(processes: int, rank: int) -> None:
    """Make this process a rank of a group whose other ranks do not exist.

    Collectives of the CPU's tensors have the results that they would have if all ranks had the same
    values.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    new_group = dist.new_group

    def fake_group(ranks: Any = None, timeout: Any = None, *_: object, **__: object) -> Any:
        return new_group(ranks, timeout, "fake")

    dist.new_group = fake_group


def patch_for(gpu: FakeGPU) -> None:
    """Replace in the package, in torch and in DeepSpeed what computes with values."""
    kernels._compiled = functools.cache(functools.partial(_recorded_formula, gpu))
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    capped_attention.compiled_flex = lambda: _flex_attention  # type: ignore[assignment]
    capped_attention.compiled_block_mask = lambda: _block_mask  # type: ignore[assignment]
    Initializer.draw = _undrawn  # type: ignore[method-assign]
    Uninitialized.draw = _undrawn  # type: ignore[method-assign]
    nn.Module._apply = _apply_in_place  # type: ignore[method-assign]


def patch_deepspeed() -> None:
    """After it has been imported."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    # In the first steps ZeRO-3 compares its trace with that of the other ranks.
    coordinator.assert_ints_same_as_other_ranks = lambda _: note_wait("ZeRO-3 compares its trace")


def _recorded_formula(gpu: FakeGPU, formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula as the one kernel that torch.compile makes of it."""

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with gpu.fused(formula.__name__, (args, kwargs)) as outputs:
            result = formula(*args, **kwargs)
            outputs.extend(tensors_of(result))
        return result

    return compiled


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = _NO_DROPOUT,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's choice on sm_90 among the backends that are enabled.

    cuDNN, then flash attention, for half types without a mask; else the memory-efficient kernel,
    whose mask is a bias in the type of the queries.
    """
    assert dropout_p == _NO_DROPOUT
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None:
        if torch.backends.cuda.cudnn_sdp_enabled():
            cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
            out: Tensor = cudnn(
                q, k, v, None, torch.is_grad_enabled(), _NO_DROPOUT, is_causal, scale=scale
            )[0]
            return out
        if torch.backends.cuda.flash_sdp_enabled():
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out = flash(q, k, v, _NO_DROPOUT, is_causal, scale=scale)[0]
            return out
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.empty(bias.shape, dtype=q.dtype, device=bias.device)
        bias = bias.expand(*q.shape[:3], k.shape[2])
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out = efficient(q, k, v, bias, torch.is_grad_enabled(), _NO_DROPOUT, is_causal, scale=scale)[0]
    return out


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """FlexAttention saves what flash attention does, and computes as much."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = flash(q, k, v, _NO_DROPOUT, True)[0]
    return out


def _block_mask(
    _: object, rows: int | None, __: object, seq: int, ___: int, *, device: torch.device
) -> Tensor:
    """The blocks of a mask, without those of its transpose."""
    blocks = -(-seq // 128)
    return torch.zeros((rows or 1, blocks, blocks), dtype=torch.int32, device=device)


def _undrawn(self: Initializer, name: str, spec: ParameterSpec) -> Tensor:
    """A whole parameter without values, on the device: it costs the host neither time nor
    memory."""
    return torch.empty(spec.shape, dtype=self.dtype, device=self.device)


def _apply_in_place(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """nn.Module._apply, which would exchange fake parameters for others."""
    for child in self.children():
        child._apply(fn)
    with torch.no_grad():
        for parameter in self._parameters.values():
            if parameter is not None:
                applied = fn(parameter)
                if applied.dtype != parameter.dtype or applied.device != parameter.device:
                    parameter.data = applied
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
    return self
