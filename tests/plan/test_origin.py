"""`origin.json`, which says where a branch begins, has one reader and one writer."""

import json
from pathlib import Path

import pytest

from megaphase.plan.origin import RunOrigin, read_origin, recorded_origin, write_origin
from megaphase.utils.errors import InputError

ORIGIN = RunOrigin(21, {"en": 40, "hi": 2}, 1_344, "base@latest", Path("/base/step-00000021"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_origin(tmp_path / "run", ORIGIN)
    assert recorded_origin(tmp_path / "run") == read_origin(tmp_path / "run") == ORIGIN
    written = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert list(written) == ["source", "checkpoint", "step", "tokens", "used", "hash"]


def test_a_run_that_is_no_branch_begins_at_nothing(tmp_path: Path) -> None:
    assert recorded_origin(tmp_path) is None
    assert read_origin(tmp_path) == RunOrigin(0, {})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"step": 3}', '{"step": 3.5, "used": {}}', '{"step": 3, "used": [1]}'],
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "origin.json").write_text(text)
    with pytest.raises(InputError, match=r"origin\.json: is damaged or cannot be read"):
        read_origin(tmp_path)


def test_an_altered_count_is_found(tmp_path: Path) -> None:
    write_origin(tmp_path, ORIGIN)
    path = tmp_path / "origin.json"
    path.write_text(path.read_text().replace("1344", "1345"))
    with pytest.raises(InputError, match="is damaged"):
        recorded_origin(tmp_path)
