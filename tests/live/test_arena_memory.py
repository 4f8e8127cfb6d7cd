"""The machine has no frame to give, or a process gives no sign: managed memory waits, or says so, and loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernels_of_users
import numpy as np
import pytest
from memory_limit import MemoryLimit, memory_limit

import nopin
from nopin.errors import PeerError
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.units import PAGE_BYTES

pytestmark = [pytest.mark.needs_userfaultfd, pytest.mark.needs_root]
MIB = 1 << 20
WORDS = PAGE_BYTES // 8
WAIT_S = 60
LIMIT = 6 * MIB


@pytest.fixture
def limit() -> Iterator[MemoryLimit]:
    with memory_limit() as made:
        yield made


def row(device: nopin.Device) -> dict[str, Any]:
    """Figures of the device's one arena."""
    return next(row for row in device.stat() if row["kind"] == "arena")


def store_and_look(line: Line[Any], server: str) -> None:
    """An owner with a budget that the machine cannot keep."""
    device = nopin.Device(server, budget=64 * MIB)
    array = device.zeros((16 * MIB // PAGE_BYTES, WORDS), np.int64)
    expected = np.arange(1, WORDS + 1)
    line.send("ready")
    line.receive()
    for page in range(len(array)):
        array[page] = expected + page
    line.send("stored")
    line.send(all(np.array_equal(array[page], expected + page) for page in range(len(array))))
    figures = row(device)
    line.send({name: figures[name] for name in ("short_of_memory", "evicted", "refused", "poisoned", "lost")})
    line.receive()


@pytest.mark.timeout(120)
def test_a_machine_short_of_memory_makes_pages_leave_though_the_budget_would_let_them_stay(
    server: LocalServer, limit: MemoryLimit
) -> None:
    with Child(store_and_look, str(server.socket_path)) as owner:
        assert owner.line.receive(WAIT_S) == "ready"
        limit.put(owner.pid, LIMIT)
        owner.line.send("go")
        assert owner.line.receive(WAIT_S) == "stored"
        assert owner.line.receive(WAIT_S) is True
        figures = owner.line.receive(WAIT_S)
        assert limit.n_refused
        assert figures["short_of_memory"]
        assert figures["evicted"] >= (16 * MIB - LIMIT) // PAGE_BYTES
        assert figures["refused"] == figures["poisoned"] == figures["lost"] == 0
        owner.line.send("end")


@pytest.mark.timeout(120)
def test_memory_that_never_comes_is_sigbus_for_who_needs_it_and_nobody_else_loses_a_byte(
    tmp_path: Path, limit: MemoryLimit
) -> None:
    options = ["--swap-limit", "32KiB", "--no-swap-compress", "--swap-dir", str(tmp_path)]
    with (
        LocalServer(tmp_path / "server.sock", options) as server,
        nopin.Device(str(server.socket_path), budget="1MiB") as other,
        Child(store_and_look, str(server.socket_path)) as owner,
    ):
        array = other.zeros(256 * WORDS, np.int64)
        array[:] = np.arange(array.size)
        assert owner.line.receive(WAIT_S) == "ready"
        limit.put(owner.pid, LIMIT)
        owner.line.send("go")
        with pytest.raises(PeerError):
            owner.line.receive(WAIT_S)
        assert owner.close() == -signal.SIGBUS
        assert np.array_equal(array, np.arange(array.size))
        array += 1
        assert np.array_equal(array, np.arange(1, array.size + 1))
        assert next(each for each in other.stat() if each["kind"] == "dev")["internal_errors"] == 0


def work_and_stop(line: Line[Any], server: str) -> None:
    """An owner, its forked child and its worker; all of them are stopped from outside for a while."""
    device = nopin.Device(server, budget=MIB)
    array = device.zeros((4 * MIB // PAGE_BYTES, WORDS), np.int64)
    array[:] = np.arange(WORDS)
    held = device.zeros(WORDS, np.int64)
    accelerator = device.accelerator()
    accelerator.launch(f"{kernels_of_users.__name__}.hold", held)
    while not held[-1]:
        pass
    child = os.fork()
    if child == 0:
        signal.pause()
    line.send([child, accelerator.pids[0]])
    line.receive()
    line.send(bool((array == np.arange(WORDS)).all()))
    array += 1
    line.send(bool((array == np.arange(1, WORDS + 1)).all()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    line.receive()


@pytest.mark.timeout(120)
def test_processes_that_are_stopped_hold_up_nobody_neither_evictions_nor_a_takeover(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalServer(path))
        owner = stack.enter_context(Child(work_and_stop, str(path)))
        child, worker = owner.line.receive(WAIT_S)
        for pid in (owner.pid, child, worker):
            os.kill(pid, signal.SIGSTOP)
        server.kill()
        server = stack.enter_context(LocalServer(path, ["--takeover"]))
        with nopin.Device(str(path), budget="256KiB") as other:
            array = other.zeros(MIB // 8, np.int64)
            array[:] = 7
            assert (array == 7).all()
            assert row(other)["evicted"]
            del array
        for pid in (worker, child, owner.pid):
            os.kill(pid, signal.SIGCONT)
        owner.line.send("look")
        assert owner.line.receive(WAIT_S) is True
        assert owner.line.receive(WAIT_S) is True
        owner.line.send("end")
