"""Odd values for every option and argument: one of the exit codes, no traceback, and an end."""

import hashlib
import resource
import sys

import pytest
from command_cases import (
    CALLS,
    Case,
    cases,
    commands,
    is_number,
    is_refused_at_once,
    make_inputs,
    run_case,
    run_cases,
)

SAMPLE = 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def wrong(outcomes):
    """Return the outcomes that were not as they should be, in readable form."""
    return [
        f"{case}: exit code {outcome.code}, {outcome.said[-2000:]}"
        for case, outcome in outcomes.items()
        if not outcome.is_right
    ]


def test_no_command_is_left_out():
    assert set(CALLS) == set(commands())
    assert len(list(cases())) > 4000


def test_no_number_is_nan_or_infinite():
    checked = 0
    for name, command in commands().items():
        for parameter in filter(is_number, command.params):
            for value in ("nan", "inf", "-inf", "1e400"):
                argv = [*name.split(), parameter.opts[0], value]
                assert is_refused_at_once(Case(name, parameter.opts[0], value, argv)), argv
                checked += 1
    assert checked > 200


def test_the_calls_are_right_but_for_the_value(inputs):
    """Otherwise the cases would show nothing."""
    for name in ("data inspect", "generate", "convert inspect"):
        chosen = next(case for case in cases() if case.command == name)
        arguments, options = CALLS[name]
        pairs = [part for option in options.items() for part in option]
        given = [value for values in arguments.values() for value in values]
        right = Case(name, "", "", [*name.split(), *pairs, "--", *given])
        outcome = run_case(right, inputs)
        assert outcome.code == 0, outcome.said
        assert chosen.argv[: len(name.split())] == name.split()


def limit_files():
    """Limit files to half a kilobyte, as on a disk that is nearly full."""
    sys.dont_write_bytecode = True  # or modules would be cached half-written
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))


WRITERS = [
    *("tokenizer train", "data tokenize", "data from-megatron", "data merge", "data split"),
    *("convert reshape", "convert to-hf", "convert from-hf", "convert to-megatron"),
    *("convert from-megatron", "report", "train output=new", "plan show output=new", "sweep"),
    "init",
]


@pytest.mark.parametrize("name", WRITERS)
def test_files_that_cannot_grow(name, inputs):
    command, _, override = name.partition(" output")
    arguments, options = CALLS[command]
    if command == "sweep":
        options = {}
    pairs = [part for option in options.items() for part in option]
    given = [value for values in arguments.values() for value in values]
    argv = [*command.split(), *pairs, "--", *given, *([f"output{override}"] if override else [])]
    outcome = run_case(Case(command, "", "", argv), inputs, prepare=limit_files)
    assert outcome.code == 1, outcome.said
    assert "Traceback" not in outcome.said
    lines = [line for line in outcome.said.splitlines() if line.startswith("megaphase: ")]
    assert len(lines) == 1
    assert lines[0].endswith("(File too large)")
    assert "Exception ignored" not in outcome.said


def test_some_odd_values(inputs):
    runs = [case for case in cases() if case.command != "launch local"]  # it starts processes
    runs = [case for case in runs if not is_refused_at_once(case)]
    runs.sort(key=lambda case: hashlib.blake2b(ascii((case, case.value)).encode()).digest())
    outcomes = run_cases(runs[:SAMPLE], inputs)
    assert not wrong(outcomes)
    assert len({case.command for case in outcomes}) > 10


@pytest.mark.slow
def test_all_odd_values(inputs):
    outcomes = run_cases(list(cases()), inputs)
    codes = [outcome.code for outcome in outcomes.values()]
    print({code: codes.count(code) for code in set(codes)})
    assert not wrong(outcomes)
