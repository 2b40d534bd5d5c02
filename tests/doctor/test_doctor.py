"""`megaphase doctor`: every check ends in time, and the report says what was found."""

import json
import signal
import subprocess

import pytest
from run_support import megaphase
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.doctor import doctor
from megaphase.doctor.doctor import CHECKS, Check, run_bounded
from megaphase.doctor.finding import Finding, Settings
from megaphase.utils.errors import InputError

WARNING = Finding("warning", "a long text " * 20, "a remedy that takes more than one line " * 4)
FAULT = Finding("fault", "does not work", "mend it")


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, gpu=False)


def test_a_check_that_hangs_is_a_fault(settings):
    (finding,) = run_bounded(Check("python", "software.python", 0.0), settings)
    assert finding.verdict == "fault"
    assert "did not end in 0 s" in finding.text


@pytest.mark.parametrize("seconds", [1.5, 2.5])
def test_a_check_that_is_ended_leaves_no_files(settings, seconds):
    run_bounded(Check("disk speed", "file_system.speed", seconds), settings)
    assert list(settings.directory.iterdir()) == []


def test_a_check_that_crashes_is_a_fault(settings, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = run_bounded(CHECKS[0], settings)
    assert finding.verdict == "fault"
    assert "SIGSEGV" in finding.text


def test_what_libraries_print_is_not_taken_for_the_answer(settings, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, sys; os.write(2, b'chatter\\n')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = run_bounded(CHECKS[0], settings)
    assert finding.verdict == "ok"


def run(monkeypatch, findings, *arguments):
    answers = iter(findings)
    monkeypatch.setattr(doctor, "CHECKS", CHECKS[: len(findings)])
    monkeypatch.setattr(doctor, "run_bounded", lambda check, settings: next(answers))
    monkeypatch.setenv("COLUMNS", "80")
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_only_a_fault_fails(monkeypatch, tmp_path):
    good = run(monkeypatch, [[WARNING]], "--dir", str(tmp_path))
    assert good.exit_code == 0
    assert good.stdout.endswith("0 ok, 1 warning, 0 faults\n")
    bad = run(monkeypatch, [[WARNING], [FAULT]], "--dir", str(tmp_path))
    assert bad.exit_code == 1
    assert "→ mend it" in bad.stdout
    assert bad.stdout.endswith("0 ok, 1 warning, 1 fault\n")


def test_the_report_fits_80_columns(monkeypatch, tmp_path):
    lines = run(monkeypatch, [[WARNING, FAULT]], "--dir", str(tmp_path)).stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert [line.split()[0] for line in lines if line[:1].strip()][1:] == ["warning", "fault", "0"]


def test_json(monkeypatch, tmp_path):
    result = run(monkeypatch, [[WARNING], [FAULT]], "--json", "--dir", str(tmp_path))
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert [each["check"] for each in said["checks"]] == [check.name for check in CHECKS[:2]]
    assert said["checks"][1]["remedy"] == FAULT.remedy
    assert (said["ok"], said["warnings"], said["faults"]) == (0, 1, 1)


def test_a_directory_that_is_not_there_is_wrong_input(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--dir", ""])
    assert isinstance(result.exception, InputError)
    result = CliRunner().invoke(app, ["doctor", "--dir", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, InputError)
    assert "nowhere" in str(result.exception)


@pytest.mark.slow
def test_the_whole_of_this_machine(tmp_path):
    result = subprocess.run(
        megaphase("doctor", "--json", "--dir", tmp_path), capture_output=True, text=True
    )
    said = json.loads(result.stdout)
    assert result.returncode == (1 if said["faults"] else 0)
    assert {each["check"] for each in said["checks"]} == {check.name for check in CHECKS}
    assert list(tmp_path.iterdir()) == []
