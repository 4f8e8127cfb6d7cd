"""How fast the modelled machine runs: steps, schedules, and a host whose memory is larger than this one's.

All figures are of one core: rates are by processor time, so other work on the machine does not show. They bound what
exploration and simulation can do in a given time, so they are measured with what those need: the oracle is told of
every access, the explorer digests every state.
"""

from __future__ import annotations

import time
import tracemalloc

import msgspec

from nopin.mm.effects import PageRun
from nopin.model.effects import Procedure, Work
from nopin.model.explore.scenario import named
from nopin.model.explore.search import Bounds, search
from nopin.model.host.advice import Advice
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.model.oracle.host_oracle import HostOracle
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.units import PAGE_BYTES, PAGE_SHIFT

TWO_PROCESS_SCENARIO = "access_vs_munmap"
HOST_BYTES = 1 << 40


class ModelFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: `value` in `unit`; `asked` is what it should be at least."""

    name: str
    value: float
    unit: str
    asked: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether it is as asked; None where nothing is."""
        return None if self.asked is None else self.value >= self.asked


def measure_model(*, n_steps: int = 400_000, n_schedules: int = 600, n_pages: int = 20_000) -> list[ModelFigure]:
    """Measure everything: some seconds."""
    return [
        ModelFigure(name="bare steps", value=_bare(n_steps), unit="steps/s"),
        ModelFigure(name="steps of lives, with the oracle", value=_lives(n_steps), unit="steps/s", asked=200_000),
        ModelFigure(name="steps of accesses, with the oracle", value=_accesses(n_steps), unit="steps/s", asked=200_000),
        ModelFigure(name="schedules explored", value=_schedules(n_schedules), unit="schedules/s", asked=83),
        *_large_host(n_pages),
    ]


def _bare(n_steps: int) -> float:
    scheduler = Scheduler()

    def works() -> Procedure[None]:
        step = Work("works", 10)
        while True:
            yield step

    for at in range(8):
        scheduler.spawn(f"task {at}", works())
    return _rate(scheduler, n_steps)


def _lives(n_steps: int) -> float:
    """Processes that map memory, fault it in, use it, have a device read it, give it up and unmap it."""
    machine = Machine(seed=1)
    oracle = HostOracle(None)
    host = machine.host("host", observer=oracle)
    device = machine.device("device", observer=oracle.devices)

    def lives(process: Process) -> Procedure[None]:
        value = 0
        while True:
            va = yield from process.mmap(8)
            for page in range(8):
                value += 1
                yield from process.store(va + page * PAGE_BYTES, value.to_bytes(8, "little"))
            yield from device.read(process, va, 8)
            yield from process.load(va, 8)
            yield from process.madvise(va, 4 * PAGE_BYTES, Advice.DONTNEED)
            yield from process.munmap(va, 8 * PAGE_BYTES)

    for at in range(4):
        machine.scheduler.spawn(f"process {at}", lives(host.spawn_process()))
    return _rate(machine.scheduler, n_steps)


def _accesses(n_steps: int) -> float:
    """Processes and a device that do nothing but access memory: an access told to the oracle in every step."""
    machine = Machine(seed=1)
    oracle = HostOracle(None)
    host = machine.host("host", observer=oracle)
    device = machine.device("device", observer=oracle.devices)
    for at in range(4):
        process = host.spawn_process()
        va = machine.run(process.mmap(64))
        random = Streams(at)["accesses"]
        places = [va + random.randrange(64) * PAGE_BYTES + 8 * random.randrange(512) for _ in range(1_000)]
        machine.scheduler.spawn(f"process {at}", _stores_and_loads(process, places))
        machine.scheduler.spawn(f"device for {at}", _reads(machine, device.name, process, va, oracle))
    return _rate(machine.scheduler, n_steps)


def _stores_and_loads(process: Process, places: list[int]) -> Procedure[None]:
    value = 0
    while True:
        for va in places:
            value += 1
            yield from process.store(va, value.to_bytes(8, "little"))
            yield from process.load(va, 8)


def _reads(machine: Machine, name: str, process: Process, va: int, oracle: HostOracle) -> Procedure[None]:
    device = machine.device(f"{name} {process.pid}", observer=oracle.devices)
    step = Work("device thinks")
    while True:
        for page in range(64):
            yield from device.read(process, va + page * PAGE_BYTES, 8)
            yield step


def _rate(scheduler: Scheduler, n_steps: int) -> float:
    before = time.process_time()
    scheduler.run(max_steps=n_steps)
    return n_steps / (time.process_time() - before)


def _schedules(n_most: int) -> float:
    scenario = named(TWO_PROCESS_SCENARIO)
    before, n_taken = time.process_time(), 0
    while n_taken < n_most:
        found = search(scenario, Bounds(max_schedules=n_most - n_taken))
        assert found.breach is None, f"{TWO_PROCESS_SCENARIO} breaks {found.breach}"
        n_taken += found.n_schedules
    return n_taken / (time.process_time() - before)


def _large_host(n_pages: int) -> list[ModelFigure]:
    """Touch pages all over a terabyte, by a device that faults for each."""
    tracemalloc.start()
    machine = Machine(seed=1)
    before = time.process_time()
    host = Host("host", machine.scheduler, HOST_BYTES >> PAGE_SHIFT, pages_per_step=512)
    process = host.spawn_process()
    first = machine.run(process.mmap(HOST_BYTES // PAGE_BYTES - 1)) >> PAGE_SHIFT
    made_s, made_bytes = time.process_time() - before, tracemalloc.get_traced_memory()[0]
    device = machine.device("device")
    stride = (HOST_BYTES // PAGE_BYTES - 1) // n_pages

    def touches() -> Procedure[None]:
        for at in range(n_pages):
            run = PageRun(first + at * stride, 1)
            came = yield from device.prefetch(process, run.first, run.n, write=True)
            assert came.reason is None

    machine.run(touches())
    used_bytes = tracemalloc.get_traced_memory()[0] - made_bytes
    tracemalloc.stop()
    before = time.process_time()
    machine.run(_touches_again(process, first, stride, n_pages))
    again_s = time.process_time() - before
    return [
        ModelFigure(name="a host of 1 TiB is made in", value=made_s * 1e3, unit="ms"),
        ModelFigure(name="memory of each touched page", value=used_bytes / n_pages, unit="bytes"),
        ModelFigure(name="time of each touched page", value=again_s / n_pages * 1e6, unit="us"),
    ]


def _touches_again(process: Process, first: int, stride: int, n_pages: int) -> Procedure[None]:
    """Fault on as many pages as before, the next ones, without anybody who counts memory."""
    for at in range(n_pages):
        yield from process.store((first + at * stride + 1) << PAGE_SHIFT, b"touched")
