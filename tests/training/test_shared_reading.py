"""What all ranks need is read by one of them; every other one opens only what it maps or writes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from distributed import check, launch
from run_support import TEXT_BYTES, make_corpora, megaphase, run_settings, write_run_file

pytestmark = pytest.mark.distributed

LOGS = "MEGAPHASE_TEST_OPENED"
MAPPED = ".bin", ".idx", ".hash", ".blocks"


def record_opened_files() -> None:
    """Write the paths that this rank opens for reading to a file of its own."""
    log = os.open(
        f"{os.environ[LOGS]}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, Path)):
            path, mode, flags = arguments
            if not (flags & (os.O_WRONLY | os.O_RDWR) or set(mode or "") & set("wax+")):
                os.write(log, f"{os.path.abspath(path)}\n".encode())

    sys.addaudithook(hook)


def files_opened(logs: Path, rank: int, folder: Path) -> Counter[str]:
    """Return how often a rank has opened each file in a folder."""
    paths = map(Path, Path(f"{logs}.{rank}").read_text().splitlines())
    return Counter(str(path.relative_to(folder)) for path in paths if path.is_relative_to(folder))


def test_a_rank_opens_what_it_maps_and_nothing_that_another_can_read_for_it(tmp_path):
    corpora = make_corpora(tmp_path / "corpora")
    run_file = write_run_file(tmp_path / "job", run_settings(corpora))
    mapped = {f"data/{task}{suffix}" for task in TEXT_BYTES for suffix in MAPPED}
    compared = {f"data/{task}{suffix}" for task in TEXT_BYTES for suffix in (*MAPPED, ".sum")}
    index = {"starts", *(f"blend-{phase}.{kind}" for phase in "01" for kind in ("tasks", "counts"))}
    for attempt, end in (("first", 4), ("resumed", 5)):
        logs = tmp_path / attempt
        command = megaphase("train", run_file, f"checkpoint.end_after={end}")
        check(launch(command, 2, env={LOGS: str(logs)}, prepare=record_opened_files))

        # Of a corpus it maps four files, and compares every second file of all with its manifest.
        opened = files_opened(logs, 1, corpora)
        assert mapped <= opened.keys() <= compared
        assert opened.total() == len(mapped) + len(compared) // 2
        by_both = opened + files_opened(logs, 0, corpora)
        assert by_both.keys() > compared  # rank 0 reads the tokenizer, too

        [plan] = (tmp_path / "job" / "run" / "plan").glob("*/")
        assert files_opened(logs, 1, plan) == Counter(index)
        others = files_opened(logs, 1, tmp_path / "job").keys()
        others -= {str((plan / name).relative_to(tmp_path / "job")) for name in index}
        # Which weights are where, the shards, and a share of the files to be compared.
        of_checkpoint = {"parameters.json", "shard-00000.safetensors", "shard-00001.safetensors"}
        allowed = {f"run/checkpoints/step-00000004/{n}" for n in (*of_checkpoint, "state.json")}
        assert others <= (allowed if attempt == "resumed" else set())
        assert "run.yaml" in files_opened(logs, 0, tmp_path / "job")
