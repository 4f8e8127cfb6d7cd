"""Random lives of several processes at once, every load compared with what was stored, and nothing left at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from random import Random

from hosts import PAGE
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.iommu.mirror import Mirror
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.sequence import overlap_any
from nopin.mm.subscriber import Fence, Invalidation
from nopin.model.choice import Drawn
from nopin.model.effects import Procedure
from nopin.model.host.advice import Advice
from nopin.model.host.device_memory import DeviceMemory
from nopin.model.host.errors import Killed, NoMemory, NotSupported, Segv
from nopin.model.host.exclusive import lookup_exclusive
from nopin.model.host.fault import fault_pages, lookup, lookup_own
from nopin.model.host.host import Host
from nopin.model.host.observer import HostObserver
from nopin.model.host.pins import Pin
from nopin.model.host.process import Process
from nopin.model.host.vma import RW, Prot
from nopin.model.scheduler import Scheduler
from nopin.ranges import Range

N_PAGES = 4
N_FILE_PAGES = 2
FILE_VA = 1 << 40
STAMP_BYTES = 8


ZEROS = bytes(STAMP_BYTES)


class Bytes(HostObserver):
    """What each page of each process may read as, by its stamp; of more than one kind only during a system call."""

    def __init__(self) -> None:
        self.memory: dict[int, dict[int, set[bytes]]] = {}
        self.used: set[int] = set()
        self.discarding: dict[tuple[int, int], set[bytes]] = {}  # what was stored since that began
        self.forking: dict[int, dict[int, set[bytes]]] = {}  # what pages have been since a fork of the process began
        self.moving: dict[tuple[int, int], int] = {}  # pages on their way: where to
        self.since: dict[int, tuple[int, int, set[bytes]]] = {}  # what a page may have read as since a device began

    def may_be(self, process: Process, number: int) -> set[bytes]:
        return self.memory.setdefault(whose(process, number), {}).get(number, {ZEROS})

    def becomes(self, process: Process, number: int, stamps: set[bytes]) -> None:
        if process.pid in self.forking:
            self.forking[process.pid].setdefault(number, set(self.may_be(process, number))).update(stamps)
        if (process.pid, number) in self.moving:
            self.becomes(process, self.moving[process.pid, number], stamps)
        if (process.pid, number) in self.discarding:  # what is stored meanwhile may be dropped, or stay
            self.discarding[process.pid, number] |= stamps
            stamps = stamps | {ZEROS}
        self.memory.setdefault(whose(process, number), {})[number] = stamps
        for pid, page, seen in self.since.values():
            if (pid, page) == (whose(process, number), number):
                seen |= stamps

    def cpu_loaded(self, process: Process, va: int, data: bytes) -> None:
        may_be = self.may_be(process, va // PAGE)
        assert data in may_be, f"{process} reads {data!r} at page {va // PAGE:#x}, not one of {may_be}"

    def cpu_stored(self, process: Process, va: int, data: bytes) -> None:
        self.becomes(process, va // PAGE, {data})

    def mapped(self, process: Process, where: Range) -> None:
        for number in numbers(where):
            self.becomes(process, number, {ZEROS})

    def discard_begins(self, process: Process, where: Range) -> None:
        for number in numbers(where):
            before = self.may_be(process, number)
            self.discarding[process.pid, number] = set()
            self.memory.setdefault(process.pid, {})[number] = before | {ZEROS}

    def discard_ends(self, process: Process, where: Range) -> None:
        for number in numbers(where):
            self.becomes(process, number, {ZEROS} | self.discarding.pop((process.pid, number)))

    def give_up_begins(self, process: Process, where: Range) -> None:
        self.discard_begins(process, where)

    def give_up_ends(self, process: Process, where: Range) -> None:
        for number in numbers(where):
            del self.discarding[process.pid, number]

    def move_begins(self, process: Process, source: Range, target: Range) -> None:
        for old, new in zip(numbers(source), numbers(target), strict=True):
            self.becomes(process, new, self.may_be(process, old))
            self.moving[process.pid, old] = new

    def move_ends(self, process: Process, source: Range, target: Range) -> None:
        for old in numbers(source):
            del self.moving[process.pid, old]

    def fork_begins(self, parent: Process) -> None:
        self.forking[parent.pid] = {}

    def fork_ends(self, parent: Process, child: Process) -> None:
        self.memory[child.pid] = self.memory.get(parent.pid, {}) | self.forking.pop(parent.pid)

    def allocated(self, frame: int) -> None:
        self.used.add(frame)

    def freed(self, frame: int) -> None:
        self.used.remove(frame)


def whose(process: Process, number: int) -> int:
    """Return whose memory a page is: the file's, which is nobody's own, or the process's."""
    return 0 if number >= FILE_VA // PAGE else process.pid


