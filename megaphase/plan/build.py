"""Build the index of a plan: in parallel, in bounded memory, and by one process at a time."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.plan.build_pool import BuildPool, ReportProgress
from megaphase.plan.built_folder import INDEX_FILE, Discard, Say, ensure_folder
from megaphase.plan.document_stream import is_table_stored, most_table_bytes
from megaphase.plan.document_tables import TABLES
from megaphase.plan.index import (
    STARTS_FILE,
    PhaseIndex,
    block_size,
    builder_threads,
    damage,
    task_dtype,
)
from megaphase.plan.packed_stream import PackedStream
from megaphase.plan.phase_blend import PhaseBlend
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.spec import FORMAT_VERSION, PhaseSpec, PlanSpec
from megaphase.plan.starts_file import StartsFile
from megaphase.plan.stream import SAMPLE_WINDOW
from megaphase.plan.verified_file import ALTERED_FILE
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import (
    atomic_write_json,
    directory_written_aside,
    remove_directory,
    remove_soon,
    with_hash,
)

_OF_AN_INDEX = re.compile(
    rf"{INDEX_FILE}|{ALTERED_FILE}|{STARTS_FILE}|blend-[0-9]+\.(tasks|counts)"
)

_INDEX_NAME = re.compile("[0-9a-f]{16}")


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

    Of a large one only header and sizes are verified here, unless `whole` is true; the same holds
    for tables of packed documents that are opened from now on.

    If several processes start at once, on any nodes, one builds and the others wait. Returns the
    index's folder. `say` is called with sentences for the user.

    Raises:
        InputError: a phase needs more than max_epochs allows, or a corpus changed meanwhile.
        RunError: the disk is too small or cannot be written.
    """

    def build(folder: Path, discard: Discard) -> None:
        _check_space(spec, folder)
        spec.known.verify_once()
        with _tables_of_a_refused_plan_removed(folder.parent):
            build_index(spec, folder, progress, discard=discard)

    folder = plan_folder(run_dir, spec)
    spec.store_tables(folder.parent, say, progress, whole=whole)
    ensure_folder(folder, partial(damage, spec=spec, whole=whole), build, _OF_AN_INDEX, say)
    return folder


def remove_other_indices(folder: Path, say: Say) -> None:
    """Remove the indices of other plans beside `folder`, which the run that begins there can never
    use: those that were built before its run file was changed."""
    for other in sorted(folder.parent.iterdir()):
        is_index = _INDEX_NAME.fullmatch(other.name) and other.is_dir() and not other.is_symlink()
        if other == folder or not is_index:
            continue
        if all(_OF_AN_INDEX.fullmatch(path.name) for path in other.iterdir()):
            say(f"{other}: the index of another plan, which is not trained here, is removed")
            remove_soon(other)


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
    """Raise RunError if the disk has too little space for what is known before anything is built:
    the blends, the tables of packed documents, and the starts if each sample has one."""
    needed = _blend_bytes(spec, spec.phases) + _most_table_bytes(spec)
    streams = spec.streams.values()
    if spec.has_one_kind and not any(isinstance(stream, PackedStream) for stream in streams):
        narrowest = min(np.dtype(stream.start_dtype).itemsize for stream in streams)
        needed += sum(phase.samples for phase in spec.phases) * 2 * narrowest
    _require_space(spec, folder, needed)


