"""A device server that was killed: its successor goes on with managed memory, and every byte is right."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nopin import Device, attach
from nopin.control.packets import close_all
from nopin.control.paths import log_path, registry_path
from nopin.errors import ServerError
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.linux.fd_store import FdStore
from nopin.server.arena_store import MapperEntry

pytestmark = pytest.mark.needs_userfaultfd

N_WORDS = 1 << 21  # 16 MiB
BUDGET = 2 << 20
N_FORKS = 400


def compute(line: Line[Any], socket_path: str, seed: int) -> None:
    """An owner that never talks to its server: stores and loads at random for a while, and checks each load."""
    device = Device(server=socket_path, budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    truth = np.zeros(N_WORDS, np.int64)
    draw = np.random.default_rng(seed)
    line.send("ready")
    n_rounds = 0
    until = time.monotonic() + 5
    while time.monotonic() < until:
        start = int(draw.integers(0, N_WORDS - 5000))
        part = slice(start, start + int(draw.integers(1, 5000)))
        if n_rounds % 2:
            truth[part] = array[part] = draw.integers(1, 1 << 40)
        elif not np.array_equal(array[part], truth[part]):
            line.send(f"wrong bytes at {part} in round {n_rounds}")
            return
        n_rounds += 1
    line.send("right" if np.array_equal(array, truth) else "wrong bytes at the end")
    line.send(n_rounds)
    line.receive()  # stay until told


def share_with_child(line: Line[Any], socket_path: str) -> None:
    """An owner and its forked child work on one arena, by turns."""
    device = Device(server=socket_path, budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    child = os.fork()
    if child == 0:
        time.sleep(1.0)  # the server is killed meanwhile
        right = bool((array == np.arange(N_WORDS)).all())
        array[::512] = -1
        os._exit(0 if right else 1)
    line.send("ready")
    _, status = os.waitpid(child, 0)
    line.send(os.waitstatus_to_exitcode(status))
    expected = np.arange(N_WORDS)
    expected[::512] = -1
    line.send(bool((array == expected).all()))


def compute_with_child(line: Line[Any], socket_path: str, seed: int) -> None:
    """An owner and its forked child store and load at random at the same time, each in every other page."""
    device = Device(server=socket_path, budget=BUDGET)
    pages = device.zeros((N_WORDS // 512, 512), np.int64)
    child = os.fork()
    n_wrong, truth = 0, np.zeros(pages.shape, np.int64)
    draw = np.random.default_rng(seed + (child == 0))
    mine = range(1 if child == 0 else 0, len(pages), 2)
    if child:
        line.send("ready")
    until = time.monotonic() + 5
    while time.monotonic() < until:
        page = mine[int(draw.integers(len(mine)))]
        n_wrong += not np.array_equal(pages[page], truth[page])
        truth[page] = pages[page] = draw.integers(1, 1 << 40, 512)
    n_wrong += int((pages[mine.start :: 2] != truth[mine.start :: 2]).any(axis=1).sum())
    if child == 0:
        os._exit(min(n_wrong, 99))
    line.send(n_wrong)
    line.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    line.receive()  # stay until told


def fork_often(line: Line[Any], socket_path: str) -> None:
    """Fork children that touch an array and end, one after the other; one that stays checks it in the end."""
    device = Device(server=socket_path, budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told, 1)
        os._exit(0 if (array == np.arange(N_WORDS)).all() else 1)
    for _ in range(N_FORKS):
        brief = os.fork()
        if brief == 0:
            os._exit(int(array[0]))
        os.waitpid(brief, 0)
    store = FdStore(*(os.dup(end) for end in device.default_arena._store))
    entries = store.entries()
    for each in entries:
        close_all(each.fds)
    line.send([len(entries), device.stat()])
    line.receive()
    os.write(tell, b"!")
    line.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def leave_a_child(line: Line[Any], socket_path: str, result: str) -> None:
    """Fork a child that works on the array when its parent, and the server, are gone."""
    device = Device(server=socket_path, budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        libc = ctypes.CDLL(None)
        libc.prctl(1, 0)  # PR_SET_PDEATHSIG: it outlives its parent
        while os.getppid() == parent:
            time.sleep(0.01)
        right = bool((array == np.arange(N_WORDS)).all())
        array += 1
        Path(result).write_text(f"{right} {bool((array == np.arange(1, N_WORDS + 1)).all())}")
        os._exit(0)
    line.send(child)
    line.receive()


def spoil_store(line: Line[Any], socket_path: str) -> None:
    """Keep something as a mapper's userfaultfd that is none."""
    device = Device(server=socket_path)
    arena = device.arena("16MiB")
    store = FdStore(*(os.dup(end) for end in arena._store))
    entry = MapperEntry(2, [(0, 1, 1 << 40)], worker=False, pid=os.getpid())
    store.put(msgspec.msgpack.encode(entry), [os.memfd_create("no userfaultfd"), os.pidfd_open(os.getpid())])
    line.send("ready")
    line.receive()


