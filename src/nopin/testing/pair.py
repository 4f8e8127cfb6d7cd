"""Two NICs wired together in memory, in virtual time: a conversation as a test reads it.

Each `Side` plays client and server in one: it owns an address space, rings and the NIC. `Pair.run` moves packets to
and fro until nothing moves any more, letting time jump to the next timer; a `Wire` may drop or change packets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Unpack

import numpy as np

from nopin.iommu.iommu import Iommu
from nopin.model.net.client import (
    ALL_RIGHTS,
    Client,
    ConnectOptions,
    SendOptions,
    connect,
    make_client,
    no_fence,
    send_entry,
)
from nopin.nic.abi import Access, Discipline, WrOpcode
from nopin.nic.mr import Region
from nopin.nic.nic import Nic
from nopin.nic.wire.batch import Endpoint, PacketBatch, Path, TxBatch
from nopin.nic.wire.gid import gid_of
from nopin.testing.memory_space import MemorySpace
from nopin.testing.paged_arena import run_through

__all__ = ["ALL_RIGHTS", "Client", "Pair", "Side", "connect", "make_pair", "make_side", "no_fence", "send_entry"]

Wire = Callable[[bytes, int], list[bytes]]
"""Takes a packet and its number, returns what arrives in its place."""


@dataclass
class Side(Client):
    """One end: a NIC with one address space, one region over all of it, and one queue pair."""

    iommu: Iommu
    space: MemorySpace
    region: Region
    answer_faults: bool = True
    counts: dict[str, int] = field(default_factory=dict)

    def post(
        self,
        opcode: WrOpcode,
        offset: int = 0,
        length: int = 0,
        *,
        to: Region | None = None,
        at: int = 0,
        **more: Unpack[SendOptions],
    ) -> None:
        """Post one send; local memory is [offset, offset + length) of our region, remote is `at` in region `to`."""
        sges = [(self.region.iova + offset, length, self.region.lkey)] if length else []
        options: SendOptions = {} if to is None else {"remote": to.iova + at, "rkey": to.rkey}
        options.update(more)
        self.sends.post([send_entry(opcode, sges, **options)])

    def post_recv(self, offset: int, length: int, wr_id: int = 0) -> None:
        """Post one receive into [offset, offset + length) of our region."""
        sges = [(self.region.iova + offset, length, self.region.lkey)] if length else []
        self.post_receive(sges, wr_id=wr_id)


def make_side(
    name: str,
    *,
    seed: int,
    n_pages: int = 1024,
    access: Access = ALL_RIGHTS,
    iova: int | None = None,
    discipline: Discipline = Discipline.ON_DEMAND,
    depth: int = 256,
    max_inline: int = 256,
    nic: Nic | None = None,
    iommu: Iommu | None = None,
) -> Side:
    """Build one end, in RESET. Give `nic` and `iommu` to put a second client on an existing device."""
    iommu = iommu or Iommu()
    nic = nic or Nic(iommu=iommu, endpoint=Endpoint(gid_of(name), 4791), mtu=4096, draw=random.Random(seed).randrange)
    base = 0x10_0000_0000 + seed * 0x1_0000_0000
    space = MemorySpace(base, n_pages)
    pd = nic.alloc_pd()
    region = nic.register(
        pd,
        pasid=iommu.bind(space),
        address=base,
        length=len(space.memory),
        iova=base if iova is None else iova,
        access=access,
        discipline=discipline,
    )
    client = make_client(nic, pd, depth=depth, max_inline=max_inline)
    return Side(**vars(client), iommu=iommu, space=space, region=region)


class Pair:
    """Two connected ends and the wire between them."""

    def __init__(self, a: Side, b: Side, wire: Wire | None = None) -> None:
        self.a, self.b = a, b
        self.wire = wire
        self.now = 0
        self.n_packets = 0
        self.log: list[bytes] = []

    def run(self, limit_ns: int = 20_000_000_000) -> None:
        """Move packets and time until nothing is left to do, or virtual time passes the limit."""
        end = self.now + limit_ns
        while self.now < end:
            if self._step():
                continue
            deadlines = [at for at in (side.nic.next_deadline() for side in (self.a, self.b)) if at is not None]
            if not deadlines:
                return
            self.now = max(self.now, min(deadlines))
            for side in (self.a, self.b):
                side.nic.on_deadline(self.now)

    def _step(self) -> bool:
        moved = False
        for us, them in ((self.a, self.b), (self.b, self.a)):
            moved |= us.nic.poll_rings(self.now)
            for batch in us.nic.transmit(self.now):
                moved = True
                self._deliver(batch, them)
            moved |= us.nic.busy
            if us.answer_faults:
                moved |= answer_faults(us, self.now)
        return moved

    def _deliver(self, batch: TxBatch, them: Side) -> None:
        packets: list[bytes] = []
        for offset, length, stride in batch.segments:
            for at in range(offset, offset + length, stride):
                packet = batch.staging.array[at : min(at + stride, offset + length)].tobytes()
                packets += self.wire(packet, self.n_packets) if self.wire else [packet]
                self.n_packets += 1
        self.log += packets
        if packets:
            path = Path(batch.path.remote, batch.path.local)
            them.nic.receive(batch_of(packets, path), self.now)


def batch_of(packets: list[bytes], path: Path) -> PacketBatch:
    """Put packets into one buffer, as a link would."""
    lengths = np.array([len(p) for p in packets], np.int64)
    ends = np.cumsum(lengths)
    buffer = np.frombuffer(b"".join(packets), np.uint8).copy()
    return PacketBatch(path, buffer, ends - lengths, lengths)


def answer_faults(side: Side, now: int) -> bool:
    """Do what workers and pagers do: fault the pages in and resume who waited."""
    for request in side.iommu.take_requests():
        space = side.iommu.space(request.pasid)
        assert space is not None
        side.iommu.respond(request, space.fault(request.start, request.end, write=request.write))
    for fault in side.iommu.take_faults():
        run_through(fault.procedure)
    woken = side.iommu.take_wakeups()
    side.nic.resume(woken, now)
    return bool(woken)


def make_pair(wire: Wire | None = None, **options: Unpack[ConnectOptions]) -> Pair:
    """Build two ends and connect them; options go to `connect`."""
    a, b = make_side("10.0.0.1", seed=1), make_side("10.0.0.2", seed=2, iova=0x7000_0123)
    connect(a, b, **options)
    return Pair(a, b, wire)
