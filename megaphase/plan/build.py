"""Build the index of a plan: in parallel, in bounded memory, and by one process at a time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.build_pool import BuildPool, ReportProgress
from megaphase.plan.built_folder import INDEX_FILE, Discard, Say, ensure_folder
from megaphase.plan.document_tables import TABLES
from megaphase.plan.hashed_chunks import HashedChunkWriter
from megaphase.plan.index import (
    START_ALIGNMENT,
    STARTS_FILE,
    PhaseIndex,
    block_size,
    builder_threads,
    damage,
    task_dtype,
)
from megaphase.plan.mixture import (
    effective_rates,
    integer_weights,
    pieces_means,
    rate_pieces,
    requested_rates,
)
from megaphase.plan.position import StreamPosition
from megaphase.plan.rate_curves import RatePieces
from megaphase.plan.spec import FORMAT_VERSION, PhaseSpec, PlanSpec
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL
from megaphase.plan.task_stream import TaskStream
from megaphase.plan.verified_file import ALTERED_FILE
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import (
    atomic_write_json,
    directory_written_aside,
    remove_directory,
    with_hash,
)

_OF_AN_INDEX = re.compile(
    rf"{INDEX_FILE}|{ALTERED_FILE}|{STARTS_FILE}|blend-[0-9]+\.(tasks|counts)"
)

# Samples per call, between which an interruption is noticed; a blend's block may be larger.
SAMPLES_PER_CALL = 1 << 19

Blend = (
    _builder.DeadlineBlend
    | _builder.RandomBlend
    | _builder.PiecewiseDeadlineBlend
    | _builder.PiecewiseRandomBlend
)


def plan_folder(run_dir: Path, spec: PlanSpec) -> Path:
    """Return the folder of this spec's index in a run directory."""
    return run_dir / "plan" / spec.fingerprint[:16]


def ensure_built(
    spec: PlanSpec,
    run_dir: Path,
    *,
    say: Say = print,
    progress: ReportProgress = lambda *_: None,
    whole: bool = False,
) -> Path:
    """Build the index unless a valid one exists; a damaged one is reported and built again.

    Of a large one only header and sizes are verified here, unless `whole` is true.

    If several processes start at once, on any nodes, one builds and the others wait. Returns the
    index's folder. `say` is called with sentences for the user.

    Raises:
        InputError: a phase needs more than max_epochs allows, or a corpus changed meanwhile.
        RunError: the disk is too small or cannot be written.
    """

    def build(folder: Path, discard: Discard) -> None:
        _check_space(spec, folder)
        with _tables_of_a_refused_plan_removed(folder.parent):
            build_index(spec, folder, progress, discard=discard)

    folder = plan_folder(run_dir, spec)
    spec.store_tables(folder.parent, say, progress)
    ensure_folder(folder, partial(damage, spec=spec, whole=whole), build, _OF_AN_INDEX, say)
    return folder


@contextmanager
def _tables_of_a_refused_plan_removed(plans: Path) -> Iterator[None]:
    """If a phase is refused, remove the tables of documents that earlier ones have stored."""
    before = set(plans.glob(TABLES))
    try:
        yield
    except InputError:
        for table in set(plans.glob(TABLES)) - before:
            shutil.rmtree(table, ignore_errors=True)
        raise