def numbers(where: Range) -> range:
    return range(where.start // PAGE, where.end // PAGE)


class Faults:
    """Faults of a device in a process's name, without holds."""

    def __init__(self, process: Process, memory: DeviceMemory) -> None:
        self._process = process
        self._memory = memory

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        return fault_pages(self._process, pages.first, pages.n, write=write, memory=self._memory)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """Nothing comes at once."""
        return False

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        """Nor here."""
        del pages, write
        yield from ()
        return False

    def release(self, pages: PageRun) -> None:
        """Nothing is held."""


class SlowMirror(Mirror):
    """A mirror whose device may be in the middle of reading a page: it then needs time to let go of it."""

    at_work = False
    reading: int | None = None
    fence: Fence | None = None
    has: int | None = None  # the page it has alone, or wants so
    lost = False

    def invalidate_start(self, event: Invalidation) -> Fence | None:  # type: ignore[override]  # ours never needs time
        super().invalidate_start(event)
        self.note_loss(event)
        if self.reading is None or not overlap_any(event.ranges, Range(self.reading, self.reading + 1)):
            return None
        self.fence = self.fence or Fence()
        return self.fence

    def protect(self, event: Invalidation) -> None:
        super().protect(event)
        self.note_loss(event)

    def note_loss(self, event: Invalidation) -> None:
        if self.has is not None and overlap_any(event.ranges, Range(self.has, self.has + 1)):
            self.lost = True

    def release(self, event: Invalidation) -> Fence | None:  # type: ignore[override]  # the same
        super().release(event)
        return self.invalidate_start(event)

    def has_read(self) -> None:
        self.reading, self.has, self.at_work = None, None, False
        if self.fence is not None:
            self.fence.signal()
            self.fence = None


class World:
    """A host, the oracle, and the programs of its processes."""

    def __init__(self, seed: int, n_frames: int) -> None:
        self.random = Random(seed)
        self.bytes = Bytes()
        self.host = Host("h", Scheduler(Drawn(self.random)), n_frames, observer=self.bytes)
        self.n_stamps = 0
        self.orphans: list[Pin] = []
        self.file = self.host.new_file("f", N_FILE_PAGES * PAGE)
        self.memory = self.host.add_device_memory("device", 6, private=True)

    def start(self, n_processes: int, n_words: int) -> None:
        for _ in range(n_processes):
            process = self.host.spawn_process()
            program = self.random.choices(list(WORDS), list(WORDS.values()), k=n_words)
            self.host.scheduler.spawn(f"process {process.pid}", self.live(process, iter(program)))

    def live(self, process: Process, program: Iterator[str]) -> Procedure[None]:
        """Map some pages, do what the program says, then end."""
        va = yield from process.mmap(N_PAGES)
        yield from process.madvise(va, N_PAGES * PAGE, Advice.MERGEABLE)
        yield from process.mmap(N_FILE_PAGES, shared=True, file=self.file, at=FILE_VA)
        yield from self.go_on(process, va, program)

    def go_on(self, process: Process, va: int, program: Iterator[str]) -> Procedure[None]:
        mirror = SlowMirror(process.notifiers, Faults(process, self.memory), 1 << 40, owner=process)
        pins: list[Pin] = []
        with suppress(Killed):
            for word in program:
                with suppress(NoMemory):
                    va = yield from self.do(word, process, va, program, mirror, pins)
                for pin in pins:
                    entry = lookup(process, pin.first)
                    assert entry is None or entry.page is pin.pages[0], "a pin lost its page"
        yield from process.exit()
        self.orphans += pins
        for pin in self.orphans:
            process.unpin(pin)
        self.orphans.clear()
        mirror.close()

    def do(
        self, word: str, process: Process, va: int, program: Iterator[str], mirror: SlowMirror, pins: list[Pin]
    ) -> Procedure[int]:
        at = va + self.random.randrange(N_PAGES) * PAGE
        in_file = FILE_VA + self.random.randrange(N_FILE_PAGES) * PAGE
        if word in ("store", "store to file"):
            yield from process.store(at if word == "store" else in_file, self.stamp())
        elif word in ("load", "load from file"):
            yield from process.load(at if word == "load" else in_file, STAMP_BYTES)
        elif word == "write back":
            self.host.scheduler.spawn(f"writeback for {process.pid}", self.host.writeback(self.file))
        elif word == "discard":
            self.orphan(pins, at // PAGE)
            yield from process.madvise(at, PAGE, Advice.DONTNEED)
        elif word == "advise":
            advice = self.random.choice([Advice.FREE, Advice.COLD, Advice.PAGEOUT, Advice.WILLNEED])
            yield from process.madvise(at, PAGE, advice)
        elif word == "fork":
            child = yield from process.fork()
            self.host.scheduler.spawn(f"process {child.pid}", self.go_on(child, va, program))
        elif word == "protect":
            prot = self.random.choice([Prot.NONE, Prot.READ])
            yield from process.mprotect(at, PAGE, prot)
            yield from self.refused(process, at, prot)
            yield from process.mprotect(at, PAGE, RW)
        elif word == "move":
            target = yield from process.mremap(va, N_PAGES * PAGE, N_PAGES * PAGE, to=va ^ (1 << 32))
            for pin in pins:
                pin.first += (target - va) // PAGE
            return target
        elif word == "remap":
            self.orphan(pins, at // PAGE)
            yield from process.mmap(1, at=at)
            yield from process.madvise(at, PAGE, Advice.MERGEABLE)
        elif word.startswith("device") and not mirror.at_work:
            mirror.at_work = True
            number = (at if self.random.random() < 0.5 else in_file) // PAGE
            if word == "device reads":
                body = self.device_reads(process, mirror, number)
            elif word == "device writes":
                body = self.device_writes(process, mirror, number)
            else:
                body = self.device_takes(process, mirror, at // PAGE)
            self.host.scheduler.spawn(f"device of {process.pid}", body)
        elif word == "sibling":
            self.host.scheduler.spawn(f"sibling of {process.pid}", self.another_thread(process, va))
        elif word == "killed":
            self.host.scheduler.spawn(f"end of {process.pid}", process.exit())
        elif word == "migrate":
            pages = range(va // PAGE, va // PAGE + N_PAGES) if self.random.random() < 0.7 else [in_file // PAGE]
            self.host.scheduler.spawn(f"migration for {process.pid}", self.host.migrate(process, pages))
        elif word == "to device":
            pages = range(va // PAGE, va // PAGE + N_PAGES)
            moves = self.host.migrate(process, pages, to=self.memory)
            self.host.scheduler.spawn(f"migration for {process.pid}", moves)
        elif word == "merge":
            if self.random.random() < 0.5:  # some bytes of it are the same as elsewhere, then
                yield from process.store(at, self.host.name.encode().ljust(STAMP_BYTES))
            self.host.scheduler.spawn(f"merging for {process.pid}", self.host.merge_identical())
        elif word == "pin":
            pins.append((yield from process.pin(at, PAGE, write=self.random.random() < 0.5)))
        elif word == "unpin" and pins:
            process.unpin(pins.pop(0))
        elif word == "reclaim":
            self.host.scheduler.spawn(f"reclaim for {process.pid}", self.host.reclaim(self.random.randrange(1, 5)))
        return va

    def another_thread(self, process: Process, va: int) -> Procedure[None]:
        """Store and load where the first thread may be changing things."""
        for _ in range(4):
            at = va + self.random.randrange(N_PAGES) * PAGE
            with suppress(Segv, NoMemory, Killed):
                if self.random.random() < 0.5:
                    yield from process.store(at, self.stamp())
                else:
                    yield from process.load(at, STAMP_BYTES)

    def stamp(self) -> bytes:
        self.n_stamps += 1
        return self.n_stamps.to_bytes(STAMP_BYTES, "little")

    def orphan(self, pins: list[Pin], number: int) -> None:
        """A page is given up: what is pinned of it is not the process's memory any more."""
        self.orphans += [pin for pin in pins if pin.first == number]
        pins[:] = [pin for pin in pins if pin.first != number]

    def refused(self, process: Process, at: int, prot: Prot) -> Procedure[None]:
        try:
            yield from process.store(at, b"never")
        except Segv:
            pass
        else:
            raise AssertionError("a store went through that nobody allowed")
        if prot == Prot.READ:
            with suppress(NoMemory):
                yield from process.load(at, STAMP_BYTES)

    def device_reads(self, process: Process, mirror: SlowMirror, number: int) -> Procedure[None]:
        """Read one page in several steps through the frame that it had at first."""
        came = yield from mirror.fill(PageRun(number, 1), write=False)
        entry = lookup_own(process, number, self.memory)
        if not came.n_done or not mirror.use(number, 1, write=False):
            mirror.has_read()
            return
        assert entry is not None
        frame = entry.frame
        seen = set(self.bytes.may_be(process, number))
        self.bytes.since[process.pid] = whose(process, number), number, seen
        mirror.reading = number
        for _ in range(4):
            yield self.host.steps.access
            assert frame in self.bytes.used
            assert self.host.frames.read(frame, 0, STAMP_BYTES) in seen
        mirror.has_read()
        del self.bytes.since[process.pid]

    def device_writes(self, process: Process, mirror: SlowMirror, number: int) -> Procedure[None]:
        """Write one page, twice if the mirror lets it."""
        came = yield from mirror.fill(PageRun(number, 1), write=True)
        del came
        for _ in range(2):
            entry = lookup_own(process, number, self.memory)
            if mirror.use(number, 1, write=True):
                assert entry is not None
                data = self.stamp()
                self.host.frames.write(entry.frame, 0, data)
                self.bytes.becomes(process, number, {data})
            yield self.host.steps.access
        mirror.has_read()

    def device_takes(self, process: Process, mirror: SlowMirror, number: int) -> Procedure[None]:
        """Have one page alone, and write it for as long as nobody wants it back."""
        mirror.has = number
        with suppress(NoMemory, NotSupported, Segv, Killed):
            yield from process.make_exclusive(number, process)
            frame, mirror.lost = lookup_exclusive(process, number, process), False
            for _ in range(3):
                if frame is None or mirror.lost:
                    break
                assert lookup(process, number) is None, "a CPU and a device have it"
                data = self.stamp()
                self.host.frames.write(frame, 0, data)
                self.bytes.becomes(process, number, {data})
                yield self.host.steps.access
        mirror.has_read()


WORDS = {
    "store": 8,
    "load": 4,
    "sibling": 4,
    "fork": 3,
    "reclaim": 4,
    "device reads": 3,
    "device writes": 3,
    "store to file": 3,
    "load from file": 2,
    "write back": 2,
    "device takes": 2,
    "migrate": 2,
    "to device": 3,
    "advise": 4,
    "merge": 2,
    "discard": 1,
    "protect": 1,
    "move": 1,
    "remap": 1,
    "pin": 1,
    "unpin": 1,
    "killed": 0.2,
}
"""What processes do, and how often."""


@settings(max_examples=150, deadline=None)
@given(
    n_processes=st.integers(1, 3),
    n_words=st.integers(1, 40),
    seed=st.integers(0, 1 << 32),
    n_frames=st.sampled_from([6, 12, 40]),
)
def test_every_load_sees_the_last_store_and_nothing_is_left(
    n_processes: int, n_words: int, seed: int, n_frames: int
) -> None:
    world = World(seed, n_frames)
    world.start(n_processes, n_words)
    assert world.host.scheduler.run(max_steps=200_000), "it never ends"
    assert not world.host.processes, "somebody waits for ever"
    world.host.check()
    assert world.host.swap.n_used == 0
    world.host.scheduler.spawn("writeback", world.host.writeback(world.file))
    assert world.host.scheduler.run(max_steps=10_000)
    for index in range(N_FILE_PAGES):
        may_be = world.bytes.memory.get(0, {}).get(FILE_VA // PAGE + index, {ZEROS})
        assert world.file.stored.get(index, ZEROS)[:STAMP_BYTES] in may_be, "a write to the file was lost"
    world.host.scheduler.spawn("truncate", world.host.truncate(world.file, 0))
    assert world.host.scheduler.run(max_steps=10_000)
    assert world.bytes.used == {world.host.zero_page.frame}
