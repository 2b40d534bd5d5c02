"""Whether the test split of a sweep has enough documents, found before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megaphase.config.run import RunConfig
from megaphase.plan.held_out_noise import measured_documents, noise_sentence
from megaphase.plan.stream import Stream
from megaphase.utils.errors import InputError

FEW_DOCUMENTS = 200  # behind the test samples of a low-resource task
MOST_OF_A_TASK = 0.5  # that is suggested as a test split


def check_test_split(
    path: Path, config: RunConfig, streams: Mapping[str, Stream], low: Sequence[str]
) -> list[str]:
    """Check that every task has as many test samples as are asked for.

    streams: the test split of the tasks that have one.

    Returns one sentence for every low-resource task with few test documents, which says how noisy
    its loss is.

    Raises:
        InputError: a task has too few samples, or some tasks have a test split and others do not.
    """
    if not streams:
        return []
    for task in config.tasks:
        if task not in streams:
            raise InputError(
                f"{path}: test",
                f"{task} has no test split, but {next(iter(streams))} has one",
                "add test: {fraction: …}",
            )
        _check_samples(path, config, task, streams[task])
    samples = config.test.samples
    found = ((task, measured_documents(streams[task], samples, FEW_DOCUMENTS)) for task in low)
    return [
        _warning(task, samples, documents)
        for task, documents in found
        if len(documents) < FEW_DOCUMENTS
    ]


def _check_samples(path: Path, config: RunConfig, task: str, stream: Stream) -> None:
    asked, there = config.test.samples, stream.samples_per_epoch
    if there >= asked:
        return
    fraction = config.test_fraction(task)
    needed = math.ceil(100 * 1.05 * fraction * asked / there) / 100
    remedy = f"lower it to {there:,}"
    if needed <= MOST_OF_A_TASK:
        remedy = f"raise {config.test_key(task)} to about {needed:g}, or {remedy}"
    raise InputError(
        f"{path}: test.samples",
        f"is {asked:,}, but the {stream.documents:,} test documents of {task} are {there:,} "
        f"sample{'s' * (there != 1)} of seq_len {stream.seq_len:,}",
        f"{remedy}, or add text",
    )


def _warning(task: str, samples: int, documents: Mapping[int, Sequence[np.ndarray]]) -> str:
    count = len(documents)
    text = (
        f"{task}: the {samples:,} test samples are of only {count} document{'s' * (count != 1)}; "
        f"{noise_sentence(documents)}"
    )
    if count < 2:
        return text
    return (
        f"{text}. All runs are measured on the same ones, so differences between runs are less "
        "noisy"
    )
