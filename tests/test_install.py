"""The wheel that is built from the source distribution gives a working command elsewhere."""

import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import megaphase

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"),
    *("SECURITY.md", "Makefile", "constraints.txt", "csrc", "megaphase", "data_tools", "launch"),
)


def run(*command, cwd):
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


pytestmark = pytest.mark.slow  # builds a source distribution and a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the bin folder of an environment into which the wheel was installed.

    `python -m build` makes a source distribution of a copy of the repository, and a wheel from it.

    The project's dependencies are taken from the environment of the tests through a path file; the
    project itself is only an editable install there, and so is not found.
    """
    folder = tmp_path_factory.mktemp("install")
    (folder / "copy").mkdir()
    for name in PROJECT:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / "copy" / name)
    for built in (folder / "copy").rglob("*.so"):
        built.unlink()
    venv.create(folder / "env", with_pip=False)
    env = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=env))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "build", "--no-isolation", "--outdir", "dist", "copy", cwd=folder)
    (wheel,) = (folder / "dist").glob("megaphase-*.whl")
    assert list((folder / "dist").glob("megaphase-*.tar.gz"))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    return python.parent


def test_command_works_outside_the_repository(installed, tmp_path):
    where = run(
        installed / "python", "-c", "import megaphase; print(megaphase.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    version = run(installed / "megaphase", "--version", cwd=tmp_path)
    assert version.strip() == f"megaphase {megaphase.__version__}"


def test_every_package_is_installed(installed):
    (package,) = installed.parent.glob("lib/*/site-packages/megaphase")
    folders = {"data_tools": REPOSITORY, "launch": REPOSITORY, "": REPOSITORY / "megaphase"}
    for name, parent in folders.items():
        for file in (parent / name).rglob("*.py"):
            assert (package / file.relative_to(parent)).is_file(), file


def test_every_program_and_data_file_is_there(installed, tmp_path):
    check = (
        "import megaphase.plan._builder, megaphase.data_tools.tokenization.tokenize\n"
        "import megaphase.launch.demo\n"
        "import importlib.resources as r\n"
        "assert r.files('megaphase.report').joinpath('report.css').is_file()\n"
        "assert r.files('megaphase.report').joinpath('templates', 'page.html').is_file()\n"
        "assert r.files('megaphase.doctor').joinpath('constraints.txt').is_file()\n"
    )
    run(installed / "python", "-c", check, cwd=tmp_path)
    for command in (["tokenizer", "train"], ["data", "tokenize"], ["plan"], ["train"],
                    ["evaluate"], ["report"], ["launch", "local"], ["demo"]):  # fmt: skip
        assert "Usage" in run(installed / "megaphase", *command, "--help", cwd=tmp_path)


def test_demo_runs_from_the_wheel(installed, tmp_path):
    run(installed / "megaphase", "demo", "demo", cwd=tmp_path)
    assert (tmp_path / "demo" / "report" / "index.html").is_file()
