"""Bytes per second of each formula between the matrix products, as torch.compile makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from gpu_parts.serving import Results
from gpu_parts.setups import ALONE, base_case, free_memory, seconds_of, weights_drawn_on_the_device
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import device
from megaphase.model.gpt import GPT
from megaphase.ops import kernels as kernels_module
from megaphase.ops.kernels import Kernels

REPEATS = 20
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def formulas(results: Results) -> None:
    """Of those that one block and the loss call, with the arguments that they get."""
    for name, (compiled, arguments, keywords) in recorded(results.rehearse).items():
        outputs = compiled(*arguments, **keywords)
        nbytes = bytes_of((arguments, keywords)) + bytes_of(outputs)
        del outputs
        times = [
            seconds_of(lambda c=compiled, a=arguments, k=keywords: c(*a, **k), REPEATS)  # type: ignore[misc]
            for _ in range(4)
        ]
        seconds = min(times[1:])
        found = {"mb": round(nbytes / 1e6, 3), "us": round(1e6 * seconds, 1)}
        results.record(name, found | {"gb_per_second": round(nbytes / seconds / 1e9, 1)})


def recorded(rehearse: bool) -> dict[str, Call]:
    """Each compiled formula with the arguments of one of its calls in a step of one block."""
    case = base_case(rehearse).with_changes(model={"layers": 1})
    calls: dict[str, Call] = {}
    usual = kernels_module._compiled

    def recording(formula: Callable[..., Any]) -> Callable[..., Any]:
        compiled = usual(formula)

        def call(*arguments: Any, **keywords: Any) -> Any:
            name = f"{formula.__module__.rpartition('.')[2]}.{formula.__name__}"
            of_call = tuple(tree_map(copied, (arguments, keywords)))
            calls.setdefault(f"{name} {shapes_of(of_call)}", (compiled, *of_call))
            return compiled(*arguments, **keywords)

        return call

    kernels_module._compiled = recording  # type: ignore[assignment]
    try:
        with weights_drawn_on_the_device():
            model = GPT(
                case.shape(), Initializer(1, torch.bfloat16), ALONE,
                compute_dtype=torch.bfloat16, kernels=Kernels(compiled=True),
            )  # fmt: skip
        batch = case.batch()[: case.micro]
        total, _ = model(batch.inputs.to(device()), batch.targets.to(device()))
        total.backward()
    finally:
        kernels_module._compiled = usual
    free_memory()
    return calls


def copied(value: Any) -> Any:
    """The arguments are kept, because they are overwritten or freed after the call."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def shapes_of(value: Any) -> str:
    tensors = [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]
    return ", ".join("×".join(map(str, each.shape)) for each in tensors)


def bytes_of(value: Any) -> int:
    """Of the tensors in it, each once."""
    tensors = {id(t): t for t in tree_flatten(value)[0] if isinstance(t, Tensor)}
    return sum(each.nbytes for each in tensors.values())
