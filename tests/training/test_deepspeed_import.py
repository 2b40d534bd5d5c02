"""A run imports nothing that it does not use, and whoever uses it can still import it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from run_support import make_corpora, run_settings, write_run_file

UNUSED = "torch._dynamo", "torch._inductor", "triton", "mlflow", "wandb", "transformers", "pandas"

# Trains, and says which of the packages were imported; then imports the first of them.
TRAINING = f"""
import sys
sys.argv = ["megaphase", "train", *sys.argv[1:]]
from megaphase.cli import main
try:
    main()
except SystemExit as ending:
    assert not ending.code, ending.code
print([name for name in {UNUSED!r} if name in sys.modules], file=sys.stderr)
import torch._dynamo
@torch.compiler.disable
def twice(number):
    return 2 * number
assert twice(2) == 4 and twice.__wrapped__ is not twice
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed looks for triton on a GPU")
def test_a_run_under_zero_3_imports_no_compiler_and_no_tracker(tmp_path):
    settings = run_settings(make_corpora(tmp_path / "corpora"))
    settings["parallel"]["zero"] = 3
    settings["phases"] = [settings["phases"][0] | {"steps": 2}]
    run_file = write_run_file(tmp_path, settings)
    ended = subprocess.run(
        [sys.executable, "-c", TRAINING, run_file], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "[]\n"
