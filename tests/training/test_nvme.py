"""ZeRO-3 with optimizer and parameters on an NVMe disk: saved, resumed, and reset.

DeepSpeed reads and writes the disk with its own operator, which needs libaio and is compiled at its
first use; where it cannot be, a class that does the same with Python's files replaces it. Both are
slow tests. Any disk will do here.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from distributed import run_ranks
from engine_support import (
    build_engine,
    fp32_weights,
    global_batch,
    run_config,
    share,
)
from torch import Tensor

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.store import CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.training.deepspeed_config import swap_folder
from megaphase.training.deepspeed_import import import_deepspeed
from megaphase.training.engine import Engine
from megaphase.training.nvme import load_async_io, prepare_offload
from megaphase.utils import locks
from megaphase.utils.errors import InputError

PROCESSES = 2
BEFORE, AFTER = 3, 3
RATE = 1e-2
# DeepSpeed leaves tensors below 1 MiB per rank in memory: the embeddings are larger, even in bf16.
VOCAB = 8192
ROWS = range(3000, 7000)
MODEL = {"hidden": 128, "ffn": 256}
PLACES = {
    "optimizer": {"offload": "nvme"},
    "optimizer and parameters": {"offload": "nvme", "offload_parameters": "nvme"},
    "parameters": {"offload": "cpu", "offload_parameters": "nvme"},
}
CASES = [*(("fp32", place) for place in PLACES), ("bf16", "optimizer and parameters")]
Curve = list[tuple[float, float]]


@cache
def missing() -> str | None:
    """Return why DeepSpeed's operator cannot be used here, or None."""
    includes = ("/usr/include", "/usr/local/include")
    if not any(Path(folder, "libaio.h").exists() for folder in includes):
        return "libaio-dev is not installed"
    return None if shutil.which("c++") else "there is no C++ compiler"


class PythonHandle:
    """The part of `aio_handle` that DeepSpeed's swappers use; requests finish at once here."""

    locked: ClassVar[list[Tensor]] = []  # by any handle: the operator shares them, too

    def __init__(self, **settings: Any) -> None:
        self._done = 0

    def async_pwrite(self, tensor: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        assert self.is_pinned(tensor)
        Path(path).write_bytes(tensor.detach().view(torch.uint8).numpy().tobytes())
        self._done += 1
        return 0

    def async_pread(self, tensor: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        assert self.is_pinned(tensor)
        content = bytearray(Path(path).read_bytes())
        assert len(content) == tensor.nbytes
        tensor.view(torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8))
        self._done += 1
        return 0

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done

    def new_cpu_locked_tensor(self, elements: int, example: Tensor) -> Tensor:
        self.locked.append(torch.empty(elements, dtype=example.dtype))
        return self.locked[-1]

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        storages = {each.untyped_storage().data_ptr() for each in self.locked}
        return tensor.untyped_storage().data_ptr() in storages


class PythonOperator:
    """Replaces AsyncIOBuilder."""

    aio_handle = PythonHandle

    def load(self, verbose: bool = False) -> PythonOperator:
        return self


def put_stand_in_place() -> None:
    import_deepspeed()
    from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper as of_optimizer
    from deepspeed.runtime.swap_tensor import partitioned_param_swapper as of_parameters

    of_optimizer.AsyncIOBuilder = of_parameters.AsyncIOBuilder = PythonOperator


@dataclass
class RowTraining:
    """Steps that train the rows of some tokens alone; whether these changed, and others did."""

    curve: Curve
    changed: bool
    others_changed: bool


@dataclass
class Examined:
    """The results of one case; curves are losses and gradient norms."""

    on_the_cpu: Curve
    undisturbed: Curve
    resumed: Curve
    same_weights: bool
    steps: tuple[int, int]  # before and after a reset
    after_reset: Curve
    fresh: Curve
    swapped: list[str]  # kinds of files on the disk
    rows_on_the_cpu: RowTraining
    rows: RowTraining


def nvme_config(folder: str, precision: str, place: str, **changes: Any) -> RunConfig:
    parallel: dict[str, Any] = {"zero": 3, **PLACES[place], "offload_folder": folder}
    return run_config(model=MODEL, precision=precision, **parallel | changes)


def train(engine: Engine, first: int, steps: int) -> Curve:
    curve = []
    for step in range(first, first + steps):
        batch = share(global_batch(step, vocab=VOCAB), engine.grid)
        result = engine.train_step(batch, RATE)
        curve.append((result.losses.mean, result.grad_norm))
    return curve


def train_rows(engine: Engine) -> RowTraining:
    engine.state.reset()
    engine.train_only(ROWS)
    before = fp32_weights(engine)
    curve = train(engine, 20, 2)
    changed = {n: (each != before[n]).nonzero()[:, 0] for n, each in fp32_weights(engine).items()}
    vocabulary = changed.pop("embedding.weight"), changed.pop("head.weight")
    own = [((rows >= ROWS.start) & (rows < ROWS.stop)) for rows in vocabulary]
    others = any(len(rows) for rows in changed.values()) or not all(bool(o.all()) for o in own)
    return RowTraining(curve, all(len(rows) > 0 for rows in vocabulary), others)


def save(engine: Engine, folder: Path, control_group: ControlGroup) -> Path:
    saver = Saver(
        CheckpointStore(folder, control_group), control_group, keep=1, asynchronous=True, say=str
    )
    saver.save("step-00000001", engine.state.snapshot(), {}, {})
    saver.finish()
    return folder / "step-00000001"


def examine(folder: Path, precision: str, place: str, control_group: ControlGroup) -> Examined:
    def build(name: str, seed: int) -> Engine:
        config = nvme_config(str(folder / name), precision, place, seed=seed)
        return build_engine(config, VOCAB)

    places = dict.fromkeys(PLACES[place], "cpu")
    on_the_cpu = run_config(model=MODEL, precision=precision, zero=3, **places)
    beside = build_engine(on_the_cpu, VOCAB)
    expected = train(beside, 0, BEFORE + AFTER)
    engine = build("one", 1)
    first = train(engine, 0, BEFORE)
    checkpoint, steps = save(engine, folder / "saved", control_group), engine.state.steps
    undisturbed = train(engine, BEFORE, AFTER)
    weights = fp32_weights(engine)

    other = build("two", 2)
    train(other, 50, 2)  # moments of its own, which must all go
    other.state.load(StoredParameters(checkpoint), steps)
    resumed = train(other, BEFORE, AFTER)
    resumed_weights = fp32_weights(other)

    other.state.load(StoredParameters(checkpoint), steps)
    other.state.reset()
    after_reset = train(other, BEFORE, AFTER)
    fresh = build("three", 3)
    fresh.state.load(StoredParameters(checkpoint), 0)
    return Examined(
        expected,
        first + undisturbed,
        resumed,
        all(torch.equal(weights[name], resumed_weights[name]) for name in weights),
        (steps, other.state.steps - AFTER),
        after_reset,
        train(fresh, BEFORE, AFTER),
        sorted({path.parts[-3] for path in (folder / "one").rglob("*.swp")}),
        train_rows(beside),
        train_rows(engine),
    )


def examine_all(folder: str, operator: str) -> dict[tuple[str, str], Examined]:
    with process_group():
        start_process_grid(1)
        if operator == "stand-in":
            put_stand_in_place()
        else:
            prepare_offload(nvme_config(folder, "bf16", "optimizer"))
        control_group = ControlGroup()
        return {
            case: examine(Path(folder, str(number)), *case, control_group)
            for number, case in enumerate(CASES)
        }


OPERATORS = [
    pytest.param("stand-in", marks=pytest.mark.slow),
    pytest.param(
        "DeepSpeed's",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(missing() is not None, reason=str(missing())),
        ],
    ),
]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=OPERATORS)
def found(request, tmp_path_factory) -> list[dict[tuple[str, str], Examined]]:
    folder = str(tmp_path_factory.mktemp("nvme"))
    return run_ranks(examine_all, PROCESSES, folder, request.param, timeout=900)


