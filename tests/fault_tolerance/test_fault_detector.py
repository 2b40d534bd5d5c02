"""Diagnosing the faulty rank from heartbeats alone: lost nodes, hangs, and harmless cases."""

from __future__ import annotations

import pytest

from megaphase.fault_tolerance.fault_detector import CHECKS_UNTIL_GONE, Diagnosis, FaultDetector
from megaphase.fault_tolerance.heartbeat import Heartbeat, RankInfo, next_on_node

SILENT_SECONDS, STALLED_SECONDS = 30.0, 900.0
BEAT_SECONDS = 1.0


class Run:
    """Ranks that send a heartbeat every second while they are not silent; `nodes` lists each
    rank's."""

    def __init__(self, *nodes: int) -> None:
        places = [
            RankInfo(f"node{node}", pid=100 + node * 10 + local, born=0)
            for node, ranks in enumerate(nodes)
            for local in range(ranks)
        ]
        self.detector = FaultDetector(places, SILENT_SECONDS, STALLED_SECONDS)
        self.beats = [Heartbeat(counter=1, progress=1, where="in step 1")] * len(places)
        self.seconds = 0.0
        self.silent: set[int] = set()

    def change(self, *ranks: int, **changes: object) -> None:
        for rank in ranks:
            self.beats[rank] = self.beats[rank]._replace(**changes)

    def go(self, seconds: float, *, progress: bool = True) -> Diagnosis | None:
        """Let time pass until there is a diagnosis."""
        end = self.seconds + seconds
        while self.seconds < end:
            self.seconds += BEAT_SECONDS
            for rank, beat in enumerate(self.beats):
                if rank not in self.silent:
                    self.change(rank, counter=beat.counter + 1)
                    self.change(rank, progress=beat.progress + progress)
            if diagnosis := self.detector.check(self.beats, BEAT_SECONDS):
                return diagnosis
        return None


def test_neighbours_are_a_circle_on_each_node():
    places = [RankInfo(host, 1, 0) for host in ("a", "b", "a", "a", "c", "b")]
    assert next_on_node(places) == [2, 5, 3, 0, 4, 1]


def test_silent_rank_is_named_in_time():
    run = Run(2, 2)
    assert run.go(100) is None
    run.silent = {3}
    diagnosis = run.go(100)
    assert 100 + SILENT_SECONDS <= run.seconds <= 100 + SILENT_SECONDS + BEAT_SECONDS
    assert diagnosis == Diagnosis(
        True,
        "rank 3 on node1 (process 111) gave no sign of life for 30 s, last seen in step 1; all "
        "processes end",
        rank=3,
        unfinished=True,
    )


def test_rank_without_any_beat_is_named():
    run = Run(1, 1)
    for _ in range(int(SILENT_SECONDS)):
        run.change(0, counter=run.beats[0].counter + 1)
        diagnosis = run.detector.check([run.beats[0], None], BEAT_SECONDS)
    assert diagnosis is not None
    assert "rank 1 on node1 (process 110)" in diagnosis.message
    assert "last seen at the start" in diagnosis.message


def test_lost_node_is_named_as_a_whole_and_before_its_victims():
    run = Run(3, 3)
    run.go(10)
    run.silent = {3, 4, 5}
    assert run.go(20) is None
    run.silent = {1, 3, 4, 5}  # it aborts, because the network to the others is gone
    run.change(0, neighbour=-1)
    diagnosis = run.go(20)
    assert diagnosis is not None
    assert diagnosis.message.startswith(
        "rank 3 on node1 (process 110) gave no sign of life for 23 s (nor did ranks 1, 4-5), last"
    )


def test_process_that_is_gone_is_named_at_once():
    run = Run(3)
    run.go(10)
    run.silent = {2}
    run.change(1, neighbour=-1)
    diagnosis = run.go(100)
    assert diagnosis is not None
    assert run.seconds == 10 + CHECKS_UNTIL_GONE * BEAT_SECONDS
    assert diagnosis.message.startswith("rank 2 on node0 (process 102) has ended without a word")


def test_rank_that_has_left_is_not_missed():
    run = Run(3)
    run.change(2, state="left")
    run.silent = {2}
    run.change(1, neighbour=-1)
    assert run.go(2 * SILENT_SECONDS) is None
    run.change(0, 1, state="left")
    assert run.go(1) == Diagnosis(ends=False)


def test_rank_that_works_without_a_beat_lives():
    run = Run(2)
    run.silent = {1}
    for ticks in range(100):
        run.change(0, neighbour=ticks * 10)
        assert run.go(BEAT_SECONDS) is None
    assert run.go(2 * SILENT_SECONDS) is not None


