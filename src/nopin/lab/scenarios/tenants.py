"""Many processes on one device: one table of the IOMMU for all (v1), or a table for each (PASID).

With one I/O address space for the whole device function, a process's memory is mapped into it page by page before it
is used: for each request and out again after it (*v1_strict*, and *v1_deferred*, which flushes translations in
batches), or all of it once and for good, which pins it (*v1_static*). All processes' mappings lie in the same table,
so whatever is mapped can be reached by a request of any of them; and mapping is done one at a time. With a PASID for
each the device uses the process's own addresses: nothing is mapped, the first use of a page faults, and a request
reaches its own process only. First uses are counted as setup, as pinning is.
"""

from __future__ import annotations

from nopin.lab.scenarios.hosts import priced_host
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.model.effects import Procedure, Work
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.model.pool import Pool
from nopin.units import MS_NS, PAGE_BYTES, PAGE_SHIFT, S_NS

RUN_NS = 50 * MS_NS


class _Tenants:
    """The processes, and what they share."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.machine = Machine(seed=point.seed, preset=point.costs)
        n_each = self.n_each = max(point["pages"], point["request_pages"])
        self.host: Host = priced_host(self.machine, point["processes"] * n_each + 1)
        self.device = self.machine.device("device")
        self.tenants: list[tuple[Process, int]] = []
        for _ in range(point["processes"]):
            process = self.host.spawn_process()
            self.tenants.append((process, self.machine.run(process.mmap(n_each)) >> PAGE_SHIFT))
        self.cpus = Pool(point.costs.n_cpus)
        self.iova = Pool(1)
        self.wire = Pool(1)
        self.n_done = 0
        self.cpu_ns = 0
        self.until_ns = 0

    def run(self) -> Measures:
        """Run all processes for a while."""
        point, machine = self.point, self.machine
        setup_ns, pinned_pages = 0, 0
        if point.discipline == "v1_static":
            pinned_pages = point["processes"] * self.n_each
            each_ns = point.costs.pin_page_ns + point.costs.cpu_minor_fault_write_ns + point.costs.iommu_map_ns
            setup_ns = point["processes"] * point.costs.pin_ns + pinned_pages * each_ns
        warm_ns = self._warm() if point.discipline == "pasid" else 0
        self.cpu_ns = 0
        self.until_ns = machine.scheduler.now_ns + RUN_NS
        for number in range(point["processes"]):
            machine.scheduler.spawn(f"process {number}", self._process(number))
        machine.scheduler.run(until_ns=self.until_ns)
        faults = sum(self.device.attachment(process).faults.n_faults for process, _ in self.tenants)
        used = self.host.frames.n_frames - self.host.frames.n_free - 1
        alone = point.discipline == "pasid"
        mapped = pinned_pages or (0 if alone else point["processes"] * point["request_pages"])
        return {
            "requests_per_s": self.n_done * S_NS / RUN_NS,
            "cpu_us_per_request": self.cpu_ns / max(1, self.n_done) / 1e3,
            "setup_ms": (setup_ns + warm_ns) / 1e6,
            "pinned_bytes": pinned_pages * PAGE_BYTES,
            "resident_bytes": (pinned_pages or used) * PAGE_BYTES,
            "reachable_by_others_bytes": mapped * PAGE_BYTES,
            "device_faults": faults,
        }

    def _warm(self) -> int:
        """Have each process use its pages for the first time, all processes at once; returns how long that takes."""
        machine, before_ns = self.machine, self.machine.scheduler.now_ns
        for number in range(self.point["processes"]):
            machine.scheduler.spawn(f"first uses {number}", self._first_uses(number))
        machine.scheduler.run()
        return machine.scheduler.now_ns - before_ns

    def _first_uses(self, number: int) -> Procedure[None]:
        for at in range(0, self._n_hot, self.point["request_pages"]):
            yield from self._through_mirror(number, at, self.point["request_pages"])

    @property
    def _n_hot(self) -> int:
        return max(self.point["request_pages"], self.n_each * self.point["hot_permille"] // 1000)

    def _process(self, number: int) -> Procedure[None]:
        point, random = self.point, self.machine.streams[f"process {number}"]
        n_places = self._n_hot - point["request_pages"] + 1
        while self.machine.scheduler.now_ns < self.until_ns:
            yield from self._request(number, random.randrange(n_places))
            self.n_done += 1

    def _request(self, number: int, at: int) -> Procedure[None]:
        point = self.point
        n = point["request_pages"]
        if point.discipline == "pasid":
            yield from self._through_mirror(number, at, n)
        elif point.discipline != "v1_static":
            yield from self._cpu(n * self._map_ns())
        yield Work("translate", point.costs.iotlb_miss_ns)
        yield from self.wire.serve("transfer", point.costs.wire_ns(n * PAGE_BYTES))
        yield Work("latency", point.costs.send_32b_ns)
        if point.discipline in ("v1_strict", "v1_deferred"):
            yield from self._cpu(n * self._unmap_ns())

    def _map_ns(self) -> int:
        costs = self.point.costs
        return costs.iommu_map_ns if self.point.discipline == "v1_strict" else costs.iommu_map_deferred_ns

    def _unmap_ns(self) -> int:
        costs = self.point.costs
        return costs.iommu_unmap_ns if self.point.discipline == "v1_strict" else costs.iommu_unmap_deferred_ns

    def _cpu(self, cost_ns: int) -> Procedure[None]:
        """Work of a CPU in the one table, one at a time."""
        yield from self.cpus.take()
        yield from self.iova.serve("map", cost_ns)
        yield from self.cpus.give()
        self.cpu_ns += cost_ns

    def _through_mirror(self, number: int, at: int, n: int) -> Procedure[None]:
        process, first = self.tenants[number]
        mirror = self.device.attach(process)
        while not mirror.use(first + at, n, write=True):
            self.cpu_ns += self.point.costs.fault_driver_ns(n) + self.point.costs.fault_table_ns(n)
            yield from self.device.prefetch(process, first + at, n, write=True)


def measure(point: Point) -> Measures:
    """Run the processes."""
    return _Tenants(point).run()


SCENARIO = Scenario(
    name="tenants",
    question="Many processes on one device: one IOMMU table for all, or a PASID for each?",
    machine="connectib56",
    disciplines=("v1_strict", "v1_deferred", "v1_static", "pasid"),
    settings={
        "processes": Setting([1, 4, 16, 64], "that use the device"),
        "pages": Setting([4096], "of each process's buffer"),
        "hot_permille": Setting([100], "of its buffer that a process uses"),
        "request_pages": Setting([4], "of a request"),
    },
    plotted="requests_per_s",
    measure=measure,
)
