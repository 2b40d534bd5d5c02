"""A small kernel, compiled as those of a run are. It is a module of its own, because Triton reads
a kernel's source from its file."""

from __future__ import annotations

import tempfile
from unittest import mock

import torch
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK = 128
ARCHITECTURE, WARP_SIZE = 80, 32  # of an A100, where there is no GPU


@triton.jit  # type: ignore[untyped-decorator]
def _add_one(values, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(values + at, tl.load(values + at, mask=at < count) + 1, mask=at < count)


def assemble() -> str:
    """Compile the kernel for a GPU that is not there; return what was done."""
    source = ASTSource(
        fn=_add_one,
        signature={"values": "*fp32", "count": "i32", "block": "constexpr"},
        constexprs={(2,): BLOCK},
    )
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": cache}),
    ):
        compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, WARP_SIZE))
    if not compiled.asm["cubin"]:
        raise RuntimeError("the assembler wrote nothing")
    return "compiles a kernel for an A100 (there is no GPU to run it)"


def run() -> str:
    """Compile the kernel and run it on the first GPU; return what was done."""
    count = 1000
    values = torch.zeros(count, device="cuda")
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": cache}),
    ):
        _add_one[(-(-count // BLOCK),)](values, count, block=BLOCK)
        torch.cuda.synchronize()
    if not bool((values == 1).all()):
        raise RuntimeError("the kernel computes something else")
    return "compiles and runs a kernel"
