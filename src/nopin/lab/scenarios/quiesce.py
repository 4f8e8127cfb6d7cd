"""Invalidations of a device that takes tens of milliseconds until nothing is in its pipes.

A memory manager wants pages back that a device has in its table. For each page it can tell the device and wait until
it is quiet (*immediate*); tell it of all, one by one, and wait for all fences together at the end (*deferred*: reads
may go on until then, which RECLAIM allows); or tell it of all pages in one invalidation (*batched*). The notifiers,
brackets and fences are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from nopin.lab.scenarios.hosts import priced_host
from nopin.lab.scenarios.scenario import Measures, Point, Scenario, Setting
from nopin.mm.causes import Cause
from nopin.mm.effects import Quiesce
from nopin.mm.subscriber import Fence
from nopin.model.effects import Procedure, Work
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.ranges import Range
from nopin.units import PAGE_SHIFT


def measure(point: Point) -> Measures:
    """Take pages that several devices use from all of them."""
    machine = Machine(seed=point.seed, preset=point.costs)
    n_pages = point["pages"]
    host = priced_host(machine, n_pages + 1)
    process = host.spawn_process()
    first = machine.run(process.mmap(n_pages)) >> PAGE_SHIFT
    devices = [machine.device(f"device {number}") for number in range(point["devices"])]
    for device in devices:
        machine.run(device.prefetch(process, first, n_pages, write=True))
    begun_ns = machine.scheduler.now_ns
    pages = [Range(first + at, first + at + 1) for at in range(n_pages)]
    n_fences = machine.run(_BY_DISCIPLINE[point.discipline](process, pages))
    took_ns = machine.scheduler.now_ns - begun_ns
    return {
        "total_ms": took_ns / 1e6,
        "us_per_page": took_ns / n_pages / 1e3,
        "invalidations": sum(process.notifiers.statistics().invalidations.values()),
        "fences": n_fences,
    }


def _immediate(process: Process, pages: Sequence[Range]) -> Procedure[int]:
    n_fences = 0
    for page in pages:
        bracket = process.begin((page,), Cause.UNMAP)
        n_fences += len(bracket.fences)
        yield Quiesce(bracket.fences)
        bracket.end()
    return n_fences


def _deferred(process: Process, pages: Sequence[Range]) -> Procedure[int]:
    fences: list[Fence] = []
    for page in pages:
        bracket = process.begin((page,), Cause.RECLAIM)
        yield Work("clear")
        bracket.end()
        fences += bracket.fences
    yield Quiesce(fences)
    return len(fences)


def _batched(process: Process, pages: Sequence[Range]) -> Procedure[int]:
    bracket = process.begin(pages, Cause.RECLAIM)
    yield Work("clear")
    bracket.end()
    yield Quiesce(bracket.fences)
    return len(bracket.fences)


_BY_DISCIPLINE = {"immediate": _immediate, "deferred": _deferred, "batched": _batched}

SCENARIO = Scenario(
    name="quiesce",
    question="How are pages taken from devices that need tens of milliseconds to be quiet?",
    machine="connectib56+slow_quiesce",
    disciplines=tuple(_BY_DISCIPLINE),
    settings={
        "pages": Setting([1, 8, 64, 512], "to be taken"),
        "devices": Setting([4], "that have all of them in their tables"),
    },
    plotted="total_ms",
    measure=measure,
)
