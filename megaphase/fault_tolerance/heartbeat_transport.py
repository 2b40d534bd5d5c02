"""Send heartbeats from every rank to rank 0, over a separate store of the watchdog."""

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

_DIAGNOSIS, _HEARD = "diagnosis", "heard"
_POLL_SECONDS = 0.05


class HeartbeatTransport(Protocol):
    """One rank's connection; used by only one thread."""

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        """Send a heartbeat, `seconds` after the last one, and receive the diagnosis if there is
        one.

        Raises RuntimeError if rank 0 no longer answers.
        """

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        """Make sure that all other ranks know the diagnosis before this process ends."""


class LocalTransport:
    """The connection of a single-process run, which runs the fault detector itself."""

    def __init__(self, detector: FaultDetector) -> None:
        self._detector = detector

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        return self._detector.check([beat], seconds)

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        pass


class HostTransport:
    """Rank 0's connection: reads all heartbeats, detects faults and publishes the diagnosis."""

    def __init__(self, store: dist.TCPStore, detector: FaultDetector, ranks: int) -> None:
        self._store, self._detector = store, detector
        self._keys = [_beat_key(rank) for rank in range(1, ranks)]

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        self._store.set(_beat_key(0), beat.to_json())
        found = [Heartbeat.from_json(each) if each else None for each in self._read()]
        diagnosis = self._detector.check([beat, *found], seconds)
        if diagnosis is not None and not diagnosis.ends:
            self._store.set(_DIAGNOSIS, diagnosis.to_json())
        return diagnosis

    def _read(self) -> list[bytes]:
        return self._store.multi_get(self._keys)

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        """Publish the diagnosis, and keep the store until all have read it or the time is over."""
        self._store.set(_DIAGNOSIS, diagnosis.to_json())
        deadline = time.monotonic() + patience_seconds
        while self._store.add(_HEARD, 0) < len(self._keys) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


class MemberTransport:
    """Another rank's connection: sends its heartbeat, and reads rank 0's and the diagnosis.

    Attributes:
        answers: how often rank 0's store has answered; other threads may read it.
        host_heartbeat: the newest heartbeat of rank 0.
    """

    def __init__(self, store: dist.TCPStore, rank: int) -> None:
        self._store, self._key = store, _beat_key(rank)
        self.answers = 0
        self.host_heartbeat: Heartbeat | None = None

    def exchange(self, beat: Heartbeat, seconds: float) -> Diagnosis | None:
        self._store.set(self._key, beat.to_json())
        diagnosis, host_heartbeat = self._store.multi_get([_DIAGNOSIS, _beat_key(0)])
        self.answers += 1
        self.host_heartbeat = Heartbeat.from_json(host_heartbeat) if host_heartbeat else None
        return Diagnosis.from_json(diagnosis) if diagnosis else None

    def end(self, diagnosis: Diagnosis, patience_seconds: float) -> None:
        self._store.add(_HEARD, 1)


def open_transport(
    silent_seconds: float, stalled_seconds: float
) -> tuple[HeartbeatTransport, Sequence[RankInfo]]:
    """Open this rank's connection, on all ranks at once. Returns it and every rank's RankInfo."""
    here = RankInfo.here()
    if world_size() == 1:
        return LocalTransport(FaultDetector([here], silent_seconds, stalled_seconds)), [here]
    address = os.environ["MASTER_ADDR"]  # all ranks have already reached rank 0 there
    timeout = timedelta(seconds=silent_seconds)
    rank, ranks = global_rank(), world_size()
    server: dist.TCPStore | None = None
    if rank == 0:
        server = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        # Every key is created at the start, since the store blocks reads of a missing key.
        for key in (_DIAGNOSIS, *(_beat_key(each) for each in range(ranks))):
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
