"""Inconsistent variables of a launcher: one line, exit code 2, for every command."""

from __future__ import annotations

import sys

import pytest
import torch

from megaphase import cli
from megaphase.distributed import dist_env
from megaphase.distributed.process_grid import join_processes
from megaphase.utils.errors import InputError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher():
    dist_env.check_launch()
    dist_env.check_rendezvous()
    assert dist_env.given_world_size() is None
    assert [dist_env.world_size(), dist_env.global_rank(), dist_env.local_rank()] == [1, 0, 0]


def test_with_a_launcher(monkeypatch):
    given(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    given(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    dist_env.check_rendezvous()
    assert dist_env.given_world_size() == dist_env.world_size() == 8
    assert [dist_env.global_rank(), dist_env.local_rank()] == [5, 1]
    assert dist_env.local_world_size() == 4
    assert not dist_env.is_first_rank()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: is 'abc', not a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: is '0', not"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: is '-1', not"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE: is '2.0', not"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE: is '²', not"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: is '999"),
        ({"RANK": "x"}, "RANK: is 'x', not a whole number from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: is 2, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK: is 1, but WORLD_SIZE is 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: is '-1', not"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK: is 4, but LOCAL_WORLD_SIZE is"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: is '0', not"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: is '70000', not a whole number from 1 to 65,535"),
    ],
)
@pytest.mark.parametrize("command", [["plan", "run.yaml"], ["train", "run.yaml"], ["report", "x"]])
def test_what_cannot_be_is_refused_by_every_command(monkeypatch, capfd, command, variables, said):
    given(monkeypatch, **variables)
    monkeypatch.setattr(sys, "argv", ["megaphase", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capfd.readouterr().err.splitlines()
    assert [stop.value.code, len(lines)] == [2, 1]
    assert lines[0].startswith(f"megaphase: {said}")


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_processes_that_are_not_told_where_to_meet(monkeypatch, missing):
    given(monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    monkeypatch.delenv(missing)
    dist_env.check_launch()  # enough for `megaphase plan`
    with pytest.raises(InputError, match=f"{missing}: is not set, but WORLD_SIZE is 2"):
        dist_env.check_rendezvous()


@pytest.mark.parametrize(
    ("variables", "gpus", "said"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "16"}, 8,
         "LOCAL_WORLD_SIZE: 16 processes on this machine see 8 GPUs; start one process for each"),
        ({"RANK": "3", "LOCAL_RANK": "3"}, 1, "LOCAL_WORLD_SIZE: 4 processes on this machine see"),
    ],
)  # fmt: skip
def test_every_rank_of_a_machine_with_fewer_gpus_says_so(variables, gpus, said, monkeypatch):
    """Rank 0, too, which has one: it is the one that is heard."""
    given(monkeypatch, WORLD_SIZE="16", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError) as error:
        join_processes()
    assert str(error.value).startswith(said)
