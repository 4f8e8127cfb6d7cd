"""Virtual machines that each believe to have more memory than they use, on one host, with a device that uses it.

Pinned, all of a machine's memory must be there before it starts. On demand only what is used is there, and when the
used parts of all do not fit either, reclaim moves pages to swap under the device's eyes. The host is a scaled model
of the preset's: memory and machines by the same factor, so shares of memory are right and runs are short. Rates are
those after everybody has warmed up.
"""

from __future__ import annotations

from nopin.lab.scenarios.hosts import priced_host
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.model.device.dma import DmaDevice
from nopin.model.effects import Procedure, Work
from nopin.model.host.errors import NoMemory
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.units import MS_NS, PAGE_BYTES, PAGE_SHIFT, S_NS

WARM_NS = 400 * MS_NS
RUN_NS = 100 * MS_NS


def measure(point: Point) -> Measures:
    """Start the machines that can be, and have a device use them all."""
    machine = Machine(seed=point.seed, preset=point.costs)
    n_frames = point["memory_pages"]
    n_given = n_frames * point["vm_permille"] // 1000
    n_used = min(n_given, n_frames * point["used_permille"] // 1000)
    host = priced_host(machine, n_frames)
    device = machine.device("device")
    machine.run(_occupy(host.spawn_process(), n_frames * point["host_permille"] // 1000))
    started = [_start(machine, host, point, n_given) for _ in range(point["vms"])]
    guests = [(process, va) for process, va in started if va]
    n_requests = [0]
    until_ns = machine.scheduler.now_ns + WARM_NS + RUN_NS

    def serve(number: int, process: Process, va: int) -> Procedure[None]:
        random = machine.streams[f"guest {number}"]
        while machine.scheduler.now_ns < until_ns:
            yield from _request(device, process, (va >> PAGE_SHIFT) + random.randrange(n_used), point)
            n_requests[0] += 1

    for number, (process, va) in enumerate(guests):
        for worker in range(point["depth"]):
            machine.scheduler.spawn(f"guest {number}.{worker}", serve(number, process, va))
    machine.scheduler.run(until_ns=until_ns - RUN_NS)
    n_before, n_faults_before, swap_before = n_requests[0], _n_faults(device, guests), host.swap_medium.n_read
    machine.scheduler.run(until_ns=until_ns)
    return {
        "vms_started": len(guests),
        "requests_per_s": (n_requests[0] - n_before) * S_NS / RUN_NS,
        "device_faults_per_s": (_n_faults(device, guests) - n_faults_before) * S_NS / RUN_NS,
        "swapped_in_pages_per_s": (host.swap_medium.n_read - swap_before) * S_NS / RUN_NS,
        "promised_permille": 1000 * len(guests) * n_given / n_frames,
    }


def _n_faults(device: DmaDevice, guests: list[tuple[Process, int]]) -> int:
    return sum(device.attachment(process).faults.n_faults for process, _ in guests)


def _start(machine: Machine, host: Host, point: Point, n_pages: int) -> tuple[Process, int]:
    """Start a virtual machine; the address of its memory, 0 if it cannot start."""
    process = host.spawn_process()
    va = machine.run(process.mmap(n_pages))
    if point.discipline == "pinned" and not machine.run(_pinned(process, va, n_pages)):
        machine.run(process.exit())
        return process, 0
    return process, va


def _pinned(process: Process, va: int, n_pages: int) -> Procedure[bool]:
    try:
        yield from process.pin(va, n_pages * PAGE_BYTES, write=True)
    except NoMemory:
        return False
    return True


def _occupy(process: Process, n_pages: int) -> Procedure[None]:
    """The host's own memory, which is never given back."""
    if n_pages:
        va = yield from process.mmap(n_pages)
        yield from process.pin(va, n_pages * PAGE_BYTES, write=True)


def _request(device: DmaDevice, process: Process, page: int, point: Point) -> Procedure[None]:
    mirror = device.attach(process)
    while not mirror.use(page, 1, write=True):
        yield from device.prefetch(process, page, 1, write=True)
    yield Work("serve", point["serve_ns"])


SCENARIO = Scenario(
    name="overcommit",
    question="How many virtual machines start, and what do they do together, when memory is promised several times?",
    machine="connectx3",
    disciplines=("pinned", "on_demand"),
    settings={
        "vms": Setting([1, 2, 3, 4, 5], "virtual machines"),
        "vm_permille": Setting([375], "of the host's memory that each believes to have"),
        "used_permille": Setting([220], "of the host's memory that each uses"),
        "host_permille": Setting([60], "of its memory that the host itself needs"),
        "memory_pages": Setting([4096], "of the scaled host", least=64),
        "depth": Setting([4], "requests of each machine under way"),
        "serve_ns": Setting([100_000], "of a request, beside its faults"),
    },
    plotted="requests_per_s",
    measure=measure,
)
