"""V2: a stream of messages whose receiver faults now and then.

What happens is what the real NIC does. The packet whose page is gone draws an RNR NAK; the fault goes through the
fault service; what was in flight behind the packet is dropped; the sender waits out its RNR timer and sends again from
that packet on. Nothing slows down afterwards: loss is no congestion here.

A fault is made by invalidating the page that the next packet in sequence goes to, which leaves the page where it is:
the fault is minor. Faults come at even distances, each at a random place of its stretch.

One parameter is free, the wait of the sender's RNR timer in effect, and was set so that the published rate at f = 2^-12
comes out. It is set for each assumed MTU, because neither MTU nor timer code were published. Down to f = 2^-12 the
stream is run as it is. Beyond, faults are so far apart that the stream is at line rate again long before the next one;
what one costs is then that of f = 2^-12, and the stretch between two is added at the rate that a stream without faults
was measured to have. `test_v2_...` checks the sum against a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nopin.lab.validate.experiment import CALIBRATED, Experiment, Parameter, Row, Settings
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
from nopin.units import PAGE_BYTES, PAGE_SHIFT, US_NS

EXPONENTS = range(8, 20)
CALIBRATED_AT = 12
_MESSAGE_BYTES = 64 << 10
_N_BUFFERS = 32
_RNR_CODE = 1
"""The shortest there is: the wait in effect is the parameter."""


@dataclass(frozen=True)
class Stream:
    """A stream to be run; a point of the experiment.

    Attributes:
        rnr_wait_ns: of the sender.
        spacing: packets from fault to fault; 0: none.
        n_packets: to be sent, whole messages.
    """

    costs: Costs
    mtu: int
    rnr_wait_ns: int
    spacing: int
    n_packets: int
    seed: int = 0


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
        return (self._n_messages * _MESSAGE_BYTES + received) // self._mtu

    def _take_page_away(self, position: int) -> None:
        va = self._va + position * self._mtu % (_N_BUFFERS * _MESSAGE_BYTES)
        page = va >> PAGE_SHIFT
        self._process.begin([Range(page, page + 1)], Cause.MIGRATE).end()


def _part(batch: PacketBatch, which: slice) -> PacketBatch:
    return PacketBatch(batch.path, batch.buffer, batch.offsets[which], batch.lengths[which], batch.icrc_checked)


def run_stream(stream: Stream) -> int:
    """Return how long the stream takes, in nanoseconds, from the first post to the last completion."""
    per_message = _MESSAGE_BYTES // stream.mtu
    link = replace(link_of(stream.costs, stream.mtu), group_packets=per_message)
    machine = Machine(preset=stream.costs, mtu=stream.mtu, link=link)
    costs = replace(stream.costs, rnr_floor_ns=stream.rnr_wait_ns)
    timers = timers_of(costs, park_bound_ns=0)
    ends: list[tuple[Process, int, NicHost, Region, HostClient]] = []
    for name in ("sender", "receiver"):
        process = machine.host(name).spawn_process()
        va = machine.run(process.mmap(_N_BUFFERS * _MESSAGE_BYTES // PAGE_BYTES))
        nic = machine.nic(f"{name} nic", timers=timers, batch_packets=per_message)
        region = nic.register(process, va, _N_BUFFERS * _MESSAGE_BYTES)
        machine.run(nic.prefetch(process, va, _N_BUFFERS * _MESSAGE_BYTES, write=True))
        ends.append((process, va, nic, region, nic.client(depth=64)))
    (_, source, _, local, sender), (process, target, nic, remote, receiver) = ends
    connect(sender.client, receiver.client, mtu=stream.mtu, min_rnr_timer=_RNR_CODE, rnr_retry=7, timeout=20)
    nic.before_receive = _Receiver(stream, process, receiver, target).split
    n_messages = stream.n_packets // per_message
    machine.scheduler.spawn("receives", _receive(receiver, target, remote.lkey, n_messages))
    began_ns = machine.scheduler.now_ns
    machine.run(_send(sender, source, local.lkey, n_messages))
    return machine.scheduler.now_ns - began_ns


def _buffer(va: int, number: int) -> int:
    return va + number % _N_BUFFERS * _MESSAGE_BYTES


def _receive(client: HostClient, va: int, lkey: int, n_messages: int) -> Procedure[None]:
    """Keep the ring full: a buffer is posted again as soon as its message is complete."""
    for number in range(_N_BUFFERS):
        client.post_recv([(_buffer(va, number), _MESSAGE_BYTES, lkey)])
    n_done = 0
    while n_done < n_messages:
        for _, status in (yield from client.completions()):
            assert status is WcStatus.SUCCESS, status
            client.post_recv([(_buffer(va, n_done), _MESSAGE_BYTES, lkey)])
            n_done += 1


def _send(client: HostClient, va: int, lkey: int, n_messages: int) -> Procedure[None]:
    n_posted = n_done = 0
    while n_done < n_messages:
        while n_posted < min(n_messages, n_done + _N_BUFFERS):
            client.post_send(WrOpcode.SEND, [(_buffer(va, n_posted), _MESSAGE_BYTES, lkey)])
            n_posted += 1
        for _, status in (yield from client.completions()):
            assert status is WcStatus.SUCCESS, status
            n_done += 1


@dataclass(frozen=True)
class Curve:
    """Rates of one MTU.

    Attributes:
        packet_ns: a packet of a stream without faults. cost_ns: what a fault adds, by exponent of f.
    """

    mtu: int
    packet_ns: float
    cost_ns: dict[int, float]

    def gbits_per_s(self, exponent: int) -> float:
        """Return the rate at f = 2^-exponent."""
        cost_ns = self.cost_ns.get(exponent, self.cost_ns[max(self.cost_ns)])
        spacing = 1 << exponent
        return self.mtu * 8 * spacing / (spacing * self.packet_ns + cost_ns)

    def half_at(self) -> float:
        """Return log2 of the frequency at which a fault costs as much time as the packets between two."""
        half = self.mtu * 8 / self.packet_ns / 2
        upper = next(each for each in EXPONENTS if self.gbits_per_s(each) >= half)
        low, high = self.gbits_per_s(upper - 1), self.gbits_per_s(upper)
        return -(upper - 1 + (half - low) / (high - low))


def measure(costs: Costs, mtu: int, rnr_wait_ns: int, n_faults: int, seed: int, settings: Settings) -> Curve:
    """Run the streams of one MTU."""
    exponents = [each for each in EXPONENTS if each <= CALIBRATED_AT]
    counts = {each: max(4, n_faults >> (each - EXPONENTS[0])) for each in exponents}
    points = [Stream(costs, mtu, rnr_wait_ns, 1 << each, counts[each] << each, seed) for each in exponents] + [
        Stream(costs, mtu, rnr_wait_ns, 0, n << EXPONENTS[0]) for n in (8, 40)
    ]
    *faulty, short, long = settings.map(run_stream, points)
    packet_ns = (long - short) / (32 << EXPONENTS[0])
    cost_ns = {
        each: (taken - (counts[each] << each) * packet_ns) / counts[each]
        for each, taken in zip(exponents, faulty, strict=True)
    }
    return Curve(mtu, packet_ns, cost_ns)


def _run(settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for mtu in (2048, 4096):
        wait_ns = settings.integer(f"rnr_wait_{mtu}_ns")
        curve = measure(settings.costs, mtu, wait_ns, settings.integer("n_faults"), settings.seed, settings)
        rows += _rows(curve)
    return rows


def _rows(curve: Curve) -> list[Row]:
    name = f"MTU {curve.mtu}"
    line = curve.mtu * 8 / curve.packet_ns
    rows = [Row(f"{name}: no faults", "Gb/s", line, 47.8, 0.01, "D", calibrated=True)]
    for exponent in EXPONENTS:
        label, rate = f"{name}: f=2^-{exponent}", curve.gbits_per_s(exponent)
        if exponent == CALIBRATED_AT:
            rows.append(Row(label, "Gb/s", rate, 19.15, 0.02, "P", calibrated=True))
        else:
            rows.append(Row(label, "Gb/s", rate))
    return [
        *rows,
        Row(f"{name}: half the line rate at f", "log2", curve.half_at()),
        Row(f"{name}: cost of a fault", "us", curve.cost_ns[CALIBRATED_AT] / US_NS),
    ]


EXPERIMENT = Experiment(
    name="V2",
    title="InfiniBand stream with synthetic receive faults",
    machine="connectib56",
    source="Lesokhin et al., NPF, ASPLOS'17, sec 6.4 and Fig 10 right",
    run=_run,
    parameters={
        "rnr_wait_2048_ns": Parameter(2_088_400, "ns", "P", f"{CALIBRATED} at f = 2^-12, for an MTU of 2 KiB"),
        "rnr_wait_4096_ns": Parameter(4_192_800, "ns", "P", f"{CALIBRATED} at f = 2^-12, for an MTU of 4 KiB"),
        "n_faults": Parameter(24, "", "X", "at f = 2^-8; at 2^-9 half as many, and so on, but four"),
    },
    missing="f is taken to count packets. The path MTU is not published: both are run.",
)
