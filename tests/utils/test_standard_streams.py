"""Standard output and error: characters that they lack, full disks, closed pipes."""

import os
import subprocess
import sys

import pytest
import warm_commands
from data_support import LIMIT_SECONDS
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from warm_process import WarmProcess

TEXT = "2 × 3 → “six” \U0001f600"
PREPARED = (
    "import sys\nfrom megaphase.utils.standard_streams import *\n"
    f"prepare_streams()\nTEXT = {TEXT!r}\n"
)


def python(code, *, redirections="", **environment):
    """Run Python code in a shell that redirects its streams; the code is the program's $0."""
    return subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, PREPARED + code],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", TEXT.encode("ascii", "backslashreplace")),
        ("ascii:surrogateescape", TEXT.encode("ascii", "backslashreplace")),
        ("latin-1", TEXT.encode("latin-1", "backslashreplace")),
        ("latin-1:replace", TEXT.encode("latin-1", "replace")),
        ("utf-16-le", TEXT.encode("utf-16-le")),
        ("utf-8", TEXT.encode()),
    ],
)
def test_every_character_can_be_written(encoding, written):
    code = (
        "from rich.console import Console\n"
        "print(TEXT, end='')\nConsole(stderr=True).print(TEXT, end='', width=99)"
    )
    done = python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout == written
    of_stderr = encoding.partition(":")[0]  # Python writes escapes there, whatever is asked for
    assert done.stderr == TEXT.encode(of_stderr, "backslashreplace")


def test_half_a_character_can_be_written():
    done = python("print('caf\\udce9 \\ud83d')", PYTHONIOENCODING="utf-8:strict")
    assert done.stdout == b"caf\\udce9 \\ud83d\n"


def test_closed_streams_lead_nowhere():
    code = (
        "import os\nprint(TEXT)\nprint(sys.stdin.read(), file=sys.stderr)\n"
        "assert os.open(os.devnull, os.O_RDONLY) > 2"  # else a file would get what is printed
    )
    done = python(code, redirections="<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.fixture
def broken_pipe():
    """Return the writing end of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_what_a_log_cannot_take_is_dropped(broken_pipe):
    code = (
        "standard_output_is_a_log()\n"
        "for i in range(9):\n    print('x' * 9999, flush=True)\n"
        "print('done', file=sys.stderr)"
    )
    done = python(code, redirections=">/dev/full")
    assert (done.returncode, done.stderr) == (0, b"done\n")
    argv = [sys.executable, "-c", PREPARED + code]
    done = subprocess.run(argv, stdout=broken_pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"done\n")
    done = python("print('x' * 9999, file=sys.stderr)\nprint('done')", redirections="2>/dev/full")
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_what_does_not_fit_into_a_pipe_waits():
    """A pipe that is set not to block, as some terminals and programs leave it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "print('x' * (1 << 20))"
    writer = subprocess.Popen([sys.executable, "-c", PREPARED + code], stdout=writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read() == b"x" * (1 << 20) + b"\n"
    assert writer.wait(60) == 0


def test_a_result_that_cannot_be_written_is_an_error(broken_pipe):
    with open("/dev/full", "w") as full:
        for stream, said in (
            (full, "megaphase: standard output cannot be written (No space left on device)\n"),
            (broken_pipe, ""),
        ):
            done = subprocess.run(
                megaphase("--version"),
                stdout=stream, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (1, said)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def to_ascii():
    """Return the code with which a process with an ASCII locale starts."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.stderr.reconfigure(encoding="ascii", errors="strict")


def test_commands_on_a_terminal_that_knows_ascii_alone(corpora, tmp_path):
    run_file = write_run_file(tmp_path, run_settings(corpora))
    for command in (
        ["plan", run_file],
        ["plan", run_file, "--json"],
        ["data", "inspect", corpora / "data" / "alda"],
        ["tokenizer", "inspect", corpora / "tok"],
    ):
        printed = warm_commands.run_well(*command, prepare=to_ascii)
        assert printed
        assert printed.isascii()


def test_a_run_whose_log_cannot_be_written_trains_all_the_same(corpora, tmp_path):
    settings = run_settings(corpora)
    settings["phases"][0]["steps"], settings["phases"][1]["steps"] = 4, 2
    quiet = write_run_file(tmp_path / "quiet", settings)
    warm_commands.run_well("train", quiet, prepare=to_ascii)
    full = write_run_file(tmp_path / "full", settings)
    process = WarmProcess(
        "megaphase.cli:main",
        ["train", str(full)],
        stdout="/dev/full",
        stderr="/dev/full",
        env={"OMP_NUM_THREADS": "1"},
    )
    assert process.wait(300) == 0
    assert timeless(read_rows(full.parent / "run")) == timeless(read_rows(quiet.parent / "run"))


def test_paths_in_another_locale(tmp_path):
    """Names are read as UTF-8 and printed in the terminal's encoding, in every locale."""
    done = subprocess.run(
        megaphase("data", "inspect", "nirgends-×"),
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megaphase: nirgends-\\xd7")
