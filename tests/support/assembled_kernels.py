"""Assembles, without a GPU, the kernels that torch.compile makes of a run's formulas for an H100.

`python -m assembled_kernels` reads as JSON {"run": a run file, "vocab", "processes"} and rehearses
one step and one evaluation of the first rank on the fake GPU. It compiles every formula that goes
through `Kernels.of`, for the shapes that it was called with: torch's compiler writes Triton
kernels, Triton compiles them to PTX, and NVIDIA's assembler, which comes with Triton, to machine
code for sm_90a. The compiled formula is then called on tensors without values, and each launch is
recorded with the bytes of its arguments. The answer is a JSON list of `Formula`s.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from megaphase.rehearsal.fake_device import CARD, install_fake_device

ARCHITECTURE = "sm_90a"
CAPABILITY, WARP_SIZE = 90, 32


@dataclass(frozen=True)
class Assembly:
    """One way to launch a kernel. Bytes but for registers, of which each thread has so many."""

    warps: int
    registers: int
    spilled: int
    shared_memory: int


@dataclass(frozen=True)
class Launch:
    """A kernel of the compiled formula: a Triton kernel, or an operator that torch did not compile.

    read, written: bytes of its arguments. reduces: whether it sums along a dimension. assemblies:
    the ways among which the first launch would choose by their time; none of an operator.
    """

    name: str
    read: int
    written: int
    reduces: bool = False
    assemblies: list[Assembly] = field(default_factory=list)


@dataclass(frozen=True)
class Formula:
    """A compiled formula and the fewest bytes that it could read and write: its arguments and
    results once each."""

    name: str
    shapes: list[list[int]]
    floor_read: int
    floor_written: int
    launches: list[Launch]


@dataclass(frozen=True)
class _Call:
    """A formula and its arguments, tensors without values among them."""

    formula: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def key(self) -> tuple[object, ...]:
        described = [
            (tuple(x.shape), x.stride(), x.dtype) if hasattr(x, "stride") else x
            for x in self.arguments
        ]
        return (self.formula, *described)


def main() -> None:
    """Read a case from standard input; write the answer to standard output."""
    case = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    install_fake_device()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        calls = _calls(case["run"], case["vocab"], case["processes"])
        with ExitStack() as replaced:
            launches = _prepare_compiler(replaced)
            formulas = [_assemble(call, launches) for call in calls]
    json.dump([asdict(each) for each in formulas], answers)
    answers.close()


def _calls(run: dict[str, Any], vocab: int, processes: int) -> list[_Call]:
    """The formulas of the rank, each with all shapes that it is called with."""
    from megaphase.config.run import RunConfig
    from megaphase.ops import kernels
    from megaphase.rehearsal import rank as rehearsal

    os.environ.update(
        WORLD_SIZE=str(processes),
        RANK="0",
        LOCAL_RANK="0",
        MASTER_ADDR="localhost",
        MASTER_PORT="1",
    )
    calls: dict[tuple[object, ...], _Call] = {}
    rank = rehearsal.Rank(RunConfig.model_validate(run), vocab, processes, 0)
    recorded = kernels._compiled

    def noting(formula: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called = _Call(formula, arguments)
            calls.setdefault(called.key, called)
            return recorded(formula)(*arguments)

        return call

    with mock.patch.object(kernels, "_compiled", noting):
        rank.train(1)
        rank.evaluate()
    return list(calls.values())


# torch's compiler and Triton, told of the card.


def _prepare_compiler(replaced: ExitStack) -> list[Launch]:
    """Let torch compile for the card; returns the list to which launches are added."""
    import torch
    import torch._dynamo.device_interface as interface
    import torch._inductor.config as config
    from torch._inductor import async_compile, graph
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.driver import driver

    driver.set_active(_driver())
    launches: list[Launch] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        replaced.enter_context(mock.patch.object(owner, name, value))

    for owner in (interface.CudaInterface, interface.CudaInterface.Worker):
        replace(owner, "get_device_properties", staticmethod(lambda *_: CARD))
        replace(owner, "current_device", staticmethod(lambda: 0))
        replace(owner, "set_device", staticmethod(lambda *_: None))
    for name, value in {
        "is_available": True, "device_count": 1, "synchronize": None, "get_raw_stream": 0,
        "get_compute_capability": CAPABILITY, "exchange_device": 0, "maybe_exchange_device": 0,
    }.items():  # fmt: skip
        replace(interface.CudaInterface, name, staticmethod(lambda *_, value=value: value))
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    replace(triton_helpers, "set_driver_to_gpu", lambda: None)
    # Patterns of attention and of padded products, which compute with real tensors. There are none.
    replace(joint_graph, "lazy_init", lambda *_, **__: None)
    replace(post_grad, "lazy_init", lambda *_, **__: None)
    replaced.enter_context(
        config.patch(
            compile_threads=1,
            fx_graph_cache=False,
            autotune_local_cache=False,
            joint_graph_constant_folding=False,
            use_static_triton_launcher=False,
        )
    )
    replace(
        async_compile.AsyncCompile,
        "triton",
        lambda _, name, source, device_str="cuda": _Kernel(name, source, launches),
    )
    compile_to_module = graph.GraphLowering.compile_to_module

    def recorded_module(self: Any) -> Any:
        module = compile_to_module(self)
        call = module.call

        def recorded_call(arguments: Any) -> Any:
            with _operators(launches):
                return call(arguments)

        module.call = recorded_call
        return module

    replace(graph.GraphLowering, "compile_to_module", recorded_module)
    return launches


def _driver() -> Any:
    """Triton's driver of a GPU that cannot launch anything."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):  # type: ignore[misc]
        utils = mock.Mock(
            get_device_properties=lambda _: (
                vars(CARD) | {"max_shared_mem": CARD.shared_memory_per_block_optin}
            )
        )

        def __init__(self) -> None: ...

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", CAPABILITY, WARP_SIZE)

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_benchmarker(self) -> None:
            return None

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_empty_cache_for_benchmark(self) -> None:
            return None

        def clear_cache(self, cache: object) -> None: ...

    return Driver()


