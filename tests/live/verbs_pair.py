"""Connected ends over real servers: over RoCEv2 when each end has its own server, directly when they share one."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from nopin import (
    Access,
    AsyncEvent,
    AsyncEventType,
    Device,
    MemoryRegion,
    QpCaps,
    QueuePair,
    RecvWr,
    SendWr,
    Sge,
    Wc,
    WcStatus,
    WrOpcode,
)
from nopin.lab.servers import LocalServer

PATIENCE_S = 20.0
"""Longer than anything here takes; what is still missing then never comes."""

WIRE, DIRECT = "wire", "direct"
PATHS = (WIRE, DIRECT)

ALL_RIGHTS = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
CAPS = QpCaps(max_send_sge=8, max_recv_sge=8)

_wr_ids = itertools.count(1)


class Servers:
    """Two servers, started once for many tests."""

    def __init__(self, folder: Path) -> None:
        self._running = [LocalServer(folder / "owner.sock"), LocalServer(folder / "peer.sock")]

    def owner_path(self) -> str:
        return str(self._running[0].socket_path)

    def peer_path(self, path: str) -> str:
        """Where a peer connects so that it reaches the owner by that path."""
        return str(self._running[1 if path == WIRE else 0].socket_path)

    def close(self) -> None:
        for server in self._running:
            server.close()


@contextlib.contextmanager
def running_servers(folder: Path) -> Iterator[Servers]:
    servers = Servers(folder)
    try:
        yield servers
    finally:
        servers.close()


class End:
    """A device with one domain, one completion queue and one queue pair; all memory is named by `lkey`."""

    def __init__(self, device: Device, caps: QpCaps = CAPS) -> None:
        self.device = device
        self.pd = device.alloc_pd()
        self.cq = device.create_cq()
        self.qp: QueuePair = self.pd.create_qp(self.cq, caps=caps)
        self.lkey = self.pd.register(access="l").lkey

    def register(self, address: int, length: int, access: Access = ALL_RIGHTS, **options: object) -> MemoryRegion:
        return self.pd.register(address, length, access=access, **options)  # type: ignore[arg-type]  # as given

    def sge(self, address: int, length: int) -> Sge:
        return Sge(address, length, self.lkey)

    def run(self, wr: SendWr) -> Wc:
        """Carry out one request; its completion is the next one."""
        wr.wr_id = next(_wr_ids)
        self.qp.post_send(wr)
        completion = self.next_completion()
        assert completion.wr_id == wr.wr_id
        return completion

    def next_completion(self) -> Wc:
        (completion,) = self.cq.wait(1, PATIENCE_S)
        return completion

    def receive_into(self, *sges: Sge, wr_id: int = 0) -> None:
        self.qp.post_recv(RecvWr(sges, wr_id))

    def read(self, remote: int, rkey: int, local: int, length: int) -> WcStatus:
        return self.run(SendWr(WrOpcode.RDMA_READ, [self.sge(local, length)], remote_address=remote, rkey=rkey)).status

    def write(self, remote: int, rkey: int, local: int, length: int) -> WcStatus:
        return self.run(SendWr(WrOpcode.RDMA_WRITE, [self.sge(local, length)], remote_address=remote, rkey=rkey)).status

    def atomic(self, opcode: WrOpcode, remote: int, rkey: int, local: int, compare_add: int, swap: int = 0) -> WcStatus:
        sges = [self.sge(local, 8)]
        wr = SendWr(opcode, sges, remote_address=remote, rkey=rkey, compare_add=compare_add, swap=swap)
        return self.run(wr).status

    def events_of(self, kind: AsyncEventType, n: int = 1) -> list[AsyncEvent]:
        """The events of one kind: waits until n have come, and returns those beyond as well."""
        found: list[AsyncEvent] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < n and time.monotonic() < deadline:
            found += self._events_now(kind, 0.1)
        self.device.stat()  # answered after all that the server had to tell
        return found + self._events_now(kind, 0.0)

    def _events_now(self, kind: AsyncEventType, timeout_s: float) -> list[AsyncEvent]:
        return [event for event in self.device.events(timeout_s) if event.kind is kind]


class Pair:
    """An owner whose memory is reached, and the peer that reaches for it, in one process."""

    def __init__(self, owner: End, peer: End) -> None:
        self.owner = owner
        self.peer = peer


@contextlib.contextmanager
def connected(
    servers: Servers, path: str, *, path_mtu: int | None = None, caps: QpCaps = CAPS, timeout: int = 14
) -> Iterator[Pair]:
    """Open two devices and connect a queue pair of each."""
    with Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs:
        pair = Pair(End(ours, caps), End(theirs, caps))
        connect(pair.owner.qp, pair.peer.qp, path_mtu=path_mtu, timeout=timeout)
        yield pair


def connect(one: QueuePair, other: QueuePair, *, path_mtu: int | None = None, timeout: int = 14) -> None:
    one.connect(other.endpoint, path_mtu=path_mtu, timeout=timeout)
    other.connect(one.endpoint, path_mtu=path_mtu, timeout=timeout)


def figures(device: Device, kind: str) -> list[dict[str, object]]:
    """The rows of one kind."""
    return [row for row in device.stat() if row["kind"] == kind]


def count(device: Device, name: str) -> int:
    """One count of the device row."""
    return int(str(figures(device, "dev")[0][name]))
