"""`launch check-node`: faults of a node are reported with its name."""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from run_support import megaphase, run_settings

from megaphase.launch.slurm import node
from megaphase.launch.slurm.node import Demands, faults


def demands(tmp_path: Path, **changes: object) -> Demands:
    """Return demands that every node fulfils; `changes` are additional ones."""
    found = {"output": tmp_path, "gpus": 0, "shared_memory_gb": 0.0, "clock": time.time()}
    return Demands(**{**found, "clock_seconds": 60.0, **changes})  # type: ignore[arg-type]


def found(demands: Demands) -> str:
    (sentence,) = faults(demands)
    return sentence


def test_a_sound_node(tmp_path: Path) -> None:
    sound = demands(tmp_path, output=tmp_path / "new" / "run", shared_memory_gb=1e-6)
    assert list(faults(sound)) == []
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    look = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    assert found(demands(tmp_path, gpus=8)) == f"torch finds no GPU of 8 ({look})"


def test_a_wrong_driver_is_told_in_torchs_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "CUDA initialization: The NVIDIA driver\non your system is too old (found 11040)."

    def is_available() -> bool:
        warnings.warn(warning, stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert found(demands(tmp_path, gpus=8)) == (
        "torch finds no GPU of 8 (CUDA initialization: The NVIDIA driver on your system is too old "
        "(found 11040).)"
    )


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="this torch is for GPUs")
def test_torch_without_cuda(tmp_path: Path) -> None:
    assert "it was built without CUDA" in found(demands(tmp_path, gpus=1))


def test_too_few_gpus_and_one_that_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = {0: torch.full((2, 2), 256.0), 1: torch.tensor([256.0, 255.0])}

    class Ones:
        def __init__(self, *shape: int, device: str) -> None:
            self.number = int(device.removeprefix("cuda:"))

        def __matmul__(self, other: object) -> torch.Tensor:
            if self.number == 2:
                raise RuntimeError("CUDA error:\nuncorrectable ECC error")
            return products[self.number]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "ones", Ones)
    assert list(faults(demands(tmp_path, gpus=4))) == [
        "torch finds 3 GPUs of 4",
        "GPU 1 computes wrong products",
        "GPU 2 does not compute (CUDA error: uncorrectable ECC error)",
    ]


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=64_000_000)
    monkeypatch.setattr(node.shutil, "disk_usage", lambda path: usage)
    assert found(demands(tmp_path, shared_memory_gb=1.0)) == (
        "/dev/shm has 0.06 GB free, but needs 1"
    )
    monkeypatch.undo()
    monkeypatch.setattr(node, "SHARED_MEMORY", tmp_path / "none")
    assert found(demands(tmp_path, shared_memory_gb=1.0)) == (
        f"{tmp_path}/none cannot be read (No such file or directory)"
    )


@pytest.mark.parametrize(
    ("output", "why"),
    [("/proc/run", "No such file or directory"), ("{}/file/run", "Not a directory")],
)
def test_output(tmp_path: Path, output: str, why: str) -> None:
    (tmp_path / "file").touch()
    folder = Path(output.format(tmp_path))
    assert found(demands(tmp_path, output=folder)) == f"{folder} cannot be written ({why})"


@pytest.mark.parametrize(("seconds", "direction"), [(-1000, "ahead of"), (1000, "behind")])
def test_clock(tmp_path: Path, seconds: float, direction: str) -> None:
    sentence = found(demands(tmp_path, clock=time.time() + seconds))
    assert sentence.endswith(f" s {direction} the first node's")
    assert 990 < float(sentence.split()[3].replace(",", "")) < 1060
    assert list(faults(demands(tmp_path, clock=time.time() + 30))) == []
    assert list(faults(demands(tmp_path, clock=None))) == []


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_settings(tmp_path)))
    return path


def check(run_file: Path, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = megaphase("launch", "check-node", run_file, *options)
    env = {**os.environ, "SLURMD_NODENAME": "node17", **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_sound_node_says_its_name(run_file: Path) -> None:
    done = check(run_file, MEGAPHASE_CLOCK=str(int(time.time())))
    assert (done.returncode, done.stdout) == (0, "node17\n"), done.stderr


def test_all_that_is_wrong_is_one_line_with_the_nodes_name(run_file: Path) -> None:
    options = ("output=/proc/run", "--shared-memory", 1e9)
    done = check(run_file, *options, MEGAPHASE_CLOCK="0")
    assert (done.returncode, done.stdout) == (1, "node17 did not pass\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("megaphase: node node17: /dev/shm has ")
    for word in ("/proc/run cannot be written", "its clock is"):
        assert f"; {word}" in line


def test_a_node_that_cannot_read_the_run_file(tmp_path: Path) -> None:
    done = check(tmp_path / "run.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(f"megaphase: node node17: {tmp_path}/run.yaml: no such file; ")
