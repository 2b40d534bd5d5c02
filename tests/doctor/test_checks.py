"""The checks of `megaphase doctor` on this machine as it is, and on broken ones."""

import os
import resource
import shutil
import stat
from collections import namedtuple
from errno import ENOLCK

import pytest

from megaphase.doctor.checks import devices, file_system, software, system
from megaphase.doctor.doctor import CHECKS
from megaphase.doctor.finding import Settings
from megaphase.doctor.run_check import findings_of

Usage = namedtuple("Usage", "total used free")
SLOW = ("devices.all_reduce", "kernels.deepspeed", "kernels.triton")


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, gpu=False)


@pytest.fixture
def on_gpu_node(tmp_path):
    return Settings(tmp_path, gpu=True)


def found(function, settings):
    """Return verdict and text of all findings of a check, each of which has a remedy if it needs
    one."""
    findings = findings_of(function, settings)
    assert findings
    assert all(each.remedy for each in findings if each.verdict != "ok")
    return [(each.verdict, each.text) for each in findings]


def only(function, settings):
    ((verdict, text),) = found(function, settings)
    return verdict, text


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(check.function, marks=[pytest.mark.slow] * (check.function in SLOW))
        for check in CHECKS
    ],
)
def test_nothing_is_wrong_where_the_tests_run(function, settings):
    # Warnings are about the machine: a slow disk, or SLURM's programs without a cluster.
    assert all(verdict != "fault" for verdict, _ in found(function, settings))
    assert list(settings.directory.iterdir()) == []


def test_an_older_python_is_a_fault(settings, monkeypatch):
    monkeypatch.setattr(software.sys, "version_info", (3, 10, 1))
    assert only("software.python", settings)[0] == "fault"


def test_packages_are_compared_with_ranges_and_with_tested_versions(
    settings, monkeypatch, tmp_path
):
    tested = tmp_path / "tested.txt"
    tested.write_text("# comment\nnumpy==1.0.0\ntorch==0.1; sys_platform == 'linux'\n")
    monkeypatch.setattr(software, "CONSTRAINTS", tested)
    needs = ["numpy>=1.26", "no-such-package>=1", "pydantic>=9999", "absent; extra == 'test'"]
    monkeypatch.setattr(software, "requires", lambda _: needs)
    missing, wrong, other = found("software.packages", settings)
    assert missing == ("fault", "not installed: no-such-package")
    assert wrong[0] == "fault"
    assert "needed >=9999" in wrong[1]
    assert other[0] == "warning"
    assert "(tested: 1.0.0)" in other[1]
    assert "torch" not in other[1]  # it is not needed here
    monkeypatch.setattr(software, "CONSTRAINTS", tmp_path / "nowhere")
    assert found("software.packages", settings)[-1][0] == "warning"


@pytest.mark.parametrize(
    ("script", "verdict", "text"),
    [
        ("echo 'x.cpp:1: error: no memory' >&2; exit 1", "fault", "error: no memory"),
        ("exit 0", "fault", "does not run"),
        ('grep -q Python.h "$6$7" && exit 1; exec g++ "$@"', "warning", "Python.h"),
    ],
)
def test_a_compiler_must_really_compile(script, verdict, text, settings, monkeypatch, tmp_path):
    if "Python.h" in script:
        script = 'for each; do grep -qs Python.h "$each" && exit 1; done; exec g++ "$@"'
    monkeypatch.setenv("CXX", str(program(tmp_path, "compiler", script)))
    said = only("software.compiler", settings)
    assert said[0] == verdict
    assert text in said[1]