def stay_resident(line: Line[Any], socket_path: str) -> None:
    """Touch two arrays that have a budget in common, over and over; say how much of them is resident."""
    device = Device(server=socket_path, budget=BUDGET)
    arenas = [device.arena("16MiB"), device.arena("16MiB")]
    arrays = [arena.zeros(N_WORDS // 2, np.int64) for arena in arenas]
    while True:
        for array in arrays:
            array += 1
        line.send(sum(os.fstat(arena.memory_fd).st_blocks * 512 for arena in arenas))
        line.receive()


def kill(server: LocalServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(server.pid, 0)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_owner_that_computes_while_servers_are_killed_finds_every_byte(
    path: Path, servers: list[LocalServer], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    with Child(compute, str(path), seed) as owner:
        assert owner.line.receive() == "ready"
        for _ in range(3):
            time.sleep(float(draw.uniform(0.05, 0.8)))
            kill(servers[-1])
            time.sleep(float(draw.uniform(0, 0.2)))
            servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == "right"
        assert int(owner.line.receive()) > 10
        with Device(server=str(path)) as watcher:
            (row,) = [row for row in watcher.stat() if row["kind"] == "dev"]
            assert row["internal_errors"] == 0
        owner.line.send("end")


@pytest.mark.timeout(90)
def test_a_forked_child_waits_for_the_successor_and_reads_no_zeros(path: Path, servers: list[LocalServer]) -> None:
    with Child(share_with_child, str(path)) as owner:
        assert owner.line.receive() == "ready"
        kill(servers[-1])
        time.sleep(1.2)
        servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == 0, "the child found other bytes"
        assert owner.line.receive() is True


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_forked_child_that_computes_too_while_servers_are_killed_finds_every_byte(
    path: Path, servers: list[LocalServer], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    with Child(compute_with_child, str(path), seed) as owner:
        assert owner.line.receive() == "ready"
        for _ in range(4):
            time.sleep(float(draw.uniform(0.05, 0.6)))
            kill(servers[-1])
            servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == 0, "the owner found wrong bytes"
        assert owner.line.receive() == 0, "the child found wrong bytes"
        owner.line.send("end")


@pytest.mark.timeout(120)
def test_hundreds_of_forks_do_not_fill_the_store_and_the_last_child_is_found(
    path: Path, servers: list[LocalServer]
) -> None:
    with Child(fork_often, str(path)) as owner:
        n_entries, rows = owner.line.receive(90.0)
        (row,) = [row for row in rows if row["kind"] == "arena"]
        assert row["store_refused"] == 0
        assert n_entries < N_FORKS / 2
        kill(servers[-1])
        owner.line.send("killed")
        servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive(30.0) == 0, "the child found other bytes"


def test_a_child_whose_parent_is_gone_as_well_is_found_by_the_successor(
    tmp_path: Path, path: Path, servers: list[LocalServer]
) -> None:
    result = tmp_path / "result"
    with Child(leave_a_child, str(path), str(result)) as owner:
        child = owner.line.receive()
        pidfd = os.pidfd_open(child)
        kill(servers[-1])
    with pytest.raises(ServerError, match=f"waits in process {child}"):
        LocalServer(path)
    servers.append(LocalServer(path, ["--takeover"]))
    assert select.select([pidfd], [], [], 30.0)[0], "the child waits for ever"
    assert result.read_text() == "True True"
    os.close(pidfd)


def test_what_cannot_be_taken_over_leaves_nothing_half_made_and_others_go_on(
    path: Path, servers: list[LocalServer]
) -> None:
    with Child(spoil_store, str(path)) as spoiler, Child(compute, str(path), 7) as owner:
        assert (spoiler.line.receive(), owner.line.receive()) == ("ready", "ready")
        kill(servers[-1])
        servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == "right"
        assert f"the arena of process {spoiler.pid} cannot be taken over" in log_path(path).read_text()
        maps = Path(f"/proc/{servers[-1].pid}/maps").read_text()
        assert maps.count("memfd:nopin-arena ") == 1
        with Device(str(path)) as device:
            shown = [row["pid"] for row in device.stat() if row["kind"] == "arena"]
        assert shown == [owner.pid], "its owner has not come back to the server"
        owner.line.receive()
        owner.line.send("end")
        spoiler.kill()


def test_a_successor_killed_when_it_has_taken_one_of_two_arenas_over_leaves_both_to_the_next(
    path: Path, servers: list[LocalServer]
) -> None:
    with Child(compute, str(path), 7) as one, Child(compute, str(path), 8) as other:
        assert (one.line.receive(), other.line.receive()) == ("ready", "ready")
        kill(servers[-1])
        left = registry_path(path)
        before = left.stat().st_ino
        command = [sys.executable, "-m", "nopin", "serve", "--takeover", "--socket", str(path)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as starting:
            while left.stat().st_ino == before:  # until it has written of the first
                time.sleep(0)
            starting.kill()
        servers.append(LocalServer(path, ["--takeover"]))
        assert (one.line.receive(), other.line.receive()) == ("right", "right")
        for owner in (one, other):
            owner.line.receive()
            owner.line.send("end")


def test_a_budget_of_several_arenas_is_kept_though_their_owner_asks_for_nothing(
    path: Path, servers: list[LocalServer]
) -> None:
    with Child(stay_resident, str(path)) as owner:
        for _ in range(3):
            assert owner.line.receive() <= BUDGET
            kill(servers[-1])
            servers.append(LocalServer(path, ["--takeover"]))
            owner.line.send("again")
        assert owner.line.receive() <= BUDGET


def test_without_being_asked_to_a_new_server_leaves_them_alone_and_says_what_to_do(
    path: Path, servers: list[LocalServer]
) -> None:
    with Child(compute, str(path), 7) as owner:
        assert owner.line.receive() == "ready"
        kill(servers[-1])
        command = [sys.executable, "-m", "nopin", "serve", "--socket", str(path)]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert refused.returncode == 1
        assert "--takeover" in refused.stderr
        assert str(owner.pid) in refused.stderr
        servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == "right"
        owner.line.receive()
        owner.line.send("end")


def test_an_owner_that_is_gone_leaves_nothing_to_take_over(path: Path, servers: list[LocalServer]) -> None:
    with Child(compute, str(path), 7) as owner:
        assert owner.line.receive() == "ready"
        kill(servers[-1])
    servers.append(LocalServer(path))
    with Device(server=str(path)) as device:
        assert not [row for row in device.stat() if row["kind"] == "arena"]


def test_a_server_stopped_in_order_leaves_its_arenas_to_the_next_and_says_so(
    path: Path, servers: list[LocalServer]
) -> None:
    with Child(compute, str(path), 7) as owner:
        assert owner.line.receive() == "ready"
        os.kill(servers[-1].pid, signal.SIGTERM)
        os.waitpid(servers[-1].pid, 0)
        assert "--takeover" in log_path(path).read_text()
        servers.append(LocalServer(path, ["--takeover"]))
        assert owner.line.receive() == "right"
        owner.line.receive()
        owner.line.send("end")


def own_server(line: Line[Any], runtime: str) -> None:
    """The library starts the server; it is killed, and only its keeper can bring the next one."""
    os.environ["XDG_RUNTIME_DIR"] = runtime
    device = Device(budget=BUDGET)
    array = device.zeros(N_WORDS, np.int64)
    array[:] = np.arange(N_WORDS)
    line.send(device.info.server_pid)
    line.receive()  # it is killed now
    line.send(bool((array == np.arange(N_WORDS)).all()))
    again = Device()
    share = again.share(array)
    line.send([again.info.server_pid, share.url])
    line.receive()


@pytest.mark.timeout(90)
def test_a_server_of_the_library_gets_a_successor_by_itself_and_the_array_can_be_shared_again(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    with Child(own_server, str(runtime)) as owner:
        pid = owner.line.receive()
        os.kill(pid, signal.SIGKILL)
        owner.line.send("killed")
        assert owner.line.receive(60.0) is True
        next_pid, url = owner.line.receive(60.0)
        assert next_pid != pid
        with Device(server=str(runtime / "nopin" / "server.sock")) as device, attach(url, device=device) as remote:
            part = remote[12345:12845]
            assert np.array_equal(part, np.arange(12345, 12845))
            remote[7] = -7
            assert remote[6:9].tolist() == [6, -7, 8]
        owner.line.send("end")
