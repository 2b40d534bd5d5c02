"""A rehearsal as `megaphase rehearse` shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megaphase.config.run import RunConfig
from megaphase.distributed.dist_env import given_world_size
from megaphase.estimate.hardware import TERA, planned_card
from megaphase.estimate.memory_table import largest_phase
from megaphase.estimate.suggestions import GB, RESERVE
from megaphase.plan.load_plan import open_run, phase_setups
from megaphase.plan.same_run import settings_of
from megaphase.rehearsal.fake_device import missing_for_rehearsal
from megaphase.training.deepspeed_config import swap_folder
from megaphase.utils.arguments import MOST_PROCESSES
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.process_lifetime import ends_with_this_process
from megaphase.utils.python_command import python_command

# What is rehearsed, in this order, and the names that are shown.
ACTIONS = {
    "train": "training",
    "evaluate": "validation",
    "save": "save",
    "load": "load",
    "reset": "reset",
}
WAITS_SHOWN, PLACES_SHOWN = 12, 8
# Of a step, at most; a step with more does the same again.
MICRO_BATCHES = 2
NOTHING = "—"
ENDS_SILENTLY = "the process that rehearses has ended without an answer"


@dataclass(frozen=True)
class Rehearsed:
    """figures: as JSON; see `rank.Rank.report` and `estimates`."""

    figures: dict[str, Any]
    config: RunConfig

    def show(self, console: Console) -> None:
        if "error" in self.figures:
            return
        console.print(self._table())
        for sentence in self._sentences():
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        console.print(self._memory())
        console.print(self._waits())

    def raise_fault(self) -> None:
        """
        Raises:
            RunError: the run would have failed on the cluster.
        """
        for fault in self._faults():
            raise RunError(fault)

    def _faults(self) -> list[str]:
        figures = self.figures
        if "error" in figures:
            print(figures["traceback"], file=sys.stderr, end="")
            return [f"the rehearsed rank has failed: {figures['error']}"]
        faults = []
        if not figures["applied"]:
            faults.append("the optimizer did not step in the rehearsal")
        for report in figures["reports"].values():
            for operator, collective, place in report["conflicts"]:
                faults.append(f"{operator} touches a tensor of an unfinished {collective}, {place}")
        card = planned_card(self.config)
        if self._peak() > card.memory_gb * GB * (1 - RESERVE):
            faults.append(
                f"the run needs {self._peak() / GB:.1f} GB, and {card.title} has "
                f"{card.memory_gb:g} GB, of which {RESERVE:.0%} are kept free for what is not "
                "rehearsed (the CUDA context, NCCL, fragmentation); `megaphase plan` names layouts "
                "that fit"
            )
        return faults

    def _peak(self) -> int:
        return max(int(report["peak_bytes"]) for report in self.figures["reports"].values())

    def _table(self) -> Table:
        reports: Mapping[str, Any] = self.figures["reports"]
        table = Table(
            title=f"Rank {self.figures['rank']:,} of {self.figures['processes']:,} on a fake GPU",
            title_justify="left",
        )
        table.add_column("", no_wrap=True)
        groups = ["tensor", "data"]
        if any(_sent(report, "secondary") != NOTHING for report in reports.values()):
            groups.append("secondary")
        sent = [f"sent to {group} group" for group in groups]
        for heading in ("kernels", "GB moved", "TFLOP", "waits", *sent, "peak GB"):
            table.add_column(heading, justify="right")
        for action, title in ACTIONS.items():
            report = reports[action]
            table.add_row(
                title,
                f"{sum(report['kernels'].values()):,}",
                f"{report['bytes_moved'] / GB:,.1f}",
                f"{report['product_flops'] / TERA:,.1f}",
                f"{sum(wait['count'] for wait in report['waits']):,}",
                *(_sent(report, group) for group in groups),
                f"{report['peak_bytes'] / GB:,.2f}",
            )
        return table

    def _sentences(self) -> Sequence[str]:
        estimates, train = self.figures["estimates"], self.figures["reports"]["train"]
        peak = train["peak_bytes"]
        sentences = []
        if self.figures["phase"] is not None:
            sentences.append(
                f"Phase {self.figures['phase']} is rehearsed, which needs the most memory"
            )
        if self.figures["micro_batches"] > MICRO_BATCHES:
            sentences.append(
                f"A step of the run has {self.figures['micro_batches']:,} micro-batches, and "
                f"{MICRO_BATCHES} of them are rehearsed"
            )
        sentences.append(
            f"Peak of a training step: {peak / GB:.2f} GB of tensors; `megaphase plan` estimates "
            f"{estimates['peak_bytes'] / GB:.2f} GB, and {RESERVE:.0%} of the card in reserve for "
            "what is no tensor"
        )
        gathered = train["gathered_ahead"] + train["gathered_when_needed"]
        if gathered:
            share = train["gathered_ahead"] / gathered
            sentences.append(
                f"ZeRO 3 gathers {gathered / 1e6:,.0f} million elements a step, {share:.0%} of "
                "them ahead of their use"
            )
        return sentences

    def _memory(self) -> Table:
        by_place: Mapping[str, int] = self.figures["reports"]["train"]["peak_by_place"]
        table = Table(title="Memory at that peak", title_justify="left")
        table.add_column("GB", justify="right")
        table.add_column("allocated at", overflow="fold")
        for place, size in list(by_place.items())[:PLACES_SHOWN]:
            table.add_row(f"{size / GB:,.2f}", place or "torch's backward pass")
        return table

    def _waits(self) -> Table:
        waits = self.figures["reports"]["train"]["waits"]
        table = Table(title="The host waits in a training step", title_justify="left")
        for heading in ("times", "why", "where"):
            table.add_column(heading, overflow="fold")
        for wait in waits[:WAITS_SHOWN]:
            table.add_row(f"{wait['count']:,}", wait["kind"], wait["place"])
        return table


def _sent(report: Mapping[str, Any], group: str) -> str:
    found = [each for each in report["collectives"] if each["group"] == group]
    sent = sum(each["count"] * each["sent"] for each in found)
    return f"{sent / GB:,.2f} GB\nin {sum(each['count'] for each in found):,}" if found else NOTHING


def rehearse_run(
    run_file: Path,
    overrides: Sequence[str] | None,
    processes: int | None,
    rank: int,
    console: Console,
) -> Rehearsed:
    """Rehearse one rank of a run.

    Raises:
        InputError: the run file is invalid or needs a package that is not installed, its layout
            does not divide, or g++ is missing.
        RunError: the rehearsal itself could not be carried out.
    """
    config, tokenizer = open_run(run_file, overrides)
    processes = processes or given_world_size() or config.parallel.fewest_processes
    if processes > MOST_PROCESSES:
        raise InputError("--processes", f"is {processes:,}", f"give at most {MOST_PROCESSES:,}")
    setups = phase_setups(config, tokenizer, processes)  # refuses what does not divide
    planned_card(config)  # refuses what no table has
    if rank >= processes:
        raise InputError("--rank", f"is {rank:,}", f"give one below {processes:,}")
    if swap_folder(config) is not None:
        problem, remedy = "a rehearsal has no disk for nvme", "rehearse with offload: cpu"
        raise InputError(config.where("parallel"), problem, remedy)
    if missing := missing_for_rehearsal():
        raise InputError(missing, "is not installed, and a rehearsal needs it", "install it")
    number = largest_phase(setups)
    micro_batches = config.micro_batches(processes, number)
    data = processes // config.parallel.tensor
    micro = config.phase_batch(number).micro
    batch = {"samples": micro * min(micro_batches, MICRO_BATCHES) * data, "micro": micro}
    settings = settings_of(config)
    # The phase's own keys as those of the run.
    model = settings["model"] | settings["phases"][number].get("model", {})
    rehearsed = {"batch": None, "model": None}
    rehearsed["average"] = settings["phases"][number].get("average")
    phases = [phase | rehearsed for phase in settings["phases"]]
    case = {
        "path": str(run_file),
        "run": settings | {"batch": batch, "model": model, "phases": phases},
        "vocab": tokenizer.vocab_size,
        "processes": processes,
        "rank": rank,
        "actions": [*ACTIONS],
    }
    with console.status(f"Rehearsing rank {rank:,} of {processes:,}"):
        done = subprocess.run(
            python_command("megaphase.rehearsal.process", options=("-W", "ignore")),
            input=json.dumps(case),
            capture_output=True,
            text=True,
            env=os.environ | ends_with_this_process(),
        )
    if not done.stdout.strip():
        lines = done.stderr.strip().splitlines()
        raise RunError(f"{ENDS_SILENTLY}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    figures = json.loads(done.stdout)
    if "wrong_input" in figures:
        raise InputError(*figures["wrong_input"])
    phase = setups[number].name if len({each.setup for each in setups}) > 1 else None
    about = {"rank": rank, "processes": processes, "micro_batches": micro_batches, "phase": phase}
    return Rehearsed(figures | about, config)
