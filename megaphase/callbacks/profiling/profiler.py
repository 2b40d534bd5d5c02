"""`megaphase train --profile`: runs torch's profiler over a few steps and summarizes its traces."""

from __future__ import annotations

import gzip
import json
import os
import statistics
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from megaphase.callbacks.callback import Callback, StepRecord
from megaphase.callbacks.profiling.printing import profile_text
from megaphase.callbacks.profiling.summary import RankProfile, summarize
from megaphase.callbacks.profiling.trace import STEP_MARK, read_trace
from megaphase.callbacks.throughput import ThroughputReference
from megaphase.distributed.all_ranks import Fault, result_or_fault
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.dist_env import local_rank
from megaphase.distributed.process_grid import device
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.utils.errors import RunError
from megaphase.utils.files import atomic_write_json, make_directory, os_errors_named, temporary_path
from megaphase.utils.set_aside import make_way_for_directory, make_way_for_file

# The first step allocates and compiles; in the second the profiler itself gets warm.
WARM_UP_STEPS = 2

SUMMARY_FILE = "summary.json"
COMPRESSION_LEVEL = 3


class Profiler(Callback):
    """Profiles the first steps of a run after WARM_UP_STEPS; exists on all ranks.

    The first rank of each node writes a trace and reads it; rank 0 prints a summary of them and
    writes `summary.json`. The ranks of a node do the same work, and the traces of hundreds would be
    hundreds of large files; a node or a link that is slow shows in those of the others.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        throughput_reference: ThroughputReference,
        control_group: ControlGroup,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ) -> None:
        """
        Raises:
            InputError: the folder cannot be made.
        """
        if control_group.rank == 0:
            with os_errors_named(folder):
                make_way_for_directory(folder, "the directory of profiles", say)
        make_directory(folder)
        self._folder, self._steps, self._throughput_reference = folder, steps, throughput_reference
        self._control_group, self._watchdog, self._say = control_group, watchdog, say
        self._done = 0
        self._waits: list[float] = []
        self._flops: list[int] = []
        self._profile = _torch_profiler(steps) if _is_first_of_node() else None
        self._mark = ExitStack()

    def on_run_begin(self) -> None:
        if self._profile is not None:
            self._profile.start()

    def on_step_begin(self, step: int) -> None:
        """Mark the step in the trace, up to its end."""
        if not self._is_over():
            self._mark.enter_context(record_function(f"{STEP_MARK}{step}"))

    def on_step_end(self, record: StepRecord) -> None:
        """Count the step; after the last one that is profiled, all ranks meet and report.

        Raises:
            RunError: the trace cannot be written; on every rank.
        """
        if self._is_over():
            return
        self._mark.close()
        if self._profile is not None:
            self._profile.step()
        self._waits.append(record.seconds.data_wait)
        flops_per_token = self._throughput_reference.flops_per_token[record.phase_number]
        self._flops.append(flops_per_token * record.batch_tokens)
        self._done += 1
        if self._is_over():
            with self._watchdog.patient(f"reading the profile after step {record.step:,}"):
                self._report(range(record.step - self._steps + 1, record.step + 1))

    def on_run_end(self, error: BaseException | None) -> None:
        self._mark.close()
        if self._is_over():
            return
        if self._profile is not None:
            self._profile.stop()
        if error is None:
            self._say("Warning: the run was over before all steps were profiled: no profile")

    def _is_over(self) -> bool:
        return self._done == WARM_UP_STEPS + self._steps

    def _report(self, steps: range) -> None:
        self._control_group.on_first_rank(self._remove_old)
        found = self._control_group.gather(result_or_fault(self._own_profile))
        for each in found:
            if isinstance(each, Fault):
                raise each
        ranks = [each for each in found if isinstance(each, RankProfile)]
        gpu = device().type == "cuda"
        name = torch.cuda.get_device_name() if gpu else "CPU"
        self._control_group.on_first_rank(lambda: self._write_summary(ranks, steps, name))
        self._say(profile_text(ranks, steps, name, self._folder))
        if gpu and not ranks[0].on_gpu:
            self._say("Warning: the trace holds no GPU kernels; see whether CUPTI is installed")

    def _own_profile(self) -> RankProfile | None:
        if self._profile is None:
            return None
        rank, world_size = self._control_group.rank, self._control_group.world_size
        file = self._folder / f"rank-{rank:05d}.json.gz"
        with os_errors_named(file):
            content = self._write_trace(file)
        try:
            events = json.loads(content)["traceEvents"]
        except ValueError:
            raise RunError(f"{file}: could not be written whole; is the disk full?") from None
        trace = read_trace(events)
        peak = self._throughput_reference.peak_flops
        return summarize(
            trace,
            self._waits[WARM_UP_STEPS:],
            rank=rank,
            file=file.name,
            model_flops=statistics.fmean(self._flops[WARM_UP_STEPS:]) / world_size,
            peak_flops=None if peak is None else peak / world_size,
        )

    def _write_trace(self, file: Path) -> bytes:
        """Write the compressed trace; its plain content."""
        assert self._profile is not None
        plain, aside = temporary_path(file.with_suffix("")), temporary_path(file)
        try:
            self._profile.export_chrome_trace(str(plain))
            content = plain.read_bytes()
            aside.write_bytes(gzip.compress(content, COMPRESSION_LEVEL))
            os.replace(aside, file)
        finally:
            plain.unlink(missing_ok=True)
            aside.unlink(missing_ok=True)
        return content

    def _remove_old(self) -> None:
        """Remove the files of an earlier start, which may have had more ranks."""
        with os_errors_named(self._folder):
            for path in (*self._folder.glob("rank-*.json.gz"), self._folder / SUMMARY_FILE):
                make_way_for_file(path, "a profile", self._say)
                path.unlink(missing_ok=True)

    def _write_summary(self, ranks: list[RankProfile], steps: range, name: str) -> None:
        content = {
            "steps": list(steps),
            "device": name,
            "torch": torch.__version__,
            "ranks": [{**asdict(each), "step_seconds": each.seconds.step} for each in ranks],
        }
        path = self._folder / SUMMARY_FILE
        with os_errors_named(path):
            atomic_write_json(path, content)


def enough_steps(steps: int, left: int, say: Callable[[str], None]) -> bool:
    """Return whether enough steps are left for the profile; print a warning if not."""
    needed = WARM_UP_STEPS + steps
    if left < needed:
        say(
            f"Warning: nothing is profiled: {left:,} steps are left, and --profile needs "
            f"{needed:,}, of which {WARM_UP_STEPS} warm up"
        )
    return left >= needed


def _torch_profiler(steps: int) -> profile:
    # Otherwise its library reports on standard error that it starts and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # torch 2.11 says so before the first cycle, too; there is one alone.
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events", module="torch")
    activities = [ProfilerActivity.CPU]
    if device().type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1),
        record_shapes=True,  # without them nothing is known of a matrix product's FLOPs
    )


def _is_first_of_node() -> bool:
    return local_rank() == 0
