"""Links within one process, for tests: no socket, no clock, nothing lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from nopin.nic.wire.batch import ROCE_PORT, Endpoint, PacketBatch, TxBatch
from nopin.nic.wire.gid import gid_of


class MemoryNetwork:
    """Delivers packets between the links made by it; those to nobody are counted and gone.

    Attributes:
        undeliverable: batches sent to an endpoint that no link has.
    """

    def __init__(self) -> None:
        self._links: dict[Endpoint, MemoryLink] = {}
        self.undeliverable = 0

    def link(self, endpoint: Endpoint, mtu: int = 4096) -> MemoryLink:
        """A new link that has this endpoint."""
        made = MemoryLink(self, endpoint, mtu)
        self._links[endpoint] = made
        return made

    def deliver(self, destination: Endpoint, batch: PacketBatch) -> None:
        """Queue a batch at its destination."""
        target = self._links.get(destination)
        if target is None:
            self.undeliverable += 1
            return
        target.arrived.append(batch)

    def forget(self, endpoint: Endpoint) -> None:
        """Remove a link."""
        self._links.pop(endpoint, None)


class MemoryLink:
    """One end; `arrived` holds what was sent to it, in order."""

    def __init__(self, network: MemoryNetwork, endpoint: Endpoint, mtu: int) -> None:
        self.endpoint = endpoint
        self.mtu = mtu
        self.arrived: deque[PacketBatch] = deque()
        self._network = network
        self._packets_sent = 0
        self._packets_received = 0

    def send(self, batch: TxBatch, now: int) -> None:
        """Copy the packets to the other end."""
        if not batch.segments:
            return
        arrived = batch.arrived()
        self._packets_sent += len(arrived.offsets)
        self._network.deliver(batch.path.remote, arrived)

    def receive(self, now: int) -> Iterator[PacketBatch]:
        """What had arrived when this was called."""
        for _ in range(len(self.arrived)):
            batch = self.arrived.popleft()
            self._packets_received += len(batch.offsets)
            yield batch

    def filenos(self) -> list[int]:
        """None: look at `arrived`."""
        return []

    def next_deadline(self) -> int | None:
        """Never: nothing is held back."""
        return None

    def close(self) -> None:
        """Leave the network; packets to this end are undeliverable from now on."""
        self._network.forget(self.endpoint)
        self.arrived.clear()

    def statistics(self) -> dict[str, int]:
        """Packets each way."""
        return {"packets_sent": self._packets_sent, "packets_received": self._packets_received}


def memory_pair() -> tuple[MemoryLink, MemoryLink]:
    """Two connected ends, 192.0.2.1 and 192.0.2.2, both on port 4791."""
    network = MemoryNetwork()
    first, second = (Endpoint(gid_of(f"192.0.2.{n}"), ROCE_PORT) for n in (1, 2))
    return network.link(first), network.link(second)
