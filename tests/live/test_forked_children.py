"""Forked children have the arenas of their parent, whatever happens to the server; or SIGSEGV, never zeros."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nopin import Device
from nopin.accel import forked
from nopin.control.paths import registry_path
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.linux.libc import LIBC, unmap

pytestmark = pytest.mark.needs_userfaultfd

N_WORDS = 1 << 20  # 8 MiB
BUDGET = 1 << 20
NOBODY = 65534
PR_SET_DUMPABLE = 4


def fork_when_told(line: Line[Any], socket_path: str) -> None:
    """Fork a child that checks an array, most of which is in swap, and stores to it; say how it ended; twice."""
    device = Device(server=socket_path, budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    for rounds in range(2):
        line.send("ready")
        line.receive()
        child = os.fork()
        if child == 0:
            right = bool((array == np.arange(N_WORDS) + rounds).all())
            array += 1
            os._exit(0 if right else 1)
        line.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        line.send(bool((array == np.arange(N_WORDS) + rounds + 1).all()))
    line.receive()


def fork_as_nobody(line: Line[Any], runtime: str) -> None:
    """Without any privilege, fork a child that checks an array and stores to it."""
    os.chown(runtime, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # as in a process that never was root
    os.environ["XDG_RUNTIME_DIR"] = runtime
    interpreters = (sys.executable, "/usr/bin/python{}.{}".format(*sys.version_info))
    found = [each for each in interpreters if os.access(each, os.X_OK)]
    line.send(found)
    sys.executable = found[0]
    array = filled(Device(budget=BUDGET))
    line.send(in_child(lambda: checks_and_adds(array)))
    line.send(bool((array == np.arange(N_WORDS) + 1).all()))


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child; returns 0 if it returned something true."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.disable()  # to die of a signal is for some tests what is expected
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def filled(device: Device) -> NDArray[np.int64]:
    """Return an array of which most is in swap."""
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    return array


def checks_and_adds(array: NDArray[np.int64]) -> bool:
    right = bool((array == np.arange(N_WORDS)).all())
    array += 1
    return right


@pytest.fixture
def device(path: Path, servers: list[LocalServer]) -> Iterator[Device]:
    with Device(server=str(path), budget=BUDGET) as opened:
        yield opened


def test_a_forked_child_shares_the_pages_and_is_served(device: Device) -> None:
    array = filled(device)
    assert in_child(lambda: checks_and_adds(array)) == 0
    assert (array == np.arange(N_WORDS) + 1).all()


def test_without_privilege_a_forked_child_shares_the_pages_and_is_served() -> None:
    runtime = Path(os.environ.get("TMPDIR", "/tmp")) / f"nopin-nobody-{os.getpid()}"
    runtime.mkdir(mode=0o700)
    try:
        with Child(fork_as_nobody, str(runtime)) as owner:
            if not owner.line.receive():
                pytest.skip("the interpreter lies where only root can reach it")
            assert owner.line.receive(30.0) == 0
            assert owner.line.receive() is True
    finally:
        for each in sorted(runtime.rglob("*"), reverse=True):
            each.rmdir() if each.is_dir() else each.unlink()
        runtime.rmdir()


def test_stores_while_a_process_forks_are_kept_under_eviction(device: Device) -> None:
    array = device.zeros(N_WORDS, np.int64)
    children = []
    for n in range(8):
        array[n::8] = n + 1
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
    assert (array.reshape(-1, 8) == np.arange(1, 9)).all()
    (row,) = [row for row in device.stat() if row["kind"] == "arena"]
    assert row["mappers"] == 9
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (array.reshape(-1, 8) == np.arange(1, 9)).all()


def test_a_child_has_what_its_parent_has_mapped_where_and_as_it_is(device: Device) -> None:
    array = filled(device)
    page, start = mmap.PAGESIZE, array.ctypes.data
    LIBC.mremap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(4 * page)
    moved = LIBC.mremap(ctypes.c_void_p(start + 8 * page), size, size, 3, ctypes.c_void_p(start + (1 << 36)))
    assert moved == start + (1 << 36)
    LIBC.mprotect(ctypes.c_void_p(start + 32 * page), ctypes.c_size_t(page), mmap.PROT_READ)
    where_it_went = (ctypes.c_int64 * 2048).from_address(moved)

    def found_as_it_is() -> bool:
        right = list(where_it_went) == list(range(8 * 512, 12 * 512)) and array[32 * 512] == 32 * 512
        where_it_went[0] = -1
        return right

    assert in_child(found_as_it_is) == 0
    assert where_it_went[0] == -1
    assert in_child(partial(array.__setitem__, 8 * 512, 1)) == -signal.SIGSEGV, "it was moved away"
    assert in_child(partial(array.__setitem__, 32 * 512, 1)) == -signal.SIGSEGV, "it is read-only"
    unmap(moved, 4 * page)


def test_a_mapping_that_a_child_makes_grow_is_served(device: Device) -> None:
    array = filled(device)
    page, start = mmap.PAGESIZE, array.ctypes.data
    LIBC.mremap.restype = ctypes.c_void_p

    def grows() -> bool:
        old, new = ctypes.c_size_t(4 * page), ctypes.c_size_t(16 * page)
        grown = LIBC.mremap(ctypes.c_void_p(start), old, new, 3, ctypes.c_void_p(start + (1 << 36)))
        return list((ctypes.c_int64 * 8192).from_address(grown)) == list(range(8192))

    assert in_child(grows) == 0


def test_children_of_children_are_served_and_each_waits_for_its_own_answer(device: Device) -> None:
    array = filled(device)
    assert in_child(lambda: in_child(lambda: checks_and_adds(array)) == 0) == 0
    assert (array == np.arange(N_WORDS) + 1).all()


def test_a_child_served_goes_on_when_its_parent_ends_at_once(device: Device, tmp_path: Path) -> None:
    """As programs do that become daemons."""
    array, result = filled(device), tmp_path / "result"

    def becomes_a_daemon() -> bool:
        if os.fork() == 0:
            time.sleep(0.3)
            result.write_text(str(checks_and_adds(array)))
            os._exit(0)
        return True

    assert in_child(becomes_a_daemon) == 0
    until = time.monotonic() + 30
    while not (result.exists() and result.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    assert result.read_text() == "True"
    assert (array == np.arange(N_WORDS) + 1).all()


def test_arrays_made_in_a_child_never_lie_in_arenas_of_its_parent(device: Device, path: Path) -> None:
    array = filled(device)

    def makes_its_own() -> bool:
        with Device(server=str(path), budget=BUDGET) as own:
            other = own.zeros(N_WORDS, np.int64)
            other[:] = -1
            right = bool((array == np.arange(N_WORDS)).all())
            del other
        return right

    assert in_child(makes_its_own) == 0


def test_a_child_that_python_is_not_told_of_gets_a_signal_and_no_zeros(device: Device) -> None:
    array = filled(device)
    child = ctypes.PyDLL(None).fork()
    if child == 0:
        faulthandler.disable()
        os._exit(int(array[N_WORDS - 1] == N_WORDS - 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
    assert (array == np.arange(N_WORDS)).all()


@pytest.mark.parametrize("killed", ["before it accepts", "while it serves"])
def test_a_child_forked_while_its_server_is_killed_finds_every_byte(
    path: Path, servers: list[LocalServer], killed: str
) -> None:
    with Child(fork_when_told, str(path)) as owner:
        for _ in range(2):
            assert owner.line.receive(30.0) == "ready"
            if killed == "before it accepts":
                os.kill(servers[-1].pid, signal.SIGSTOP)
            owner.line.send("fork")
            time.sleep(0.2 if killed == "before it accepts" else 0.005)
            servers[-1].kill()
            time.sleep(0.1)
            servers.append(LocalServer(path, ["--takeover"]))
            assert owner.line.receive(30.0) == 0, "the child found other bytes"
            assert owner.line.receive() is True
        with Device(server=str(path)) as watcher:
            assert next(row for row in watcher.stat() if row["kind"] == "dev")["internal_errors"] == 0
        owner.line.send("end")


def test_a_child_that_nobody_serves_any_more_gets_a_signal_and_no_zeros(path: Path, servers: list[LocalServer]) -> None:
    with Child(fork_when_told, str(path)) as owner:
        assert owner.line.receive(30.0) == "ready"
        servers[-1].kill()
        registry_path(path).unlink()
        servers.append(LocalServer(path))
        owner.line.send("fork")
        assert owner.line.receive(30.0) == -signal.SIGSEGV
        owner.kill()


def test_a_fork_that_fails_and_a_child_that_dies_at_once_hold_up_nobody(device: Device) -> None:
    array = filled(device)
    forked._before()
    forked._in_parent()  # as Python calls them around a fork that the kernel refuses
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(lambda: checks_and_adds(array)) == 0
