"""What it costs to make memory usable by a device, before and while it is used, from 1 GiB to 1 TiB.

A buffer is registered, then parts of it are written by the device in requests of consecutive pages, in an order that is
drawn. Pinning pays for every page up front, touched or not: each is faulted in, and all of it stays. On-demand memory
pays for a page when the device first wants it. Implicit registration is one handle for the whole process, and does not
even cost the call.

On demand, process, faults and device table are those of the modelled machine, the table being the real mirror. Its
costs grow with touched pages, so the sizes are real. Pinning a terabyte page by page would model nothing more than its
law, so the law is used.
"""

from __future__ import annotations

from nopin.lab.scenarios.hosts import priced_host
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.model.device.dma import DmaDevice
from nopin.model.effects import Procedure, Work
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.model.streams import Streams
from nopin.units import PAGE_BYTES, PAGE_SHIFT

ENTRY_BYTES = 8
"""A translation of one page in a device's table."""

REGISTER_CALL_NS = 1_000
"""A system call that pins nothing [X]."""


def measure(point: Point) -> Measures:
    """Register and use a buffer."""
    n_pages = -(-point["size_bytes"] // PAGE_BYTES)
    return _pinned(point, n_pages) if point.discipline == "pinned" else _on_demand(point, n_pages)


def _on_demand(point: Point, n_pages: int) -> Measures:
    machine = Machine(seed=point.seed, preset=point.costs)
    host = priced_host(machine, n_pages + 1)
    process = host.spawn_process()
    va = machine.run(process.mmap(n_pages))
    device = machine.device("device")
    attachment = device.attachment(process)
    begun_ns = machine.scheduler.now_ns
    for first, n in requests(point, n_pages):
        machine.run(_access(device, process, (va >> PAGE_SHIFT) + first, n, point))
    register_ns = REGISTER_CALL_NS if point.discipline == "on_demand" else 0
    return {
        "register_us": register_ns / 1_000,
        "total_ms": (register_ns + machine.scheduler.now_ns - begun_ns) / 1e6,
        "resident_bytes": (host.frames.n_frames - host.frames.n_free - 1) * PAGE_BYTES,  # without the page of zeros
        "pinned_bytes": 0,
        "device_table_bytes": attachment.mirror.statistics().n_present * ENTRY_BYTES,
        "device_faults": attachment.faults.n_faults,
        "fits": 1,
    }


def _access(device: DmaDevice, process: Process, first: int, n: int, point: Point) -> Procedure[None]:
    mirror = device.attach(process)
    while not mirror.use(first, n, write=True):
        came = yield from device.prefetch(process, first, n, write=True)
        assert came.reason is None, f"no memory: {came.reason}"
    yield Work("write", _transfer_ns(point, n))


def _transfer_ns(point: Point, n_pages: int) -> int:
    return point.costs.send_32b_ns + point.costs.wire_ns(n_pages * PAGE_BYTES)


def _pinned(point: Point, n_pages: int) -> Measures:
    costs, n_bytes = point.costs, n_pages * PAGE_BYTES
    register_ns = costs.pin_range_ns(n_bytes) + n_pages * costs.cpu_minor_fault_write_ns
    use_ns = sum(_transfer_ns(point, n) for _, n in requests(point, n_pages))
    return {
        "register_us": register_ns / 1_000,
        "total_ms": (register_ns + use_ns) / 1e6,
        "resident_bytes": n_bytes,
        "pinned_bytes": n_bytes,
        "device_table_bytes": n_pages * ENTRY_BYTES,
        "device_faults": 0,
        "fits": int(n_bytes <= costs.host_memory_bytes),
    }


def requests(point: Point, n_pages: int) -> list[tuple[int, int]]:
    """Return runs of pages (first, n) spread evenly over the buffer, in an order that is drawn."""
    n_each = point["request_pages"]
    n_used = n_pages * point["used_permille"] // 1000 or point["used_pages"]
    n_requests = max(1, min(n_used, n_pages) // n_each)
    stride = n_pages // n_requests
    runs = [(at * stride, min(n_each, n_pages - at * stride)) for at in range(n_requests)]
    Streams(point.seed)["order"].shuffle(runs)
    return runs


SCENARIO = Scenario(
    name="registration",
    question="What do pinning, on-demand and implicit registration cost, from 1 GiB to 1 TiB?",
    machine="connectib56",
    disciplines=("pinned", "on_demand", "implicit"),
    settings={
        "size_bytes": Setting([1 << shift for shift in (30, 32, 34, 36, 38, 40)], "of the buffer"),
        "used_pages": Setting([4096], "of it that the device writes"),
        "used_permille": Setting([0], "of it that the device writes; 0: used_pages", least=0),
        "request_pages": Setting([16], "in one request"),
    },
    plotted="total_ms",
    measure=measure,
)
