"""The optimizer, DeepSpeed's operators, NVIDIA apex and Triton."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version

from megaphase.doctor.finding import Finding, Settings, fault, first_line, ok, warning
from megaphase.training.backends import APEX_NORM, APEX_OPTIMIZER, lacks_module

AIO_REMEDY = (
    "needed by parallel.offload: nvme alone: install libaio with its headers (Debian: libaio-dev), "
    "ninja and g++"
)


def check_optimizer(settings: Settings) -> Iterator[Finding]:
    """Take a step of torch's fused AdamW, which runs use, on the CPU (offload: cpu) and the GPU."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        weight = torch.ones(1000, device=device, requires_grad=True)
        try:
            optimizer = torch.optim.AdamW([weight], lr=0.5, eps=0, weight_decay=0, fused=True)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        except RuntimeError as error:
            yield fault(
                f"fused AdamW fails on the {device} ({first_line(error)})", "install torch again"
            )
            return
        # Without decay and epsilon, Adam's first step is the learning rate, whatever the gradient.
        if not bool((weight - 0.5).abs().max() < 1e-6):
            yield fault(f"fused AdamW steps wrongly on the {device}", "install torch again")
            return
    where = " and ".join({"cpu": "the CPU", "cuda": "the GPU"}[device] for device in devices)
    yield ok(f"torch's fused AdamW steps rightly on {where}")


def check_deepspeed(settings: Settings) -> Iterator[Finding]:
    """Import DeepSpeed; look for what its operator for NVMe needs, with `gpu` build it."""
    from megaphase.training.deepspeed_import import import_deepspeed
    from megaphase.training.nvme import load_async_io

    remedy = "install it again: pip install -c constraints.txt deepspeed"
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            deepspeed = import_deepspeed()
        except Exception as error:
            yield fault(f"DeepSpeed cannot be imported ({first_line(error)})", remedy)
            return
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        builder = accelerator.create_op_builder("AsyncIOBuilder")
        compatible = builder is not None and builder.is_compatible(verbose=False)
        problem = ""
        if settings.gpu and compatible:
            try:
                load_async_io()
            except Exception as error:  # whatever the builders of torch and DeepSpeed raise
                problem = first_line(error)
    yield ok(f"DeepSpeed {deepspeed.__version__} on {accelerator.device_name()}")
    if not compatible:
        text = "its operator async_io cannot be built: no libaio"
        yield (warning if settings.gpu else ok)(text, AIO_REMEDY)
    elif problem:
        yield warning(f"its operator async_io cannot be built ({problem})", AIO_REMEDY)
    elif settings.gpu:
        yield ok("its operator async_io (offload: nvme) is built")
    else:
        yield ok("its operator async_io (offload: nvme) finds what it needs; --gpu builds it")


def check_apex(settings: Settings) -> Iterator[Finding]:
    """Look for NVIDIA apex and its CUDA extensions."""
    if importlib.util.find_spec("apex") is None:
        yield ok("not installed; torch's own norms and AdamW are used")
        return
    missing = [name for each in (APEX_NORM, APEX_OPTIMIZER) for name in each if lacks_module(name)]
    if missing:
        yield warning(
            f"apex has no {', '.join(missing)}, so it is not used",
            "build NVIDIA apex with --cpp_ext --cuda_ext (github.com/NVIDIA/apex); the package "
            "apex on PyPI is another one; or uninstall it",
        )
        return
    try:
        import amp_C  # type: ignore[import-not-found]  # noqa: F401
        import fused_layer_norm_cuda  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, OSError) as error:
        yield fault(
            f"apex was built for another torch or CUDA ({first_line(error)})",
            "build it again, or set parts.norm and parts.optimizer to torch",
        )
        return
    yield ok("NVIDIA apex with its CUDA extensions")


def check_triton(settings: Settings) -> Iterator[Finding]:
    """Compile a kernel; run it where there is a GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        found = version("triton")
    except PackageNotFoundError:
        if has_gpu or settings.gpu:
            yield warning(
                "not installed, so kernels are not compiled (parts.kernels: eager)",
                "install the triton that your torch build names, or torch with CUDA again",
            )
        else:
            yield ok("not installed; it is needed on GPUs alone")
        return
    try:
        from megaphase.doctor.triton_kernel import assemble, run

        text = run() if has_gpu else assemble()
    except Exception as error:
        text = f"Triton {found} does not compile a kernel ({first_line(error)})"
        remedy = "check the lines `compiler` and `gpus`; or write parts.kernels: eager"
        yield fault(text, remedy) if has_gpu or settings.gpu else warning(text, remedy)
        return
    yield ok(f"Triton {found} {text}")
