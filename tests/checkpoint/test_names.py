"""The names with which a user refers to a checkpoint."""

from __future__ import annotations

import json

import pytest

from megaphase.checkpoint.names import find_checkpoint, with_latest
from megaphase.utils.errors import InputError


@pytest.fixture
def run(tmp_path):
    """A run directory with the checkpoint at the end of its phase, which is also the latest."""
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000012").mkdir(parents=True)
    state = {"permanent": True, "phase_name": "joint", "step": 12}
    (folder / "step-00000012" / "state.json").write_text(json.dumps(state))
    (folder / "latest").symlink_to("step-00000012")
    return tmp_path / "run"


def test_a_run_directory_may_mean_its_latest_checkpoint(run):
    assert with_latest(str(run)) == f"{run}@latest"
    found = run / "checkpoints" / "step-00000012"
    assert find_checkpoint(with_latest(str(run))) == found.resolve()
    for named in (f"{run}@joint", str(found), str(run / "other")):
        assert with_latest(named) == named


def test_elsewhere_a_run_directory_is_refused_with_names_of_its_checkpoints(run):
    with pytest.raises(InputError) as error:
        find_checkpoint(str(run))
    assert str(error.value) == (
        f"{run}: this is a run directory, not a checkpoint; give {run}@latest or {run}@joint"
    )
