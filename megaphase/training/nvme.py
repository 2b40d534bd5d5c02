"""The NVMe disk that ZeRO-3 offloads to: the run's folder there, and what reads and writes it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from megaphase.config.run import RunConfig
from megaphase.training.deepspeed_config import swap_folder
from megaphase.training.deepspeed_import import import_deepspeed
from megaphase.utils.errors import InputError, file_fault
from megaphase.utils.locks import exclusive_lock

LOCK_FILE = "megaphase-async-io.lock"


def prepare_offload(config: RunConfig) -> None:
    """Make the folder and load DeepSpeed's operator, where the run file asks for NVMe.

    Raises:
        InputError: the folder cannot be written, or the operator cannot be built.
    """
    folder = swap_folder(config)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        where = config.where("parallel.offload_folder")
        remedy = "give a folder on a disk of every node"
        raise file_fault(folder, error, remedy, "cannot be written", where=where) from None
    try:
        load_async_io()
    except Exception as error:  # whatever the builders of torch and DeepSpeed raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            config.where("parallel"),
            f"nvme needs DeepSpeed's operator async_io, which cannot be built here ({reason})",
            "install libaio-dev, ninja, a C++ compiler and, with GPUs, the CUDA toolkit of torch's "
            "version (CUDA_HOME), or offload to the cpu",
        ) from None


def load_async_io() -> None:
    """Compile the operator at its first use, one process at a time.

    torch marks a build with a lock file, on which every later run would hang for ever if this one
    were killed meanwhile. Under a lock that ends with its process, such a file is a leftover; where
    the file system has no locks, it may be another process's, which fails if it is removed.
    """
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    root = Path(cpp_extension.get_default_build_root())
    with exclusive_lock(root / LOCK_FILE, lambda: None) as held:
        for name in ("pin_memory", "async_io") if held else ():
            directory = cpp_extension._get_build_directory(name, verbose=False)
            Path(directory, "lock").unlink(missing_ok=True)
        get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)
