"""A server killed in the very moment of a fork takes the child's userfaultfd along: the child finds the next server.

The test plays the dying server: while that is stopped, it reads the message of the fork with a copy of the parent's
userfaultfd, and with it gets, and then closes, the child's.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nopin import Device
from nopin.control.paths import registry_path
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.linux.pidfd import PidFd

pytestmark = pytest.mark.needs_userfaultfd

N_WORDS = 1 << 20  # 8 MiB
BUDGET = 1 << 20
_EVENT_FORK = 0x13


def fork_when_told(line: Line[Any], socket_path: str) -> None:
    """Fork a child that checks an array, most of which is in swap, and stores to it; say how it ended; twice."""
    device = Device(server=socket_path, budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    arena = device.default_arena
    for rounds in range(2):
        line.send(arena.uffd)
        line.receive()
        child = os.fork()
        if child == 0:
            right = bool((array == np.arange(N_WORDS) + rounds).all())
            array += 1
            os._exit(0 if right else 1)
        line.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        line.send(bool((array == np.arange(N_WORDS) + rounds + 1).all()))
    line.receive()


def take_userfaultfd_of_child(owner: PidFd, number: int) -> int:
    """Read the message of the fork in place of the server; the child's userfaultfd."""
    uffd = owner.take_fd(number)
    try:
        while True:
            try:
                message = os.read(uffd, 32)
            except BlockingIOError:
                time.sleep(0.001)
                continue
            if message[0] == _EVENT_FORK:
                return int(struct.unpack_from("<I", message, 8)[0])
    finally:
        os.close(uffd)


@pytest.mark.parametrize("lost", ["at once", "while it waits", "when the successor is there"])
def test_a_child_that_lost_its_userfaultfd_finds_every_byte(path: Path, servers: list[LocalServer], lost: str) -> None:
    with Child(fork_when_told, str(path)) as owner:
        process = PidFd.open(owner.pid)
        number = owner.line.receive()
        os.kill(servers[-1].pid, signal.SIGSTOP)
        owner.line.send("fork")
        childs = take_userfaultfd_of_child(process, number)
        if lost == "at once":
            os.close(childs)
        time.sleep(0.3)
        if lost == "while it waits":
            os.close(childs)
        servers[-1].kill()
        servers.append(LocalServer(path, ["--takeover"]))
        if lost == "when the successor is there":
            os.close(childs)
        assert owner.line.receive(30.0) == 0, "the child found other bytes"
        assert owner.line.receive() is True
        owner.line.receive()
        owner.line.send("fork")
        assert owner.line.receive(30.0) == 0, "the next child found other bytes"
        assert owner.line.receive() is True
        with Device(server=str(path)) as watcher:
            assert next(row for row in watcher.stat() if row["kind"] == "dev")["internal_errors"] == 0
        process.close()
        owner.line.send("end")


def test_a_child_that_nobody_serves_any_more_gets_a_signal_and_no_zeros(path: Path, servers: list[LocalServer]) -> None:
    with Child(fork_when_told, str(path)) as owner:
        process = PidFd.open(owner.pid)
        number = owner.line.receive()
        os.kill(servers[-1].pid, signal.SIGSTOP)
        owner.line.send("fork")
        os.close(take_userfaultfd_of_child(process, number))
        servers[-1].kill()
        registry_path(path).unlink()
        servers.append(LocalServer(path))
        assert owner.line.receive(30.0) == -signal.SIGSEGV
        owner.kill()
        process.close()


def test_children_of_children_are_served_and_each_waits_for_its_own_answer(
    path: Path, servers: list[LocalServer]
) -> None:
    with Device(server=str(path), budget=BUDGET) as device:
        array = device.zeros(N_WORDS, np.int64)
        array[:] = np.arange(N_WORDS)
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if (array == np.arange(N_WORDS)).all() else 1)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        del array
