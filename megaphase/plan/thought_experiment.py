"""Plan a run whose text does not exist yet, from numbers of tokens alone; no index is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from megaphase.config.run import RunConfig
from megaphase.plan.mixture import TaskSupply, effective_rates, requested_rates
from megaphase.plan.spec import PhaseSpec, phase_specs
from megaphase.tokenizer import Tokenizer
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError


def is_thought_experiment(config: RunConfig) -> bool:
    """Return whether the tasks have numbers of tokens in place of corpora.

    Raises:
        InputError: some have, and others have not.
    """
    without = [name for name, task in config.tasks.items() if task.corpus is None]
    others = [name for name in config.tasks if name not in without]
    if without and others:
        raise InputError(
            config.where(f"tasks.{others[0]}.corpus"),
            f"{without[0]} has tokens in place of a corpus",
            "give tokens for all tasks, or corpora for all",
        )
    return bool(without)


def vocab_size(config: RunConfig) -> int:
    """Return the size of the tokenizer's vocabulary, or of the model's where there is none yet."""
    if config.tokenizer.exists():
        return Tokenizer.load(config.tokenizer).vocab_size
    if config.model.vocab is None:
        raise InputError(
            config.where("tokenizer"),
            f"{config.tokenizer} does not exist yet",
            "write model.vocab, the number of tokens that it is to have",
        )
    return config.model.vocab


def thought_experiment(config: RunConfig) -> tuple[dict[str, Any], list[PhaseSpec]]:
    """Return tokens, rates and epochs as `Plan.summary()` does, and the phases.

    Raises:
        InputError: as `plan_spec` does, of what does not depend on the text itself.
    """
    tokens = {task: _training_tokens(config, task) for task in config.tasks}
    lengths = [config.phase_model(number).seq_len for number in range(len(config.phases))]
    unused = dict.fromkeys(tokens, 0)
    specs = phase_specs(config, [_supplies(tokens, unused, seq_len) for seq_len in lengths])
    used, phases, first_step = unused, [], 0
    for spec, seq_len in zip(specs, lengths, strict=True):
        supply = _supplies(tokens, used, seq_len)
        requested = requested_rates(spec.mixture, supply)
        rates = effective_rates(spec.mixture, supply, spec.samples, spec.where, requested)
        samples = {task: round(rate * spec.samples) for task, rate in rates.items()}
        used = {task: used[task] + n * seq_len for task, n in samples.items()}
        phases.append(
            {
                "name": spec.name,
                "order": spec.order,
                **({} if set(lengths) == {config.model.seq_len} else {"seq_len": seq_len}),
                "steps": spec.steps,
                "first_step": first_step,
                "samples": spec.samples,
                "batch": [
                    {"first_step": stage.first_step, "steps": steps, "samples": stage.samples}
                    for stage, steps in spec.batch.within(spec.steps)
                ],
                "tokens": spec.samples * seq_len,
                "tasks": {
                    task: {
                        "requested_rate": float(requested[task]),
                        "rate": float(rates[task]),
                        "samples": n,
                        "tokens": n * seq_len,
                        "epochs": n * seq_len / tokens[task],
                        "epochs_so_far": used[task] / tokens[task],
                    }
                    for task, n in samples.items()
                },
            }
        )
        first_step += spec.steps
    tasks = {task: {"tokens": number} for task, number in tokens.items()}
    return {"seq_len": config.model.seq_len, "tasks": tasks, "phases": phases}, specs


def _training_tokens(config: RunConfig, task: str) -> int:
    """Return the tokens that are trained on: neither held out nor in the test split."""
    settings = config.tasks[task]
    assert settings.tokens is not None
    kept_apart = as_written(config.held_out_fraction(task)) + as_written(config.test_fraction(task))
    return max(2, math.floor(settings.tokens * (1 - kept_apart) * as_written(settings.trained_on)))


def _supplies(
    tokens: Mapping[str, int], used: Mapping[str, int], seq_len: int
) -> dict[str, TaskSupply]:
    return {
        task: TaskSupply(
            number, -(-number // seq_len), 0, partial(_samples_until, number, used[task], seq_len)
        )
        for task, number in tokens.items()
    }


def _samples_until(tokens: int, used: int, seq_len: int, epochs: Fraction) -> int:
    return max(0, math.floor((epochs * tokens - used) / seq_len))
