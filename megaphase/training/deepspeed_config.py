"""Translates the run file into DeepSpeed's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megaphase.config.run import RunConfig
from megaphase.estimate.gathered_parameters import gather_limits, reduce_bucket
from megaphase.estimate.state_memory import SWAP_BUFFERS
from megaphase.model.parameters import largest_partition, parameter_sizes
from megaphase.model.shape import GPTShape
from megaphase.utils.files import hash_json, real_path


def parameter_dtype(config: RunConfig) -> torch.dtype:
    """The type that parameters are stored in.

    DeepSpeed keeps fp32 masters beside bf16 parameters for ZeRO 1 to 3. Without ZeRO the
    parameters themselves stay fp32, and are cast where they are used.
    """
    bf16 = config.precision == "bf16" and config.parallel.zero > 0
    return torch.bfloat16 if bf16 else torch.float32


def compute_dtype(config: RunConfig) -> torch.dtype:
    """The type of the activations."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def largest_norm(config: RunConfig) -> float:
    """Return the norm to clip to; unreachably high without clipping, so that it is measured."""
    return config.optimizer.clip or 1e30


def swap_folder(config: RunConfig) -> Path | None:
    """Return the folder of this run's files on an NVMe disk, or None if it has none.

    Every run directory has its own, because DeepSpeed gives the files of all runs the same names.
    """
    folder = config.parallel.offload_folder
    return folder and folder / f"megaphase-{hash_json(str(real_path(config.output)))}"


def _offload(config: RunConfig, largest: int) -> dict[str, Any]:
    parallel, folder = config.parallel, swap_folder(config)
    places = {"offload_optimizer": parallel.offload, "offload_param": parallel.offload_parameters}
    offload: dict[str, Any] = {
        key: {
            "device": place,
            "pin_memory": torch.cuda.is_available(),
            "nvme_path": folder and str(folder),
        }
        for key, place in places.items()
        if place != "none"
    }
    if parallel.offload_parameters == "nvme":
        offload["offload_param"] |= {
            "buffer_count": SWAP_BUFFERS,
            "buffer_size": largest,
            "max_in_cpu": 0,
        }
    return offload


def deepspeed_config(config: RunConfig, shape: GPTShape, data_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    The batch is the full one of the first phase; the engine sets that of every step.
    """
    micro = config.phase_batch(0).micro
    accumulation = config.micro_batches(config.parallel.tensor * data_size)
    sizes = parameter_sizes(shape, config.parallel.tensor)
    limits = gather_limits(sizes, config.parallel.keep_gathered)
    return {
        "train_batch_size": micro * accumulation * data_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if config.parallel.zero == 0 else largest_norm(config),
        "bf16": {
            "enabled": parameter_dtype(config) == torch.bfloat16,
            # Stage 1 adds each gradient to its fp32 sum when it is computed, and frees it.
            "immediate_grad_update": config.parallel.zero == 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.parallel.zero,
            # Stage 3 joins gradients on the way to the network in any case; with this twice.
            "contiguous_gradients": config.parallel.zero < 3,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": reduce_bucket(sizes),
            "stage3_prefetch_bucket_size": limits.prefetch,
            "stage3_max_reuse_distance": limits.reuse,
            "stage3_max_live_parameters": limits.live,
            "zero_hpz_partition_size": config.parallel.secondary_partition or 1,
            **_offload(config, largest_partition(shape, config.parallel.tensor, data_size)),
        },
        # The optimizer is torch's own fused AdamW, which DeepSpeed has not on its list.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        # It would wait for the device at both ends of every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
