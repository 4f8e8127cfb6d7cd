"""Managed memory's own order of eviction, with and without what devices tell.

The pager of managed memory never sees a CPU's accesses to mapped pages, only that a page came back soon after it had
left (2Q with refault distances, `mm/residency.py`). Of devices it can see more: their mirrors have young bits. A device
reads hot pages at random while a program goes through a large array; memory holds so many pages. *with_young* asks the
mirror, *without* does not, and has only refaults to tell hot from cold. Order, budget, notifiers and mirror are the
real ones; media and faults cost what the machine's do.
"""

from __future__ import annotations

import numpy as np

from nopin.errors import UsageError
from nopin.iommu.mirror import Mirror
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.notifier import Notifiers
from nopin.mm.page_table import PageState
from nopin.mm.residency import Budget, Residency, runs_of
from nopin.model.costs import Costs
from nopin.model.effects import Acquire, Lock, Procedure, Release, Work
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.ranges import Range
from nopin.units import S_NS


class _Memory:
    """Pages of which some are resident; answers the device's faults."""

    def __init__(self, n_pages: int, n_resident: int, costs: Costs, *, asks_devices: bool) -> None:
        self.notifiers = Notifiers()
        self.budget = Budget(n_resident)
        self.states = np.full(n_pages, PageState.SWAPPED, np.uint8)
        self.residency = Residency(self.states, self.budget)
        self._costs = costs
        self._asks_devices = asks_devices
        self._lock = Lock("pager")

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """See `DeviceFaults`."""
        del write
        yield Work("device fault", self._costs.fault_service_ns(pages.n))
        for page in range(pages.first, pages.end):
            yield from self.bring(page)
        self.residency.hold(pages)
        return FaultPages(pages.n)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """See `DeviceFaults`: nothing is settled at once here."""
        del pages, write
        return False

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        """See `DeviceFaults`: nor is anything made so."""
        del pages, write
        yield from ()
        return False

    def release(self, pages: PageRun) -> None:
        """End one hold."""
        self.residency.unhold(pages)

    def bring(self, page: int) -> Procedure[None]:
        """Make a page resident, at the cost of another if need be."""
        yield Acquire(self._lock)
        if self.states[page] != PageState.RESIDENT:
            while self.budget.room < 1:
                self._evict()
            yield Work("read", self._costs.major_fault_ns)
            self.states[page] = PageState.RESIDENT
            self.budget.charge(1)
            self.residency.admit(PageRun(page, 1))
        yield Release(self._lock)

    def _evict(self) -> None:
        n_most = max(1, self.budget.n_pages // 64)
        victims = self.residency.victims(n_most, self._young, hot=True)
        assert len(victims), "everything is held"
        ranges = [Range(run.first, run.end) for run in runs_of(victims)]
        self.notifiers.invalidate_start(ranges, Cause.RECLAIM).end()
        self.states[victims] = PageState.SWAPPED
        self.residency.evicted(victims)
        self.budget.charge(-len(victims))

    def _young(self, ranges: list[Range]) -> set[int]:
        return self.notifiers.age(ranges) if self._asks_devices else set()


def measure(point: Point) -> Measures:
    """Run device and program together, until the program is through."""
    scheduler, costs = Scheduler(), point.costs
    n_resident, n_cold = point["memory_pages"], point["scanned_pages"]
    if 2 * point["readers"] > n_resident:
        raise UsageError(f"readers={point['readers']} each hold a page; memory_pages must be twice as many")
    n_hot = n_resident * point["hot_permille"] // 1000
    memory = _Memory(n_hot + n_cold, n_resident, costs, asks_devices=point.discipline == "with_young")
    mirror = Mirror(memory.notifiers, memory, n_hot + n_cold)
    random, n_reads = Streams(point.seed)["accesses"], [0]

    def scans() -> Procedure[None]:
        for page in range(n_hot, n_hot + n_cold):
            yield from memory.bring(page)
            yield Work("think", point["scan_ns"])

    def reads() -> Procedure[None]:
        while not scan.ended:
            page = random.randrange(n_hot)
            while not mirror.use(page, 1, write=False):
                came = yield from mirror.fill(PageRun(page, 1), write=False)
                mirror.unhold(PageRun(page, 1), came)
            yield Work("read", costs.send_4k_ns)
            n_reads[0] += 1

    scan = scheduler.spawn("scan", scans())
    for reader in range(point["readers"]):
        scheduler.spawn(f"reader {reader}", reads())
    scheduler.run()
    n_faults = mirror.statistics().fills
    return {
        "device_reads_per_s": n_reads[0] * S_NS / scheduler.now_ns,
        "device_faults": n_faults,
        "faulting_permille": 1000 * n_faults / n_reads[0],
        "refaults": memory.residency.n_refaults,
        "scan_ms": scheduler.now_ns / 1e6,
    }


SCENARIO = Scenario(
    name="residency",
    question="What do young bits of devices add to an order of eviction that knows refaults?",
    machine="connectib56",
    disciplines=("without", "with_young"),
    settings={
        "hot_permille": Setting([100, 250, 500, 750, 900], "of memory that the device reads at random"),
        "memory_pages": Setting([1024], "that may be resident", least=64),
        "scanned_pages": Setting([2048], "that the program goes through"),
        "scan_ns": Setting([20_000], "of the program's own work on each page"),
        "readers": Setting([4], "reads of the device under way"),
    },
    plotted="device_reads_per_s",
    measure=measure,
)
