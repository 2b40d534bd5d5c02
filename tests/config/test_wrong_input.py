"""Wrong input: one line that names file, key and remedy, exit code 2, nothing written."""

import json
import re
import shutil
import sys

import pytest
import yaml
from distributed import launch, run_ranks
from run_support import make_corpora, megaphase, run_settings, write_run_file

from megaphase import cli
from megaphase.config.load import load_run_file
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def own_corpora(corpora, tmp_path):
    """Corpora that the test may damage."""
    return shutil.copytree(corpora, tmp_path / "corpora")


@pytest.fixture
def refuse(monkeypatch, capfd):
    """Runs a command that must be refused; returns its one line on standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["megaphase", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr().err
        assert stop.value.code == 2, said
        lines = [line for line in said.splitlines() if line.strip()]
        assert len(lines) == 1, said
        assert lines[0].startswith("megaphase: ")
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "--hours", "0"), "Invalid value for '--hours': "),
        (("init", "--gpus", "0"), "Invalid value for '--gpus': "),
        (("init", "--hours", "nan"), "Invalid value for '--hours': "),
        (("init", "--ours", "1"), "No such option: --ours"),
        (("plan", "show"), "Missing argument 'RUN_FILE'"),
    ],
)
def test_a_wrong_option_is_one_line(refuse, arguments, said):
    line = refuse(*arguments)
    assert line.startswith(f"megaphase: {said}")
    assert line.endswith(f"{arguments[0]} --help`") or arguments[1] == "show"


def at(settings, path, value):
    """Set a value deep in the run file."""
    *parents, last = path
    for part in parents:
        settings = settings[part]
    settings[last] = value


RUN_FILE_MISTAKES = {
    "unknown key": (["batch", "sample"], 8, ["batch", "'sample'", "samples"]),
    "wrong type": (["phases", 0, "steps"], "many", ["phases[0].steps", "many"]),
    "task without corpus": (["phases", 0, "mixture"], {"rates": {"aldo": 1.0}}, ["aldo", "alda"]),
    "negative rate": (
        ["phases", 0, "mixture"], {"rates": {"alda": 1.0, "boreth": -0.5}},
        ["phases[0].mixture.rates.boreth", "-0.5"],
    ),
    "rates beside 1": (
        ["phases", 0, "mixture"], {"rates": {"alda": 0.5, "boreth": 0.4}}, ["rates", "0.9", "1"],
    ),
    "heads": (["model", "heads"], 6, ["model.heads", "6", "32"]),
    "tensor and heads": (["parallel", "tensor"], 8, ["parallel.tensor", "8"]),
    "batch": (["batch"], {"samples": 8, "micro": 3}, ["batch", "3", "8"]),
    "held out": (["validation", "fraction"], 1e-9, ["validation.fraction", "raise it"]),
    "missing corpus": (["tasks", "alda", "corpus"], "nowhere", ["nowhere", "tokenize"]),
    "missing tokenizer": (["tokenizer"], "nowhere", ["nowhere", "tokenizer train"]),
    "short corpus": (["model", "seq_len"], 20000, ["tasks.boreth.corpus", "20,001"]),
    "unknown preset": (["model", "preset"], "gpt-7m", ["model.preset", "gpt-6m"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", RUN_FILE_MISTAKES)
def test_mistakes_in_the_run_file(mistake, corpora, tmp_path, refuse):
    path, value, named = RUN_FILE_MISTAKES[mistake]
    settings = run_settings(corpora)
    at(settings, path, value)
    line = refuse("train", write_run_file(tmp_path, settings))
    for word in named:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["plan", "train"])
def test_damaged_indexes(command, own_corpora, tmp_path, refuse):
    index = own_corpora / "data" / "boreth.idx"
    run_file = write_run_file(tmp_path, run_settings(own_corpora))
    whole = index.read_bytes()
    for content, named in (
        (whole[:-8], "truncated"),
        (whole[:9] + b"\x02" + whole[10:], "version 2"),
        (whole[:34] + b"\x01" + whole[35:], "was altered: its hash differs from the manifest's"),
    ):
        index.write_bytes(content)
        line = refuse(command, run_file)
        assert f"{index}: " in line
        assert named in line
    index.write_bytes(whole)
    tokens = index.with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    line = refuse(command, run_file)
    assert f"{tokens}: is truncated" in line
    assert not (tmp_path / "run").exists()


def test_corpus_of_another_tokenizer(own_corpora, tmp_path, refuse):
    texts = own_corpora / "text" / "alda.jsonl"
    other = tmp_path / "other"
    cli_arguments = ["--input", f"alda={texts}", "--vocab-size", "400", "--out", str(other)]
    assert launch(megaphase("tokenizer", "train", *cli_arguments), 1)[0].returncode == 0
    run_file = write_run_file(tmp_path, run_settings(own_corpora, tokenizer=str(other)))
    line = refuse("train", run_file)
    assert "tasks.alda.corpus" in line
    assert "another tokenizer" in line


def test_empty_corpus_invalid_json_and_missing_key(own_corpora, tmp_path, refuse):
    text = tmp_path / "text.jsonl"
    target = tmp_path / "out" / "x"
    arguments = ["data", "tokenize", text, "--tokenizer", own_corpora / "tok", "--out", target]
    for content, named in (
        ("", "empty"),
        ('{"text": "a"}\n{"text": \n', f"{text}:2"),
        ('{"text": "a"}\n{"txt": "b"}\n', "txt"),
    ):
        text.write_text(content)
        assert named in refuse(*arguments)
        assert not list(tmp_path.glob("out/*"))


def test_a_run_file_changed_under_its_run(corpora, tmp_path, refuse):
    settings = run_settings(corpora)
    settings["phases"] = settings["phases"][:1]
    run_file = write_run_file(tmp_path, settings)
    assert launch(megaphase("train", run_file), 1)[0].returncode == 0
    files = sorted(tmp_path.rglob("*"))
    line = refuse("train", run_file, "phases.0.learning_rate.peak=0.5")
    assert "phases[0].learning_rate.peak" in line
    assert "0.5" in line
    assert "0.01" in line
    assert sorted(tmp_path.rglob("*")) == files
    line = refuse("train", run_file, "phases.0.steps=13")
    assert "phases[0].steps" in line
    assert sorted(tmp_path.rglob("*")) == files


@pytest.fixture
def begun(corpora, tmp_path):
    """Return a run file whose run has apparently started, and its directory."""
    run_file = write_run_file(tmp_path, run_settings(corpora, monitor={"tasks": ["cimri"]}))
    directory = RunDirectory(tmp_path / "run")
    directory.claim(load_run_file(run_file), {"fingerprint": "of the plan"})
    return run_file, directory


LATER_CHANGES = {
    "parallel.tensor=2": None,
    "parallel.zero=3": None,
    "parallel.sequence=true parallel.tensor=2": None,
    "parallel.zero=1 parallel.offload=cpu": None,
    "parallel.zero=3 parallel.keep_gathered=0.5": None,
    "batch.micro=1": None,
    "deterministic=true": None,
    "model.activation_checkpointing=full": None,
    "checkpoint.every_steps=7": None,
    "faults.silent_seconds=9": None,
    "hardware.card=l4": None,
    "tasks.alda.corpus=elsewhere": None,  # its content may not change, as the plan detects
    "precision=bf16": "precision",
    "batch.samples=16": "batch.samples",
    "seed=3": "seed",
    "model.hidden=64": "model.hidden",
    "model.dropout=0.1": "model.dropout",
    "optimizer.clip=2.0": "optimizer.clip",
    "phases.1.optimizer_state=keep": "phases[1].optimizer_state",
    "phases.1.steps=10": "phases[1].steps",
    "validation.every_steps=6": "validation.every_steps",
    "monitor.tasks=[alda]": "monitor.tasks[0]",
}


@pytest.mark.parametrize("changes", LATER_CHANGES)
def test_what_may_change_between_two_starts(changes, begun):
    run_file, directory = begun
    config = load_run_file(run_file, tuple(changes.split()))
    named = LATER_CHANGES[changes]
    if named is None:
        directory.refuse_other_run(config)
        return
    with pytest.raises(InputError, match=rf"{re.escape(named)}: is .*, but the run in .* began"):
        directory.refuse_other_run(config)


def test_tasks_in_another_order_are_called_that(begun):
    run_file, directory = begun
    settings = yaml.safe_load(run_file.read_text())
    names = list(settings["tasks"])
    settings["tasks"] = {name: settings["tasks"][name] for name in reversed(names)}
    other = run_file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(InputError) as refused:
        directory.refuse_other_run(load_run_file(other))
    assert str(refused.value) == (
        f"{other}: tasks: are in the order {', '.join(reversed(names))}, but the run in "
        f"{directory.path} began with the order {', '.join(names)}; put them into that order or "
        "choose another output"
    )


FREE = re.compile(
    r"(output|tokenizer|deterministic|(checkpoint|logging|parallel|parts|faults|hardware)\..*|batch\.micro|"
    r"model\.activation_checkpointing|tasks\.\w+\.corpus|test\.samples)"
)


def leaves(value, path=""):
    """Return all values of a JSON value that are neither object nor list, by their paths."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path


