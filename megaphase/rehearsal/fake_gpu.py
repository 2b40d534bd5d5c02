"""The GPU that does not exist: a dispatch mode that records operators on "cuda"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from megaphase.rehearsal.fake_device import current_stream_id, note_wait, on_wait
from megaphase.rehearsal.kernel_costs import (
    NO_KERNEL,
    bytes_moved,
    is_view,
    product_flops,
    tensor_bytes,
    written_arguments,
)
from megaphase.rehearsal.live_memory import LiveMemory
from megaphase.rehearsal.recording import (
    Collective,
    HostCopy,
    Kernel,
    Recording,
    Wait,
    called_by,
    place,
)
from megaphase.rehearsal.unfinished import UnfinishedCollectives

COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
# Their device is the one for which memory of the host is pinned.
PINNING = ("aten::_pin_memory", "aten::is_pinned")
# Scalars are read of tensors that have no values. DeepSpeed asks whether a gradient overflows (no),
# and whether it is longer than the limit (yes, so that it is clipped).
NO_OVERFLOW = frozenset(
    {"is_invalid_grad_norm", "has_overflow", "has_overflow_serial",
     "has_overflow_partitioned_grads_serial", "_has_inf_or_nan", "check_overflow"}
)  # fmt: skip
# Operators whose result's shape depends on values.
ELEMENTS_FOUND = 8
LARGE = 1 << 16


def is_on_gpu(x: object) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def tensors_of(tree: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries; called for every operator."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: object, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, list | tuple):
        for each in tree:
            _collect(each, found)
    elif isinstance(tree, dict):
        for each in tree.values():
            _collect(each, found)


class DeviceMismatch(RuntimeError):
    """An operator got tensors of both devices; a real GPU raises an error, too."""


class FakeGPU(TorchDispatchMode):
    """Within it, tensors can be created on "cuda", and what happens to them is recorded.

    Attributes:
        recording: the events
        memory: the live bytes of the device
        unfinished: the collectives that are still running
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.recording = Recording()
        self.memory = LiveMemory(place)
        self.unfinished = UnfinishedCollectives()
        self._fused = False
        on_wait(lambda kind: self.recording.add(Wait(kind, place())))

    @contextmanager
    def fused(self, name: str, inputs: object) -> Iterator[list[Tensor]]:
        """Record all operators of the block as one kernel, which keeps nothing but its outputs.

        Append the outputs to the list that is yielded.
        """
        outputs: list[Tensor] = []
        self._fused = True
        try:
            yield outputs
        finally:
            self._fused = False
        read = sum(map(tensor_bytes, {id(x): x for x in tensors_of(inputs)}.values()))
        written = sum(map(tensor_bytes, {id(x): x for x in outputs}.values()))
        self.recording.add(Kernel(f"fused:{name}", read, written, 0, current_stream_id()))
        for output in filter(is_on_gpu, outputs):
            self.memory.see(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        name: str = func._schema.name
        if not any(map(is_on_gpu, tensors)) and (not to_gpu or name in PINNING):
            return func(*args, **kwargs)
        if name.startswith("c10d::"):
            return self._collective(func, args, tensors)
        if name == "aten::_local_scalar_dense":
            return self._scalar(tensors[0])
        if (found := self._data_dependent(name, tensors)) is not None:
            return found
        return self._operator(func, name, tensors, args, kwargs)

    def _operator(
        self, func: Any, name: str, tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        from_host = [x for x in tensors if not is_on_gpu(x) and x.dim() > 0]
        if from_host and name not in COPIES:
            raise DeviceMismatch(f"{name} got tensors of the CPU and of the GPU, at {place()}")
        if len(self.unfinished) and not is_view(func) and name not in NO_KERNEL:
            changed = [x for x in written_arguments(func, args, kwargs) if is_on_gpu(x)]
            self.unfinished.check(name, [x for x in tensors if is_on_gpu(x)], changed, place)
        if not all(isinstance(x, FakeTensor) for x in tensors):
            fake_args, fake_kwargs = tree_map(self._without_values, (args, kwargs))
        else:
            fake_args, fake_kwargs = args, kwargs
        with self._fake:
            result = func(*fake_args, **fake_kwargs)
        outputs = tensors_of(result)
        if name == "aten::copy_" and not is_on_gpu(args[0]):
            if not (len(args) > 2 and args[2]):
                note_wait("copy to the host")
            return args[0].fill_(1)
        if name in COPIES and from_host and any(map(is_on_gpu, outputs)):
            self._note_host_copy(name, from_host, args, kwargs)
        if not self._fused:
            if name not in NO_KERNEL and not is_view(func):
                read, written = bytes_moved(func, tensors, args, kwargs, outputs)
                flops = product_flops(name, tensors)
                short = name.removeprefix("aten::")
                self.recording.add(Kernel(short, read, written, flops, current_stream_id()))
            for output in filter(is_on_gpu, outputs):
                self.memory.see(output)
        if all(map(is_on_gpu, outputs)):
            return result
        return tree_map(lambda x: self._to_host(x, tensors, kwargs), result)

    def _without_values(self, x: Any) -> Any:
        if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
            with self._fake:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return x

    def _to_host(self, x: Any, tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> Any:
        """Results on the CPU become real: ones, since the device knows no values; zeros where they
        are large, which take no memory until they are written to."""
        if not isinstance(x, FakeTensor) or is_on_gpu(x) or any(x is each for each in tensors):
            return x
        if not kwargs.get("non_blocking"):
            note_wait("copy to the host")
        return (torch.ones if x.numel() < LARGE else torch.zeros)(x.shape, dtype=x.dtype)

    def _note_host_copy(
        self, name: str, sources: Sequence[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> None:
        pinned = all(x.is_pinned() for x in sources)
        in_place = name == "aten::copy_" and len(args) > 2 and args[2]
        non_blocking = bool(kwargs.get("non_blocking") or in_place)
        nbytes = sum(map(tensor_bytes, sources))
        self.recording.add(HostCopy(nbytes, pinned, non_blocking, place()))
        if not (pinned and non_blocking):
            note_wait("copy from pageable memory" if non_blocking else "blocking copy to the GPU")

    def _scalar(self, x: Tensor) -> bool | int | float:
        note_wait("scalar read")
        if called_by(NO_OVERFLOW):
            return 0 if x.dtype != torch.bool else False
        if x.dtype == torch.bool:
            return True
        return 1.0 if x.dtype.is_floating_point else 1

    def _data_dependent(self, name: str, tensors: Sequence[Tensor]) -> Any:
        """The invented result of an operator that waits for values; None for all others."""
        if name == "aten::equal":
            note_wait(name.removeprefix("aten::"))
            return True
        if name == "aten::nonzero":
            note_wait(name.removeprefix("aten::"))
            x = tensors[0]
            with self._fake:
                return torch.empty(
                    (min(x.numel(), ELEMENTS_FOUND), x.dim()), dtype=torch.int64, device=x.device
                )
        if name in ("aten::masked_select", "aten::unique_consecutive", "aten::_unique2"):
            raise NotImplementedError(f"the shape of {name}'s result depends on values")
        return None

    def _collective(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        group = next(found for found in map(_group_of, args) if found is not None)
        outputs, inputs = tensors_of(args[0]), tensors_of(args[1])
        if name in ("allreduce_", "broadcast_"):
            inputs = []
        whole = max(
            sum(x.numel() for x in outputs), sum(x.numel() for x in inputs) if inputs else 0
        )
        nbytes = whole * tensors[0].element_size()
        self.recording.add(Collective(name, whole, nbytes, group.group_name, group.size(), place()))
        self.unfinished.check(name, tensors, outputs, place)
        work = self.unfinished.start(name, outputs, inputs).boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


def _group_of(argument: object) -> ProcessGroup | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return ProcessGroup.unbox(argument)
    except RuntimeError:  # another object
        return None