each_case = pytest.mark.parametrize("case", CASES, ids=" ".join)


@each_case
def test_the_numbers_are_those_of_an_offload_to_the_cpu(case, found) -> None:
    precision, place = case
    assert found[0][case].undisturbed == found[0][case].on_the_cpu
    kinds = ["optimizer"] * place.startswith("optimizer")
    kinds += [f"{'float32' if precision == 'fp32' else 'bfloat16'}params"] * place.endswith(
        "parameters"
    )
    assert found[0][case].swapped == sorted(kinds)


@each_case
def test_what_was_saved_goes_on_bit_for_bit(case, found) -> None:
    assert found[0][case].resumed == found[0][case].undisturbed[BEFORE:]
    assert all(rank[case].same_weights for rank in found)


@each_case
def test_rows_are_trained_alone(case, found) -> None:
    rows = found[0][case].rows
    assert rows == found[0][case].rows_on_the_cpu
    assert (rows.changed, rows.others_changed) == (True, False)


@each_case
def test_a_reset_leaves_a_fresh_optimizer(case, found) -> None:
    assert found[0][case].steps == (BEFORE, 0)
    assert found[0][case].after_reset == found[0][case].fresh
    assert found[0][case].after_reset != found[0][case].resumed


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = nvme_config(str(tmp_path), "bf16", "optimizer")
    other = config.model_copy(update={"output": Path("elsewhere")})
    one, two = swap_folder(config), swap_folder(other)
    assert one is not None
    assert one != two
    assert one.parent == tmp_path
    assert one == swap_folder(config), "a run that goes on uses the same"
    assert swap_folder(run_config(zero=3)) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = nvme_config(str(tmp_path / "file"), "bf16", "optimizer")
    with pytest.raises(InputError, match=r"parallel\.offload_folder: .* cannot be written \(Not a"):
        prepare_offload(config)


def test_a_missing_compiler_or_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Unable to JIT load the async_io op\nmore")

    monkeypatch.setattr("megaphase.training.nvme.load_async_io", fail)
    config = nvme_config(str(tmp_path), "bf16", "optimizer")
    with pytest.raises(InputError, match=r"parallel: nvme needs .* async_io op\); install libaio"):
        prepare_offload(config)


@pytest.mark.parametrize("has_locks", [True, False])
def test_whose_lock_of_torch_is_removed(
    has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leftover is, but not where it may be that of a process that compiles now."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if not has_locks:
        monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    folder = Path(cpp_extension._get_build_directory("async_io", verbose=False))
    assert folder.is_relative_to(tmp_path)
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    found: list[bool] = []
    builder = SimpleNamespace(load=lambda verbose: found.append((folder / "lock").exists()))
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: builder)
    load_async_io()
    assert found == [not has_locks]
    if not has_locks:
        baton.release()  # raises FileNotFoundError if it has been removed


@pytest.mark.parametrize(
    "error", [TypeError("expected str, not NoneType"), RuntimeError("no nvcc")]
)
def test_whatever_the_builder_raises_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a CUDA toolkit DeepSpeed's builder raises a TypeError."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("megaphase.training.nvme.load_async_io", fail)
    config = run_config(model=MODEL, zero=3, offload="nvme", offload_folder=str(tmp_path))
    with pytest.raises(InputError, match=rf"cannot be built here \({error}\); install libaio-dev"):
        prepare_offload(config)
