"""One rank of a run on the fake GPU: builds its engine and takes it through a few steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import Piece, StoredParameters, factor_layout
from megaphase.config.run import RunConfig
from megaphase.decoding.generate import generate
from megaphase.decoding.options import Decoding
from megaphase.distributed.initialization import Uninitialized
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.distributed.sharding import ParameterLayout
from megaphase.estimate.hardware import Hardware, hardware_of
from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import setup_of
from megaphase.estimate.step_time import step_time
from megaphase.model.gpt import GPT
from megaphase.model.presets import build_shape
from megaphase.plan.dataset import Batch
from megaphase.rehearsal.fake_gpu import FakeGPU
from megaphase.rehearsal.gathers import Gathers
from megaphase.rehearsal.patches import join_fake_group, patch_deepspeed, patch_for
from megaphase.training.deepspeed_import import import_deepspeed
from megaphase.training.engine import Engine
from megaphase.training.secondary_partition import secondary_group
from megaphase.training.step_result import StepResult

_ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups
# ZeRO-3 traces its first steps before it gathers ahead.
STEPS = 3
LEARNING_RATE = 1e-3
PROMPTS, GENERATED = (3, 9, 30), 24
PLACES = 12  # of the peak's memory that are reported
DOCUMENTS_PER_ROW = 5


class Rank:
    """A rank of `processes`; its engine is the run's own.

    Attributes:
        gpu: the device, whose recording is that of the last action
        gathers: of ZeRO-3, in the last training step
    """

    def __init__(self, config: RunConfig, vocab: int, processes: int, rank: int) -> None:
        self.config, self.vocab, self.processes = config, vocab, processes
        self.gpu = FakeGPU()
        join_fake_group(processes, rank)
        patch_for(self.gpu)
        with self.gpu:
            self.grid: ProcessGrid = start_process_grid(config.parallel.tensor)
            import_deepspeed()
            patch_deepspeed()
            self.gathers = Gathers()
            self.shape = build_shape(config, vocab)
            self.engine = Engine(config, self.shape, self.grid, len(config.tasks))
            self.average = config.phases[0].average
            if self.average is not None:
                self.engine.average.begin(self.average)  # taken after every step
        self.step = 0

    def batch(self) -> Batch:
        """This rank's rows of a step: random tokens, of several documents where tasks ask."""
        rows = self.config.phase_batch(0).samples // self.grid.data_size
        seq_len = self.shape.seq_len
        tokens = torch.randint(self.vocab, (rows, seq_len))
        documents = None
        if any(not task.attends_across_documents for task in self.config.tasks.values()):
            length = max(1, seq_len // DOCUMENTS_PER_ROW)
            documents = (torch.arange(seq_len) // length).repeat(rows, 1)
        tasks = torch.arange(rows) % len(self.config.tasks)
        return Batch(tokens, tokens.clone(), tasks, documents).pinned()

    def train(self, steps: int = STEPS) -> bool:
        """Train steps; the recording is that of the last one. Returns whether it was applied."""
        result = None
        for _ in range(steps):
            batch = self.batch()
            self.gathers.clear()
            self.step += 1
            result = self._recorded(partial(self._step, batch))
        assert result is not None
        return bool(result.applied)

    def _step(self, batch: Batch) -> StepResult:
        result = self.engine.train_step(batch, LEARNING_RATE, self.step)
        if self.average is not None:
            self.engine.average.take(result.applied_on_device)
        return result

    def evaluate(self) -> None:
        """Measure the losses of a batch, with the weights and with their average if it is kept."""
        batch = self.batch()
        self._recorded(lambda: self._evaluate(batch))

    def _evaluate(self, batch: Batch) -> None:
        self.engine.evaluate(batch)
        if self.average is not None:
            with self.engine.average.exchanged():
                self.engine.evaluate(batch)

    def save(self) -> None:
        """Copy to the host what this rank writes into a checkpoint."""

        def copy() -> None:
            for _, tensor in self.engine.state.snapshot().tensors:
                tensor.cpu()

        self._recorded(copy)

    def load(self) -> None:
        """Load a checkpoint of zeros, with the moments of one step."""
        self._recorded(lambda: self.engine.state.load(cast(StoredParameters, _Zeros()), 1))

    def reset(self) -> None:
        """Reset the optimizer state, as between phases."""
        self._recorded(self.engine.state.reset)

    def generate(self) -> None:
        """Continue prompts of several lengths, in one process, by so many tokens each."""
        with self.gpu:
            model = GPT(self.shape, Uninitialized(0, torch.bfloat16), _ALONE,
                        compute_dtype=torch.bfloat16).eval()  # fmt: skip
        how = Decoding(max_tokens=GENERATED)
        # The id that is "read" of the device is 1; no row ends before its limit.
        self._recorded(lambda: generate(model, [[5] * length for length in PROMPTS], how, eod=0))

    def optimizer_steps(self) -> int:
        """Steps of the optimizer since its last reset; where its state is on the GPU, 1 if any."""
        with self.gpu:
            return self.engine.state.steps

    def _recorded(self, action: Callable[[], Any]) -> Any:
        recording = self.gpu.recording
        recording.clear()
        self.gpu.memory.reset_peak()
        recording.on = True
        try:
            with self.gpu:
                return action()
        finally:
            recording.on = False

    def report(self) -> dict[str, Any]:
        """What the last action did, as JSON."""
        recording, memory = self.gpu.recording, self.gpu.memory
        kernels = recording.kernels
        return {
            "kernels": dict(Counter(kernel.name for kernel in kernels)),
            "bytes_moved": sum(kernel.read + kernel.written for kernel in kernels),
            "product_flops": sum(kernel.flops for kernel in kernels),
            "waits": [
                {"kind": wait.kind, "place": wait.place, "count": count}
                for wait, count in Counter(recording.waits).most_common()
            ],
            "collectives": self._collectives(),
            "peak_bytes": memory.peak,
            "peak_by_place": dict(memory.by_place.most_common(PLACES)),
            "started": self.gpu.unfinished.started,
            "unfinished": len(self.gpu.unfinished),
            "conflicts": [list(key) for key in self.gpu.unfinished.conflicts],
            "gathered_ahead": self.gathers.ahead,
            "gathered_when_needed": self.gathers.when_needed,
        }

    def _collectives(self) -> list[dict[str, Any]]:
        groups: dict[str, str] = {
            self.grid.data_group.group_name: "data",
            self.grid.tensor_group.group_name: "tensor",
        }
        if (secondary := secondary_group()) is not None:
            groups[secondary.group_name] = "secondary"
        counted: Counter[tuple[str, str, int, int, float, str]] = Counter(
            (groups.get(c.group, "all"), c.kind, c.ranks, c.elements, c.sent, c.place)
            for c in self.gpu.recording.collectives
        )
        names = ("group", "kind", "ranks", "elements", "sent", "place")
        return [
            dict(zip(names, key, strict=True)) | {"count": count}
            for key, count in counted.most_common()
        ]

    def estimates(self) -> dict[str, Any]:
        """What `megaphase plan` says of this rank: memory, and the bytes that it sends in a
        step."""
        setup = setup_of(self.config, self.shape, self.processes, "cuda")
        memory = estimate(setup)
        hardware: Hardware | None = hardware_of(self.config)
        sent: Mapping[str, float] = {}
        if hardware is not None:
            sent = step_time(setup, hardware).sent_by
        return {
            "peak_bytes": memory.total,
            "parts": memory.parts,
            "moment": memory.moment,
            "sent": dict(sent),
        }


class _Zeros:
    """Stands for a checkpoint: has every parameter, all zeros."""

    def check(self, layouts: Mapping[str, ParameterLayout]) -> None:
        self._layouts = layouts

    def whole(self, name: str, kind: str) -> Tensor:
        layout = self._layouts[name]
        return torch.zeros((factor_layout(kind, layout) or layout).shape)

    def read(
        self, name: str, kind: str, layout: ParameterLayout, rank: int, size: int, piece: Piece
    ) -> Tensor:
        return torch.zeros(piece.stop - piece.start)
