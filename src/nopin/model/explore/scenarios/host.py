"""Ordinary memory of a modelled process: every two things that can happen to it at once.

A process has three pages. The first two were written, the third was never touched. Device `cold` knows none of them,
device `warm` has the first two in its mirror, with the right to write. Devices are slow: between a translation and the
last byte others go on. Accesses are of two words, the last of the first page and the first of the second.

Afterwards every process that is alive, and both devices for it, read everything back; references must add up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from itertools import combinations_with_replacement
from typing import Any, TypeVar

from nopin.errors import OwnerGone
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun, Procedure, Quiesce
from nopin.mm.space import Reason
from nopin.mm.subscriber import AGAIN, Answer, Invalidation, Subscriber
from nopin.model.device.atomic import AtomicDevice
from nopin.model.device.dma import DmaDevice
from nopin.model.device.faults import Resolve
from nopin.model.effects import Work
from nopin.model.explore.scenario import add, scenario
from nopin.model.explore.world import Steps, World
from nopin.model.host.advice import Advice
from nopin.model.host.errors import ModelFault
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import NO_PAGE, Prot
from nopin.model.oracle.host_oracle import HostOracle
from nopin.model.oracle.memory import WORD_BYTES
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_SHIFT, U64_MAX

N_PAGES = 3
TWO_PAGES = 2 * PAGE_BYTES
BORDER = PAGE_BYTES - WORD_BYTES
"""Of the first two pages: where accesses go, two words long."""


class Machine:
    """The machine described above, with actors."""

    def __init__(self, world: World, *, n_frames: int = 16, pages_per_step: int = 1) -> None:
        self.world = world
        self.oracle = HostOracle(world.note if world.trace is not None else None)
        self.host = Host(
            "host", world.scheduler, n_frames, observer=self.oracle, pages_per_step=pages_per_step, fires=self._fires
        )
        self.cold = DmaDevice("cold", world.scheduler, slow=True, observer=self.oracle.devices)
        self.warm = DmaDevice("warm", world.scheduler, slow=True, observer=self.oracle.devices)
        self.process = self.host.spawn_process()
        self.va = 0
        self._n_values = 0
        world.prepare(self._prepare())
        world.afterwards(self._read_everything)
        world.at_end(self._check_idle)

    def _fires(self, site: str) -> bool:
        fires = self.world.may(site)
        if fires:
            self.oracle.trouble.add(site)
        return fires

    def fresh(self, n_words: int = 1) -> bytes:
        """Return words that nobody wrote before."""
        words = range(self._n_values + 1, self._n_values + 1 + n_words)
        self._n_values += n_words
        return b"".join((n * 0x9E3779B97F4A7C15 & U64_MAX).to_bytes(WORD_BYTES, "little") for n in words)

    def _map(self) -> Steps:
        self.va = yield from self.process.mmap(N_PAGES)

    def _prepare(self) -> Steps:
        yield from self._map()
        yield from self.process.store(self.va + BORDER, self.fresh(2))
        yield from self.process.store(self.va, self.fresh())
        self.cold.attach(self.process)
        yield from self.warm.write(self.process, self.va + BORDER, self.fresh(2))
        yield from self.warm.read(self.process, self.va + TWO_PAGES, WORD_BYTES)  # zeros that everybody shares

    # Accesses, with the refusals that are right

    def loads(self, process: Process, va: int, n_words: int = 1) -> Steps:
        """Load words as a program does."""
        since = self.oracle.clock
        try:
            yield from process.load(va, n_words * WORD_BYTES)
        except ModelFault as failed:
            who, n_bytes = f"process {process.pid}", n_words * WORD_BYTES
            self.oracle.refused(who, process, va, n_bytes, failed.reason, write=False, since=since)

    def stores(self, process: Process, va: int, data: bytes) -> Steps:
        """Store words as a program does."""
        since = self.oracle.clock
        try:
            yield from process.store(va, data)
        except ModelFault as failed:
            who = f"process {process.pid}"
            self.oracle.refused(who, process, va, len(data), failed.reason, write=True, since=since)

    def device_reads(self, device: DmaDevice, process: Process, va: int, n_words: int = 1) -> Steps:
        """Read words as a device does."""
        since = self.oracle.clock
        try:
            came = yield from device.read(process, va, n_words * WORD_BYTES)
        except OwnerGone:
            came = Reason.OWNER_GONE
        if isinstance(came, Reason):
            self.oracle.refused(device.name, process, va, n_words * WORD_BYTES, came, write=False, since=since)

    def device_writes(self, device: DmaDevice, process: Process, va: int, data: bytes) -> Steps:
        """Write words as a device does."""
        since = self.oracle.clock
        reason = yield from device.write(process, va, data)
        if reason is not None:
            self.oracle.refused(device.name, process, va, len(data), reason, write=True, since=since)

    def exchanges(self, word: bytes) -> Steps:
        """Have a device exchange the last word of the first page by one, atomically, with the page to itself."""
        name = f"atomic {self._n_values}"
        return self._exchanges(AtomicDevice(name, self.process, self.oracle.walkers), word)

    def _exchanges(self, device: AtomicDevice, word: bytes) -> Steps:
        at, since = self.va + BORDER, self.oracle.clock
        reason = yield from device.exchange(at, word)
        if reason is not None:
            self.oracle.refused(device.name, self.process, at, len(word), reason, write=True, since=since)

    # Actors

    def act(self, name: str, procedure: Steps) -> None:
        """Have an actor run; a call that is refused because of another actor is no violation."""
        self.world.spawn(name, _unless_refused(procedure))

    def forks(self, data: bytes) -> Steps:
        """Fork, and store on both sides: neither may see what the other stores."""
        child = yield from self.process.fork()
        for process, word in ((child, data[:WORD_BYTES]), (self.process, data[WORD_BYTES:])):
            self.act(f"process {process.pid} after fork", self.stores(process, self.va + BORDER, word))

    def forks_and_child_ends(self) -> Steps:
        """Fork; the child reads what it has, and exits."""
        child = yield from self.process.fork()
        yield from self.loads(child, self.va + BORDER, 2)
        yield from child.exit()

    def migrates(self) -> Steps:
        """Have the host move the first two pages to other frames."""
        first = self.va >> PAGE_SHIFT
        yield from self.host.migrate(self.process, [first, first + 1])

    def merges(self) -> Steps:
        """Write to the third page what is in the first, and have the two become one (KSM)."""
        for offset in (0, BORDER):
            word = yield from self.process.load(self.va + offset, WORD_BYTES)
            yield from self.process.store(self.va + TWO_PAGES + offset, word)
        yield from self.process.madvise(self.va, N_PAGES * PAGE_BYTES, Advice.MERGEABLE)
        yield from self.host.merge_identical()

    def gives_up(self) -> Steps:
        """Let the first two pages be dropped until they are written (MADV_FREE), and have the host want frames."""
        yield from self.process.madvise(self.va, TWO_PAGES, Advice.FREE)
        yield from self.host.reclaim(2)

    def prefetches(self) -> Steps:
        """Bring all pages into the cold mirror."""
        yield from self.cold.prefetch(self.process, self.va >> PAGE_SHIFT, N_PAGES, write=True)

    def maps_anew(self, data: bytes) -> Steps:
        """Unmap, map at the same address, and store there: the old pages are gone for good."""
        yield from self.process.munmap(self.va, TWO_PAGES)
        yield from self.process.mmap(2, at=self.va)
        yield from self.process.store(self.va + BORDER, data)

    def moves(self, data: bytes) -> Steps:
        """Move the first two pages elsewhere, and store there."""
        to = yield from self.process.mremap(self.va, TWO_PAGES, TWO_PAGES, to=self.va + 16 * PAGE_BYTES)
        yield from self.process.store(to + BORDER, data)

    def detaches(self) -> Steps:
        """Have the warm device let go of the process, when nothing of it is under way."""
        while self.warm.attachment(self.process).engine.n_under_way:
            yield Work("waits for the device")
        self.warm.detach(self.process)

    def protects(self, prot: Prot) -> Steps:
        """Change the rights of the first two pages."""
        yield from self.process.mprotect(self.va, TWO_PAGES, prot)

    def protects_and_allows(self, data: bytes) -> Steps:
        """Take the right to write away and give it back, then store."""
        yield from self.process.mprotect(self.va, TWO_PAGES, Prot.READ)
        yield from self.process.mprotect(self.va, TWO_PAGES, Prot.READ | Prot.WRITE)
        yield from self.process.store(self.va + BORDER, data)

    # Afterwards

    def _read_everything(self) -> Steps:
        for process in list(self.host.processes.values()):
            if not process.alive:
                continue
            for page in (*range(N_PAGES), *range(16, 16 + N_PAGES)):
                for offset in (0, BORDER):
                    va = self.va + page * PAGE_BYTES + offset
                    yield from self.device_reads(self.cold, process, va)
                    yield from self.device_reads(self.warm, process, va)
                    yield from self.loads(process, va)

    def _check_idle(self) -> None:
        self.oracle.check_idle()
        self.host.check()
        for process in self.host.processes.values():
            for device in (self.cold, self.warm):
                device.attach(process).check()


def _unless_refused(procedure: Steps) -> Generator[Any, Any, None]:
    try:
        yield from procedure
    except ModelFault:
        return


M = TypeVar("M", bound=Machine)
Actor = Callable[[Machine, bytes], Steps]
"""Given two words that nobody else writes."""

ACTORS: dict[str, Actor] = {
    "fault": lambda m, _: m.device_reads(m.cold, m.process, m.va + BORDER, 2),
    "write_fault": lambda m, data: m.device_writes(m.cold, m.process, m.va + BORDER, data),
    "access": lambda m, _: m.device_reads(m.warm, m.process, m.va + BORDER, 2),
    "write_access": lambda m, data: m.device_writes(m.warm, m.process, m.va + BORDER, data),
    "prefetch": lambda m, _: m.prefetches(),
    "load": lambda m, _: m.loads(m.process, m.va + BORDER, 2),
    "store": lambda m, data: m.stores(m.process, m.va + BORDER, data),
    "first_store": lambda m, data: m.stores(m.process, m.va + BORDER + PAGE_BYTES, data),
    "first_write": lambda m, data: m.device_writes(m.warm, m.process, m.va + BORDER + PAGE_BYTES, data),
    "munmap": lambda m, _: m.process.munmap(m.va, TWO_PAGES),
    "map_anew": lambda m, data: m.maps_anew(data),
    "mremap": lambda m, data: m.moves(data),
    "discard": lambda m, _: m.process.madvise(m.va, TWO_PAGES, Advice.DONTNEED),
    "fork": lambda m, data: m.forks(data),
    "fork_exit": lambda m, _: m.forks_and_child_ends(),
    "reclaim": lambda m, _: m.host.reclaim(2),
    "migrate": lambda m, _: m.migrates(),
    "merge": lambda m, _: m.merges(),
    "protect": lambda m, _: m.protects(Prot.READ),
    "protect_all": lambda m, _: m.protects(Prot.NONE),
    "protect_twice": lambda m, data: m.protects_and_allows(data),
    "dereg": lambda m, _: m.detaches(),
    "exit": lambda m, _: m.process.exit(),
    "give_up": lambda m, _: m.gives_up(),
    "atomic": lambda m, data: m.exchanges(data[:WORD_BYTES]),
}


def pair(
    make: Callable[[World], M], actors: Mapping[str, Callable[[M, bytes], Steps]], one: str, other: str
) -> Callable[[World], None]:
    """Return what builds a machine on which two actors are at work."""

    def build(world: World) -> None:
        machine = make(world)
        machine.act(f"a: {one}", actors[one](machine, machine.fresh(2)))
        machine.act(f"b: {other}", actors[other](machine, machine.fresh(2)))

    return build


for _one, _other in combinations_with_replacement(ACTORS, 2):
    add(f"{_one}_vs_{_other}", pair(Machine, ACTORS, _one, _other), f"a process's memory: {_one} while {_other}")


@scenario("two_faults_vs_munmap")
def two_faults_vs_munmap(world: World) -> None:
    """Two devices fault on pages that are being unmapped."""
    machine = Machine(world)
    machine.act("a: fault", machine.device_reads(machine.cold, machine.process, machine.va + BORDER, 2))
    other = DmaDevice("other", world.scheduler, observer=machine.oracle.devices)
    machine.act("b: fault", machine.device_reads(other, machine.process, machine.va + BORDER, 2))
    machine.act("c: munmap", machine.process.munmap(machine.va, TWO_PAGES))


@scenario("fault_vs_munmap_at_wrap")
def fault_vs_munmap_at_wrap(world: World) -> None:
    """The sequence stands where one of eight bits would begin anew."""
    machine = Machine(world)
    eras = machine.process.notifiers._eras
    while eras._clock % 256 != 254:
        eras.end(eras.start([Range(0, 1)]))
    machine.act("a: fault", machine.device_reads(machine.cold, machine.process, machine.va + BORDER, 2))
    machine.act("b: munmap", machine.process.munmap(machine.va, TWO_PAGES))


class AlwaysBeaten:
    """The way of a fault on which, each time, its pages are invalidated before its answer arrives."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def serve(self, pages: PageRun, write: bool, resolve: Resolve) -> Procedure[FaultPages]:
        """See `FaultPath`."""
        came = yield from resolve(pages, write)
        bracket = self._process.begin([Range(pages.first, pages.end)], Cause.COW)
        yield Quiesce(bracket.fences)
        bracket.end()
        return came


