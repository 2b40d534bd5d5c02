"""Find the rank that caused a fault from the heartbeats of all ranks, without any I/O or clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from megaphase.fault_tolerance.heartbeat import Heartbeat, RankInfo, next_on_node
from megaphase.utils.errors import EXIT_FAILED

GONE = "has ended without a word (killed, or out of memory)"
SILENT = "gave no sign of life for {seconds:.0f} s"

# A process must be seen as gone in this many checks, since its last heartbeat may be delayed.
CHECKS_UNTIL_GONE = 3
# Fraction of silent_seconds within which the other ranks must report a fault that they share.
FAULT_SHARE = 1 / 3
LINES_AT_MOST = 10

NO_HEARTBEAT = Heartbeat(counter=0, progress=0, where="at the start")


@dataclass(frozen=True)
class Diagnosis:
    """How the run ends. With `ends`, every process exits at once; otherwise all left by themselves.

    message: one line that one rank reports, after `details`; empty if there is nothing to report.
    rank: the rank that caused the fault, if there is one. unfinished: whether the run should be
    started again, so that the report says from where it resumes.
    """

    ends: bool
    message: str = ""
    details: tuple[str, ...] = ()
    exit_code: int = EXIT_FAILED
    rank: int | None = None
    unfinished: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Diagnosis:
        return cls(**json.loads(data))


class FaultDetector:
    """Compares the heartbeats of all ranks and diagnoses the rank that is dead, frozen or
    hanging."""

    def __init__(
        self, places: Sequence[RankInfo], silent_seconds: float, stalled_seconds: float
    ) -> None:
        ranks = len(places)
        self._places, self._next_on_node = list(places), next_on_node(places)
        self._silent_seconds, self._stalled_seconds = silent_seconds, stalled_seconds
        self._beats: list[Heartbeat] = [NO_HEARTBEAT] * ranks
        self._silent = [0.0] * ranks
        self._checks_gone = [0] * ranks
        self._still = 0.0
        self._faulted = 0.0

    def check(self, beats: Sequence[Heartbeat | None], seconds: float) -> Diagnosis | None:
        """Process the newest heartbeat of every rank, None if there has been none yet.

        `seconds` is the time since the last call, without time in which the detector itself did not
        run (because the whole job was suspended).
        """
        now = [new or old for new, old in zip(beats, self._beats, strict=True)]
        self._update_silence(now, seconds)
        self._update_progress(now, seconds)
        self._beats = now
        # In this order: a collective fails because a rank has died, not the reverse.
        return (
            self._interrupted()
            or self._failed()
            or self._dead()
            or self._left(seconds)
            or self._stalled()
        )

    def _update_silence(self, now: Sequence[Heartbeat], seconds: float) -> None:
        for rank, (old, new) in enumerate(zip(self._beats, now, strict=True)):
            if new.counter != old.counter:
                self._silent[rank] = 0.0
            else:
                self._silent[rank] += seconds
        for witness, (old, new) in enumerate(zip(self._beats, now, strict=True)):
            rank = self._next_on_node[witness]
            if new.neighbour == -1 and self._is_here(now[rank]):
                self._checks_gone[rank] += 1
            elif None not in (old.neighbour, new.neighbour) and new.neighbour != old.neighbour:
                # It works, but in code that lets no other thread of its process run.
                self._silent[rank] = 0.0

    def _update_progress(self, now: Sequence[Heartbeat], seconds: float) -> None:
        moved = any(
            (new.progress, new.state) != (old.progress, old.state)
            for old, new in zip(self._beats, now, strict=True)
        )
        if moved or any(beat.state == "patient" for beat in now):
            self._still = 0.0
        else:
            self._still += seconds

    @staticmethod
    def _is_here(beat: Heartbeat) -> bool:
        return beat.state != "left"

    def _ranks(self, holds: Callable[[Heartbeat], bool]) -> list[int]:
        return [rank for rank, beat in enumerate(self._beats) if holds(beat)]

    def _name(self, rank: int) -> str:
        place = self._places[rank]
        return f"rank {rank} on {place.host} (process {place.pid})"

    def _interrupted(self) -> Diagnosis | None:
        """A rank received a signal before there was anything to save: all ranks end."""
        ranks = self._ranks(lambda beat: beat.state == "interrupted")
        if not ranks:
            return None
        first = self._beats[ranks[0]]
        return Diagnosis(True, first.reason, exit_code=first.exit_code, rank=ranks[0])

    def _failed(self) -> Diagnosis | None:
        failed = self._ranks(lambda beat: beat.state == "failed")
        if not failed:
            return None
        beat = self._beats[failed[0]]
        others = f" (and so did {_ranges(failed[1:])})" if failed[1:] else ""
        return self._end(
            f"{self._name(failed[0])} failed {beat.where}{others}: {beat.reason}", failed[0]
        )

    def _dead(self) -> Diagnosis | None:
        """Diagnose a rank that is gone or silent; if several are, the one that has been for
        longest."""
        here = self._ranks(self._is_here)
        gone = [rank for rank in here if self._checks_gone[rank] >= CHECKS_UNTIL_GONE]
        if not gone and all(self._silent[rank] < self._silent_seconds for rank in here):
            return None
        silent = [
            rank
            for rank in here
            if self._silent[rank] >= self._silent_seconds / 2 and rank not in gone
        ]
        # A silent rank makes others silent after a while, so it was the first.
        silent.sort(key=lambda rank: -self._silent[rank])
        if silent:
            first = silent[0]
            how = SILENT.format(seconds=self._silent[first])
        else:
            # A killed rank makes the libraries of others abort, so it was the first.
            first, how = max(gone, key=lambda rank: self._checks_gone[rank]), GONE
        others = sorted({*silent, *gone} - {first})
        too = f" (nor did {_ranges(others)})" if silent and others else ""
        too = f" (and so have {_ranges(others)})" if not silent and others else too
        return self._end(
            f"{self._name(first)} {how}{too}, last seen {self._beats[first].where}", first
        )

    def _left(self, seconds: float) -> Diagnosis | None:
        """End the run on a fault of some ranks only; a fault shared by all is raised by each of
        them."""
        faults = self._ranks(lambda beat: beat.state == "fault")
        if all(beat.state in ("fault", "left") for beat in self._beats):
            return Diagnosis(ends=False)
        if not faults:
            return None
        self._faulted += seconds
        if self._faulted < self._silent_seconds * FAULT_SHARE:
            return None
        first = self._beats[faults[0]]
        message = f"{self._name(faults[0])}: {first.reason}"
        return Diagnosis(True, message, exit_code=first.exit_code, rank=faults[0])

    def _stalled(self) -> Diagnosis | None:
        if self._still < self._stalled_seconds:
            return None
        blamed = self._hanging()
        start = f"no rank has made progress for {self._still:.0f} s (faults.stalled_seconds)"
        if blamed is None:
            return self._end(f"{start}, and none of them stands out", details=self._where_all_are())
        beat = self._beats[blamed[0]]
        place = f" ({beat.code})" if beat.code else ""
        others = f", as do {_ranges(blamed[1:])}" if blamed[1:] else ""
        return self._end(
            f"{start}: {self._name(blamed[0])} hangs {beat.where}{place}{others}", blamed[0]
        )

    def _hanging(self) -> list[int] | None:
        """Return the ranks for which the others wait; None if that cannot be determined."""
        here = self._ranks(self._is_here)
        if len(here) == 1:
            return here
        busy = self._ranks(lambda beat: self._is_here(beat) and not beat.waits)
        if 0 < len(busy) < len(here):
            return busy
        # On a GPU all ranks wait for their device, and it is not known which wait for a collective.
        least = min(self._beats[rank].progress for rank in here)
        behind = [rank for rank in here if self._beats[rank].progress == least]
        places = sorted(self._ranks_by_place().values(), key=len)
        apart = places[0] if len(places) == 2 else here
        return next((ranks for ranks in (behind, apart) if 2 * len(ranks) < len(here)), None)

    def _ranks_by_place(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for rank, beat in enumerate(self._beats):
            doing = "has left" if beat.state == "left" else f"{beat.where} ({beat.code})"
            doing += ", in a collective" if beat.waits else ""
            places.setdefault(doing, []).append(rank)
        return places

    def _where_all_are(self) -> tuple[str, ...]:
        """List the positions of all ranks, those with the fewest ranks first, which are
        suspicious."""
        places = sorted(self._ranks_by_place().items(), key=lambda place: len(place[1]))
        lines = [f"{_ranges(ranks)}: {doing}" for doing, ranks in places]
        if len(lines) > LINES_AT_MOST:
            more = f"and {len(lines) - LINES_AT_MOST + 1} other places"
            lines = [*lines[: LINES_AT_MOST - 1], more]
        return tuple(lines)

    @staticmethod
    def _end(message: str, rank: int | None = None, details: tuple[str, ...] = ()) -> Diagnosis:
        return Diagnosis(True, f"{message}; all processes end", details, rank=rank, unfinished=True)


def host_lost(place: RankInfo, beat: Heartbeat | None, how: str) -> Diagnosis:
    """Return the other ranks' diagnosis if rank 0, which runs the detector, is lost."""
    seen = (beat or NO_HEARTBEAT).where
    return Diagnosis(
        True,
        f"rank 0 on {place.host} (process {place.pid}) {how}, last seen {seen}; all processes end",
        rank=0,
        unfinished=True,
    )


def _ranges(ranks: Sequence[int]) -> str:
    """Format rank numbers as `rank 3` or `ranks 1, 4-7`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    shown = ", ".join(f"{part[0]}-{part[-1]}" if part[1:] else str(part[0]) for part in parts)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
