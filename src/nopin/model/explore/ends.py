"""One end of a connection between modelled hosts, as explored: host, process, NIC, oracle, and what befalls packets."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from nopin.iommu.tickets import TURNS
from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Work
from nopin.model.explore.world import Steps, World
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.net.fates import Fate
from nopin.model.net.network import Network
from nopin.model.net.nic_host import NicHost
from nopin.model.oracle.host_oracle import HostOracle
from nopin.model.oracle.memory import WORD_BYTES, words_of
from nopin.model.oracle.violation import violate
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

LOSSES_MAX = 2
"""Of packets, on either way: a connection gives up after eight in a row."""
DOUBLES_MAX = 1
"""Of packets that come twice, on either way."""


class End:
    """A host, its process, its NIC, and what was seen of them."""

    def __init__(self, world: World, network: Network, number: int) -> None:
        name = ("ours", "theirs")[number]
        self.world = world
        self.oracle = HostOracle(world.note)
        self.seen = Seen(self.oracle.devices)
        self.host = Host(name, world.scheduler, 16, observer=self.oracle)
        self.process = self.host.spawn_process()
        self.nic = NicHost(
            world.scheduler,
            network,
            f"nic of {name}",
            f"10.0.0.{number + 1}",
            draw=Random(number).randrange,
            batch_packets=4,
            observer=self.seen,
            queue_limit=1,
            fates=self._fates,
        )
        self.n_lost = self.n_doubled = 0
        self.va = self.at = 0
        self.deregistered = False

    def _fates(self, n_packets: int) -> Sequence[Fate]:
        """Lose a packet on its way here now and then, but not as many as make a connection give up; or double one."""
        return [self._fate() for _ in range(n_packets)]

    def _fate(self) -> Fate:
        if self.n_lost < LOSSES_MAX and self.world.may(f"loss on the way to the {self.nic.name}"):
            self.n_lost += 1
            return Fate.LOSE
        if self.n_doubled < DOUBLES_MAX and self.world.may(f"a packet comes twice to the {self.nic.name}"):
            self.n_doubled += 1
            return Fate.TWICE
        return Fate.PASS

    def prepare(self, words: bytes) -> Steps:
        """Map two pages, and write where transfers go: as much in one page as in the other."""
        self.va = yield from self.process.mmap(2)
        self.at = self.va + PAGE_BYTES - len(words) // 2
        yield from self.process.store(self.at, words)
        self.region = self.nic.register(self.process, self.va, 2 * PAGE_BYTES)

    def deregister(self) -> Steps:
        """Take the region away; from here on nothing reaches the process."""
        yield Work("deregisters")
        self.nic.deregister(self.region)
        self.deregistered = True
        self.seen.shut = "its region was deregistered"

    def check(self) -> None:
        """Check what holds when nothing is under way."""
        self.oracle.check_idle()
        self.host.check()
        self.nic.attachment(self.process).mirror.check()
        for _ in range(TURNS + 2):
            self.nic.iommu.take_wakeups()  # who does not come for its pages loses them after so many turns
        requests, tickets = self.nic.iommu._requests, self.nic.iommu._managed._tickets
        if len(requests) or requests.n_backlogged or len(tickets):
            violate("unbalanced", f"{self.nic.name} has {len(requests)} page requests and {len(tickets)} tickets left")


class Seen(DeviceObserver):
    """What a NIC read and wrote, told to an oracle as well.

    Attributes:
        read, written: (address, value) of each word.
        shut: why no access is allowed any more; empty while some is.
    """

    def __init__(self, oracle: DeviceObserver) -> None:
        self._oracle = oracle
        self.read: set[tuple[int, int]] = set()
        self.written: set[tuple[int, int]] = set()
        self.shut = ""

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check(device, va)
        self._oracle.device_read(device, process, va, frame, data)
        self.read.update(words_of(va, data))

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check(device, va)
        self._oracle.device_wrote(device, process, va, frame, data)
        self.written.update(words_of(va, data))

    def fault_raised(self, device: str, process: Process, pages: PageRun, *, write: bool) -> None:
        """See `DeviceObserver`."""
        self._oracle.fault_raised(device, process, pages, write=write)

    def fault_answered(self, device: str, process: Process, pages: PageRun, reason: Reason | None) -> None:
        """See `DeviceObserver`."""
        self._oracle.fault_answered(device, process, pages, reason)

    def invalidation_returned(self, process: Process, device: str, pages: Sequence[Range], cause: Cause) -> None:
        """See `DeviceObserver`."""
        self._oracle.invalidation_returned(process, device, pages, cause)

    def _check(self, device: str, va: int) -> None:
        if self.shut:
            violate("stale_access", f"{device} reaches {va:#x}, and {self.shut}")


def check_moved(
    read: set[tuple[int, int]], source: int, written: set[tuple[int, int]], target: int, length: int
) -> None:
    """Of a transfer that is done: each word was written where it belongs, as it was read at that place.

    Args:
        read: words that were read, as (address, value); `written` likewise.
    """
    for offset in range(0, length, WORD_BYTES):
        there = {value for va, value in written if va == target + offset}
        if not there:
            violate("completion_without_bytes", f"done, and the word at {target + offset:#x} was not written")
        if not there & {value for va, value in read if va == source + offset}:
            violate("wrong_bytes", f"the word at {target + offset:#x} was never at {source + offset:#x}")