@pytest.mark.parametrize("state", ["left", "fault"])
def test_fault_that_all_share_is_theirs_to_tell(state):
    run = Run(2, 1)
    run.change(1, state="fault", reason="the disk is full")
    assert run.go(SILENT_SECONDS / 3 - 2 * BEAT_SECONDS) is None
    run.change(0, 2, state=state)
    assert run.go(1) == Diagnosis(ends=False)


def test_fault_of_one_rank_ends_all_with_its_code():
    run = Run(2, 1)
    run.change(2, state="fault", reason="run.yaml: is wrong", exit_code=2)
    diagnosis = run.go(SILENT_SECONDS)
    assert diagnosis == Diagnosis(
        True, "rank 2 on node1 (process 110): run.yaml: is wrong", exit_code=2, rank=2
    )


def test_failure_comes_before_those_that_it_kills():
    run = Run(4)
    run.change(2, 3, state="failed", reason="ValueError: 5", where="in step 7")
    run.change(0, neighbour=-1)
    diagnosis = run.go(10)
    assert diagnosis is not None
    assert diagnosis.message.startswith(
        "rank 2 on node0 (process 102) failed in step 7 (and so did rank 3): ValueError: 5; all"
    )


def test_signal_to_one_rank_ends_all_with_its_code():
    run = Run(2)
    run.change(1, state="interrupted", reason="SIGTERM came", exit_code=75)
    assert run.go(1) == Diagnosis(True, "SIGTERM came", exit_code=75, rank=1)


def test_of_several_that_are_gone_the_first_is_named():
    run = Run(3)
    run.go(10)
    run.silent = {2}
    run.change(1, neighbour=-1)
    assert run.go(1) is None
    run.silent = {1, 2}  # it aborts, because its connection to the other has broken
    run.change(0, neighbour=-1)
    diagnosis = run.go(10)
    assert diagnosis is not None
    assert diagnosis.rank == 2
    assert diagnosis.message.startswith("rank 2 on node0 (process 102) has ended without a word")


def test_hanging_rank_is_the_one_that_does_not_wait():
    run = Run(2, 2)
    run.change(0, 1, 3, waits=True)
    run.change(2, where="reading the batch of step 9", code="dataset.py:7 in read")
    diagnosis = run.go(2 * STALLED_SECONDS, progress=False)
    assert diagnosis is not None
    assert STALLED_SECONDS <= run.seconds <= STALLED_SECONDS + 2 * BEAT_SECONDS
    assert diagnosis.message == (
        "no rank has made progress for 900 s (faults.stalled_seconds): rank 2 on node1 (process "
        "110) hangs reading the batch of step 9 (dataset.py:7 in read); all processes end"
    )


@pytest.mark.parametrize("waits", [True, False])
def test_rank_that_is_behind_is_named_where_all_look_alike(waits):
    run = Run(2, 2)
    run.change(0, 1, 2, 3, waits=waits)
    run.change(0, 2, 3, progress=5)
    diagnosis = run.go(2 * STALLED_SECONDS, progress=False)
    assert diagnosis is not None
    assert ": rank 1 on node0 (process 101) hangs in step 1" in diagnosis.message


def test_rank_that_is_apart_from_all_others_is_named():
    run = Run(2, 2)
    run.change(0, 1, 3, code="engine.py:5 in step")
    run.change(2, code="dataset.py:7 in read")
    diagnosis = run.go(2 * STALLED_SECONDS, progress=False)
    assert diagnosis is not None
    assert (
        "rank 2 on node1 (process 110) hangs in step 1 (dataset.py:7 in read)" in diagnosis.message
    )


def test_where_all_are_is_said_where_nobody_stands_out():
    run = Run(*[8] * 3)
    run.change(*range(24), waits=True, code="engine.py:5 in step")
    for rank in range(12):
        run.change(2 * rank, code=f"gpt.py:{rank} in forward")
    run.change(5, code="loop.py:9 in run")
    diagnosis = run.go(2 * STALLED_SECONDS, progress=False)
    assert diagnosis is not None
    assert "none of them stands out" in diagnosis.message
    assert len(diagnosis.details) == 10
    assert diagnosis.details[0] == "rank 0: in step 1 (gpt.py:0 in forward), in a collective"
    assert diagnosis.details[-1] == "and 5 other places"


def test_single_process_that_hangs_is_named():
    run = Run(1)
    diagnosis = run.go(2 * STALLED_SECONDS, progress=False)
    assert diagnosis is not None
    assert "rank 0 on node0 (process 100) hangs in step 1" in diagnosis.message


def test_patience_stops_the_clock():
    run = Run(2)
    run.change(0, state="patient")
    assert run.go(5 * STALLED_SECONDS, progress=False) is None
    run.change(0, state="running")
    assert run.go(2 * STALLED_SECONDS, progress=False) is not None