def with_change(value, path):
    """A copy with another value at this place."""
    value = json.loads(json.dumps(value))
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", path)]
    at(value, [*parents, last], "another value")
    return value


def test_nothing_else_may_change_between_two_starts(begun):
    run_file, directory = begun
    config, began = load_run_file(run_file), json.loads(directory.run_file.read_text())
    free = set()
    for path in leaves(began):
        directory.run_file.write_text(json.dumps(with_change(began, path)))
        if FREE.fullmatch(path):
            free.add(path)
            directory.refuse_other_run(config)
        else:
            with pytest.raises(InputError, match=re.escape(f"{path}: ")):
                directory.refuse_other_run(config)
    assert {"output", "parallel.zero", "batch.micro", "tasks.alda.corpus"} < free


def test_an_altered_plan_file_is_named(begun):
    run_file, directory = begun
    path = directory.path / "plan.json"
    path.write_text(path.read_text().replace("of the plan", "of the plum"))
    with pytest.raises(InputError, match=r"plan\.json: is missing or damaged"):
        directory.claim(load_run_file(run_file), {"fingerprint": "of the plan"})


def test_keys_that_a_version_had_not_yet_have_their_defaults(begun):
    run_file, directory = begun
    began = json.loads(directory.run_file.read_text())
    del began["model"]["dropout"], began["phases"][0]["learning_rate"]["first_step"]
    directory.run_file.write_text(json.dumps(began))
    directory.refuse_other_run(load_run_file(run_file))
    with pytest.raises(InputError, match=r"model\.dropout: is 0\.1, but .* began with 0\.0"):
        directory.refuse_other_run(load_run_file(run_file, ("model.dropout=0.1",)))


