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
from nopin.cli.bench_managed import row
from nopin.lab.bench_fault import FaultBench
from nopin.lab.bench_overcommit import run_overcommit, scan_pages
from nopin.lab.servers import LocalServer
from nopin.lab.touch import one_cpu

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


def test_each_kind_of_fault_is_held_against_its_floor(server: LocalServer) -> None:
    with nopin.Device(str(server.socket_path)) as device, one_cpu():
        results = list(FaultBench(device, n_pages=2048, n_rounds=2).all())
    assert [each.name for each in results] == ["cpu_fault", "first_touch", "reread", "device_minor", "device_major"]
    for each in results:
        line = row(each)
        assert each.name in line
        assert (" no " in line) is not each.reached
        assert each.as_json()["ratio_to_floor"] == each.figure.ratio_to_floor


def test_a_working_set_stays_while_a_scan_runs_through_the_rest() -> None:
    n_scanned: list[int] = []
    figure = run_overcommit(n_scanned.append, budget_bytes=2 * MIB)
    assert sum(n_scanned) == scan_pages(2 * MIB)
    assert figure.as_promised, figure
    assert figure.scan_faults > 0
    assert figure.hot_accesses == figure.scan_accesses == 2 * (4 * 512 - 256)


def test_a_budget_that_tells_nothing_is_refused() -> None:
    with pytest.raises(nopin.UsageError, match="whole MiB"):
        run_overcommit(lambda n: None, budget_bytes=MIB + 1)
