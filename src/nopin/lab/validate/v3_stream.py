"""A TCP stream into a ring whose entries fault now and then: what is lost, and what only waits.

**Backup ring.** A packet whose entry has no page goes to a pinned ring and is copied when the page has come. Those
behind it land in place, but the receiver is shown nothing newer than the oldest open fault, so what it acknowledges
stops, and the sender stops a window later. Nothing is lost.

**Drop.** The entry at the head has no page, so whatever arrives until it has one is dropped: all that is under way.
With nothing behind it to tell, only the sender's timer finds out (RFC 6298), and slow start follows.

The sender is a task of the scheduler, and so is each page on its way. A packet arrives when the link has carried it and
the window allows it; it is shown when those before it have been, and its page is there. Between faults that are far
apart nothing happens, and whole stretches are one step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from random import Random

from nopin.model.costs import Costs
from nopin.model.effects import Gate, Open, Pause, Procedure, Work
from nopin.model.pool import Pool
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.units import S_NS


@dataclass(frozen=True)
class Stream:
    """A point of the experiment.

    Attributes:
        exponent: the fault frequency is 2 ** -exponent a packet. major: the page comes from disk.
        n_faults: after which it ends.
    """

    costs: Costs
    backup: bool
    major: bool
    exponent: int
    payload_bytes: int
    window_bytes: int
    rtt_ns: int
    copy_ns: int
    n_faults: int
    seed: int

    @property
    def packet_ns(self) -> int:
        """Time of a packet on the link."""
        return self.payload_bytes * 8 * S_NS // self.costs.line_rate_bits_per_s

    @property
    def window(self) -> int:
        """Packets that may be under way."""
        return max(2, self.window_bytes // self.payload_bytes)

    @property
    def service_ns(self) -> int:
        """From the fault until its page is there."""
        return self.costs.fault_service_ns(1) + (self.costs.disk_ns if self.major else 0)


def throughput(stream: Stream) -> float:
    """Return the payload throughput, in Gb/s."""
    sender = _BackupSender(stream) if stream.backup else _DropSender(stream)
    sender.scheduler.spawn("sender", sender.sends())
    sender.scheduler.run()
    return sender.n_packets * stream.payload_bytes * 8 / sender.scheduler.now_ns


def _gap(random: Random, frequency: float) -> int:
    """Draw how many packets come up to and with the next one that faults."""
    return 1 + int(log(1 - random.random()) / log(1 - frequency))


class _Sender:
    """What both have in common.

    Attributes:
        n_packets: that were sent, and not in vain.
    """

    def __init__(self, stream: Stream) -> None:
        self.scheduler = Scheduler()
        self.n_packets = 0
        self._stream = stream
        self._random = Streams(stream.seed)["faults"]

    def _gaps(self) -> Iterator[int]:
        """Yield how many packets come up to and with each that faults."""
        for _ in range(self._stream.n_faults):
            yield _gap(self._random, 2.0**-self._stream.exponent)


class _Packet:
    """One that has arrived.

    Attributes:
        ready: its page is there. shown: so were those before it, at `shown_ns`.
    """

    __slots__ = ("ready", "shown", "shown_ns")

    def __init__(self) -> None:
        self.ready = False
        self.shown = Gate()
        self.shown_ns = 0


class _BackupSender(_Sender):
    """Nothing is lost; what is behind an open fault waits to be shown."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        # A disk does one thing at a time.
        self._servers = Pool(1 if stream.major else stream.costs.outstanding_faults)
        self._window: deque[_Packet] = deque(maxlen=stream.window)
        self._unshown: deque[_Packet] = deque()
        self._n_calm = 0
        self._show_all()

    def sends(self) -> Procedure[None]:
        """Send, up to the last packet that faults."""
        stream = self._stream
        for gap in self._gaps():
            left = gap
            while left:
                if self._n_calm > 2 * stream.window and left > 1:  # full speed, and nothing under way that is late
                    yield Work("calm", (left - 1) * stream.packet_ns)
                    self._show_all()
                    self.n_packets, left = self.n_packets + left - 1, 1
                yield from self._send()
                self.n_packets, left = self.n_packets + 1, left - 1
                packet = _Packet()
                self._window.append(packet)
                self._unshown.append(packet)
                if left:
                    self._is_ready(packet)
                else:
                    self._n_calm = 0
                    self.scheduler.spawn("page", self._page(packet))

    def _send(self) -> Procedure[None]:
        """Have one packet arrive: after the one before, and a round trip after the one a window before was shown."""
        stream, oldest, began_ns = self._stream, self._window[0], self.scheduler.now_ns
        if not oldest.shown.is_open:
            yield Pause(oldest.shown)
        yield Work("window", max(0, oldest.shown_ns + stream.rtt_ns - stream.packet_ns - self.scheduler.now_ns))
        self._n_calm = self._n_calm + 1 if self.scheduler.now_ns == began_ns else 0
        yield Work("packet", stream.packet_ns)

    def _page(self, packet: _Packet) -> Procedure[None]:
        yield from self._servers.take()
        yield Work("service", self._stream.service_ns)
        yield from self._servers.give()
        yield Work("copy", self._stream.copy_ns)
        self._is_ready(packet)

    def _is_ready(self, packet: _Packet) -> None:
        packet.ready = True
        while self._unshown and self._unshown[0].ready:
            first = self._unshown.popleft()
            first.shown_ns = self.scheduler.now_ns
            self.scheduler.open(first.shown)

    def _show_all(self) -> None:
        """The last window of packets was shown one after the other, up to now."""
        assert not self._unshown
        for back in range(self._stream.window - 1, -1, -1):
            packet = _Packet()
            packet.ready = packet.shown.is_open = True
            packet.shown_ns = max(0, self.scheduler.now_ns - back * self._stream.packet_ns)
            self._window.append(packet)


class _DropSender(_Sender):
    """Each fault costs all that is under way, a timeout, and a slow start to the window."""

    def sends(self) -> Procedure[None]:
        """Send, up to the last packet that faults."""
        stream, costs = self._stream, self._stream.costs
        window, rto_ns = stream.window, costs.tcp_min_rto_ns
        congestion, threshold = float(window), float(window)
        for gap in self._gaps():
            left = gap
            while congestion < window and left > congestion:
                yield Work("round trip", max(stream.rtt_ns, int(congestion) * stream.packet_ns))
                self.n_packets, left = self.n_packets + int(congestion), left - int(congestion)
                congestion = min(window, congestion * 2 if congestion < threshold else congestion + 1)
                rto_ns = costs.tcp_min_rto_ns
            yield Work("packets", (left - 1) * max(stream.packet_ns, stream.rtt_ns // int(congestion)))
            self.n_packets += left - 1
            if left > 1:
                rto_ns = costs.tcp_min_rto_ns
            page = Gate()
            self.scheduler.spawn("page", self._page(page))
            is_there = False
            while not is_there:  # the first packet sent again may find it still absent
                yield Work("timer", rto_ns)
                rto_ns, is_there = min(2 * rto_ns, costs.tcp_max_rto_ns), page.is_open
                yield Work("round trip", stream.rtt_ns)
            threshold, congestion = max(2.0, congestion / 2), 1.0

    def _page(self, page: Gate) -> Procedure[None]:
        yield Work("service", self._stream.service_ns)
        yield Open(page)
