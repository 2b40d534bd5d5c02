"""A run of four phases that changes mixture, batch, temperature, sequence length, rotary base and
averaging, as `examples/four-phases` does: the same losses in every layout, exact resume, branches
at every boundary that continue as the run did, and a trace of both.

The run on real text, with 20 kills, is part of the slow tests.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from chaos import MOMENTS, NEVER, Layout, Victim, largest_difference, overrides
from data_support import CORPORA
from distributed import check, launch
from run_support import (
    HIGH,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from warm_commands import run_well

from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.train import train_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "four-phases" / "run.yaml"
LANGUAGES = ("en", "fr", "de", "hi", "eu")
ONE: Layout = (1, 1, 0)
FOUR: Layout = (4, 2, 3)
KILLS = 20
# A run's messages about its own start and its checkpoints.
OWN_EVENTS = ("branch", "checkpoint", "best")


def small_settings(corpora: Path) -> dict[str, Any]:
    """Return a run file of the example's four phases over synthetic languages."""
    settings = run_settings(corpora)
    for task in HIGH:
        settings["tasks"][task]["role"] = "high"
    example = yaml.safe_load(EXAMPLE.read_text())
    phases = copy.deepcopy(example["phases"])
    for phase, length in zip(
        phases, ({"steps": 6}, {"tokens": 2048}, {"tokens": 3072}, {"tokens": 3072}), strict=True
    ):
        phase.pop("steps", None), phase.pop("tokens", None)
        phase["learning_rate"].pop("warmup_steps", None)
        phase |= length
    phases[1]["batch"] = {"tokens": 512, "ramp": {"from": 128, "tokens": 1024, "step": 128}}
    phases[2]["batch"] = phases[3]["batch"] = {"tokens": 512}
    phases[2]["mixture"].pop("max_epochs"), phases[3]["mixture"].pop("max_epochs")
    phases[3]["model"] = {"seq_len": 128, "rotary_base": 50000}
    settings |= {"phases": phases, "batch": {"tokens": 128, "micro": 1}}
    return settings


def real_settings(folder: Path) -> dict[str, Any]:
    """Tokenize the real corpora; return the example's run file with a smaller model and budget."""
    texts = {name: [CORPORA / f"{name}.jsonl.gz"] for name in LANGUAGES}
    train_tokenizer(texts, folder / "tok", vocab_size=2000)
    for name, files in texts.items():
        tokenize(files, folder / "tok", folder / "data" / name, workers=2)
    settings: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    settings |= {"output": "run", "tokenizer": str(folder / "tok")}
    for name, task in settings["tasks"].items():
        task["corpus"] = str(folder / "data" / name)
    del settings["model"]["preset"]
    settings["model"] |= {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128}
    settings["batch"]["tokens"] = 1024
    for phase, tokens in zip(settings["phases"], (40_000, 80_000, 80_000, 60_000), strict=True):
        phase.pop("steps", None)
        phase["tokens"] = tokens
        # With the example's peaks rounding errors grow a hundredfold in ten steps, in one layout
        # (with another micro-batch) as between two.
        phase["learning_rate"]["peak"] = min(float(phase["learning_rate"]["peak"]), 1e-3)
        if "batch" in phase:
            phase["batch"]["tokens"] = 4096
    settings["optimizer"] = {"eps": 1e-6}
    settings["phases"][1]["batch"]["ramp"] = {"from": 1024, "tokens": 40_000, "step": 1024}
    settings["validation"] |= {"every_steps": 20, "samples": 8}
    settings["checkpoint"]["every_steps"] = 10
    return settings


def train(folder: Path, settings: dict[str, Any], layout: Layout, *arguments: object) -> Path:
    """Train in a layout; return the run directory."""
    run_file = write_run_file(folder, settings)
    command = megaphase("train", run_file, *overrides(layout), *arguments)
    check(launch(command, layout[0]))
    return folder / "run"


def rows_of_phases(run_dir: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of some phases, without the run's messages about itself."""
    wanted = set(names)
    return [
        row
        for row in timeless(read_rows(run_dir))
        if row.get("phase") in wanted and row.get("event") not in OWN_EVENTS
    ]


def traced(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Return what a step of a run read, from `plan trace`."""
    printed = run_well("plan", "trace", run_dir, "--step", step, "--json")
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def check_branches(folder: Path, settings: dict[str, Any], run_dir: Path, layout: Layout) -> None:
    """Branch at the end of each phase but the last; the rest must come out as in the run."""
    names = [phase["name"] for phase in settings["phases"]]
    last_step = max(row["step"] for row in read_rows(run_dir))
    for done in range(1, len(names)):
        rest = settings | {"phases": settings["phases"][done:]}
        source = f"{run_dir}@{names[done - 1]}"
        branch = train(folder / f"branch-{done}", rest, layout, "--from", source)
        assert rows_of_phases(branch, names[done:]) == rows_of_phases(run_dir, names[done:])
        first_step = min(row["step"] for row in rows_of_phases(branch, names[done:])) + 1
        for step in (first_step, last_step):
            assert traced(branch, step) == traced(run_dir, step)


@pytest.mark.slow
def test_four_phases_have_the_same_losses_in_every_layout_and_branches(tmp_path: Path) -> None:
    settings = small_settings(make_corpora(tmp_path / "corpora"))
    one = train(tmp_path / "one", settings, ONE)
    four = train(tmp_path / "four", settings, FOUR)
    assert largest_difference(timeless(read_rows(one)), timeless(read_rows(four))) < 1e-5
    check_branches(tmp_path, settings, one, ONE)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not CORPORA.is_dir(), reason=f"needs real text in {CORPORA}")
def test_four_phases_on_real_text_survive_20_kills(tmp_path: Path) -> None:
    settings = real_settings(tmp_path)
    one = train(tmp_path / "one", settings, ONE)
    four = train(tmp_path / "four", settings, FOUR)
    assert largest_difference(timeless(read_rows(one)), timeless(read_rows(four))) < 1e-5
    for layout, run_dir in ((ONE, one), (FOUR, four)):
        expected, random, kills = timeless(read_rows(run_dir)), Random(23), 0
        while kills < KILLS // 2:
            victim = Victim(
                write_run_file(tmp_path / f"killed-{layout[0]}-{kills}", settings), random
            )
            while kills + victim.kills < KILLS // 2:
                if not victim.live(layout, random.choice(MOMENTS)):
                    break
            victim.live(layout, NEVER)
            assert timeless(read_rows(victim.folder)) == expected, dict(victim.counts)
            kills += victim.kills
    check_branches(tmp_path, settings, one, ONE)
    check_branches(tmp_path / "on-four", settings, four, FOUR)
