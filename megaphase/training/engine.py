"""One optimizer step at a time: the GPT under DeepSpeed ZeRO with tensor parallelism."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaphase.config.run import RunConfig
from megaphase.distributed.dist_env import local_world_size
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.model.dropout import row_seeds
from megaphase.model.gpt import GPT, Block
from megaphase.model.shape import GPTShape
from megaphase.optim.optimizer import build_optimizer
from megaphase.optim.optimizer_state import OptimizerState
from megaphase.plan.dataset import Batch
from megaphase.training.backends import choose_backends
from megaphase.training.deepspeed_config import (
    compute_dtype,
    deepspeed_config,
    largest_norm,
    parameter_dtype,
)
from megaphase.training.gradients import clip_gradients
from megaphase.training.parameter_persistence import keep_gathered
from megaphase.utils.targets import IGNORED_TARGET


def import_deepspeed() -> Any:  # its classes are not typed
    """Import DeepSpeed on the accelerator that is really there, without its chatter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Otherwise it asks `numactl` how many CPUs there are, in every backward pass.
        os.environ.setdefault("LOCAL_SIZE", str(local_world_size()))
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.expanduser("~/.triton/cache"))
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for it even in a single process
    # DeepSpeed calls collectives by deprecated names, of which torch warns at each step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Its collectives over shared memory are compiled at the first use, behind a lock file on which
    # every later run hangs forever if that one is killed. gloo serves the CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _deepspeed_silenced() -> Iterator[None]:
    """Its bf16 optimizer prints memory figures to standard output, which belongs to the run."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@dataclass(frozen=True)
class TaskLosses:
    """Sums over the tokens of each task, over all data-parallel ranks; float64 [tasks]."""

    loss_sums: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Loss a token in nats over all tasks; 0 where no token has a target."""
        return float(self.loss_sums.sum() / self.tokens.sum().clamp(min=1))

    def by_task(self, names: list[str]) -> dict[str, float]:
        """Mean loss a token in nats for each task that had any."""
        return {
            name: float(self.loss_sums[i] / self.tokens[i])
            for i, name in enumerate(names)
            if self.tokens[i] > 0
        }


@dataclass(frozen=True)
class StepResult:
    """The figures of one optimizer step.

    losses: before the step. grad_norm: before clipping.
    applied: False where the gradient was not finite; nothing has changed then.
    """

    losses: TaskLosses
    grad_norm: float
    applied: bool


