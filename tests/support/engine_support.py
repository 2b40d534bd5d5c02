"""Engines of small models, learnable batches, and the fp32 weights of an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaphase.config.run import RunConfig
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.model.presets import build_shape
from megaphase.plan.dataset import Batch
from megaphase.training.deepspeed_import import import_deepspeed
from megaphase.training.engine import Engine
from megaphase.utils.targets import IGNORED_TARGET

TASKS = ["big", "small"]
SAMPLES = 8
SEQ_LEN = 16
VOCAB = 96
CLIP = 0.85  # clips some steps of a small model, but not all
# Cancellation of the gradients of a batch's tokens: the ratio of the mean of their norms, to which
# the rounding error is proportional, and the norm of their mean.
CANCELLATION = 10
MODEL = {"seq_len": SEQ_LEN, "layers": 2, "hidden": 32, "heads": 4, "ffn": 48}
# Its feed-forward layers are too large for ZeRO-3 to keep gathered by default; SOME keeps the
# weights of block 0 gathered.
WIDE = {"hidden": 128, "ffn": 2048}
SOME = 0.6


def run_config(
    *,
    model: dict[str, Any] | None = None,
    micro: int = 2,
    precision: str = "fp32",
    seed: int = 1,
    optimizer: dict[str, Any] | None = None,
    **parallel: Any,
) -> RunConfig:
    """Return a run of the small model; `parallel` has tensor, zero and sequence."""
    return RunConfig.model_validate(
        {
            "seed": seed,
            "output": "run",
            "tokenizer": "tok",
            "tasks": {name: {"corpus": name} for name in TASKS},
            "model": MODEL | (model or {}),
            "parallel": parallel,
            "precision": precision,
            "batch": {"samples": SAMPLES, "micro": micro},
            "optimizer": {"clip": CLIP} | (optimizer or {}),
            "phases": [
                {
                    "name": "only",
                    "steps": 1,
                    "mixture": {"rates": {TASKS[0]: 1.0}},
                    "learning_rate": {"peak": 1e-3},
                }
            ],
        }
    )


def build_engine(config: RunConfig, vocab: int = VOCAB) -> Engine:
    grid = start_process_grid(config.parallel.tensor)
    return Engine(config, build_shape(config, vocab), grid, len(TASKS))


def global_batch(
    step: int, *, vocab: int = VOCAB, short: bool = False, packed: bool = False
) -> Batch:
    """Return the whole batch of a step: sequences that count by ones in the first task, by threes
    in the other, with a tenth of the tokens random.

    short: rows end early, at different lengths; one has no target at all.
    packed: the second half of the rows, and in even steps also the first, contain several documents
    that do not attend to each other, and only the last tokens of each are targets.
    """
    random = torch.Generator().manual_seed(1000 + step)
    tasks = (torch.rand(SAMPLES, generator=random) < 0.3).long()
    first = torch.randint(vocab, (SAMPLES, 1), generator=random)
    stride = torch.where(tasks == 0, 1, 3).unsqueeze(1)
    tokens = (first + stride * torch.arange(SEQ_LEN + 1)) % vocab
    noise = torch.rand(tokens.shape, generator=random) < 0.1
    tokens = torch.where(noise, torch.randint(vocab, tokens.shape, generator=random), tokens)
    targets = tokens[:, 1:].clone()
    if short:
        lengths = torch.randint(1, SEQ_LEN, (SAMPLES, 1), generator=random)
        lengths[step % SAMPLES] = 0
        targets[torch.arange(SEQ_LEN) >= lengths] = IGNORED_TARGET
    documents = _documents(targets, step % 2 == 1, random) if packed else None
    return Batch(tokens[:, :-1].contiguous(), targets, tasks, documents)


def _documents(targets: Tensor, half: bool, random: torch.Generator) -> Tensor:
    """Split rows into documents at random, and ignore the targets of a document's first tokens."""
    begins = torch.rand(targets.shape, generator=random) < 0.2
    begins[: SAMPLES // 2 if half else 0] = False
    begins[:, 0] = False
    targets[begins | begins.roll(-1, 1)] = IGNORED_TARGET
    return begins.cumsum(1)


def share(batch: Batch, grid: ProcessGrid) -> Batch:
    """Return the rows of this data-parallel rank."""
    rows = len(batch) // grid.data_size
    return list(batch.split(rows))[grid.data_rank]


def fp32_weights(engine: Engine) -> dict[str, Tensor]:
    """Return this tensor-parallel rank's weights of the optimizer, whole, by name."""
    deepspeed = import_deepspeed()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        weights[name] = (parameter if master is None else master).detach().clone()
    return weights


def model_weights(engine: Engine) -> dict[str, Tensor]:
    """Return this tensor-parallel rank's weights of the model, whole, by name."""
    deepspeed = import_deepspeed()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights


def load_fp32_weights(engine: Engine, weights: dict[str, Tensor]) -> None:
    """Set the optimizer's weights and the model's, which are rounded to its dtype."""
    deepspeed = import_deepspeed()
    for name, parameter in engine.module.named_parameters():
        partitioned = hasattr(parameter, "ds_id")
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned),
        ):
            parameter.copy_(weights[name])
        if partitioned and weights[name].numel() % engine.grid.data_size:
            _set_partition(parameter, weights[name])
        else:
            deepspeed.utils.safe_set_full_fp32_param(parameter, weights[name])


def _set_partition(parameter: Any, weight: Tensor) -> None:
    """Set the partition of the optimizer's weight where it has other elements than there are ranks
    to share them, which DeepSpeed's function refuses."""
    optimizer = parameter._z3_optimizer
    partition, _ = optimizer._get_fp32_opt_state_partition(parameter, False)
    first = partition.numel() * optimizer._get_param_partition_rank(parameter)
    mine = weight.flatten()[first : first + partition.numel()]
    partition.data[: len(mine)].copy_(mine)
