"""A one-way stream of messages between two modelled hosts, whose receiver's pages go away now and then.

All of it is the real NIC: what it does about a fault depends on its timer laws alone. With a bound of nothing it sends
an RNR NAK at once, as hardware does; with one that is longer than a fault it parks: it keeps what arrives, and the
acknowledgement is late.

A fault is made by invalidating the page that the next packet in sequence goes to, which leaves the page where it is:
the fault is minor. Faults come at even distances, each at a random place of its stretch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nopin.mm.causes import Cause
from nopin.model.costs import Costs
from nopin.model.effects import Procedure
from nopin.model.host.process import Process
from nopin.model.machine import Machine, link_of, timers_of
from nopin.model.net.client import connect
from nopin.model.net.nic_host import HostClient, NicHost
from nopin.model.streams import Streams
from nopin.nic.abi import WcStatus, WrOpcode
from nopin.nic.mr import Region
from nopin.nic.wire.batch import PacketBatch
from nopin.nic.wire.bth import Bth
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_SHIFT

MESSAGE_BYTES = 64 << 10
_N_BUFFERS = 32


@dataclass(frozen=True)
class Stream:
    """A stream to be run.

    Attributes:
        costs: of the machine; its timer laws, too.
        rnr_code: that the receiver asks for.
        park_bound_ns: how long it parks before it does.
        spacing: packets from fault to fault; 0: none.
        n_packets: to be sent, whole messages.
    """

    costs: Costs
    mtu: int
    rnr_code: int
    park_bound_ns: int
    spacing: int
    n_packets: int
    seed: int = 0


@dataclass(frozen=True)
class Streamed:
    """What came of it.

    Attributes:
        taken_ns: from the first post to the last completion.
        latency_ns: of each message, from its post to its completion.
        n_resent: packets sent again. n_rnr_naks: sent by the receiver. n_faults: it had.
    """

    taken_ns: int
    latency_ns: list[int]
    n_resent: int
    n_rnr_naks: int
    n_faults: int


class _Receiver:
    """Counts packets in sequence, and takes pages away from those whose turn it is."""

    def __init__(self, stream: Stream, process: Process, client: HostClient, va: int) -> None:
        self._mtu = stream.mtu
        self._process = process
        self._qp = client.client.qp
        self._va = va
        self._draws = Streams(stream.seed)["faults"]
        self._spacing = stream.spacing
        self._n_messages = 0
        self._msn_before = self._qp.recv.msn
        self._n_drawn = 0
        self._next = self._draw()

    def split(self, batch: PacketBatch) -> list[PacketBatch]:
        """Return a batch as the NIC is to have it: cut before the packet that faults, whose page is then gone."""
        if Bth.parse(batch.buffer.data, int(batch.offsets[0])).psn != self._qp.recv.epsn:
            return [batch]
        at = self._position()
        if not self._spacing or self._next >= at + len(batch.offsets):
            return [batch]
        cut = max(0, self._next - at)
        self._next = self._draw()
        self._take_page_away(at + cut)
        return [_part(batch, slice(0, cut)), _part(batch, slice(cut, None))] if cut else [batch]

    def _draw(self) -> int:
        self._n_drawn += 1
        return (self._n_drawn - 1) * self._spacing + self._draws.randrange(max(1, self._spacing))

    def _position(self) -> int:
        """Return how many packets came in sequence so far."""
        side = self._qp.recv
        self._n_messages += (side.msn - self._msn_before) % (1 << 24)
        self._msn_before = side.msn
        received = side.inbound.received if side.inbound is not None else 0
        return (self._n_messages * MESSAGE_BYTES + received) // self._mtu

    def _take_page_away(self, position: int) -> None:
        va = self._va + position * self._mtu % (_N_BUFFERS * MESSAGE_BYTES)
        page = va >> PAGE_SHIFT
        self._process.begin([Range(page, page + 1)], Cause.MIGRATE).end()


def _part(batch: PacketBatch, which: slice) -> PacketBatch:
    return PacketBatch(batch.path, batch.buffer, batch.offsets[which], batch.lengths[which], batch.icrc_checked)


def run_stream(stream: Stream) -> Streamed:
    """Run a stream from one host to another; both have all their memory in their NIC's mirror when it begins."""
    per_message = MESSAGE_BYTES // stream.mtu
    link = replace(link_of(stream.costs, stream.mtu), group_packets=per_message)
    machine = Machine(preset=stream.costs, mtu=stream.mtu, link=link)
    timers = timers_of(stream.costs, park_bound_ns=stream.park_bound_ns)
    ends: list[tuple[Process, int, NicHost, Region, HostClient]] = []
    for name in ("sender", "receiver"):
        process = machine.host(name).spawn_process()
        va = machine.run(process.mmap(_N_BUFFERS * MESSAGE_BYTES // PAGE_BYTES))
        nic = machine.nic(f"{name} nic", timers=timers, batch_packets=per_message)
        region = nic.register(process, va, _N_BUFFERS * MESSAGE_BYTES)
        machine.run(nic.prefetch(process, va, _N_BUFFERS * MESSAGE_BYTES, write=True))
        ends.append((process, va, nic, region, nic.client(depth=64)))
    (_, source, from_nic, local, sender), (process, target, nic, remote, receiver) = ends
    connect(sender.client, receiver.client, mtu=stream.mtu, min_rnr_timer=stream.rnr_code, rnr_retry=7, timeout=20)
    nic.before_receive = _Receiver(stream, process, receiver, target).split
    n_messages = stream.n_packets // per_message
    machine.scheduler.spawn("receives", _receive(receiver, target, remote.lkey, n_messages))
    began_ns = machine.scheduler.now_ns
    latency_ns = machine.run(_send(sender, source, local.lkey, n_messages, lambda: machine.scheduler.now_ns))
    return Streamed(
        taken_ns=machine.scheduler.now_ns - began_ns,
        latency_ns=latency_ns,
        n_resent=from_nic.nic.counters.resent_pkts,
        n_rnr_naks=nic.nic.counters.sent_rnr_nak,
        n_faults=nic.attachment(process).faults.n_faults - 1,
    )


def _buffer(va: int, number: int) -> int:
    return va + number % _N_BUFFERS * MESSAGE_BYTES


def _receive(client: HostClient, va: int, lkey: int, n_messages: int) -> Procedure[None]:
    """Keep the ring full: a buffer is posted again as soon as its message is complete."""
    for number in range(_N_BUFFERS):
        client.post_recv([(_buffer(va, number), MESSAGE_BYTES, lkey)])
    n_done = 0
    while n_done < n_messages:
        for _, status in (yield from client.completions()):
            assert status is WcStatus.SUCCESS, status
            client.post_recv([(_buffer(va, n_done), MESSAGE_BYTES, lkey)])
            n_done += 1


def _send(client: HostClient, va: int, lkey: int, n_messages: int, now: Callable[[], int]) -> Procedure[list[int]]:
    """Keep as many messages posted as there are buffers; returns how long each took, in nanoseconds."""
    posted_ns: list[int] = []
    taken_ns: list[int] = []
    while len(taken_ns) < n_messages:
        while len(posted_ns) < min(n_messages, len(taken_ns) + _N_BUFFERS):
            client.post_send(WrOpcode.SEND, [(_buffer(va, len(posted_ns)), MESSAGE_BYTES, lkey)])
            posted_ns.append(now())
        for _, status in (yield from client.completions()):
            assert status is WcStatus.SUCCESS, status
            taken_ns.append(now() - posted_ns[len(taken_ns)])
    return taken_ns