def _blend_bytes(spec: PlanSpec, phases: Iterable[PhaseSpec]) -> int:
    """Return the size of the files of these phases' blends."""
    tasks = len(spec.streams)
    of_sample, of_block = np.dtype(task_dtype(tasks)).itemsize, tasks * np.dtype(np.int64).itemsize
    samples = [phase.samples for phase in phases]
    return sum(n * of_sample + -(-n // block_size(tasks)) * of_block for n in samples)


def _most_table_bytes(spec: PlanSpec) -> int:
    """Return at most how large the tables of packed documents are that are not stored yet: one of
    an epoch for each length, and one of what is left of an epoch for each phase that begins in one
    that samples of another kind have begun."""
    needed = 0
    for stream, start in zip(spec.streams.values(), spec.starts, strict=True):
        if isinstance(stream, PackedStream):
            continue
        kinds = [segment.kind for segment in start.segments[-1:]]
        cuts, known = 0, set[SampleKind]()
        for phase in spec.phases:
            kind = phase.kind
            if kinds and kinds[-1] != kind:
                # Samples that are drawn of a window leave gaps where those of the window are cut.
                cuts += min(SAMPLE_WINDOW, stream.positions // kinds[-1].seq_len) + 2
                if kind.cut == "documents":
                    needed += most_table_bytes(stream, kind.seq_len, cuts)
            if kind.cut == "documents" and kind not in known:
                stored = is_table_stored(stream, kind.seq_len)
                needed += 0 if stored else most_table_bytes(stream, kind.seq_len)
                known.add(kind)
            kinds.append(kind)
    return needed


def _require_space(spec: PlanSpec, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        samples = sum(phase.samples for phase in spec.phases)
        raise RunError(
            f"{folder}: the plan's index needs {_amount(needed)} for {samples:,} samples, the disk "
            f"has {_amount(free)} left; make room or put output on a larger disk"
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.3f} MB"


def build_index(
    spec: PlanSpec,
    folder: Path,
    progress: ReportProgress,
    threads: int | None = None,
    discard: Discard = remove_directory,
) -> None:
    """Build the whole index and publish it as `folder`; the result does not depend on `threads`.

    `discard` removes the partial output if the build is interrupted or fails.

    Raises RunError if the disk has too little space for the starts.
    """
    with (
        directory_written_aside(folder, discard) as aside,
        BuildPool(threads or builder_threads(), progress) as pool,
    ):
        used = list(spec.starts)
        phases: list[PhaseIndex] = []
        files: dict[str, Any] = {}
        starts: StartsFile | None = None
        for group in _independent(spec.phases):
            blends = [PhaseBlend.of(number, spec, used) for number in group]
            if group[-1] == len(spec.phases) - 1:
                starts = _starts_beside(aside, spec, blends, used)
            if starts is not None:
                left = _blend_bytes(spec, [blend.phase for blend in blends])
                _require_space(spec, folder, left + starts.written_bytes)
            _write(aside, blends, starts, pool, files)
            for blend in blends:
                phases.append(blend.index(used))
                used = _after(spec, blend.number, used, blend.blend.counts)
        if starts is None:
            starts = StartsFile(aside, spec, used)
            _require_space(spec, folder, starts.written_bytes)
            _write(aside, [], starts, pool, files)
        header = {
            "format": FORMAT_VERSION,
            "fingerprint": spec.fingerprint,
            "tasks": list(spec.streams),
            "phases": [phase.to_json() for phase in phases],
            "starts": starts.regions,
            "files": files,
        }
        atomic_write_json(aside / INDEX_FILE, with_hash(header))


def _independent(phases: Sequence[PhaseSpec]) -> list[list[int]]:
    """Divide the phases into groups whose blends depend on earlier groups alone: what `max_epochs`
    leaves is known only when all samples before it are counted."""
    groups: list[list[int]] = []
    for number, phase in enumerate(phases):
        if number == 0 or phase.mixture.max_epochs is not None:
            groups.append([])
        groups[-1].append(number)
    return groups


def _starts_beside(
    folder: Path, spec: PlanSpec, blends: Sequence[PhaseBlend], used: list[StreamPosition]
) -> StartsFile | None:
    """Return the file of starts that can be written at the same time as the last blends, because
    each task's number of samples is at most its expected number, rounded up. None if nothing bounds
    it like that: where the order is random, or samples change their length."""
    if not spec.has_one_kind or any(blend.phase.order == "random" for blend in blends):
        return None
    for blend in blends:
        most = [math.ceil(turns) for turns in blend.turns]
        used = _after(spec, blend.number, used, most)
    return StartsFile(folder, spec, used)


def _after(
    spec: PlanSpec, number: int, used: Sequence[StreamPosition], counts: Sequence[int]
) -> list[StreamPosition]:
    """Return where the streams are after the samples of a phase."""
    kind = spec.phases[number].kind
    return [
        at.after(stream.kind_of(kind), n)
        for stream, at, n in zip(spec.task_streams.values(), used, counts, strict=True)
    ]


def _write(
    folder: Path,
    blends: Sequence[PhaseBlend],
    starts: StartsFile | None,
    pool: BuildPool,
    files: dict[str, Any],
) -> None:
    """Write blends and, if given, the starts of all samples; adds them to `files`."""
    names = ", ".join(blend.phase.name for blend in blends)
    what = [f"blend of {names}"] if blends else []
    total = sum(blend.phase.samples for blend in blends)
    jobs: list[Callable[[], Any]] = [partial(blend.write, folder, pool) for blend in blends]
    with ExitStack() as stack:
        if starts is not None:
            what.append("sample index")
            total += starts.rows
            # After the blends, each of which takes one thread long.
            jobs += stack.enter_context(starts.jobs(pool))
        results = pool.run(" and ".join(what), total, jobs)
    for written in results[: len(blends)]:
        files |= written
    if starts is not None:
        files[STARTS_FILE] = starts.described(results[len(blends) :])
