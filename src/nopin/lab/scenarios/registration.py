"""What it costs to make memory usable by a device, before and while it is used, from 1 GiB to 1 TiB.

A buffer is registered, then a part of it is read by the device in requests of consecutive pages, at random places.
Pinning pays for every page up front, touched or not: what is not resident is faulted in, and all of it stays. On-demand
memory pays for a page when the device first wants it. Implicit registration is one handle for the whole process and
does not even cost the call.

On demand, the device's table is the real `iommu.mirror.Mirror`: its faults are counted, not assumed, and its entries
are the table that is reported.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from nopin.iommu.mirror import Mirror
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.notifier import Notifiers
from nopin.model.costs import Costs
from nopin.model.effects import Work
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.units import PAGE_BYTES

ENTRY_BYTES = 8
"""A translation of one page in a device's table."""

REGISTER_CALL_NS = 1_000
"""A system call that pins nothing [X]."""


class _Faults:
    """Where device faults are answered: at the cost of their stages, on pages never touched before."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.n_faults = 0
        self.n_pages = 0

    def device_fault(self, pages: PageRun, *, write: bool) -> Generator[Any, Any, FaultPages]:
        """Bring pages in."""
        del write
        self.n_faults += 1
        self.n_pages += pages.n
        yield Work("device fault", self._costs.fault_service_ns(pages.n))
        return FaultPages(pages.n, None)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """Never: these pages were not touched before."""
        del pages, write
        return False

    def release(self, pages: PageRun) -> None:
        """Nothing is held: no one evicts here."""
        del pages


def measure(point: Point) -> Measures:
    """Register and use a buffer."""
    costs, n_pages = point.costs, -(-point["size_bytes"] // PAGE_BYTES)
    if point.discipline == "pinned":
        return _pinned(point, n_pages)
    scheduler, faults = Scheduler(), _Faults(costs)
    mirror = Mirror(Notifiers(), faults, n_pages)
    register_ns = REGISTER_CALL_NS if point.discipline == "on_demand" else 0
    scheduler.spawn("device", _use(point, mirror, n_pages))
    scheduler.run()
    n_present = mirror.statistics().n_present
    return {
        "register_us": register_ns / 1_000,
        "total_ms": (register_ns + scheduler.now_ns) / 1e6,
        "resident_bytes": n_present * PAGE_BYTES,
        "pinned_bytes": 0,
        "device_table_bytes": n_present * ENTRY_BYTES,
        "device_faults": faults.n_faults,
        "possible": 1,
    }


def _pinned(point: Point, n_pages: int) -> Measures:
    costs, n_bytes = point.costs, n_pages * PAGE_BYTES
    register_ns = costs.pin_range_ns(n_bytes) + n_pages * costs.cpu_minor_fault_write_ns
    scheduler = Scheduler()
    scheduler.spawn("device", _use(point, None, n_pages))
    scheduler.run()
    return {
        "register_us": register_ns / 1_000,
        "total_ms": (register_ns + scheduler.now_ns) / 1e6,
        "resident_bytes": n_bytes,
        "pinned_bytes": n_bytes,
        "device_table_bytes": n_pages * ENTRY_BYTES,
        "device_faults": 0,
        "possible": int(n_bytes <= costs.host_memory_bytes),
    }


def _use(point: Point, mirror: Mirror | None, n_pages: int) -> Generator[Any, Any, None]:
    """Read parts of the buffer: each part once, in an order of its own."""
    request, costs = point["request_pages"], point.costs
    n_used = n_pages * point["used_permille"] // 1000 if point["used_permille"] else point["used_pages"]
    n_requests = max(1, min(n_used, n_pages) // request)
    stride = max(1, n_pages // request // n_requests)
    order = list(range(n_requests))
    Streams(point.seed)["order"].shuffle(order)
    for at in order:
        first = at * stride * request
        n = min(request, n_pages - first)
        if mirror is not None and not mirror.use(first, n, write=False):
            came = yield from mirror.fill(PageRun(first, n), write=False)
            mirror.unhold(PageRun(first, n), came)
        yield Work("read", costs.send_4k_ns + costs.wire_ns(n * PAGE_BYTES))


_SIZES = [1 << 30, 4 << 30, 16 << 30, 64 << 30, 256 << 30, 1 << 40]

SCENARIO = Scenario(
    name="registration",
    question="What do pinning, on-demand and implicit registration cost, from 1 GiB to 1 TiB?",
    machine="connectib56",
    disciplines=("pinned", "on_demand", "implicit"),
    settings={
        "size_bytes": Setting(_SIZES, "of the buffer"),
        "used_pages": Setting([4096], "of it that the device reads"),
        "used_permille": Setting([0], "of it that the device reads; 0: used_pages"),
        "request_pages": Setting([16], "in one request"),
    },
    plotted="register_us",
    measure=measure,
)
