"""Assembles FlexAttention's kernels of capped scores for an H100, without a GPU.

`python -m assembled_attention HEAD_DIM` writes as JSON a list of launches, see `assembled_kernels`,
of each step: the mask of documents and a window, the forward pass, and the backward pass.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assembled_kernels import Launch, _prepare_compiler

from megaphase.rehearsal.fake_device import install_fake_device

ROWS, SEQ, HEADS, KV_HEADS, WINDOW, CAP = 2, 2048, 8, 4, 512, 50.0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    install_fake_device()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as replaced:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        steps = _steps(int(sys.argv[1]), _prepare_compiler(replaced))
    json.dump({name: [asdict(each) for each in found] for name, found in steps.items()}, answers)
    answers.close()


def _steps(head_dim: int, launches: list[Launch]) -> dict[str, list[Launch]]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megaphase.ops.capped_attention import block_mask, flex_capped_attention

    found: dict[str, list[Launch]] = {}

    def note(name: str) -> None:
        found[name] = list(launches)
        launches.clear()

    def heads(count: int) -> Any:
        projected = torch.empty((ROWS, SEQ, count, head_dim), dtype=torch.bfloat16, device="cuda")
        return projected.transpose(1, 2).requires_grad_()

    with FakeTensorMode(allow_non_fake_inputs=True):
        documents = torch.zeros((ROWS, SEQ), dtype=torch.int64, device="cuda")
        mask = block_mask(documents, WINDOW)
        note("mask")
        q, k, v = (heads(count) for count in (HEADS, KV_HEADS, KV_HEADS))
        out = flex_capped_attention(q, k, v, mask, None, CAP)
        assert out.stride() == q.stride()
        note("forward")
        out.backward(torch.empty_like(out))
        assert [x.grad.stride() for x in (q, k, v)] == [x.stride() for x in (q, k, v)]
        note("backward")
    return found


if __name__ == "__main__":
    main()
