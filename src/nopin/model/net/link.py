"""One direction of a link: packets leave one after the other at line rate, and arrive after a latency.

Packets are sent in batches and arrive in groups, each at the time its last packet is in; a small group costs events,
a large one makes what could be noticed early be noticed late. Packets keep their order, but for those whose fate it
is to be overtaken. Time is counted in picoseconds inside, so that many packets do not add up many roundings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nopin.model.net.fates import Fate, Fates, all_pass
from nopin.model.scheduler import Scheduler
from nopin.nic.wire.batch import PacketBatch
from nopin.units import S_NS, US_NS

_PS = 1000


@dataclass(frozen=True, slots=True)
class LinkLaw:
    """What a link does in what time.

    Attributes:
        bits_per_s: line rate; 0: no limit.
        latency_ns: from the last bit sent to the same bit received.
        frame_bytes: what each packet takes on the wire beside its bytes from base header to ICRC.
        late_ns: how much later an overtaken packet arrives.
        queue_bytes: what may wait to be sent; packets beyond are dropped. None: no limit.
        group_packets: packets that arrive as one.
        cut_through: what comes in at line rate goes on at once, without a second time on the wire.
    """

    bits_per_s: int = 0
    latency_ns: int = 0
    frame_bytes: int = 0
    late_ns: int = 10 * US_NS
    queue_bytes: int | None = None
    group_packets: int = 16
    cut_through: bool = False


@dataclass(slots=True)
class LinkStatistics:
    """Packets since the link was made; `sent` counts those that took line time."""

    sent: int = 0
    lost: int = 0
    duplicated: int = 0
    overtaken: int = 0
    dropped: int = 0


class Link:
    """See above.

    Args:
        name: stable from run to run.
        deliver: called with each group that arrives; what befell packets is done by then.
        fates: what befalls them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        law: LinkLaw,
        deliver: Callable[[PacketBatch], None],
        fates: Fates = all_pass,
    ) -> None:
        self.law = law
        self.statistics = LinkStatistics()
        self.fates = fates
        self._scheduler = scheduler
        self._name = name
        self._deliver = deliver
        self._free_at_ps = 0
        self._under_way: deque[PacketBatch] = deque()

    @property
    def free_at_ns(self) -> int:
        """When everything sent so far has left."""
        return -(-self._free_at_ps // _PS)

    def send(self, batch: PacketBatch) -> None:
        """Send packets, whose buffer is the link's from now on."""
        batch.icrc_checked = True  # nothing here changes a byte
        n_packets = len(batch.offsets)
        for at in range(0, n_packets, self.law.group_packets):
            group = slice(at, at + self.law.group_packets)
            self._send_group(PacketBatch(batch.path, batch.buffer, batch.offsets[group], batch.lengths[group], True))

    def _send_group(self, group: PacketBatch) -> None:
        n_fits = self._n_fitting(group)
        self.statistics.dropped += len(group.offsets) - n_fits
        if n_fits:
            group = group if n_fits == len(group.offsets) else _some(group, list(range(n_fits)))
            self.statistics.sent += n_fits
            self._send_out(group)

    def _send_out(self, group: PacketBatch) -> None:
        takes_ps = self._time_ps(int(group.lengths.sum()) + self.law.frame_bytes * len(group.offsets))
        now_ps = self._scheduler.now_ns * _PS
        self._free_at_ps = max(self._free_at_ps, now_ps - takes_ps if self.law.cut_through else now_ps) + takes_ps
        arrives_ns = self.free_at_ns + self.law.latency_ns
        fates = self.fates(len(group.offsets))
        if fates is None:
            self._arrive(arrives_ns, group)
            return
        self._meet(arrives_ns, group, fates)

    def _meet(self, arrives_ns: int, group: PacketBatch, fates: Sequence[Fate]) -> None:
        """Have packets meet their fates."""
        statistics = self.statistics
        statistics.lost += fates.count(Fate.LOSE)
        statistics.duplicated += fates.count(Fate.TWICE)
        statistics.overtaken += fates.count(Fate.LATE)
        in_time: list[int] = []
        for number, fate in enumerate(fates):
            if fate is Fate.LATE:
                late = _some(group, [number])
                at_ns = arrives_ns + self.law.late_ns
                self._scheduler.call_at(at_ns, f"{self._name} delivers late", partial(self._deliver, late))
            elif fate is not Fate.LOSE:
                in_time += [number] * (1 + (fate is Fate.TWICE))
        if in_time:
            self._arrive(arrives_ns, _some(group, in_time))

    def _arrive(self, at_ns: int, group: PacketBatch) -> None:
        """Deliver in the order of sending, whichever of several timers is taken first."""
        self._under_way.append(group)
        self._scheduler.call_at(at_ns, f"{self._name} delivers", self._deliver_next)

    def _deliver_next(self) -> None:
        self._deliver(self._under_way.popleft())

    def _time_ps(self, n_bytes: int) -> int:
        return n_bytes * 8 * S_NS * _PS // self.law.bits_per_s if self.law.bits_per_s else 0

    def _n_fitting(self, group: PacketBatch) -> int:
        """Count the leading packets that find room in the queue."""
        if self.law.queue_bytes is None or not self.law.bits_per_s:
            return len(group.offsets)
        waits_ps = max(0, self._free_at_ps - self._scheduler.now_ns * _PS)
        queued_bytes = waits_ps * self.law.bits_per_s // (8 * S_NS * _PS)
        ends = np.cumsum(group.lengths + self.law.frame_bytes)
        return int(np.searchsorted(ends, self.law.queue_bytes - queued_bytes, "right"))


def _some(group: PacketBatch, numbers: list[int]) -> PacketBatch:
    """Return some packets of a group, in the order given."""
    return PacketBatch(group.path, group.buffer, group.offsets[numbers], group.lengths[numbers], group.icrc_checked)
