"""Hot-in-device protection against blind reclaim.

A device reads its hot pages again and again, at random. A program scans a large array in the same memory. The CPU's
page table says nothing of the device's accesses: to a memory manager that looks there alone (*blind*) the device's
pages are the oldest of all, and go first. One that also asks the mirrors for their young bits (*protected*) sees them
used. The reclaim and the mirror are those of the modelled host and the real device table.
"""

from __future__ import annotations

from nopin.lab.scenarios.hosts import priced_host
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.model.device.dma import DmaDevice
from nopin.model.effects import Procedure, Work
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.units import PAGE_BYTES, PAGE_SHIFT, S_NS


def measure(point: Point) -> Measures:
    """Run device and scan together."""
    machine = Machine(seed=point.seed, preset=point.costs)
    n_frames = point["memory_pages"]
    n_hot = n_frames * point["hot_permille"] // 1000
    host = priced_host(machine, n_frames, devices_count_as_use=point.discipline == "protected")
    process, device = host.spawn_process(), machine.device("device")
    hot = machine.run(process.mmap(n_hot))
    cold = machine.run(process.mmap(point["scanned_pages"]))
    machine.run(_warm(device, process, hot, n_hot))
    warm_faults = device.attachment(process).faults.n_faults
    begun_ns, n_accesses = machine.scheduler.now_ns, [0]
    scan = machine.scheduler.spawn("scan", _scan(process, cold, point))
    random = machine.streams["accesses"]

    def reads() -> Procedure[None]:
        while not scan.ended:
            yield from _read(device, process, (hot >> PAGE_SHIFT) + random.randrange(n_hot), point)
            n_accesses[0] += 1

    for reader in range(point["readers"]):
        machine.scheduler.spawn(f"reader {reader}", reads())
    machine.scheduler.run()
    took_ns = machine.scheduler.now_ns - begun_ns
    n_faults = device.attachment(process).faults.n_faults - warm_faults
    return {
        "device_reads_per_s": n_accesses[0] * S_NS / took_ns,
        "device_faults": n_faults,
        "faulting_permille": 1000 * n_faults / n_accesses[0],
        "scan_ms": took_ns / 1e6,
        "swapped_out_pages": host.swap_medium.n_written,
        "swapped_in_pages": host.swap_medium.n_read,
    }


def _warm(device: DmaDevice, process: Process, hot: int, n_hot: int) -> Procedure[None]:
    for page in range(n_hot):
        came = yield from device.prefetch(process, (hot >> PAGE_SHIFT) + page, 1, write=True)
        assert came.reason is None


def _read(device: DmaDevice, process: Process, page: int, point: Point) -> Procedure[None]:
    mirror = device.attach(process)
    while not mirror.use(page, 1, write=False):
        yield from device.prefetch(process, page, 1, write=False)
    yield Work("read", point.costs.send_4k_ns)


def _scan(process: Process, cold: int, point: Point) -> Procedure[None]:
    for _ in range(point["scans"]):
        for page in range(point["scanned_pages"]):
            yield from process.store(cold + page * PAGE_BYTES, b"scanned")
            yield Work("think", point["scan_ns"])


SCENARIO = Scenario(
    name="hot",
    question="What is it worth to ask devices which pages they use, before memory is reclaimed?",
    machine="connectib56",
    disciplines=("blind", "protected"),
    settings={
        "hot_permille": Setting([100, 250, 500, 750], "of memory that the device reads at random"),
        "memory_pages": Setting([1024], "of the host", least=64),
        "scanned_pages": Setting([2048], "that the program stores to, one after the other"),
        "scans": Setting([1], "through all of them"),
        "scan_ns": Setting([50_000], "of the program's own work on each page"),
        "readers": Setting([4], "reads of the device under way"),
    },
    plotted="device_reads_per_s",
    measure=measure,
)
