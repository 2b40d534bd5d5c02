"""Every command of the tutorials works, in the order of the pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megaphase.data_tools.synthetic.languages import write_languages

PAGES = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
TEXT_BYTES = {"alda": 300_000, "boreth": 300_000, "cimri": 60_000, "dovan": 60_000}
BLOCK = re.compile(r"^```(sh|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the texts of the tutorials; what a page leaves there the next one finds."""
    folder = tmp_path_factory.mktemp("tutorials")
    write_languages(folder / "text", seed=1, languages=TEXT_BYTES)
    return folder


@pytest.mark.parametrize(
    ("page", "result"),
    [
        ("from-scratch", "hf/model.safetensors"),
        ("add-languages", "hf-extended/model.safetensors"),
        ("compare-recipes", "sweep-report/index.html"),
    ],
)
def test_the_commands_of_a_page_work(page, result, folder):
    blocks = BLOCK.findall((PAGES / f"{page}.md").read_text())
    assert len(blocks) >= 4
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for language, block in blocks:
        if language == "yaml":
            (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (folder / result).is_file()