@scenario("fault_vs_endless_invalidation")
def fault_vs_endless_invalidation(world: World) -> None:
    """A fill is beaten by an invalidation each time: it gives up for now, and does not go on for ever."""
    machine = Machine(world)
    path = AlwaysBeaten(machine.process)
    device = DmaDevice("beaten", world.scheduler, observer=machine.oracle.devices, path=path)
    machine.act("a: prefetch", device.prefetch(machine.process, machine.va >> PAGE_SHIFT, 2, write=False))


class CannotWait(Subscriber):
    """A holder of translations that would have to wait, and says so if it must not."""

    def invalidate_start(self, event: Invalidation) -> Answer:
        """See `Subscriber`."""
        return None if event.blockable else AGAIN


@scenario("fault_vs_again")
def fault_vs_again(world: World) -> None:
    """An invalidation that must not wait is put off because somebody would have to."""
    machine = Machine(world)
    machine.process.notifiers.subscribe(Range(0, NO_PAGE), CannotWait())

    def tries() -> Steps:
        first = machine.va >> PAGE_SHIFT
        bracket = machine.process.notifiers.invalidate_start([Range(first, first + 2)], Cause.REMOVE, blockable=False)
        yield Work("has tried")
        assert bracket.again, "somebody would have had to wait"

    machine.act("a: fault", machine.device_reads(machine.cold, machine.process, machine.va + BORDER, 2))
    machine.act("b: tries", tries())
