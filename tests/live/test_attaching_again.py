"""Remote arrays attach again by themselves when a device server on the way is killed, and every byte is right."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nopin import Closed, Device, RegionGone, RemoteArray, Share, attach
from nopin.control.mending import LOST
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer

N = 1 << 16
WAIT_S = 30.0


def own(line: Line[Any], socket_path: str) -> None:
    """Share an array and say what is in it when asked; never talk to a server again."""
    device = Device(server=socket_path)
    array = np.zeros(N, np.int64)
    line.send(device.share(array).url)
    while True:
        first, end = line.receive()
        line.send(array[first:end].tolist())


class Servers:
    """Two servers that can be replaced: the owner's, and the peer's, which may be the same."""

    def __init__(self, folder: Path, *, same: bool) -> None:
        self.owners = folder / "owner.sock"
        self.peers = self.owners if same else folder / "peer.sock"
        self.running = {path: LocalServer(path) for path in {self.owners, self.peers}}

    def kill(self, path: Path) -> None:
        self.running[path].kill()

    def take_over(self, path: Path) -> None:
        self.running[path] = LocalServer(path, ["--takeover"])

    def replace(self, path: Path) -> None:
        self.kill(path)
        self.take_over(path)

    def close(self) -> None:
        for server in self.running.values():
            server.close()


@pytest.fixture(params=["two servers", "one server"])
def servers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Servers]:
    running = Servers(tmp_path, same=request.param == "one server")
    yield running
    running.close()


@pytest.fixture
def owner(servers: Servers) -> Iterator[Child]:
    with Child(own, str(servers.owners)) as process:
        yield process


@pytest.fixture
def remote(servers: Servers, owner: Child) -> Iterator[RemoteArray]:
    with Device(server=str(servers.peers)) as device, attach(owner.line.receive(), device=device) as attached:
        yield attached


def test_reads_and_writes_under_way_are_repeated_in_order(servers: Servers, owner: Child, remote: RemoteArray) -> None:
    servers.kill(servers.owners)
    written = [remote.write_async(slice(i, N), i) for i in range(50)]
    read = remote.read_async()
    assert not read.done()
    servers.take_over(servers.owners)
    expected = np.minimum(np.arange(N), 49)
    assert np.array_equal(read.result(WAIT_S), expected)
    assert all(each.done() for each in written)
    assert owner.ask([0, N]) == expected.tolist()


def test_whichever_server_is_killed_and_however_often(servers: Servers, owner: Child, remote: RemoteArray) -> None:
    for i, path in enumerate([servers.owners, servers.peers, servers.owners, servers.peers]):
        servers.replace(path)
        remote[i] = i + 1
        assert remote[: i + 1].tolist() == list(range(1, i + 2))
    assert owner.ask([0, 5]) == [1, 2, 3, 4, 0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
def test_threads_compute_through_kills_and_every_byte_is_right(
    servers: Servers, owner: Child, remote: RemoteArray, seed: int
) -> None:
    """Each thread has a part of its own, and checks it against what it wrote."""
    n_threads, wrong, rounds = 3, [], [0] * 3
    ends = threading.Event()

    def compute(number: int) -> None:
        draw = np.random.default_rng([seed, number])
        base, size = number * (N // n_threads), N // n_threads
        truth = np.zeros(size, np.int64)
        while not ends.is_set():
            start = int(draw.integers(0, size - 600))
            part = slice(start, start + int(draw.integers(1, 600)))
            truth[part] = draw.integers(1, 1 << 40)
            remote[base + part.start : base + part.stop] = truth[part]
            whole = remote[base : base + size]
            if not np.array_equal(whole, truth):
                wrong.append((number, rounds[number]))
                return
            rounds[number] += 1
        if owner_has(base, base + size) != truth.tolist():
            wrong.append((number, -1))

    asking = threading.Lock()

    def owner_has(first: int, end: int) -> Any:
        with asking:
            return owner.ask([first, end])

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    draw = np.random.default_rng(seed)
    for _ in range(4):
        time.sleep(float(draw.uniform(0.05, 0.5)))
        path = [servers.owners, servers.peers][int(draw.integers(2))]
        servers.kill(path)
        time.sleep(float(draw.uniform(0.0, 0.2)))
        servers.take_over(path)
    time.sleep(0.3)
    ends.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(rounds) > 3


def test_what_is_awaited_goes_on_in_its_event_loop(servers: Servers, owner: Child, remote: RemoteArray) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async def work() -> Any:
        ticking = asyncio.create_task(tick())
        remote[3] = 7
        servers.kill(servers.owners)
        pending = asyncio.gather(*(asyncio.ensure_future(read(i)) for i in range(20)))
        await asyncio.sleep(0.2)
        threading.Thread(target=servers.take_over, args=(servers.owners,)).start()
        found = await asyncio.wait_for(pending, WAIT_S)
        ticking.cancel()
        return found

    async def read(i: int) -> Any:
        return await remote.read_async(i)

    assert asyncio.run(work()) == [7 if i == 3 else 0 for i in range(20)]
    assert ticks > 15, "the loop was never held up"
    assert owner.ask([3, 4]) == [7]


def test_an_atomic_under_way_is_an_error_and_later_ones_work(
    servers: Servers, owner: Child, remote: RemoteArray
) -> None:
    caught: list[BaseException] = []

    def add() -> None:
        try:
            remote.fetch_add(0, 1)
        except RegionGone as error:
            caught.append(error)

    pid = servers.running[servers.owners].pid
    os.kill(pid, signal.SIGSTOP)
    thread = threading.Thread(target=add)
    thread.start()
    time.sleep(0.3)
    servers.replace(servers.owners)
    thread.join(WAIT_S)
    (error,) = caught
    assert "nobody knows whether it was carried out" in str(error)
    before = remote.fetch_add(0, 10)
    assert before in (0, 1)
    assert remote[0] == before + 10


def test_a_share_that_was_withdrawn_meanwhile_is_gone(tmp_path: Path) -> None:
    with LocalServer(tmp_path / "peer.sock") as peers, Device(server=str(peers.socket_path)) as user:
        first = LocalServer(tmp_path / "owner.sock")
        owner = Device(server=str(first.socket_path))
        share: Share = owner.share(np.zeros(10))
        remote = attach(share.url, device=user)
        first.kill()
        share.close()
        with (
            LocalServer(first.socket_path, ["--takeover"]),
            pytest.raises(RegionGone, match="no such share"),
        ):
            remote[0]
        owner.close()


def failing_while_mended(remote: RemoteArray, end: Callable[[], None]) -> BaseException | None:
    """Have a thread wait for a connection that is mended in vain; what it gets when that ends."""
    caught: list[BaseException] = []

    def read() -> None:
        try:
            remote[0]
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    end()
    thread.join(WAIT_S)
    return caught[0] if caught else None


def test_an_array_closed_while_it_is_mended_wakes_who_waits(servers: Servers, remote: RemoteArray) -> None:
    servers.kill(servers.owners)
    assert isinstance(failing_while_mended(remote, remote.close), Closed)


def test_a_device_closed_while_its_array_is_mended_wakes_who_waits(servers: Servers, remote: RemoteArray) -> None:
    servers.kill(servers.owners)
    assert isinstance(failing_while_mended(remote, remote.device.close), Closed)


def test_a_peer_that_lost_its_connection_replaces_it_and_not_that_of_another(tmp_path: Path) -> None:
    """As after a cut in the network: the owner's server has not noticed, and still has the old queue pair."""
    with (
        LocalServer(tmp_path / "owner.sock") as theirs,
        LocalServer(tmp_path / "peer.sock") as ours,
        Device(server=str(theirs.socket_path)) as owner,
        Device(server=str(ours.socket_path)) as user,
    ):
        share = owner.share(np.arange(10))
        one, other = attach(share.url, device=user), attach(share.url, device=user)
        connection = one._attachment._connection
        connection.peer.close = lambda: None  # type: ignore[method-assign]  # its end never arrives
        connection.peer._cause = LOST
        connection._peer_spoke()
        assert one[...].tolist() == list(range(10))
        assert sum(row["kind"] == "qp" and row["comm"] == "peer" for row in owner.stat()) == 2
        assert other[3] == 3