class _Kernel:
    """A Triton kernel of a compiled formula, assembled; a launch is only recorded."""

    def __init__(self, name: str, source: str, launches: list[Launch]) -> None:
        from torch._inductor.codecache import PyCodeCache

        self._name, self._source, self._launches = name, source, launches
        tuner = getattr(PyCodeCache.load(source), name)
        self._arguments: list[str] = list(tuner.triton_meta["signature"])
        self._reduces = "REDUCTION" in str(tuner.heuristic_type)
        self._assemblies = [_assembly(tuner, config) for config in tuner.configs]

    def run(self, *arguments: Any, **_: Any) -> None:
        from torch import Tensor

        named = dict(zip(self._arguments, arguments, strict=False))
        # Of a tensor of which it computes a part, a kernel touches no more than one value a point
        # with every load and store; a sum that loads a row again takes it from a cache.
        points = math.prod(value for name, value in named.items() if name.endswith("numel"))
        read = written = 0
        for name, value in named.items():
            if isinstance(value, Tensor):
                times = 1 if self._reduces else self._source.count(f"({name} +")
                touched = min(_bytes(value), times * points * value.element_size())
                read += touched if name.startswith("in_") else 0
                written += 0 if name.startswith("in_ptr") else touched
        self._launches.append(Launch(self._name, read, written, self._reduces, self._assemblies))


def _assembly(tuner: Any, config: Any) -> Assembly:
    binary = tuner._precompile_config(config).kernel
    report = _assembler_report(binary.asm["ptx"])
    (registers,) = re.findall(r"Used (\d+) registers", report)
    ((stored, loaded),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return Assembly(
        config.num_warps, int(registers), int(stored) + int(loaded), binary.metadata.shared
    )


def _assembler_report(ptx: str) -> str:
    import triton.backends.nvidia

    assembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={ARCHITECTURE}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


@contextmanager
def _operators(launches: list[Launch]) -> Iterator[None]:
    """Record the operators that a compiled formula leaves to torch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megaphase.rehearsal.fake_gpu import tensors_of
    from megaphase.rehearsal.kernel_costs import NO_KERNEL, bytes_moved, is_view

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: object, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            name = func._schema.name
            if name not in NO_KERNEL and not is_view(func):
                inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
                launches.append(Launch(name, *bytes_moved(func, inputs, args, kwargs, outputs)))
            return out

    with Recorder():
        yield


def _assemble(call: _Call, launches: list[Launch]) -> Formula:
    import torch
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megaphase.ops.kernels import OPTIONS
    from megaphase.rehearsal.fake_gpu import tensors_of

    launches.clear()
    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        arguments = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, Tensor)
            else x
            for x in call.arguments
        ]
        compiled = torch.compile(call.formula, dynamic=False, fullgraph=True, options=OPTIONS)
        results = tensors_of(compiled(*arguments))
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    read, written = (sum(map(_bytes, each)) for each in (tensors, results))
    shapes = [list(x.shape) for x in tensors]
    module = call.formula.__module__.rpartition(".")[2]
    name = f"{module}.{call.formula.__name__}"
    return Formula(name, shapes, read, written, list(launches))


def _bytes(x: Any) -> int:
    """Of the values of a tensor, those that are expanded once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return int(count * x.element_size())


def formulas(answer: Sequence[dict[str, Any]]) -> list[Formula]:
    """The answer of a process, as it was written."""
    return [
        Formula(
            **each
            | {
                "launches": [
                    Launch(**one | {"assemblies": [Assembly(**a) for a in one["assemblies"]]})
                    for one in each["launches"]
                ]
            }
        )
        for each in answer
    ]


if __name__ == "__main__":
    main()
