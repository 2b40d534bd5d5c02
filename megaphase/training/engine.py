"""One optimizer step at a time: the GPT under DeepSpeed ZeRO with tensor parallelism."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaphase.config.run import RunConfig
from megaphase.distributed.device_copies import to_device
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import (
    ProcessGrid,
    collective_timeout,
    device,
    set_timeout,
)
from megaphase.model.document_mask import DocumentBounds, takes_bounds
from megaphase.model.dropout import row_seeds
from megaphase.model.gpt import GPT, Block
from megaphase.model.shape import GPTShape
from megaphase.optim.optimizer import (
    build_optimizer,
    set_learning_rate,
    skips_by_itself,
)
from megaphase.optim.optimizer_state import OptimizerState
from megaphase.optim.trained_rows import TrainedRows
from megaphase.optim.weight_average import WeightAverage
from megaphase.plan.dataset import Batch
from megaphase.training.backends import choose_backends
from megaphase.training.deepspeed_config import (
    compute_dtype,
    deepspeed_config,
    largest_norm,
    parameter_dtype,
)
from megaphase.training.deepspeed_import import import_deepspeed, without_compiler
from megaphase.training.determinism import choose_algorithms
from megaphase.training.gather_order import order_of_training_kept
from megaphase.training.gradient_sums import keep_until_reduced, reduce_nothing, sum_without_copies
from megaphase.training.gradients import clip_gradients
from megaphase.training.loss_spike_filter import LossSpikeFilter
from megaphase.training.parameter_persistence import keep_gathered
from megaphase.training.secondary_partition import forget_secondary_group, secondary_group
from megaphase.training.step_result import StepResult, TaskLosses
from megaphase.utils.heap import keep_freed_memory


@contextlib.contextmanager
def _deepspeed_silenced() -> Iterator[None]:
    """Its bf16 optimizer prints memory figures to standard output, which belongs to the run."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Engine:
    """The model, its optimizer and its ZeRO state on this rank.

    Attributes:
        state: weights and optimizer state. average: of the weights, where one has begun.
        spikes: decides which steps are left out as loss spikes.
    """

    def __init__(self, config: RunConfig, shape: GPTShape, grid: ProcessGrid, tasks: int) -> None:
        choose_algorithms(config)
        if not torch.cuda.is_available():
            keep_freed_memory()
        deepspeed = import_deepspeed()
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.backends = backends = choose_backends(config)
        self.grid = grid
        self._tasks = tasks
        self._loss_weights: Tensor | None = None
        self._seed, self._dropout = config.seed, shape.dropout
        self._dtype = compute_dtype(config)
        self.micro = config.phase_batch(0).micro
        settings = deepspeed_config(config, shape, grid.data_size)
        # Without ZeRO, DeepSpeed clips but does not return the norm.
        self._clip_here = largest_norm(config) if config.parallel.zero == 0 else None
        partitioned: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        forget_secondary_group()
        if config.parallel.zero == 3:
            partitioned = deepspeed.zero.Init(
                config_dict_or_path=settings,
                mpu=grid,
                data_parallel_group=grid.data_group,
                tensor_overrides=[],  # parameters come in their type; nothing else is to change
            )
        # Weights are rounded to the precision's type for every ZeRO stage, so that all start equal.
        init = Initializer(config.seed, self._dtype)
        with partitioned:
            model = GPT(
                shape,
                init,
                grid,
                sequence_parallel=config.parallel.sequence,
                compute_dtype=self._dtype,
                kernels=backends.kernels,
                overlap=config.parallel.overlap,
            )
        model = model.to(parameter_dtype(config))
        if config.parallel.zero == 3:
            # A block's weights travel together, and its inner modules cost no bookkeeping.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        optimizer = build_optimizer(model, config.optimizer, backends.optimizer, self._dtype)
        with _deepspeed_silenced(), without_compiler():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings,
                mpu=grid,
                dist_init_required=False,
            )
        if (secondary := secondary_group()) is not None:
            set_timeout(secondary, collective_timeout(config.faults.stalled_seconds))
        if config.parallel.zero == 3:
            keep_gathered(self._engine.optimizer, model, config.parallel.keep_gathered)
        sum_without_copies(self._engine.optimizer)
        keep_until_reduced(self._engine.optimizer)
        if config.parallel.zero == 0 and grid.data_size == 1:
            reduce_nothing(self._engine)
        self._optimizer = optimizer
        self._skips_by_itself = skips_by_itself(config.optimizer, backends.optimizer)
        self.state = OptimizerState(self._engine, optimizer, grid, config.optimizer)
        self.state.reset()
        self.average = WeightAverage(self.state)
        self.spikes = LossSpikeFilter(config.faults.skip_spikes)
        self._rows = TrainedRows(
            self.module,
            optimizer,
            self.state,
            tensor_rank=grid.tensor_rank,
            tensor_size=grid.tensor_size,
        )

    @property
    def module(self) -> nn.Module:
        """The GPT; under ZeRO-3 its parameters are partitioned between steps."""
        module: nn.Module = self._engine.module
        return module

    @property
    def gpt(self) -> GPT:
        """`module`."""
        module = self.module
        assert isinstance(module, GPT)
        return module

    def take_shape(self, shape: GPTShape) -> None:
        """Have the sequence length and the rotary positions of a phase's shape from here on."""
        module = self.gpt
        if shape == module.shape:
            return
        module.take_shape(shape)
        if torch.cuda.is_available():
            # Blocks of memory that fit activations of the old length fit none of the new one.
            torch.cuda.empty_cache()

    def train_only(self, tokens: range | None) -> None:
        """Train the rows of these tokens alone, in embedding and output projection; None: all
        weights. The optimizer state must be reset before the next step."""
        self._rows.choose(tokens)

    def weigh_losses(self, weights: Sequence[float]) -> None:
        """Multiply the losses of each task by its weight, from the next training step on.

        weights: by the tasks' numbers, see RunConfig.relative_loss_weights.
        """
        equal = min(weights) == max(weights)
        self._loss_weights = None if equal else torch.tensor(weights).double()

    def train_step(
        self,
        batch: Batch,
        learning_rate: float,
        step: int | None = None,
        progress: Callable[[], object] = lambda: None,
    ) -> StepResult:
        """Accumulate gradients over this rank's rows of the global batch, then step.

        The loss is the mean over all tokens of the global batch that have a target, whatever the
        layout, weighted by `weigh_losses`; the gradient is zero where none has a target or a
        weight, and the optimizer takes its step with that. A gradient that is not finite changes
        nothing. The losses of the result have no weights.
        The host waits for the device only where DeepSpeed does (docs/performance.md lists where).

        step: its number over the whole run, which dropout needs and nothing else. progress: called
            after every micro-batch.
        """
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.train()
        tokens = self._over_ranks(self._scored_tokens(batch))
        # DeepSpeed takes the mean over micro-batches and data-parallel ranks; this makes it a sum.
        number = self._accumulate(len(batch))
        factor = number * self.grid.data_size
        weights = self._weighed(tokens)
        scale = (factor / weights.where(weights > 0, 1.0)).float()
        row_losses = []
        seeds = self._dropout_seeds(len(batch), step)
        norm: Tensor | float = 0.0
        losses_by_task = None
        for micro, micro_seeds in zip(batch.split(self.micro), seeds, strict=True):
            total, losses = self._forward(micro, micro_seeds)
            self._engine.backward(total * scale)
            row_losses.append(losses.double().sum(1))
            if self.spikes.is_on and len(row_losses) == number:
                losses_by_task = self._over_ranks(self._by_task(torch.cat(row_losses), batch.tasks))
                loss = losses_by_task.sum() / tokens.sum().clamp(min=1.0)
                self.spikes.take_loss(loss, weights > 0)
            norm = self._step()
            progress()
        if losses_by_task is None:
            losses_by_task = self._over_ranks(self._by_task(torch.cat(row_losses), batch.tasks))
        return StepResult(losses_by_task, tokens, norm, self.spikes.left_out, self.spikes.judgement)

    def _accumulate(self, rows: int) -> int:
        """Tell DeepSpeed of how many micro-batches the next step accumulates; returns that."""
        if rows % self.micro:
            raise ValueError(f"{rows} rows are no whole number of micro-batches of {self.micro}")
        number = rows // self.micro
        settings, zero = self._engine._config, self._engine.optimizer
        settings.gradient_accumulation_steps = number
        settings.train_micro_batch_size_per_gpu = self.micro
        settings.train_batch_size = rows * self.grid.data_size
        # It steps when a multiple of this number is reached since its start.
        self._engine.micro_steps = 0
        if hasattr(zero, "gradient_accumulation_steps"):
            zero.gradient_accumulation_steps = number
        return number

    def _weighed(self, tokens: Tensor) -> Tensor:
        """The sum of the weights of all scored tokens; tokens: [tasks]."""
        if self._loss_weights is None:
            return tokens.sum()
        return (tokens * to_device(self._loss_weights)).sum()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> TaskLosses:
        """Losses over this rank's rows and those of all other data-parallel ranks.

        Every rank must hold as many rows; rows without any target may fill up the last ones.
        """
        self._engine.eval()
        tokens = self._over_ranks(self._scored_tokens(batch))
        rows = torch.cat([self._evaluate(micro) for micro in batch.split(self.micro)])
        losses = self._over_ranks(self._by_task(rows, batch.tasks))
        return TaskLosses(*torch.cat([losses, tokens]).cpu().chunk(2))

    def _evaluate(self, micro: Batch) -> Tensor:
        """The sum of the losses of each row; float64 [samples]."""
        with self._order_kept():
            return self._forward(micro, None)[1].double().sum(1)

    def _order_kept(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass of an evaluation."""
        if self.is_partitioned:
            return order_of_training_kept(self._engine.optimizer)
        return contextlib.nullcontext()

    @property
    def is_partitioned(self) -> bool:
        """Whether weights are partitioned over data-parallel ranks, so that all take part in every
        forward pass."""
        return bool(self._engine.zero_optimization_stage() == 3)

    @contextlib.contextmanager
    def forward_alone(self) -> Iterator[Callable[..., Any]]:
        """Yield what calls the GPT (see `GPT.forward`) on batches of any shape, without gradients.

        Within, sequences are whole on every rank, nothing is compiled, and under ZeRO-3 all
        data-parallel ranks must call it equally often.
        """
        self._engine.eval()

        def forward(*arguments: Any, **options: Any) -> Any:
            with torch.no_grad(), self._order_kept():
                return self._engine(*arguments, **options)

        # Kernels would be compiled for every shape.
        with (
            self.gpt.region.with_whole_sequences(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield forward

    def sum_by_task(self, rows: Tensor, batch: Batch) -> Tensor:
        """Sum one figure a row by task, over all data-parallel ranks; float64 [tasks], CPU.

        rows: [samples], CPU.
        """
        return self._over_ranks(self._by_task(rows, batch.tasks)).cpu()

    def _scored_tokens(self, batch: Batch) -> Tensor:
        """Tokens with a target in this rank's rows, by task; float64 [tasks], CPU."""
        return self._by_task(batch.scored_tokens, batch.tasks)

    def _by_task(self, rows: Tensor, tasks: Tensor) -> Tensor:
        """The sums of one figure a row over the rows of each task; float64 [tasks].

        rows: [samples] on any device. tasks: int64 [samples], CPU.
        """
        if rows.device.type == "cpu":
            sums = torch.zeros(self._tasks, dtype=torch.float64)
            return sums.index_add_(0, tasks, rows.double())
        # index_add_ adds in any order on a GPU, and would not give the same sums twice.
        numbers = torch.arange(self._tasks, device=rows.device).unsqueeze(1)
        return rows.double().where(to_device(tasks) == numbers, 0.0).sum(1)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """The sums over all data-parallel ranks, on the device; the host does not wait for them."""
        dist.all_reduce(on_device := to_device(sums), group=self.grid.data_group)
        return on_device

    def _step(self) -> Tensor | float:
        """Step if this was the last micro-batch; then the gradients' norm before clipping.

        Where that is not finite, nothing changes: DeepSpeed's ZeRO optimizers skip the step, for
        which they read the norm; without ZeRO, torch's AdamW does so without the host, which reads
        it for the other optimizers.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return 0.0
        if self._clip_here is None:
            with self.spikes.judging(self._engine.optimizer):
                self._engine.step()
            if not self._engine.was_step_applied():
                self._forget_gradients()
            norm: Tensor | float = self._engine.get_global_grad_norm()
            return norm if self.spikes.norm is None else self.spikes.norm
        norm = clip_gradients(self.module.parameters(), self._clip_here, self.grid)
        judged = self.spikes.judge(norm) if self.spikes.is_on else norm
        if self._skips_by_itself:
            self._optimizer.found_inf = judged.isfinite().logical_not().float()  # type: ignore[attr-defined]
        elif not judged.isfinite():
            self.module.zero_grad(set_to_none=True)
        self._engine.step()
        return norm

    def _forget_gradients(self) -> None:
        """DeepSpeed 0.19 keeps those of a skipped step under ZeRO 1 and 2 with offload."""
        zero = self._engine.optimizer
        if getattr(zero, "cpu_offload", False):
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)

    def _dropout_seeds(self, rows: int, step: int | None) -> Sequence[Tensor | None]:
        """Of each micro-batch of this rank's rows of the global batch; None without dropout."""
        if self._dropout == 0:
            return [None] * -(-rows // self.micro)
        assert step is not None, "the masks of a step depend on its number"
        first = self.grid.data_rank * rows
        seeds = to_device(row_seeds(self._seed, step, range(first, first + rows)))
        return [seeds[start : start + self.micro] for start in range(0, rows, self.micro)]

    def _forward(self, micro: Batch, dropout_seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of all losses of a micro-batch and each of them, see GPT.forward."""
        documents, bounds = micro.documents, None
        if documents is not None:
            if takes_bounds(device(), self._dtype):
                bounds = (micro.bounds or DocumentBounds.of(documents)).apply(to_device)
            documents = to_device(documents)
        inputs, targets = to_device(micro.inputs), to_device(micro.targets)
        row_weights = None
        if self._loss_weights is not None and self._engine.training:
            row_weights = to_device(self._loss_weights.float()[micro.tasks])
        losses: tuple[Tensor, Tensor] = self._engine(
            inputs, targets, documents, dropout_seeds, bounds=bounds, row_weights=row_weights
        )
        return losses