class Engine:
    """The model, its optimizer and its ZeRO state on this rank."""

    def __init__(self, config: RunConfig, shape: GPTShape, grid: ProcessGrid, tasks: int) -> None:
        deepspeed = import_deepspeed()
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.backends = backends = choose_backends(config)
        self.grid = grid
        self._tasks = tasks
        self._seed, self._dropout = config.seed, shape.dropout
        self.micro = config.batch.micro
        settings = deepspeed_config(config, shape, grid.data_size)
        # Without ZeRO, DeepSpeed clips but does not return the norm.
        self._clip_here = largest_norm(config) if config.parallel.zero == 0 else None
        self._accumulation: int = settings["gradient_accumulation_steps"]
        partitioned: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if config.parallel.zero == 3:
            partitioned = deepspeed.zero.Init(
                config_dict_or_path=settings,
                mpu=grid,
                data_parallel_group=grid.data_group,
                tensor_overrides=[],  # parameters come in their type; nothing else is to change
            )
        # Weights are rounded to the precision's type for every ZeRO stage, so that all start equal.
        init = Initializer(config.seed, compute_dtype(config))
        with partitioned:
            model = GPT(
                shape,
                init,
                grid,
                sequence_parallel=config.parallel.sequence,
                compute_dtype=compute_dtype(config),
                kernels=backends.kernels,
                overlap=config.parallel.overlap,
            )
        model = model.to(parameter_dtype(config))
        if config.parallel.zero == 3:
            # A block's weights travel together, and its inner modules cost no bookkeeping.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        optimizer = build_optimizer(model, config.optimizer, backends.optimizer)
        with _deepspeed_silenced():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings,
                mpu=grid,
                dist_init_required=False,
            )
        if config.parallel.zero == 3:
            keep_gathered(self._engine.optimizer, model, config.parallel.keep_gathered)
        self._optimizer = optimizer
        self.state = OptimizerState(self._engine, optimizer, grid)
        self.state.reset()

    @property
    def module(self) -> nn.Module:
        """The GPT; under ZeRO-3 its parameters are partitioned between steps."""
        module: nn.Module = self._engine.module
        return module

    def train_step(self, batch: Batch, learning_rate: float, step: int | None = None) -> StepResult:
        """Accumulate gradients over this rank's rows of the global batch, then step.

        The loss is the mean over all tokens of the global batch that have a target, whatever the
        layout; the gradient is zero where none has. A gradient that is not finite changes nothing.

        step: its number over the whole run, which dropout needs and nothing else.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        tokens = self._count_tokens(batch)
        # DeepSpeed takes the mean over micro-batches and data-parallel ranks; this makes it a sum.
        scale = self._accumulation * self.grid.data_size / max(1.0, float(tokens.sum()))
        row_losses = []
        seeds = self._dropout_seeds(len(batch), step)
        for micro, micro_seeds in zip(batch.split(self.micro), seeds, strict=True):
            total, losses = self._forward(micro, micro_seeds)
            self._engine.backward(total * scale)
            norm = self._step()
            row_losses.append(losses.double().sum(1))  # not read yet: nothing waits
        losses_by_task = self.sum_by_task(torch.cat(row_losses), batch)
        return StepResult(TaskLosses(losses_by_task, tokens), norm, math.isfinite(norm))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> TaskLosses:
        """Losses over this rank's rows and those of all other data-parallel ranks.

        Every rank must hold as many rows; rows without any target may fill up the last ones.
        """
        self._engine.eval()
        tokens = self._count_tokens(batch)
        micros = batch.split(self.micro)
        losses = [self._forward(micro, None)[1].double().sum(1) for micro in micros]
        return TaskLosses(self.sum_by_task(torch.cat(losses), batch), tokens)

    def sum_by_task(self, rows: Tensor, batch: Batch) -> Tensor:
        """Sum one figure a row by task, over all data-parallel ranks; float64 [tasks], CPU."""
        sums = torch.zeros(self._tasks, dtype=torch.float64)
        sums.index_add_(0, batch.tasks, rows.double().cpu())
        dist.all_reduce(on_device := sums.to(device()), group=self.grid.data_group)
        return on_device.cpu()

    def _step(self) -> float:
        """Step if this was the last micro-batch; then the gradients' norm before clipping.

        Where that is not finite, DeepSpeed's ZeRO optimizers skip the step themselves.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return 0.0
        if self._clip_here is None:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            if not math.isfinite(norm):
                self._forget_gradients()
            return norm
        norm = clip_gradients(self.module.parameters(), self._clip_here, self.grid)
        if not math.isfinite(norm):
            self.module.zero_grad(set_to_none=True)
        self._engine.step()
        return norm

    def _forget_gradients(self) -> None:
        """DeepSpeed 0.19 keeps those of a skipped step under ZeRO 1 and 2 with offload."""
        zero = self._engine.optimizer
        if getattr(zero, "cpu_offload", False):
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)

    def _dropout_seeds(self, rows: int, step: int | None) -> Iterator[Tensor | None]:
        """Of each micro-batch of this rank's rows of the global batch; None without dropout."""
        first = self.grid.data_rank * rows
        for start in range(first, first + rows, self.micro):
            if self._dropout == 0:
                yield None
                continue
            assert step is not None, "the masks of a step depend on its number"
            numbers = range(start, min(start + self.micro, first + rows))
            yield row_seeds(self._seed, step, numbers).to(device())

    def _forward(self, micro: Batch, dropout_seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of all losses of a micro-batch and each of them, see GPT.forward."""
        inputs, targets, documents = (
            None if rows is None else rows.to(device(), non_blocking=True)
            for rows in (micro.inputs, micro.targets, micro.documents)
        )
        losses: tuple[Tensor, Tensor] = self._engine(inputs, targets, documents, dropout_seeds)
        return losses

    def _count_tokens(self, batch: Batch) -> Tensor:
        """Tokens with a target in the global batch, by task; float64 [tasks]."""
        return self.sum_by_task((batch.targets != IGNORED_TARGET).sum(1), batch)
