"""`megaphase init`: run files over real corpora, which the plan accepts, and its questions."""

import contextlib
import errno
import os
import pty
import re
import select
import shlex
import signal
import sys

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_support import make_corpora, megaphase
from typer.testing import CliRunner
from warm_commands import run_well

from megaphase.cli import app
from megaphase.config.load import load_run_file
from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.estimate.gpu_specs import CARDS
from megaphase.estimate.suggestions import fits
from megaphase.init import questions
from megaphase.init.found_corpora import find_corpora, find_tokenizer
from megaphase.model.parameters import train_flops_per_token
from megaphase.plan.load_plan import open_run, phase_setups, preview_plan
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

# Documents and their mean length.
SIZES = {"en": (4000, 150), "fr": (900, 200), "hi": (300, 60), "eu": (40, 90), "yo": (12, 30)}
GIVEN = ["--low", "auto", "--model", "gpt-3m", "--card", "a100-80gb", "--gpus", "2", "--hours", "1"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Make languages of very different sizes, in `many`, beside those of other tests."""
    folder = make_corpora(tmp_path_factory.mktemp("corpora"))
    tokenizer = Tokenizer.load(folder / "tok")
    (folder / "many").mkdir()
    for name, (documents, length) in SIZES.items():
        write(folder / "many" / name, documents, length, tokenizer)
    (folder / "chats").mkdir()
    write(folder / "chats" / "talk", 500, 60, tokenizer, chat=True)
    write(folder / "chats" / "help", 100, 60, tokenizer, chat=True)
    write(folder / "many" / "part", 10, 10, tokenizer, shard=True)
    return folder


def write(prefix, documents, length, tokenizer, *, shard=False, chat=False):
    random = np.random.default_rng(documents)
    lengths = random.integers(1, 2 * length, documents)
    tokens = random.integers(10, tokenizer.vocab_size, lengths.sum()).astype(np.uint16)
    hashes = random.integers(0, 2**64, documents, dtype=np.uint64)
    kind = {"kind": "chat", "turn_end": 5} if chat else {}
    marks = (np.arange(len(tokens)) % 3 == 0).astype(np.uint8) if chat else None
    identity = {"shard": {"job": "x", "number": 0, "of": 2}} if shard else {}
    with CorpusWriter(
        prefix,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        **identity,
        **kind,
    ) as writer:
        writer.add_batch(DocumentBatch.of(tokens, lengths, hashes, lengths * 3, None, marks))


def init(*arguments):
    result = CliRunner().invoke(app, ["init", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def refused(*arguments):
    """Return why a file is not written, or None if it is."""
    try:
        init(*arguments)
    except InputError as error:
        return str(error)
    return None


@pytest.fixture
def here(corpora, monkeypatch):
    """Work among the corpora, and remove the run files that a test writes."""
    monkeypatch.chdir(corpora)
    yield corpora
    for path in corpora.glob("*.yaml"):
        path.unlink()


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True),
    low=st.sampled_from(["auto", "none", "first", "all"]),
    model=st.sampled_from(["auto", "gpt-1m", "gpt-30m", "60m", "gpt-1.3b", "gpt-13b"]),
    card=st.sampled_from(["l4", "a100-40gb", "h100-sxm"]),
    gpus=st.sampled_from([1, 2, 3, 6, 8]),
    hours=st.sampled_from([0.01, 1, 1000]),
)
def test_every_file_passes_the_plan(here, names, low, model, card, gpus, hours):
    chosen = {"first": names[:1], "all": names}.get(low, [low])
    options = [part for name in names for part in ("--corpus", f"many/{name}")]
    options += [part for name in chosen for part in ("--low", name)]
    options += ["--model", model, "--card", card, "--gpus", gpus, "--hours", hours]
    refusal = refused("any.yaml", "--force", *options)
    if refusal is not None:
        # A large model on few small GPUs, or a few hundred tokens for many GPUs.
        assert "does not fit" in refusal or "fewer than the" in refusal
        return
    config, tokenizer = open_run(here / "any.yaml", ())
    for phase in phase_setups(config, tokenizer, gpus):
        assert fits(phase.setup, CARDS[card].memory_gb)
    summary = preview_plan(config, tokenizer).summary()
    last = summary["phases"][-1]["tasks"]
    assert all(facts["epochs_so_far"] <= 4 for facts in last.values())
    for phase in summary["phases"]:
        for facts in phase["tasks"].values():
            assert facts["rate"] == pytest.approx(facts["requested_rate"], rel=0.02)


def test_what_is_said_and_written(here):
    said = init("run.yaml", "--corpus", "many/*", "--corpus", "more=data/alda", *GIVEN)
    assert "many/*: 1 shards left out" in said
    config = load_run_file(here / "run.yaml")
    assert config.tasks_with_role("high") == ["en", "fr"]
    assert config.tasks_with_role("low") == ["more", "hi", "eu", "yo"]
    assert config.tasks["more"].corpus == here / "data" / "alda"
    assert [phase.name for phase in config.phases] == ["pretrain", "joint"]
    assert config.phases[1].optimizer_state == "reset"
    assert config.hardware.card == "a100-80gb"
    text = (here / "run.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert str(here) not in text  # all paths are relative to the file
    for word in ("high tasks", "low tasks", "layout", "pretrain", "joint", "megaphase plan"):
        assert word in said


@pytest.mark.parametrize("low", ["auto", "none"])
def test_conversations_get_a_last_phase_of_their_own(here, low):
    given = [low if each == "auto" else each for each in GIVEN]
    said = init("run.yaml", "--corpus", "many/*", "--corpus", "chats/*", *given)
    config = load_run_file(here / "run.yaml")
    *before, last = config.phases
    assert [phase.name for phase in before] == ["pretrain", "joint"][: 2 - (low == "none")]
    assert (last.name, last.optimizer_state) == ("chat", "reset")
    assert set(last.mixture.rates) == {"talk", "help"}
    for phase in before:
        assert not {"talk", "help"} & set(phase.mixture.rates)
        assert last.learning_rate.peak < phase.learning_rate.peak
    assert {config.tasks[name].role for name in ("talk", "help")} == {None}
    assert config.tasks["talk"].kind == "chat"
    assert "the loss is on the assistant's turns" in " ".join(said.split())
    assert "conversations" in said
    summary = preview_plan(*open_run(here / "run.yaml", ())).summary()
    facts = summary["phases"][-1]["tasks"]
    assert all(1 <= facts[name]["epochs_so_far"] <= 2.1 for name in ("talk", "help"))
    with pytest.raises(InputError, match="talk holds conversations"):
        init("other.yaml", "--corpus", "chats/*", "--low", "talk", *GIVEN[2:])


def test_a_file_in_another_place_has_whole_paths(here, tmp_path):
    init(tmp_path / "run.yaml", "--corpus", "many/en", "--corpus", "many/eu", *GIVEN)
    config = load_run_file(tmp_path / "run.yaml")
    assert config.tokenizer == here / "tok"
    assert config.output == tmp_path / "runs" / "multilingual"


def test_names_that_yaml_takes_for_something_else(here):
    init("run.yaml", "--corpus", "no=many/en", "--corpus", "1.5=many/fr", *GIVEN)
    assert set(load_run_file(here / "run.yaml").tasks) == {"no", "1.5"}
    assert set(yaml.safe_load((here / "run.yaml").read_text())["tasks"]) == {"no", "1.5"}


def test_nothing_is_overwritten_without_force(here):
    (here / "run.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"run\.yaml: exists"):
        init("run.yaml", "--corpus", "many/en", *GIVEN)
    assert (here / "run.yaml").read_text() == "mine"
    init("run.yaml", "--force", "--corpus", "many/en", *GIVEN)
    assert load_run_file(here / "run.yaml").tasks


def test_without_a_terminal_the_missing_options_are_named(here):
    with pytest.raises(InputError) as error:
        init("--corpus", "many/en", "--gpus", "8")
    assert "missing: --low, --model or --checkpoint, --card, --hours" in str(error.value)
    assert not (here / "run.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["--corpus", "many/nothing"], "no such file"),
        (["--corpus", "nothing/*"], "no corpus is found"),
        (["--corpus", "many/en", "--corpus", "en=data/alda"], "both be the task en"),
        (["--corpus", "a b=many/en"], "no name of a task"),
        (["--corpus", "x=many/*"], "a name goes with one corpus"),
        (["--corpus", "many/en", "--low", "de"], "no corpus of 'de'"),
        (["--corpus", "many/en", "--card", "rtx"], "not in the table"),
        (["--corpus", "many/en", "--gpus", "12"], "no multiple of the 8"),
        (["--corpus", "many/en", "--model", "huge"], "no preset and no size"),
        (["--corpus", "many/en", "--model", "400b"], "does not fit"),
        (["--corpus", "many/en", "--output", "many/en.bin"], "many/en.bin is no folder"),
        (["--corpus", "many/en", "--output", "many/en.bin/run"], "en.bin is no folder"),
        (["--corpus", "many/en", "--tokenizer", "many"], "many"),
        (["--corpus", "many/yo", "--gpus", "4096", "--gpus-per-node", "8"], "fewer than the"),
    ],
)
def test_wrong_answers_are_one_line(changes, problem, here):
    given = dict(zip(changes[::2], changes[1::2], strict=True))
    usual = dict(zip(GIVEN[::2], GIVEN[1::2], strict=True))
    rest = [part for key, value in usual.items() if key not in given for part in (key, value)]
    with pytest.raises(InputError) as error:
        init("run.yaml", *changes, *rest)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert not (here / "run.yaml").exists()


def test_the_commands_that_follow_are_for_a_shell(here):
    said = init("$(id) it's.yaml", "--corpus", "many/en", *GIVEN)
    following = [shlex.split(line) for line in said[said.index("Next:") :].splitlines()[1:3]]
    assert [words[:3] for words in following] == [
        ["megaphase", "plan", "$(id) it's.yaml"],
        ["megaphase", "launch", "local"],
    ]
    assert following[1][3] == "$(id) it's.yaml"


CPU = ["--low", "hi", "--model", "gpt-1m", "--card", "cpu", "--hours", "0.05"]


def test_a_run_file_for_a_cpu_says_what_speed_is_assumed(here):
    said = init("cpu.yaml", "--corpus", "many/en", "--corpus", "many/hi", *CPU)
    content = (here / "cpu.yaml").read_text()
    for text in (said, content):
        assert "40 GFLOP/s of matrix products" in text.replace("\n", " ").replace("# ", "")
        assert "GPU" not in text
    assert said.splitlines()[-1] == "  megaphase train cpu.yaml"
    config, tokenizer = open_run(here / "cpu.yaml", ())
    assert (config.precision, config.parallel.zero) == ("fp32", 0)
    assert config.batch.micro in (1, 2, 4, 8)
    assert "hardware" not in yaml.safe_load(content)
    # What the hours allow at two thirds of the assumed speed.
    [phase] = {each.setup for each in phase_setups(config, tokenizer, 1)}
    cores = len(os.sched_getaffinity(0))
    tokens = 0.05 * 3600 * 2 / 3 * 40e9 * cores / train_flops_per_token(phase.shape)
    planned = sum(each["tokens"] for each in preview_plan(config, tokenizer).summary()["phases"])
    assert planned == pytest.approx(tokens, rel=0.02)


def test_a_cpu_is_one_process_that_has_to_hold_the_model(here):
    options = ["--low", "none", "--model", "70b", "--card", "cpu", "--hours", "1"]
    with pytest.raises(InputError, match=r"^--gpus: does not go with --card cpu; leave it out$"):
        init("cpu.yaml", "--corpus", "many/en", *options, "--gpus", "2")
    with pytest.raises(InputError, match=r"^--card cpu: .* does not fit the \d+ GB of memory"):
        init("cpu.yaml", "--corpus", "many/en", *options)


def test_one_phase_that_was_asked_for_is_no_warning(here):
    arguments = ["--corpus", "many/en", "--model", "gpt-3m", *GIVEN[4:]]
    assert "no task is low-resource" not in init("a.yaml", "--low", "none", *arguments)
    assert "no task is low-resource" in init("b.yaml", "--low", "auto", *arguments)


def test_a_tokenizer_elsewhere_is_asked_for(here, tmp_path):
    far = tmp_path / "a" / "b" / "c" / "d"
    far.mkdir(parents=True)
    for path in (here / "many").glob("en.*"):
        (far / path.name).symlink_to(path)
    (here / "tok").rename(tmp_path / "tok")
    try:
        with pytest.raises(InputError, match="--tokenizer: the tokenizer"):
            init("run.yaml", "--corpus", here / "many" / "en", *GIVEN)
        init("run.yaml", "--corpus", "many/en", "--tokenizer", tmp_path / "tok", *GIVEN)
    finally:
        (tmp_path / "tok").rename(here / "tok")


def test_questions_on_a_terminal(here):
    """A wrong answer is asked for again; an empty one takes what is suggested."""
    answers = ["many/x*", "'many/*'", "de", "", "", "two", "4", "", "1", ""]
    process, terminal = pty.fork()
    if process == 0:
        environment = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
        command = megaphase("init", "asked.yaml")
        os.execve(sys.executable, command, environment)
    said, left = "", list(answers)
    while select.select([terminal], [], [], 300)[0]:
        try:
            new = os.read(terminal, 65536).decode()
        except OSError:  # the process has closed its end
            break
        said += new
        if len(re.findall(r"(?:\]|spaces\)): ", said)) > len(answers) - len(left):
            os.write(terminal, f"{left.pop(0)}\n".encode())
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, said
    assert left == []
    assert said.count("Number of GPUs") == said.count("Low-resource tasks") == 2
    assert load_run_file(here / "asked.yaml").tasks_with_role("low") == ["hi", "eu", "yo"]


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 75)]
)
def test_a_question_can_be_interrupted(here, number, name, code):
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, megaphase("init", "asked.yaml"), {**os.environ, "TERM": "dumb"})
    said = b""
    while b"spaces): " not in said and select.select([terminal], [], [], 300)[0]:
        said += os.read(terminal, 65536)
    os.kill(process, number)
    with contextlib.suppress(OSError):  # the process has closed its end
        while True:
            if select.select([terminal], [], [], 5)[0]:
                said += os.read(terminal, 65536)
            else:
                os.kill(process, number)  # it came just before the process waited
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == code
    assert f"megaphase: stopped by {name}" in said.decode()


def test_a_file_in_place_of_the_run_directory_is_named(here, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="runs is no folder; give a folder for the run"):
        init(tmp_path / "run.yaml", "--corpus", "many/en", *GIVEN)
    assert not (tmp_path / "run.yaml").exists()


def test_a_file_that_cannot_be_read_ends_no_search_for_the_tokenizer(here, monkeypatch):
    """Another user's, near the corpora."""
    wanted = str(Tokenizer.load(here / "tok").path)
    load = Tokenizer.load

    def refused(path):
        if str(path) != wanted:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return load(path)

    monkeypatch.setattr(Tokenizer, "load", refused)
    (corpus,) = find_corpora(["many/en"], [])
    assert find_tokenizer([corpus], []) == here / "tok"


def test_the_card_of_this_machine_is_suggested(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert questions._card_here() == "a100-80gb"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert questions._card_here() is None


@pytest.mark.slow
def test_a_written_file_is_trained(here):
    options = ["--low", "auto", "--model", "gpt-1m", "--card", "l4", "--gpus", "1", "--hours", "1"]
    init("trained.yaml", "--corpus", "many/en", "--corpus", "many/eu", *options)
    shorter = ["phases.0.tokens=4096", "phases.1.tokens=4096", "precision=fp32"]
    shorter += [f"phases.{n}.learning_rate.warmup_steps=0" for n in (0, 1)]
    run_well("train", here / "trained.yaml", *shorter)
    assert (here / "runs" / "trained" / "checkpoints" / "latest").exists()
