"""A peer that knows everything and means no good: a NIC of this process behind a UDP socket of its own.

It can talk sense (its queue pairs are legitimately connected to the victim's) and nonsense, and both leave from the
same address.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np

from nopin import QueuePair
from nopin.iommu.iommu import Iommu
from nopin.link.udp import UdpLink
from nopin.mm.space import Staging
from nopin.nic.abi import QpState, WcStatus, WrOpcode
from nopin.nic.attributes import AddressVector, QpAttr
from nopin.nic.nic import Nic
from nopin.nic.plan import segments_of
from nopin.nic.wire.batch import Endpoint, Path, TxBatch
from nopin.testing.packets import Flood
from nopin.testing.pair import ALL_RIGHTS, Side, make_side
from nopin.verbs.qp import QpEndpoint

MTU = 1024
PATIENCE_S = 10.0
_FIRST_PSN = 0xFFFF00


class HostilePeer:
    """The NIC and its link. Close it when done."""

    def __init__(self, address: str, victim: Endpoint) -> None:
        self.link = UdpLink(address, 0)
        self.path = Path(self.link.endpoint, victim)
        self._iommu = Iommu()
        draw = random.Random(address).randrange
        self.nic = Nic(iommu=self._iommu, endpoint=self.link.endpoint, mtu=MTU, draw=draw)
        self.n_sent = 0

    def connect(self, theirs: QueuePair) -> Side:
        """Make a queue pair and connect it with a victim's, both up to RTS."""
        side = make_side("", seed=7, n_pages=4, nic=self.nic, iommu=self._iommu)
        to = theirs.endpoint
        av = AddressVector(gid=to.gid, port=to.port)
        steps = (
            QpAttr(state=QpState.INIT, pkey_index=0, port_num=1, access=int(ALL_RIGHTS)),
            QpAttr(
                state=QpState.RTR,
                av=av,
                path_mtu=MTU,
                dest_qpn=to.qpn,
                rq_psn=to.psn,
                max_dest_rd_atomic=16,
                min_rnr_timer=12,
            ),
            QpAttr(state=QpState.RTS, timeout=14, retry_cnt=7, rnr_retry=7, sq_psn=_FIRST_PSN, max_rd_atomic=16),
        )
        for attr in steps:
            self.nic.modify_qp(side.qp, attr, time.monotonic_ns())
        us = self.link.endpoint
        theirs.connect(QpEndpoint(us.gid, us.port, side.qp.qpn, _FIRST_PSN), path_mtu=MTU)
        return side

    def pump(self, until: Callable[[], bool]) -> bool:
        """Do what a device server does until a condition holds; False if it does not come to hold."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            now = time.monotonic_ns()
            for batch in self.link.receive(now):
                self.nic.receive(batch, now)
            self.nic.poll_rings(now)
            for out in self.nic.transmit(now):
                self.n_sent += sum(-(-segment.length // segment.stride) for segment in out.segments)
                self.link.send(out, now)
            due = self.nic.next_deadline()
            if due is not None and due <= now:
                self.nic.on_deadline(now)
            if time.monotonic() > deadline:
                return False
        return True

    def write(self, side: Side, address: int, rkey: int, data: bytes) -> WcStatus:
        """Carry out one well-meant WRITE and return how it ended."""
        side.space.memory[: len(data)] = np.frombuffer(data, np.uint8)
        side.post(WrOpcode.RDMA_WRITE, 0, len(data), remote=address, rkey=rkey)
        done: list[WcStatus] = []

        def ended() -> bool:
            done.extend(status for _, status in side.poll())
            return bool(done)

        assert self.pump(ended), "neither success nor error: the queue pair hangs"
        return done[0]

    def send_flood(self, flood: Flood) -> None:
        """Send packets as they are."""
        buffer, offsets, lengths = flood
        self.n_sent += len(offsets)
        self.link.send(TxBatch(self.path, Staging(buffer), segments_of(offsets, lengths)), time.monotonic_ns())

    def drain(self) -> None:
        """Throw away what came back."""
        for _ in self.link.receive(time.monotonic_ns()):
            pass

    def close(self) -> None:
        self.link.close()
