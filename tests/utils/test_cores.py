"""A process takes as many cores as it may run on, or fewer where a container limits its time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaphase.utils import cgroups
from megaphase.utils.cores import available_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the machine's cgroups, of which none is there yet, with 12 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(cgroups, "_OWN_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(cgroups, "_MOUNT", tmp_path / "cgroup")
    return tmp_path


def write(machine: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = machine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_without_cgroups_it_is_the_cores_that_it_may_run_on(machine: Path) -> None:
    assert available_cores() == 12


@pytest.mark.parametrize(
    ("inner", "outer", "cores"),
    [
        ("max 100000", "max 100000", 12),
        ("400000 100000", "max 100000", 4),
        ("max 100000", "250000 100000", 3),  # two and a half
        ("400000 100000", "100000 50000", 2),
        ("1000 100000", "max 100000", 1),
        ("2400000 100000", "max 100000", 12),  # more than there are
    ],
)
def test_the_lowest_limit_of_version_2_counts(
    machine: Path, inner: str, outer: str, cores: int
) -> None:
    write(machine, {"self": "0::/a/b", "cgroup/a/b/cpu.max": inner, "cgroup/a/cpu.max": outer})
    assert available_cores() == cores


def test_in_a_container_the_limit_is_at_the_mount(machine: Path) -> None:
    write(machine, {"self": "0::/../../kubepods/pod-1", "cgroup/cpu.max": "300000 100000"})
    assert available_cores() == 3


@pytest.mark.parametrize(("quota", "cores"), [("-1", 12), ("700000", 7), ("50000", 1)])
def test_limits_of_version_1_count(machine: Path, quota: str, cores: int) -> None:
    write(
        machine,
        {
            "self": "4:cpu,cpuacct:/job\n2:memory:/other\n0::/",
            "cgroup/cpu/job/cpu.cfs_quota_us": quota,
            "cgroup/cpu/job/cpu.cfs_period_us": "100000",
            "cgroup/cpu/other/cpu.cfs_quota_us": "100000",  # another process's
            "cgroup/cpu/other/cpu.cfs_period_us": "100000",
        },
    )
    assert available_cores() == cores
