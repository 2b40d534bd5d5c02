"""Paths that no file can have, that the system rejects, and files of an unexpected kind."""

import errno
import os
import resource
import sys
from pathlib import Path

import pytest
import warm_commands
from run_support import make_corpora, run_settings, write_run_file

from megaphase import cli
from megaphase.corpus.manifest import Manifest
from megaphase.data_tools.text import expand_inputs
from megaphase.utils import json_models, yaml_file
from megaphase.utils.errors import InputError, RunError, exit_code, os_fault
from megaphase.utils.files import atomic_write_text, directory_written_aside, read_file, read_json
from megaphase.utils.json_models import read_record
from megaphase.utils.yaml_file import read_yaml

LATIN_1 = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def refuse(monkeypatch, capfd):
    """Return a function that runs a command that must fail, and returns its line on standard
    error."""

    def run(*arguments, code=2):
        monkeypatch.setattr(sys, "argv", ["megaphase", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr().err
        assert stop.value.code == code, said
        assert said.count("\n") == 1, said
        return said

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "tokenize", f"{LATIN_1}.jsonl", "--tokenizer", "tok", "--out", "x"],
        ["train", "run.yaml", f"output={LATIN_1}"],
        ["report", LATIN_1],
        ["generate", "run@joint", "--prompt", LATIN_1],
    ],
)
def test_arguments_that_are_not_utf8(arguments, tmp_path, monkeypatch, refuse):
    monkeypatch.chdir(tmp_path)
    said = refuse(*arguments)
    assert "caf\\xe9" in said
    assert "not UTF-8" in said
    assert not list(tmp_path.iterdir())


def test_other_places_where_such_names_come_from(tmp_path, monkeypatch, refuse):
    folder = tmp_path / LATIN_1
    folder.mkdir()
    (tmp_path / f"{LATIN_1}.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"caf\\xe9.txt: the name of this file is not UTF-8"):
        expand_inputs([f"{tmp_path}/*.txt"])
    monkeypatch.chdir(folder)
    assert "the current directory's name is not UTF-8" in refuse("report", "run")
    folder.rmdir()
    assert "the current directory: does not exist any more" in refuse("report", "run")


def test_a_file_that_a_network_has_lost_is_no_wrong_input(tmp_path, monkeypatch):
    """So that the job is started again (docs/slurm.md)."""
    path = tmp_path / "corpus.json"
    path.write_text("{}")
    for number, kind in ((errno.ESHUTDOWN, RunError), (errno.EACCES, InputError)):

        def fail(path, number=number, **options):
            raise OSError(number, os.strerror(number), str(path))

        for module in (json_models, yaml_file):
            monkeypatch.setattr(module, "read_file", fail)
        for read in (lambda: read_record(path, Manifest, "again"), lambda: read_yaml(path)):
            with pytest.raises(kind, match=rf"corpus\.json: cannot be .*{os.strerror(number)}"):
                read()


def test_what_errors_of_the_system_mean():
    for number, kind in (
        (errno.ENOSPC, RunError),
        (errno.EDQUOT, RunError),
        (errno.EIO, RunError),
        # Of network file systems that will be back.
        (errno.ESHUTDOWN, RunError),
        (errno.ENOTCONN, RunError),
        (errno.ETIMEDOUT, RunError),
        (errno.EREMOTEIO, RunError),
        (errno.ENOLCK, RunError),
        (errno.EBUSY, RunError),
        (errno.ENOTDIR, InputError),
        (errno.ENAMETOOLONG, InputError),
        (errno.ELOOP, InputError),
        (errno.EROFS, InputError),
    ):
        fault = os_fault(OSError(number, os.strerror(number), "some/file"))
        assert isinstance(fault, kind)
        assert str(fault).startswith("some/file: cannot be ")
        assert os.strerror(number) in str(fault)
        assert exit_code(fault) == (2 if kind is InputError else 1)
    full = os_fault(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(full) == "a file: cannot be written (No space left on device)"
    assert os_fault(OSError(errno.EBADF, os.strerror(errno.EBADF))) is None  # a bug


def test_errors_in_writing_name_what_was_to_be_written(tmp_path):
    final = tmp_path / "final"

    def write(error):
        with directory_written_aside(final) as aside:
            (aside / "part").write_text("")
            raise error(aside)

    def fails_with(error):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write(error)
        assert not list(tmp_path.iterdir())
        return caught.value

    full = OSError(errno.ENOSPC, "No space left on device")
    assert fails_with(lambda aside: full).filename == str(final)
    named = fails_with(lambda aside: FileNotFoundError(errno.ENOENT, "", str(aside / "part")))
    assert named.filename == str(final / "part")
    other = fails_with(lambda aside: FileNotFoundError(errno.ENOENT, "", "elsewhere"))
    assert other.filename == "elsewhere"
    assert fails_with(lambda aside: OSError(errno.EIO, "of a file that is read")).filename is None
    with pytest.raises(OSError) as missing:  # noqa: PT011
        atomic_write_text(tmp_path / "nowhere" / "file", "text")
    assert missing.value.filename == str(tmp_path / "nowhere" / "file")


def test_files_of_another_kind_are_refused_without_waiting(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, number in (
        (fifo, errno.EINVAL),
        (tmp_path, errno.EISDIR),
        (Path("/dev/zero"), errno.EINVAL),
        (loop, errno.ELOOP),
        (tmp_path / ("x" * 300), errno.ENAMETOOLONG),
        (Path("/proc/self/mem"), errno.EIO),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            read_json(path)
        assert caught.value.errno == number
        assert caught.value.filename == str(path)
        kind = RunError if number == errno.EIO else InputError
        with pytest.raises(kind, match=path.name):
            read_yaml(path)
    assert read_file(fifo, pipes=True) == b""  # nobody writes into it
    reading, writing = os.pipe()
    os.write(writing, b"seed: 3")
    os.close(writing)
    assert read_yaml(Path(f"/dev/fd/{reading}")) == {"seed": 3}  # as <(command) of a shell
    os.close(reading)


def limit_files():
    """Limit files to a kibibyte, as on a disk that is nearly full."""
    sys.dont_write_bytecode = True  # or modules would be cached half-written
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_files_that_cannot_grow(corpora, tmp_path):
    text, tok = corpora / "text" / "alda.jsonl", corpora / "tok"
    for out, command in {
        "tok": ["tokenizer", "train", "--input", f"a={text}", "--vocab-size", 400, "--out", "tok"],
        "corpus": ["data", "tokenize", text, "--tokenizer", tok, "--out", "corpus"],
        "demo": ["demo", "demo"],
    }.items():
        *command, last = command
        done = warm_commands.run(*command, tmp_path / last, prepare=limit_files)
        assert done.returncode == 1, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("megaphase: ")]
        assert len(lines) == 1
        assert f"{tmp_path / out}" in lines[0]
        assert lines[0].endswith("cannot be written (File too large)")
        assert "Traceback" not in done.stderr


def test_a_file_where_the_run_wants_a_folder(corpora, tmp_path):
    for name in ("run", "run/tensorboard"):
        place = tmp_path / name.replace("/", "-")
        settings = run_settings(corpora, logging={"tensorboard": True})
        run_file = write_run_file(place, settings)
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("no folder")
        done = warm_commands.run("train", run_file)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert str(place / name) in done.stderr
