"""benchmarks/gpu.py: its rehearsal on the CPU, and what a part that fails costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WHOLE_MINUTES = 60  # far more than needed, for a loaded machine


def rehearse(output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--output", str(output)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(output.read_text())
    return done.returncode, found


def results(found: dict[str, Any], part: str) -> dict[str, Any]:
    outcome = found["parts"][part]
    assert outcome["status"] == "done", outcome.get("output")
    values: dict[str, Any] = outcome["results"]
    return values


@pytest.mark.slow
def test_parts_record_what_they_find(tmp_path: Path) -> None:
    options = ("--only", "device,documents,rules,step", "--skip", "device", "--minutes", "10")
    code, found = rehearse(tmp_path / "gpu.json", *options)
    assert code == 0
    assert list(found["parts"]) == ["step", "documents", "rules"]
    assert results(found, "step")["speed"]["tokens_per_second"] > 0
    assert set(results(found, "documents")["differences"]) == {"output", "q", "k", "v"}
    assert len(results(found, "rules")["differences"]) == 6


def test_what_does_not_fit_the_time_is_skipped(tmp_path: Path) -> None:
    code, found = rehearse(tmp_path / "gpu.json", "--minutes", "0.01")
    assert code == 0
    assert {each["status"] for each in found["parts"].values()} == {"skipped"}


def test_a_part_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    # Five seconds of the whole time are kept, and two are too few for this part.
    options = ("--only", "resume", "--minutes", str(7 / 60))
    code, found = rehearse(tmp_path / "gpu.json", *options)
    assert code == 1
    assert found["parts"]["resume"]["status"] == "timed out"


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "steps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part is called steps" in done.stderr


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    code, found = rehearse(tmp_path / "gpu.json", "--minutes", str(WHOLE_MINUTES))
    assert code == 0, {name: each["status"] for name, each in found["parts"].items()}
    for part in found["parts"]:
        results(found, part)
    assert results(found, "twice")["same"] == {"losses": True, "grad_norms": True, "weights": True}
    assert results(found, "resume")["same_metrics"]
    assert max(results(found, "fp32")["compiled"][key] for key in ("losses", "by")) < 1e-5
    assert len(results(found, "formulas")) >= 8
    assert all("failed" not in speed for speed in results(found, "variants")["speeds"].values())