def test_a_missing_compiler_is_a_warning(settings, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    verdict, text = only("software.compiler", settings)
    assert verdict == "warning"
    assert "no-such-compiler" in text


def test_a_node_without_the_gpus_that_it_must_have(on_gpu_node):
    if devices.has_device_files():
        pytest.skip("this machine has a GPU")
    assert "fault" in dict(found("devices.torch", on_gpu_node))
    assert "fault" in dict(found("devices.gpus", on_gpu_node))


@pytest.mark.slow
def test_an_all_reduce_that_cannot_work(on_gpu_node, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    findings = found("devices.all_reduce", on_gpu_node)
    assert [verdict for verdict, _ in findings] == ["fault", "fault"]
    assert "no-such-interface" in findings[1][1]


@pytest.mark.parametrize(("free", "verdict"), [(64e6, "fault"), (0.5e9, "warning"), (8e9, "ok")])
def test_shared_memory(free, verdict, settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    assert only("system.shared_memory", settings)[0] == verdict


def test_no_shared_memory(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(system, "SHARED_MEMORY", tmp_path / "nothing")
    assert only("system.shared_memory", settings)[0] == "fault"


@pytest.mark.parametrize(
    ("files", "verdict"),
    [(256, "fault"), (1024, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")],
)
def test_limit_of_open_files(files, verdict, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(system, "INFINIBAND", tmp_path / "none")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, resource.RLIM_INFINITY))
    assert only("system.limits", settings)[0] == verdict


def test_locked_memory_counts_with_infiniband_alone(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(system, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert [verdict for verdict, _ in found("system.limits", settings)] == ["ok", "warning"]


@pytest.mark.parametrize(
    ("script", "verdict", "text"),
    [
        ("echo gpu; echo cpu", "ok", "partitions cpu, gpu"),
        ("echo 'sinfo: error: slow' >&2; exit 1", "fault", "sinfo: error: slow"),
        ("exit 1", "fault", "sinfo ended with exit code 1"),
        (f"echo 'Could not {system.NO_CLUSTER}' >&2; exit 1", "warning", "no cluster"),
    ],
)
def test_slurm(script, verdict, text, settings, monkeypatch, tmp_path):
    for name in system.SLURM_COMMANDS:
        program(tmp_path, name, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = only("system.slurm", settings)
    assert said[0] == verdict
    assert text in said[1]


def test_no_slurm(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only("system.slurm", settings)[0] == "ok"
    program(tmp_path, "srun", "exit 0")
    assert only("system.slurm", settings)[0] == "warning"


def test_locks_that_exclude_nobody(settings, monkeypatch):
    monkeypatch.setattr(file_system, "RIVAL", "print('taken')")
    verdicts = [verdict for verdict, _ in found("file_system.locks", settings)]
    assert verdicts == ["fault", "warning"]  # flock is the one that megaphase uses


def test_a_file_system_without_locks(settings, monkeypatch):
    def refuse(*_):
        raise OSError(ENOLCK, os.strerror(ENOLCK))

    monkeypatch.setattr(file_system.fcntl, "flock", refuse)
    assert only("file_system.locks", settings)[0] == "warning"


def test_renames_that_fail(settings, monkeypatch):
    def refuse(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    assert only("file_system.renames", settings)[0] == "fault"
    monkeypatch.setattr(os, "replace", lambda source, target: None)
    assert only("file_system.renames", settings)[0] == "fault"


def test_speed_writes_bounded_bytes(settings, monkeypatch):
    monkeypatch.setattr(file_system, "MOST_BYTES", 8 << 20)
    monkeypatch.setattr(file_system, "SLOW_MB_PER_S", 1e9)
    monkeypatch.setattr(file_system, "LITTLE_GB", 0)
    verdict, text = only("file_system.speed", settings)
    assert verdict == "warning"
    assert " 8 MB;" in text
    # At most a hundredth of the free space.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100 << 20))
    assert only("file_system.speed", settings)[1].startswith("too little space")


@pytest.mark.parametrize(
    ("ahead", "verdict"), [(0, "ok"), (10, "warning"), (-10, "warning"), (100, "fault")]
)
def test_clock(ahead, verdict, settings, monkeypatch):
    real = file_system.time.time
    monkeypatch.setattr(file_system.time, "time", lambda: real() + ahead)
    said = only("file_system.clock", settings)
    assert said[0] == verdict
    if ahead:
        assert ("ahead of" if ahead > 0 else "behind") in said[1]
