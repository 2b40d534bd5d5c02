"""The corrections of DeepSpeed's gradient sums."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megaphase.training.deepspeed_import import import_deepspeed
from megaphase.training.gradient_sums import keep_until_reduced


def gradient_of_a_gpu() -> mock.Mock:
    return mock.Mock(is_cuda=True)


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801
    """Frees gradients, as DeepSpeed's does on a rank without a part of the parameters."""

    def partition_grads(self, parameters: list[Any], parts: list[Any]) -> list[Any]:
        for parameter in parameters:
            parameter.grad = None
        return parts


def test_a_gradient_is_kept_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    zero, parameters = DeepSpeedZeroOptimizer_Stage3(), [SimpleNamespace() for _ in range(3)]
    gradients = [gradient_of_a_gpu(), None, torch.ones(2)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    keep_until_reduced(zero)
    parts = [torch.ones(1)] * 3
    assert zero.partition_grads(parameters, parts) is parts
    gradients[0].record_stream.assert_called_once_with(stream)
    assert [parameter.grad for parameter in parameters] == [None] * 3


def test_the_installed_deepspeed_still_needs_it() -> None:
    """It calls the method by way of the object, on the stream that reduces, and returns before it
    would say that the stream uses the gradient."""
    import_deepspeed()
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    source = inspect.getsource(Stage3)
    reducing = source[source.index("with get_accelerator().stream(self.reduce_and_partition_str") :]
    assert "self.partition_grads(params_in_bucket, grad_partitions)" in reducing
    freeing = source[source.index("def partition_grads(") :]
    assert freeing.index("param.grad = None") < freeing.index("record_stream")
