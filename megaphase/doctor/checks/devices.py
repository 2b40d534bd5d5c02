"""torch, the GPUs with their driver, and an all-reduce among processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from megaphase.doctor.finding import Finding, Settings, fault, first_line, ok
from megaphase.launch.slurm.node import gpu_faults
from megaphase.utils.cores import available_cores
from megaphase.utils.nvidia_smi import query_gpus
from megaphase.utils.python_command import python_command

DEVICE_FILES = ("nvidia0", "kfd")  # of the drivers of NVIDIA and AMD
PROCESSES = 2  # where there are no GPUs
ALL_REDUCE_SECONDS = 60
GET_TORCH = "install the torch build of your CUDA version (pytorch.org/get-started), then megaphase"


def has_device_files() -> bool:
    """Return whether the driver of a GPU shows a device."""
    return any(Path("/dev", name).exists() for name in DEVICE_FILES)


def check_torch(settings: Settings) -> Iterator[Finding]:
    """Import torch, and compute a product on the CPU."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        yield fault(
            f"torch cannot be imported ({first_line(error)})",
            "install it again: pip install -c constraints.txt torch",
        )
        return
    ones = torch.ones(64, 64)
    if not bool((ones @ ones == 64).all()):
        yield fault("torch computes wrong products on the CPU", "install torch again")
        return
    cores = available_cores()
    built = "for the CPU alone"
    if torch.version.cuda or torch.version.hip:
        maker = "CUDA" if torch.version.cuda else "ROCm"
        built = f"for {maker} {torch.version.cuda or torch.version.hip}"
    text = f"torch {torch.__version__}, built {built}; {cores} CPU cores for this process"
    if built == "for the CPU alone" and (settings.gpu or has_device_files()):
        yield fault(f"{text}, and this node is to use GPUs", GET_TORCH)
    else:
        yield ok(text)


def check_gpus(settings: Settings) -> Iterator[Finding]:
    """Compute on every GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and not settings.gpu and not has_device_files():
        yield ok("no GPU here; on a GPU node run `megaphase doctor --gpu`")
        return
    driver = next(iter(query_gpus("driver_version")), "")
    wrong = list(gpu_faults(max(1, count)))
    for each in wrong:
        yield fault(each, _gpu_remedy(driver))
    if wrong:
        return
    names: dict[str, int] = {}
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        name = f"{properties.name} of {properties.total_memory / (1 << 30):.0f} GB"
        names[name] = names.get(name, 0) + 1
    listed = ", ".join(f"{number} × {name}" for name, number in names.items())
    yield ok(f"{listed}{f', driver {driver}' if driver else ''}; all compute")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield fault("these GPUs do not compute in bf16", "write precision: fp32, or use newer GPUs")


def _gpu_remedy(driver: str) -> str:
    if not has_device_files():
        return (
            "no device file of a GPU is here: ask for GPUs (SLURM: --gpus-per-node), or start the "
            "container with --gpus all (Apptainer: --nv)"
        )
    if not driver:
        return "the driver does not answer: check nvidia-smi, and the node's log"
    return (
        f"check nvidia-smi, CUDA_VISIBLE_DEVICES, and that driver {driver} is new enough for "
        "torch's CUDA; else leave out this node"
    )


def check_all_reduce(settings: Settings) -> Iterator[Finding]:
    """Do an all-reduce over one process for each GPU of the node, or over two on the CPU."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.gpu and not gpus:
        yield fault("no GPU, so NCCL was not tried", "see the line `gpus`")
    backend, processes = ("nccl", gpus) if gpus else ("gloo", PROCESSES)
    with TemporaryDirectory(prefix="megaphase-doctor-") as folder:
        command = python_command("megaphase.doctor.all_reduce", backend, str(processes), folder)
        environment = os.environ | {"NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")}
        ranks = [
            subprocess.Popen(
                [*command, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
            )
            for rank in range(processes)
        ]
        said, hung = [], False
        for process in ranks:
            try:
                said.append(process.communicate(timeout=ALL_REDUCE_SECONDS)[0])
            except subprocess.TimeoutExpired:
                hung = True
                break
        if hung:
            for process in ranks:
                process.kill()
            said = [process.communicate()[0] for process in ranks]
    name = {"nccl": "NCCL", "gloo": "gloo"}[backend]
    over = f"{processes} GPU{'s' * (processes > 1)}" if gpus else f"{processes} processes"
    remedy = {
        "nccl": "run again with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 to "
        "see which link fails",
        "gloo": "the host's name must lead to this machine (/etc/hosts), or name an interface: "
        "GLOO_SOCKET_IFNAME=lo",
    }[backend]
    if hung:
        yield fault(
            f"an all-reduce of {name} over {over} did not end in {ALL_REDUCE_SECONDS} s", remedy
        )
        return
    if any(process.returncode for process in ranks):
        lines = [line for text in said for line in text.splitlines() if line.strip()]
        reason = first_line(lines[-1] if lines else "no message")
        yield fault(
            f"an all-reduce of {name} over {over} fails ({reason})",
            remedy,
        )
        return
    figure = said[0].split()[-1]
    speed = f", {figure} GB/s (bus bandwidth)" if gpus > 1 else ""
    yield ok(f"{name}, over {over}: right{speed}")
    if gpus == 1:
        yield ok("with one GPU no link between GPUs was tried")