def _check_space(spec: PlanSpec, folder: Path) -> None:
    """Raise RunError if the disk has too little space, before anything is built."""
    samples = sum(phase.samples for phase in spec.phases)
    shortest = min(phase.kind.seq_len for phase in spec.phases)
    starts = sum(phase.samples * -(-phase.kind.seq_len // shortest) for phase in spec.phases)
    widest = max(np.dtype(stream.start_dtype).itemsize for stream in spec.streams.values())
    tasks = samples * np.dtype(task_dtype(len(spec.streams))).itemsize
    needed = tasks + starts * 2 * widest
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise RunError(
            f"{folder}: the plan's index needs {needed / 1e9:,.1f} GB for {samples:,} samples, the "
            f"disk has {free / 1e9:,.1f} GB left; make room or put output on a larger disk"
        )


def build_index(
    spec: PlanSpec,
    folder: Path,
    progress: ReportProgress,
    threads: int | None = None,
    discard: Discard = remove_directory,
) -> None:
    """Build the whole index and publish it as `folder`; the result does not depend on `threads`.

    `discard` removes the partial output if the build is interrupted or fails.
    """
    with (
        directory_written_aside(folder, discard) as aside,
        BuildPool(threads or builder_threads(), progress) as pool,
    ):
        used = list(spec.starts)
        phases: list[PhaseIndex] = []
        files: dict[str, Any] = {}
        for number, phase in enumerate(spec.phases):
            phases.append(_build_blend(aside, number, phase, spec, used, pool, files))
            counts = phases[-1].counts
            used = [
                at.after(stream.kind_of(phase.kind), n)
                for stream, at, n in zip(spec.task_streams.values(), used, counts, strict=True)
            ]
        starts = _build_starts(aside, spec, used, pool, files)
        header = {
            "format": FORMAT_VERSION,
            "fingerprint": spec.fingerprint,
            "tasks": list(spec.streams),
            "phases": [phase.to_json() for phase in phases],
            "starts": starts,
            "files": files,
        }
        atomic_write_json(aside / INDEX_FILE, with_hash(header))


def _build_blend(
    folder: Path,
    number: int,
    phase: PhaseSpec,
    spec: PlanSpec,
    used: list[StreamPosition],
    pool: BuildPool,
    files: dict[str, Any],
) -> PhaseIndex:
    names = list(spec.streams)
    samples = phase.samples
    supply = spec.supply(number, used)
    requested = requested_rates(phase.mixture, supply)
    pieces = None
    if phase.mixture.changes:
        pieces = rate_pieces(phase.mixture, supply, samples, phase.where)
        rates = pieces_means(pieces, names)
        blend = make_piecewise_blend(phase, pieces)
    else:
        rates = effective_rates(phase.mixture, supply, samples, phase.where)
        blend = make_blend(phase, [rates[task] for task in names], samples)
    write = partial(_write_blend, folder, number, blend, samples, len(names), pool)
    [written] = pool.run(f"blend of {phase.name}", samples, [write])
    files |= written
    return PhaseIndex(
        phase.name,
        phase.steps,
        samples,
        [float(requested[task]) for task in names],
        [float(rates[task]) for task in names],
        [at.samples for at in used],
        list(blend.counts),
        None if pieces is None else pieces.requested.tolist(),
        None if pieces is None else pieces.ends.tolist(),
    )


def make_blend(phase: PhaseSpec, rates: list[Any], samples: int) -> Blend:
    """Return the order of a phase's samples, at its beginning."""
    weights = integer_weights(rates, samples, _builder.LARGEST_TOTAL_WEIGHT)
    if phase.order == "random":
        return _builder.RandomBlend(weights, phase.order_key)
    return _builder.DeadlineBlend(weights)


def make_piecewise_blend(phase: PhaseSpec, pieces: RatePieces) -> Blend:
    """Return the order of a phase's samples, at its beginning, where rates change within it."""
    if phase.order == "random":
        return _builder.PiecewiseRandomBlend(pieces.bounds, pieces.weights, phase.order_key)
    return _builder.PiecewiseDeadlineBlend(pieces.bounds, pieces.weights)


def _write_blend(
    folder: Path, number: int, blend: Blend, samples: int, tasks: int, pool: BuildPool
) -> dict[str, Any]:
    block = block_size(tasks)
    stride = max(SAMPLES_PER_CALL // block, 1) * block
    order = np.empty(min(stride, samples), task_dtype(tasks))
    counts = np.empty((-(-len(order) // block), tasks), np.int64)
    order_name, counts_name = f"blend-{number}.tasks", f"blend-{number}.counts"
    with (
        open(folder / order_name, "wb", buffering=0) as order_file,
        open(folder / counts_name, "wb", buffering=0) as counts_file,
    ):
        order_writer = HashedChunkWriter(order_file.fileno(), 0, pool.flusher)
        counts_writer = HashedChunkWriter(counts_file.fileno(), 0, pool.flusher)
        for first in range(0, samples, stride):
            part = order[: min(stride, samples - first)]
            rows = counts[: -(-len(part) // block)]
            blend.fill(part, rows, block)
            order_writer.write(part)
            counts_writer.write(rows)
            pool.advance(len(part))
        return {
            order_name: _described(order_writer.finish()),
            counts_name: _described(counts_writer.finish()),
        }


def _build_starts(
    folder: Path,
    spec: PlanSpec,
    used: list[StreamPosition],
    pool: BuildPool,
    files: dict[str, Any],
) -> list[list[int]]:
    """Write where the samples of all tasks begin; return [first byte, samples] of every task.

    The epochs that an earlier run has used up are holes in the file.
    """
    streams = list(spec.task_streams.values())
    sizes = [
        stream.index_sizes(first, last)
        for stream, first, last in zip(streams, spec.starts, used, strict=True)
    ]
    samples = [sum(each) for each in sizes]
    epochs = [
        stream.first_indexed_epoch(first)
        for stream, first in zip(streams, spec.starts, strict=True)
    ]
    to_write = [sum(each[epoch:]) for each, epoch in zip(sizes, epochs, strict=True)]
    lengths = [_aligned(n * _row_bytes(stream)) for stream, n in zip(streams, samples, strict=True)]
    first_bytes = list(accumulate(lengths, initial=0))
    with open(folder / STARTS_FILE, "wb", buffering=0) as file:
        os.ftruncate(file.fileno(), first_bytes[-1])
        jobs = {
            task: partial(
                _write_starts,
                stream,
                sizes[task],
                epochs[task],
                file.fileno(),
                first_bytes[task],
                pool,
            )
            for task, stream in enumerate(streams)
        }
        # The longest first, so that no thread is left with a long one at the end.
        longest_first = sorted(jobs, key=lambda task: -to_write[task])
        written = pool.run("sample index", sum(to_write), [jobs[task] for task in longest_first])
    pieces = sorted(piece for each in written for piece in each)
    files[STARTS_FILE] = {"bytes": first_bytes[-1], "pieces": pieces}
    return [[first, n] for first, n in zip(first_bytes, samples, strict=False)]


def _write_starts(
    stream: TaskStream,
    sizes: list[int],
    first_epoch: int,
    descriptor: int,
    first_byte: int,
    pool: BuildPool,
) -> list[list[Any]]:
    skipped = sum(sizes[:first_epoch]) * _row_bytes(stream)
    writer = HashedChunkWriter(descriptor, first_byte + skipped, pool.flusher)
    buffer = np.empty((min(SAMPLES_PER_CALL, max(sizes, default=0)), 2), stream.start_dtype)
    walk = None
    for epoch, size in enumerate(sizes[first_epoch:], first_epoch):
        walk = stream.walk(epoch, walk)
        while size > 0:
            filled = walk.fill(buffer[:size], DOCUMENTS_PER_CALL)
            writer.write(buffer[:filled])
            pool.advance(filled)
            size -= filled
            if size > 0 and walk.at_end:
                raise InputError(stream.prefix, "changed while the plan was built", "start again")
    return writer.finish()


def _row_bytes(stream: TaskStream) -> int:
    return 2 * np.dtype(stream.start_dtype).itemsize


def _aligned(size: int) -> int:
    return -(-size // START_ALIGNMENT) * START_ALIGNMENT


def _described(pieces: list[list[Any]]) -> dict[str, Any]:
    return {"bytes": sum(size for _, size, _ in pieces), "pieces": pieces}
