"""Python, the packages, the built extensions and the compiler."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from megaphase.doctor.finding import Finding, Settings, fault, first_line, ok, warning

OLDEST_PYTHON = (3, 11)
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
NAMED_PACKAGES = ("torch", "deepspeed")
# torch.compile writes programs like this one, and so do Triton's launchers and DeepSpeed.
PROGRAM = """\
#include <Python.h>
#include <numeric>
#include <vector>
extern "C" int answer() {
    std::vector<int> numbers(8);
    std::iota(numbers.begin(), numbers.end(), 1);
    return std::accumulate(numbers.begin(), numbers.end(), PY_MAJOR_VERSION);
}
"""
COMPILER_SECONDS = 60


def check_python(settings: Settings) -> Iterator[Finding]:
    """Check the version of this Python."""
    found = f"Python {platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield fault(found, "install Python 3.11 or newer, and megaphase in it")
    else:
        yield ok(found)


def check_packages(settings: Settings) -> Iterator[Finding]:
    """Compare the installed packages with those that megaphase needs, and with the tested ones."""
    needed = [Requirement(each) for each in requires("megaphase") or []]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    missing, wrong, installed = [], [], dict[str, str]()
    for each in needed:
        try:
            installed[each.name] = found = version(each.name)
        except PackageNotFoundError:
            missing.append(each.name)
            continue
        if not each.specifier.contains(found, prereleases=True):
            wrong.append(f"{each.name} {found}, needed {each.specifier}")
    again = 'install megaphase again: pip install -c constraints.txt "."'
    if missing:
        yield fault(f"not installed: {', '.join(missing)}", again)
    if wrong:
        yield fault(f"wrong version: {'; '.join(wrong)}", again)
    tested = _tested_versions()
    if not tested:
        yield warning(
            "the list of tested versions is not installed, so nothing was compared with it",
            "install megaphase again, from its repository or a wheel",
        )
        return
    # A local version such as 2.13.0+cu130 is a build of the tested one.
    other = {
        name: found
        for name, found in installed.items()
        if tested.get(name.lower(), found) != found.split("+")[0]
    }
    if other:
        named = ", ".join(f"{n} {v} (tested: {tested[n.lower()]})" for n, v in other.items())
        yield warning(
            f"within the range, but not tested: {named}",
            "if something fails, install with -c constraints.txt",
        )
    if not missing and not wrong and not other:
        named = ", ".join(f"{name} {installed[name]}" for name in NAMED_PACKAGES)
        yield ok(f"{len(installed)} packages, all of the tested versions ({named})")


def _tested_versions() -> dict[str, str]:
    """Return the versions in constraints.txt by package; empty if there is no such file."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = [line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    pinned = [Requirement(line) for line in lines if line]
    return {each.name.lower(): next(iter(each.specifier)).version for each in pinned}


def check_extensions(settings: Settings) -> Iterator[Finding]:
    """Call the compiled extensions of megaphase."""
    try:
        from megaphase.corpus import _checksums
        from megaphase.fault_tolerance import _thread_stacks
        from megaphase.plan import _builder
    except ImportError as error:
        yield fault(
            f"an extension cannot be loaded ({first_line(error)})",
            "build it: python setup.py build_ext --inplace, or pip install -c constraints.txt .",
        )
        return
    named = [module.__name__.rpartition(".")[2] for module in (_builder, _checksums)]
    yield ok(f"{', '.join([*named, _thread_stacks.__name__.rpartition('.')[2]])} are loaded")


def check_compiler(settings: Settings) -> Iterator[Finding]:
    """Compile, load and call a C++ function, with and without the headers of Python."""
    compiler = os.environ.get("CXX", "g++")
    program = shlex.split(compiler)[0] if compiler.strip() else "g++"
    found = shutil.which(program)
    if found is None:
        yield warning(
            f"no C++ compiler {program}: kernels are not compiled (parts.kernels), nor the "
            "extensions when megaphase is installed from source",
            "install g++ (Debian: apt-get install g++; on a cluster: module load gcc), or name "
            "another one in CXX",
        )
        return
    include = f"-I{sysconfig.get_path('include')}"
    problem = _compile(compiler, PROGRAM, [include])
    if not problem:
        yield ok(f"{found} compiles, with the headers of Python")
        return
    without = PROGRAM.replace("#include <Python.h>\n", "").replace("PY_MAJOR_VERSION", "3")
    if _compile(compiler, without, []):
        yield fault(
            f"{found} does not compile ({problem})",
            "install a whole compiler with its libraries (Debian: apt-get install g++), or name "
            "another one in CXX",
        )
        return
    yield warning(
        f"{found} compiles, but not with Python.h, which kernels on a GPU need",
        "install the headers of this Python (Debian: apt-get install python3-dev)",
    )


def _compile(compiler: str, program: str, options: list[str]) -> str:
    """Return the first error of compiling, loading and calling a program; empty if it works."""
    with TemporaryDirectory(prefix="megaphase-doctor-") as folder:
        source, library = Path(folder) / "program.cpp", Path(folder) / "program.so"
        source.write_text(program)
        command = [*shlex.split(compiler), "-std=c++17", "-O2", "-shared", "-fPIC", *options]
        result = subprocess.run(
            [*command, str(source), "-o", str(library)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILER_SECONDS,
        )
        if result.returncode:
            lines = result.stderr.splitlines()
            errors = [line for line in lines if "error" in line] or lines or ["no message"]
            return first_line(errors[0].replace(f"{folder}/", ""))
        call = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
        result = subprocess.run(
            [sys.executable, "-c", call], capture_output=True, text=True, timeout=COMPILER_SECONDS
        )
        if result.stdout.strip() != "39":
            return first_line(f"the program does not run: {result.stderr or result.returncode}")
    return ""
