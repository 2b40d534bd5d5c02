"""How heartbeats reach rank 0: over a store that only the watchdog uses."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from megaphase.distributed.dist_env import global_rank, world_size
from megaphase.fault_tolerance.fault_detector import Diagnosis, FaultDetector
from megaphase.fault_tolerance.heartbeat import Heartbeat, RankInfo

_VERDICT, _HEARD = "diagnosis", "heard"
_POLL_SECONDS = 0.05


class HeartbeatTransport(Protocol):
    """One rank's end. Only one thread uses it."""

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        """Hand a beat over, `seconds` after the one before, and hear whether there is a diagnosis.

        Raises RuntimeError where rank 0 does not answer any more.
        """

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        """Make sure, before this process ends, that all others know."""


class LocalTransport:
    """Of a run that is a single process, which checks its own heartbeats."""

    def __init__(self, detector: FaultDetector) -> None:
        self._detector = detector

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        return self._detector.check([beat], seconds)

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        pass


class HostTransport:
    """Of rank 0: it reads all heartbeats, diagnoses and publishes. A beat costs O(ranks) in all."""

    def __init__(self, store: dist.TCPStore, detector: FaultDetector, ranks: int) -> None:
        self._store, self._detector = store, detector
        self._keys = [_beat_key(rank) for rank in range(1, ranks)]

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        self._store.set(_beat_key(0), beat.to_json())
        found = [Heartbeat.from_json(each) if each else None for each in self._read()]
        diagnosis = self._detector.check([beat, *found], seconds)
        if diagnosis is not None and not diagnosis.ends:
            self._store.set(_VERDICT, diagnosis.to_json())
        return diagnosis

    def _read(self) -> list[bytes]:
        return self._store.multi_get(self._keys)

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        """Tell all, and keep the store up until they have heard or can be waited for no longer."""
        self._store.set(_VERDICT, diagnosis.to_json())
        deadline = time.monotonic() + patience_seconds
        while self._store.add(_HEARD, 0) < len(self._keys) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


class MemberTransport:
    """Any other rank's: it sends its beat and hears rank 0's, and the diagnosis if there is one.

    Attributes:
        answers: how often rank 0's store has answered; anyone may read it.
        host_beat: the newest beat of rank 0.
    """

    def __init__(self, store: dist.TCPStore, rank: int) -> None:
        self._store, self._key = store, _beat_key(rank)
        self.answers = 0
        self.host_beat: Heartbeat | None = None

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        self._store.set(self._key, beat.to_json())
        diagnosis, host_beat = self._store.multi_get([_VERDICT, _beat_key(0)])
        self.answers += 1
        self.host_beat = Heartbeat.from_json(host_beat) if host_beat else None
        return Diagnosis.from_json(diagnosis) if diagnosis else None

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        self._store.add(_HEARD, 1)


def open_transport(
    silent_seconds: float, stalled_seconds: float
) -> tuple[HeartbeatTransport, Sequence[RankInfo]]:
    """Open this rank's transport, on all ranks at once; returns it and where every rank runs."""
    here = RankInfo.here()
    if world_size() == 1:
        return LocalTransport(FaultDetector([here], silent_seconds, stalled_seconds)), [here]
    address = os.environ["MASTER_ADDR"]  # all ranks have found rank 0 there before
    timeout = timedelta(seconds=silent_seconds)
    rank, ranks = global_rank(), world_size()
    server: dist.TCPStore | None = None
    if rank == 0:
        server = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        # Every key is there from the start: the store makes a reader wait for a missing one.
        for key in (_VERDICT, *(_beat_key(each) for each in range(ranks))):
            server.set(key, "")
    gathered: list[tuple[RankInfo, int]] = [(here, 0)] * ranks
    dist.all_gather_object(gathered, (here, server.port if server else 0))
    places = [place for place, _ in gathered]
    if server is not None:
        return HostTransport(
            server, FaultDetector(places, silent_seconds, stalled_seconds), ranks
        ), places
    port = gathered[0][1]
    store = dist.TCPStore(address, port, wait_for_workers=False, timeout=timeout)
    return MemberTransport(store, rank), places


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
