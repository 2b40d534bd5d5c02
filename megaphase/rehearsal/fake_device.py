"""Make torch believe that there is a GPU; before anything else imports torch.

A shim (fake_cuda.cpp) is compiled against the installed torch and loaded, and `torch.cuda` is
replaced where a CPU build of torch has nothing behind it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from stat import S_ISDIR
from types import SimpleNamespace
from typing import Any

from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import fsync_path

SHIM = Path(__file__).with_name("fake_cuda.cpp")
# The card that is rehearsed: its name and properties, as torch.cuda gives them on a real one.
CARD = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85_000_000_000,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    max_threads_per_block=1_024,
    warp_size=32,
    is_integrated=False,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=52_428_800,
    gcnArchName="",
    uuid="0",
    pci_bus_id=0,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5_120,
)
GPUS = 8  # of the node

OnWait = Callable[[str], None]
_on_wait: list[OnWait] = []


def missing_for_rehearsal() -> str | None:
    """The program that a rehearsal needs and does not find; None if it finds all."""
    return None if shutil.which("g++") else "g++"


def install_fake_device() -> None:
    """Give this process a GPU that does not exist; `on_wait` then hears of the host's waits.

    Raises:
        InputError: g++ is missing.
        RunError: the shim does not fit the installed torch.
    """
    if "torch" in sys.modules:
        raise AssertionError("the fake device comes before torch")
    if missing := missing_for_rehearsal():
        raise InputError(missing, "is not installed, and a rehearsal compiles a shim", "install it")
    os.environ |= {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    library = _compiled_shim()
    try:
        shim = ctypes.CDLL(str(library))
    except OSError:  # cut off, as by a crash of the machine
        library.unlink(missing_ok=True)
        shim = ctypes.CDLL(str(_compiled_shim()))
    _replace_torch_cuda()
    shim.install_guard()


def on_wait(report: OnWait) -> None:
    """Call `report` with a short description whenever the host would wait for the device."""
    _on_wait.append(report)


def note_wait(kind: str) -> None:
    for report in _on_wait:
        report(kind)


def _compiled_shim() -> Path:
    """The shim for the installed torch, compiled once for each version of both."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise InputError("torch", "is not installed", "install it")
    root = Path(spec.origin).parent
    identity = SHIM.read_bytes() + (root / "version.py").read_bytes() + str(root).encode()
    name = f"fake-cuda-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    library = _own_folder() / name
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / name
        libraries = root / "lib"
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}",
                   f"-L{libraries}", f"-Wl,-rpath,{libraries}", str(SHIM), "-ltorch_cpu", "-lc10",
                   "-o", str(fresh)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise RunError(f"the rehearsal's shim does not compile against this torch: {first}")
        fsync_path(fresh)
        os.replace(fresh, library)  # whole, also where several processes compile it at once
    return library


def _own_folder() -> Path:
    """A folder for code that is loaded, which no other user can write to."""
    folder = Path(tempfile.gettempdir()) / f"megaphase-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        problem = "can be written by other users, or is no folder"
        raise InputError(folder, problem, "remove it, or set TMPDIR to a folder of your own")
    return folder


class Stream:
    """A CUDA stream on which nothing runs."""

    _count = 0

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        import torch

        Stream._count += 1
        self.stream_id = self.cuda_stream = Stream._count
        self.device, self.priority = torch.device("cuda", 0), priority

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        note_wait("Stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        _streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _streams.pop()


class Event:
    """A CUDA event that has always happened already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note_wait("Event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        note_wait("Event.elapsed_time")
        return 1.0


class _StreamContext:
    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        _streams.append(self._stream or _streams[-1])

    def __exit__(self, *_: object) -> None:
        _streams.pop()


_streams: list[Stream] = []


def current_stream_id() -> int:
    return _streams[-1].stream_id


def _replace_torch_cuda() -> None:
    import torch
    import torch._dynamo
    import torch._inductor  # both ask for the real CUDA when they are imported
    from torch._subclasses import fake_tensor

    default = Stream()
    _streams.append(default)

    def always(result: object) -> Callable[..., object]:
        """A new function at every call: dynamo's table of rules must not see one twice."""
        return lambda *_, **__: result

    def wait(kind: str) -> Callable[..., None]:
        return lambda *_, **__: note_wait(kind)

    replaced: dict[str, Any] = {
        "is_available": always(True),
        "is_initialized": always(True),
        "is_bf16_supported": always(True),
        "is_current_stream_capturing": always(False),
        "device_count": always(GPUS),
        "get_device_name": always(CARD.name),
        "get_device_capability": always((CARD.major, CARD.minor)),
        "get_device_properties": always(CARD),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "memory_stats": lambda *_: defaultdict(int),
        "synchronize": wait("cuda.synchronize"),
        "empty_cache": wait("cuda.empty_cache"),
        "Stream": Stream,
        "Event": Event,
        "stream": _StreamContext,
        "current_stream": lambda *_: _streams[-1],
        "default_stream": always(default),
        "nvtx": SimpleNamespace(range_push=always(0), range_pop=always(0)),
    }
    for name in ("set_device", "init", "_lazy_init", "ipc_collect", "manual_seed",
                 "manual_seed_all", "set_rng_state", "reset_peak_memory_stats",
                 "reset_max_memory_allocated", "reset_max_memory_cached"):  # fmt: skip
        replaced[name] = always(None)
    for name in ("current_device", "_exchange_device", "_maybe_exchange_device", "initial_seed",
                 "memory_allocated", "max_memory_allocated", "memory_reserved",
                 "max_memory_reserved", "memory_cached", "max_memory_cached"):  # fmt: skip
        replaced[name] = always(0)
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))  # noqa: B010
    setattr(torch.version, "cuda", "13.0")  # noqa: B010
    setattr(torch._C, "_cuda_getDeviceCount", lambda: GPUS)  # noqa: B010
    setattr(torch.Tensor, "record_stream", always(None))  # noqa: B010
    setattr(fake_tensor, "init_gpu_context", always(None))  # noqa: B010
    torch._C._set_only_lift_cpu_tensors(True)
