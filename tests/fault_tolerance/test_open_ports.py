"""Strangers who write to a run's ports leave it unharmed (SECURITY.md)."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest
from data_support import LIMIT_SECONDS, wait_until
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    rows_so_far,
    run_settings,
    timeless,
    write_run_file,
)

pytestmark = pytest.mark.distributed

RANKS = 2
MOST_CONNECTIONS = 200
# All ports on the loopback interface, so that the test reaches them without any other.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def messages(random: Random) -> Iterator[bytes]:
    """What a port scanner, a wrong client or nobody in particular may send."""
    yield b""
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(64)
    yield b"\xff" * 64  # as lengths: the largest there are
    while True:
        yield random.randbytes(random.choice((1, 8, 9, 64, 4096)))


def listening_ports(process: subprocess.Popen[bytes]) -> set[int]:
    """The TCP ports of a launcher's processes that can be reached over the loopback interface."""
    ports = set()
    for each in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            for connection in each.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    ports.add(connection.laddr.port)
    return ports


def send(port: int, message: bytes) -> None:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0) as stranger:
        stranger.settimeout(0.1)
        stranger.sendall(message)
        with suppress(TimeoutError):
            stranger.recv(16)


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = megaphase("launch", "local", folder / "run.yaml", "--processes", RANKS)
    return subprocess.Popen(command, env=os.environ | LOOPBACK, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_random_bytes_on_every_port_change_nothing(tmp_path):
    corpora = make_corpora(tmp_path / "corpora")
    settings = run_settings(corpora)
    for name in ("alone", "disturbed"):
        (tmp_path / name).mkdir()
        write_run_file(tmp_path / name, settings)
    assert start(tmp_path / "alone").wait(LIMIT_SECONDS) == 0

    process = start(tmp_path / "disturbed")
    try:
        wait_until(lambda: rows_so_far(tmp_path / "disturbed" / "run"))
        ports = sorted(listening_ports(process))
        # The rendezvous of the ranks, the watchdog's heartbeats, and gloo's of every rank.
        assert len(ports) >= 2 + RANKS
        random = Random(0)
        said = messages(random)
        for number in range(MOST_CONNECTIONS):
            if process.poll() is not None:
                break
            send(ports[number % len(ports)], next(said))
        assert number >= len(ports), "every port was written to before the run had ended"
        assert process.wait(LIMIT_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    rows = [timeless(read_rows(tmp_path / name / "run")) for name in ("alone", "disturbed")]
    assert rows[0] == rows[1]
