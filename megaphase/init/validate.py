"""Checks of a run file before it is written, by the plan and the estimates of the project."""

from __future__ import annotations

from pathlib import Path

from megaphase.config.load import run_config
from megaphase.estimate.suggestions import fits
from megaphase.plan.load_plan import phase_setups
from megaphase.plan.mixture import effective_rates
from megaphase.plan.spec import plan_spec
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.yaml_file import parse_scalar


def check_run(
    content: str, out: Path, tokenizer: Tokenizer, processes: int, memory_gb: float
) -> None:
    """Check that the content of a run file is valid, fits its GPUs, and that the corpora suffice.

    memory_gb: of each of them.

    Raises:
        InputError: the first thing that is wrong.
    """
    config = run_config(out, parse_scalar(content))
    for name, setup in phase_setups(config, tokenizer, processes):
        if not fits(setup, memory_gb):
            problem = f"phase {name} does not fit {memory_gb:g} GB of memory"
            raise InputError(config.where("parallel"), problem, "change it")
    spec = plan_spec(config, tokenizer)
    positions = spec.starts
    streams = list(spec.task_streams.values())
    for number, phase in enumerate(spec.phases):
        supply = spec.supply(number, positions)
        rates = effective_rates(phase.mixture, supply, phase.samples, phase.where)
        counts = [int(rate * phase.samples) for rate in rates.values()]
        positions = [
            at.after(stream.kind_of(phase.kind), count)
            for at, stream, count in zip(positions, streams, counts, strict=True)
        ]
