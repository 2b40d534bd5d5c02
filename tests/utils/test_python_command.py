"""Processes that Megaphase starts run what is installed, wherever they are started."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megaphase import __version__
from megaphase.utils.python_command import python_command


def test_modules_of_the_working_directory_are_not_used(tmp_path: Path) -> None:
    """A checkout that is not built, and a file with the name of a library."""
    (tmp_path / "megaphase").mkdir()
    for name in ("megaphase/__init__.py", "tempfile.py", "yaml.py"):
        (tmp_path / name).write_text("raise SystemExit(f'{__name__} of the working directory')\n")
    command = python_command("megaphase", "--version", options=("-W", "ignore"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["megaphase", __version__]), done.stderr
