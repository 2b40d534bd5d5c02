"""The examples for clusters make a batch script that their options describe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_support import make_corpora, run_settings, write_run_file

SCRIPTS = Path(__file__).resolve().parents[2] / "launch" / "clusters"
HEADERS = {
    "juwels-booster": ["--gpus-per-node=4", "--cpus-per-task=12", "--partition=booster"],
    "jean-zay": ["--gpus-per-node=4", "--cpus-per-task=24", "--account=mine@h100"],
}


@pytest.mark.parametrize("cluster", HEADERS)
def test_script_of_a_cluster(cluster, tmp_path):
    corpora = make_corpora(tmp_path / "corpora")
    run_file = write_run_file(tmp_path, run_settings(corpora, batch={"samples": 16, "micro": 2}))
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MEGAPHASE_VENV": str(tmp_path / "venv"),
        "BASH_FUNC_module%%": "() { :; }",  # a function that does nothing, exported to bash
    }
    done = subprocess.run(
        [SCRIPTS / f"{cluster}.sh", "mine", "2", run_file, "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options = [line.removeprefix("#SBATCH ") for line in done.stdout.splitlines()]
    assert {*HEADERS[cluster], "--nodes=2", "--ntasks-per-node=4"} <= set(options)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
