"""A TCP stream into a ring whose entries fault now and then: what is lost, and what only waits.

**Backup ring.** A packet whose entry has no page goes to a pinned ring and is copied when the page has come. Those
behind it land in place, but the receiver is shown nothing newer than the oldest open fault, so what it acknowledges
stops, and the sender stops a window later. Nothing is lost.

**Drop.** The entry at the head has no page, so whatever arrives until it has one is dropped: all that is under way.
With nothing behind it to tell, only the sender's timer finds out (RFC 6298), and slow start follows.

The stream is a recurrence over packets: one arrives when the link has carried it and the window allows it; it is shown
when those before it have been, and its page is there. Between faults that are far apart nothing happens, and whole
stretches are stepped over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import log
from random import Random

from nopin.model.costs import Costs
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
    n_packets, took_ns = _with_backup(stream) if stream.backup else _with_drops(stream)
    return n_packets * stream.payload_bytes * 8 / took_ns


def _gap(random: Random, frequency: float) -> int:
    """Draw how many packets come up to and with the next one that faults."""
    return 1 + int(log(1 - random.random()) / log(1 - frequency))


def _with_backup(stream: Stream) -> tuple[int, int]:
    random, frequency = Streams(stream.seed)["faults"], 2.0**-stream.exponent
    window, packet_ns = stream.window, stream.packet_ns
    shown_ns = deque([0] * window, maxlen=window)  # of the last packets, oldest first
    servers_ns = [0] * (1 if stream.major else stream.costs.outstanding_faults)  # a disk does one thing at a time
    arrived_ns, n_packets, n_calm = 0, 0, 0
    for _ in range(stream.n_faults):
        left = _gap(random, frequency)
        while left:
            if n_calm > 2 * window and left > 1:  # full speed, and nothing under way that is late
                arrived_ns += (left - 1) * packet_ns
                shown_ns.extend(arrived_ns - back * packet_ns for back in range(window - 1, -1, -1))
                n_packets, left = n_packets + left - 1, 1
                continue
            late_ns = max(arrived_ns + packet_ns, shown_ns[0] + stream.rtt_ns)
            n_calm = n_calm + 1 if late_ns == arrived_ns + packet_ns else 0
            arrived_ns, left, n_packets = late_ns, left - 1, n_packets + 1
            ready_ns = arrived_ns
            if not left:
                ready_ns = _serve(servers_ns, arrived_ns, stream.service_ns) + stream.copy_ns
                n_calm = 0
            shown_ns.append(max(shown_ns[-1], ready_ns))
    return n_packets, max(arrived_ns, shown_ns[-1])


def _serve(servers_ns: list[int], at_ns: int, service_ns: int) -> int:
    """Have the server that is free first serve; returns when it is done."""
    index = servers_ns.index(min(servers_ns))
    servers_ns[index] = max(servers_ns[index], at_ns) + service_ns
    return servers_ns[index]


def _with_drops(stream: Stream) -> tuple[int, int]:
    """Each fault costs all that is under way, a timeout, and a slow start to the window."""
    random, frequency = Streams(stream.seed)["faults"], 2.0**-stream.exponent
    costs, window = stream.costs, stream.window
    now_ns, n_packets, n_faults, rto_ns = 0, 0, 0, costs.tcp_min_rto_ns
    congestion, threshold = float(window), float(window)
    while n_faults < stream.n_faults:
        left = _gap(random, frequency)
        n_faults += 1
        while congestion < window and left > congestion:  # a round trip at a time
            now_ns += max(stream.rtt_ns, int(congestion) * stream.packet_ns)
            n_packets, left = n_packets + int(congestion), left - int(congestion)
            congestion = min(window, congestion * 2 if congestion < threshold else congestion + 1)
            rto_ns = costs.tcp_min_rto_ns
        now_ns += (left - 1) * max(stream.packet_ns, stream.rtt_ns // int(congestion))
        n_packets += left - 1
        if left > 1:
            rto_ns = costs.tcp_min_rto_ns
        while True:  # the first packet sent again may find the page still absent
            now_ns += rto_ns + stream.rtt_ns
            resolved = rto_ns >= stream.service_ns
            rto_ns = min(2 * rto_ns, costs.tcp_max_rto_ns)
            if resolved:
                break
        threshold, congestion = max(2.0, congestion / 2), 1.0
    return n_packets, now_ns
