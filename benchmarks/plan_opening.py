"""What opening a built plan takes: `python benchmarks/plan_opening.py --folder DIR --samples 1e9`.

Builds a plan of 100 tasks in the folder unless it is there, of corpora without tokens. Then, each
in a process of its own and after its imports, wall and processor seconds of: what `megaphase plan`
does with a plan that is built; opening it for training, the corpora not counted; reading where the
samples of the first step are; and verifying all of it. The median over the rounds. `--before TREE`
runs another checkout in turn with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TASKS = 100
DOCUMENTS = 20_000_000
SEQ_LEN = 2048
BATCH = 1024
PARTS = "megaphase plan", "opening for training", "places of the first step", "verifying all"


def prepare(folder: Path, samples: int) -> None:
    """Write corpora and build the plan, where that has not been done."""
    from synthetic_corpora import document_lengths, open_spec, write_corpus, write_run_file

    from megaphase.corpus.format import blocks_of
    from megaphase.corpus.manifest import BLOCKS_SUFFIX, Manifest, corpus_file
    from megaphase.plan.build import ensure_built

    tasks = [f"task-{number}" for number in range(TASKS)]
    shares = np.random.default_rng(3).lognormal(0, 1, TASKS)
    documents = np.maximum(shares / shares.sum() * DOCUMENTS, 1000).astype(int).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    for number, (task, count) in enumerate(zip(tasks, documents, strict=True)):
        prefix = folder / task
        if corpus_file(prefix, BLOCKS_SUFFIX).exists():
            continue
        write_corpus(prefix, document_lengths(count, 1000, number), number, with_tokens=False)
        # As a corpus of this version has it; the .bin is then not read at a start.
        manifest, blocks = Manifest.read(prefix), corpus_file(prefix, BLOCKS_SUFFIX)
        with open(blocks, "wb") as file:
            file.truncate(4 * blocks_of(manifest.files[".bin"].bytes))
        from megaphase.utils.files import describe_file

        files = manifest.model_dump()["files"] | {BLOCKS_SUFFIX: describe_file(blocks)}
        Manifest.model_validate(manifest.model_dump() | {"files": files}).write(prefix)
    phase = {"name": "only", "steps": samples // BATCH, "mixture": {"temperature": 2.0}}
    run_file = write_run_file(folder, tasks, seq_len=SEQ_LEN, batch=BATCH, phases=[phase])
    config, spec = open_spec(run_file)
    ensure_built(spec, config.output)


def measure(folder: Path) -> None:
    """Print the seconds of the parts."""
    from synthetic_corpora import TOKENIZER, open_spec

    import megaphase.corpus.integrity as integrity
    from megaphase.config.load import load_run_file
    from megaphase.plan.build import ensure_built
    from megaphase.plan.held_out_noise import held_out_warnings
    from megaphase.plan.index import damage
    from megaphase.plan.load_plan import preview_plan
    from megaphase.plan.plan import Plan

    integrity.SMALL_BIN_BYTES = -1  # there are no tokens
    run_file, seconds = folder / "run.yaml", {}

    def timed(part: str, action: Callable[[], object]) -> None:
        began = time.perf_counter(), time.process_time()
        action()
        seconds[part] = time.perf_counter() - began[0], time.process_time() - began[1]

    def show() -> None:
        config = load_run_file(run_file)
        plan = preview_plan(config, TOKENIZER)  # type: ignore[arg-type]
        plan.summary()
        held_out_warnings(config, plan.spec)
        if hasattr(plan, "store_counts"):
            plan.store_counts()

    timed(PARTS[0], show)
    config, spec = open_spec(run_file)
    plans: list[Plan] = []
    timed(PARTS[1], lambda: plans.append(Plan(spec, ensure_built(spec, config.output))))
    [plan] = plans

    def locate() -> None:
        samples = plan.samples(0, 0, BATCH)
        for task, rows in samples.by_task():
            samples.start.part(task).locate(int(samples.ordinals[rows][0]))

    timed(PARTS[2], locate)
    verify = {"whole": True} if hasattr(plan, "files") else {}
    timed(PARTS[3], lambda: damage(plan.folder, spec, **verify))
    print(json.dumps(seconds))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout, built in place")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.folder)
        return
    prepare(arguments.folder, int(arguments.samples))
    trees = {"now": Path(__file__).resolve().parents[1]}
    if arguments.before is not None:
        trees = {"before": arguments.before.resolve(), **trees}
    found: dict[str, list[dict[str, list[float]]]] = {side: [] for side in trees}
    for _ in range(arguments.rounds):
        for side, tree in trees.items():
            done = subprocess.run(
                [sys.executable, __file__, "--measure", "--folder", arguments.folder],
                env=os.environ | {"PYTHONPATH": str(tree)},
                check=True,
                capture_output=True,
                text=True,
            )
            found[side].append(json.loads(done.stdout))
    size = sum(path.stat().st_size for path in (arguments.folder / "run" / "plan").rglob("*"))
    print(f"{size / 1e9:.1f} GB, {DOCUMENTS:,} documents, {arguments.rounds} rounds\n")
    print("| | " + " | ".join(f"{side}, wall s | CPU s" for side in trees) + " |")
    print("| --- |" + " --- | --- |" * len(trees))
    for part in PARTS:
        cells = [
            f"{statistics.median(each[part][i] for each in rounds):.3f}"
            for rounds in found.values()
            for i in range(2)
        ]
        print(f"| {part} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