def test_another_optimizer_is_named_before_its_keys(begun):
    run_file, directory = begun
    said = r"optimizer\.name: is .*lion.*, but .* began with .*adamw"
    with pytest.raises(InputError, match=said):
        directory.refuse_other_run(load_run_file(run_file, ("optimizer={name: lion}",)))


@pytest.mark.parametrize(
    ("processes", "changes", "named"),
    [
        (3, {"parallel": {"tensor": 2}}, ["parallel.tensor", "3 processes"]),
        (3, {}, ["batch.samples", "3 data-parallel ranks"]),
    ],
)
def test_one_rank_reports_and_all_stop(processes, changes, named, corpora, tmp_path):
    run_file = write_run_file(tmp_path, run_settings(corpora, **changes))
    results = launch(megaphase("train", run_file), processes)
    assert [result.returncode for result in results] == [2] * processes
    assert all(word in results[0].stderr for word in named)
    assert results[0].stderr.count("\n") == 1
    assert [result.stderr for result in results[1:]] == [""] * (processes - 1)
    assert not (tmp_path / "run").exists()


def _joined_after(*arguments):
    """Return the command's exit code, and whether the rank is still in the process group."""
    import torch.distributed

    sys.argv = ["megaphase", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code, torch.distributed.is_initialized()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_refused_ranks_leave_the_process_group(command, corpora, tmp_path):
    settings = run_settings(corpora)
    settings["seeds"] = 1
    run_file = write_run_file(tmp_path, settings)
    assert run_ranks(_joined_after, 2, command, str(run_file)) == [(2, False)] * 2


def test_launch_local_passes_the_exit_code_on(corpora, tmp_path):
    settings = run_settings(corpora)
    settings["seeds"] = 1
    run_file = write_run_file(tmp_path, settings)
    result = launch(megaphase("launch", "local", run_file, "--processes", 2), 1)[0]
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "'seeds'" in result.stderr


def test_evaluation_before_training(corpora, tmp_path, refuse):
    run_file = write_run_file(tmp_path, run_settings(corpora))
    assert "there is no checkpoint yet" in refuse("evaluate", run_file)
    assert not (tmp_path / "run").exists()


def test_demo_refuses_an_existing_folder(tmp_path, refuse):
    assert "exists already" in refuse("demo", tmp_path)


def test_report_of_something_else(tmp_path, refuse):
    (tmp_path / "run.json").write_text(json.dumps({}))
    assert "plan.json" in refuse("report", tmp_path, "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()
