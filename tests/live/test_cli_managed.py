"""The commands that show managed memory, against a server that has some."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import nopin
from nopin.lab.servers import LocalServer

pytestmark = pytest.mark.needs_userfaultfd
MIB = 1 << 20
COMMAND = [sys.executable, "-m", "nopin"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}


@pytest.fixture
def busy(server: LocalServer) -> Iterator[LocalServer]:
    """A server with an arena of which four times the budget was written, and read."""
    with nopin.Device(str(server.socket_path), budget="1MiB") as device:
        array = device.zeros(4 * MIB, np.uint8)
        array[:] = 3
        assert array.min() == 3
        yield server


def said(server: LocalServer, *arguments: str) -> str:
    command = [*COMMAND, *arguments, "--socket", str(server.socket_path)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=50, check=True).stdout


def test_stat_shows_an_arena_in_bytes_and_how_long_its_faults_took(busy: LocalServer) -> None:
    (row,) = json.loads(said(busy, "stat", "arena", "-j"))
    assert (row["budget"], row["pid"]) == (MIB, os.getpid())
    assert MIB // 2 < row["resident"] <= MIB + 4096
    line = said(busy, "stat", "arena")
    assert line.startswith("arena ")
    assert " missing_p50_ns " in line


def test_top_gives_one_report_when_nobody_watches(busy: LocalServer) -> None:
    text = said(busy, "top", "-d", "0.1")
    assert "fault latency" in text
    assert "1 MiB" in text
    load = json.loads(said(busy, "top", "-d", "0.1", "-j"))
    (arena,) = load["arenas"]
    assert arena["budget_bytes"] == MIB
    assert arena["swapped_bytes"] > 0
    assert arena["faults_per_s"]["swap"] == 0
    assert sum(load["fault_latency_ever"].values()) > 0 == sum(load["fault_latency"].values())


def watched(process: subprocess.Popen[bytes], terminal: int, until: bytes) -> bytes:
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other side of a terminal has gone
        while until not in seen:
            piece = os.read(terminal, 65536)
            seen += piece
    return seen


def test_top_on_a_terminal_goes_on_until_it_is_told_to_stop(busy: LocalServer) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "top", "-d", "0.1", "--socket", str(busy.socket_path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        for _ in range(2):
            assert b"faults/s" in watched(process, ours, b"faults/s")
        process.send_signal(signal.SIGINT)
        watched(process, ours, b"nothing that is ever shown")
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(ours)
