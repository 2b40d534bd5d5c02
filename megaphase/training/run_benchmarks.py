"""Benchmarks of lm-evaluation-harness in training, on the current weights."""

from __future__ import annotations

from megaphase.callbacks.callback import BenchmarkRecord
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import run_on_all_ranks
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.dist_env import global_rank
from megaphase.harness.benchmarks import BenchmarkChoice, Benchmarks, require_harness
from megaphase.harness.rank_model import RankModel
from megaphase.harness.results import BenchmarkResults
from megaphase.harness.service import ModelService
from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine


class RunBenchmarks:
    """The benchmarks of a run; every method is called by all ranks."""

    def __init__(self, config: RunConfig) -> None:
        """Load the tasks and their documents, on rank 0.

        Raises:
            InputError: see Benchmarks; on every rank.
        """
        self._config = config.validation.harness
        if self._config is None:
            return
        settings = self._config
        choice = BenchmarkChoice(
            settings.tasks,
            config.where("validation.harness.tasks"),
            settings.tasks_path,
            settings.limit,
            settings.fewshot,
            settings.groups,
            standard_errors=False,
        )
        run_on_all_ranks(lambda: require_harness(config.where("validation.harness")))
        is_first = global_rank() == 0
        self._benchmarks = run_on_all_ranks(lambda: Benchmarks(choice) if is_first else None)

    @property
    def are_wanted(self) -> bool:
        """Whether the run file has any."""
        return self._config is not None

    def are_due(self, step: int, *, ends_phase: bool) -> bool:
        """Whether they are measured after so many steps of the run."""
        if self._config is None:
            return False
        return ends_phase or step % self._config.every_steps == 0

    def measure(
        self, engine: Engine, tokenizer: Tokenizer, control: ControlGroup, step: int, phase: str
    ) -> BenchmarkRecord | None:
        """Run them on the current weights; returns the record on rank 0, None on the others.

        Raises:
            InputError, RunError: a task asks for something that is not supported, or fails.
        """
        with engine.forward_alone() as forward:
            model = RankModel(engine.gpt, engine.grid, forward, partitioned=engine.is_partitioned)
            service = ModelService(model, tokenizer, control, batch=engine.micro)
            results = service.serve(lambda: self._run(service))
        if results is None:
            return None
        return BenchmarkRecord(
            step,
            phase,
            {name: task.figures for name, task in results.tasks.items()},
            {name: group.figures for name, group in results.groups.items()},
        )

    def _run(self, service: ModelService) -> BenchmarkResults:
        assert self._benchmarks is not None, "only rank 0 runs them"
        return self._benchmarks.run(service)
