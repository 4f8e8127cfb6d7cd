"""A network: one switch, and a link each way between it and every host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nopin.model.net.fates import Fates, all_pass
from nopin.model.net.link import Link, LinkLaw
from nopin.model.scheduler import Scheduler
from nopin.nic.wire.batch import Endpoint, PacketBatch, TxBatch


class Port:
    """A host's way into the network and out of it.

    Attributes:
        up: to the switch. down: from it; it queues where several send to one host.
    """

    def __init__(self, network: Network, up: Link, down: Link) -> None:
        self.up, self.down = up, down
        self._network = network

    def send(self, batch: TxBatch) -> None:
        """Send packets; the batch's buffer is free when this returns."""
        if batch.segments:
            self.up.send(batch.arrived())


class Network:
    """See above.

    Args:
        law: of each host's links; half of the latency is spent on either side of the switch.

    Attributes:
        undeliverable: packets to an endpoint that nobody has.
    """

    def __init__(self, scheduler: Scheduler, law: LinkLaw | None = None) -> None:
        self.undeliverable = 0
        self._scheduler = scheduler
        self._law = law or LinkLaw()
        self._ports: dict[Endpoint, Port] = {}

    def attach(
        self, name: str, endpoint: Endpoint, arrived: Callable[[PacketBatch], None], fates: Fates = all_pass
    ) -> Port:
        """Give a host its links.

        Args:
            arrived: called with packets for it.
            fates: what befalls packets on their way to it.
        """
        assert endpoint not in self._ports, f"two NICs have {endpoint}"
        early = self._law.latency_ns // 2
        up = replace(self._law, latency_ns=early)
        down = replace(self._law, latency_ns=self._law.latency_ns - early, cut_through=True)
        port = Port(
            self,
            Link(self._scheduler, f"{name} up", up, self._switch),
            Link(self._scheduler, f"{name} down", down, arrived, fates),
        )
        self._ports[endpoint] = port
        return port

    def detach(self, endpoint: Endpoint) -> None:
        """Have nobody there. What was sent from there is still on its way, and arrives."""
        del self._ports[endpoint]

    def _switch(self, batch: PacketBatch) -> None:
        port = self._ports.get(batch.path.local)
        if port is None:
            self.undeliverable += len(batch.offsets)
            return
        port.down.send(batch)
