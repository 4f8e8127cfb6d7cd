"""A modelled host: frames, processes, a swap area, files, and what the memory management does of its own accord.

**What happens between two yields** happens at once: it is what Linux does under a page table lock. Every `Work` is a
place where anything else may come in between.

**Locks**, in the order in which they are taken: a process's mmap lock (shared for faults and MADV_DONTNEED, alone for
what changes mappings), then the locks of single pages. Reclaim takes page locks only if they are free, so it may run
inside a fault, whatever that holds; so do migration and merging. Whoever waits for several waits in the order of their
place in one file.

**When a frame may be used anew.** Whoever takes a translation away brackets it (`Process.begin`), clears the entry, and
gives the frame's reference back after the bracket's end; for a must-now cause the fences have passed before the end,
for a deferrable one they are waited for before the reference is given back. Every reference counts, so the frame is
free when the last one is given back, and then at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from nopin.model.effects import Gate, Lock, Pause, Procedure
from nopin.model.host import file_changes, huge, merge, migrate, reclaim
from nopin.model.host.background import BackgroundReclaim
from nopin.model.host.costs import HostCosts, Steps
from nopin.model.host.device_memory import DeviceMemory
from nopin.model.host.errors import NoMemory
from nopin.model.host.files import File
from nopin.model.host.frames import Frames
from nopin.model.host.medium import Medium
from nopin.model.host.observer import HostObserver
from nopin.model.host.page import Page
from nopin.model.host.process import Process
from nopin.model.host.swap import SwapArea
from nopin.model.host.table import Entry, Present, Private, Swapped
from nopin.model.host.vma import NO_PAGE, Vma
from nopin.model.scheduler import Scheduler
from nopin.units import PAGE_BYTES

RECLAIM_ATTEMPTS = 4
"""How often an allocation may find that others took what it had reclaimed."""

FAULT_SITES = ("frame", "swap slot", "swap write", "swap read", "file write", "file read")
"""Where something may go wrong: no frame is free at once, no slot is, a medium fails to write, to read."""


def _never(site: str) -> bool:
    del site
    return False


class Host:
    """See above.

    Args:
        name: stable from run to run.
        scheduler: runs its procedures.
        n_frames: memory, in pages.
        observer: is told what programs may observe.
        costs: of its steps.
        pages_per_step: how many entries are cleared, copied or protected between two places where others may go on:
            1 to explore every order, 512 (a leaf, whose lock Linux takes) to simulate.
        n_swap_slots: pages that fit in the swap area; medium_depth: requests that it serves at a time, and the
            medium of the files.
        devices_count_as_use: reclaim spares what devices used lately, as it does what CPUs used; False is what
            systems do that ask only CPUs.
        fires: asked at each place where something may go wrong, by its name: `FAULT_SITES`.

    Attributes:
        lru: pages in use, in the order in which reclaim looks at them.
        processes: alive and dying, by process id.
        background: who reclaims when few frames are free, if anybody does.
        zero_page: what untouched memory reads as; its mappings are not recorded and its frame is never freed.
    """

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        n_frames: int,
        *,
        observer: HostObserver | None = None,
        costs: HostCosts | None = None,
        pages_per_step: int = 1,
        n_swap_slots: int = 1 << 20,
        medium_depth: int = 32,
        devices_count_as_use: bool = True,
        fires: Callable[[str], bool] = _never,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.observer = observer or HostObserver()
        self.frames = Frames(n_frames, self.observer)
        costs = costs or HostCosts()
        self.steps = Steps(costs)
        self.swap = SwapArea(n_swap_slots, self.frames)
        self.swap_medium = Medium("swap", scheduler, costs, depth=medium_depth)
        self.file_medium = Medium("file", scheduler, costs, depth=medium_depth)
        self.files: dict[str, File] = {}
        self._maybe_ended: list[File] = []
        self.lru: OrderedDict[Page, None] = OrderedDict()
        self.device_pages: dict[Page, None] = {}
        self.device_memories: list[DeviceMemory] = []
        self.pages_per_step = pages_per_step
        self.devices_count_as_use = devices_count_as_use
        self.fires = fires
        self.processes: dict[int, Process] = {}
        self.zero_page = Page(self._boot_frame())
        self.background: BackgroundReclaim | None = None
        self._last_pid = 0

    def reclaim_in_background(self, low: int, high: int) -> None:
        """Have frames reclaimed whenever fewer than `low` are free, until `high` are (kswapd)."""
        assert self.background is None
        assert low < high
        self.background = BackgroundReclaim(self, low, high)

    def spawn_process(self) -> Process:
        """Make a process with nothing mapped."""
        self._last_pid += 1
        process = self.processes[self._last_pid] = Process(self._last_pid, self)
        return process

    def add_device_memory(self, name: str, n_frames: int, *, private: bool) -> DeviceMemory:
        """Add memory on a device; `private`: no CPU can reach it."""
        memory = DeviceMemory(name, self.frames.add_device(n_frames), private)
        self.device_memories.append(memory)
        return memory

    def memory_of(self, frame: int) -> DeviceMemory | None:
        """Return the device that a frame is on; None: the host."""
        if frame < self.frames.n_frames:
            return None
        return next(memory for memory in self.device_memories if frame in memory.pool)

    def new_file(
        self, name: str, length_bytes: int, stored: bytes = b"", *, memory: DeviceMemory | None = None
    ) -> File:
        """Make a file, with these bytes on its medium and zeros after them.

        Args:
            name: empty: shared anonymous memory.
            memory: where its pages are, that CPUs can reach it; None: the host's.
        """
        assert name not in self.files
        assert memory is None or not memory.private
        file = File(name, length_bytes, Lock(f"file {name}"), memory)
        for index in range(-(-len(stored) // PAGE_BYTES)):
            file.stored[index] = stored[index * PAGE_BYTES :][:PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
        if name:
            self.files[name] = file
        return file

    def note_unmapped(self, vmas: Iterable[Vma]) -> None:
        """Mappings have gone: shared memory without a name may have lost its last one (`end_shared_memory`)."""
        self._maybe_ended += [vma.file for vma in vmas if vma.file is not None and not vma.file.name]

    def end_shared_memory(self) -> Procedure[None]:
        """Free shared memory that nobody can map any more. Requires: the caller has no lock."""
        while self._maybe_ended:
            file = self._maybe_ended.pop()
            if not any(vma.file is file for process in self.processes.values() for vma in process.vmas):
                yield from file_changes.truncate(self, file, 0)

    def writeback(self, file: File) -> Procedure[int]:
        """Write what is dirty of a file to its medium (fsync); returns how many pages were written."""
        return file_changes.writeback(self, file)

    def truncate(self, file: File, length_bytes: int) -> Procedure[None]:
        """Make a file shorter, or longer by zeros."""
        return file_changes.truncate(self, file, length_bytes)

    def reclaim(self, n_pages: int) -> Procedure[int]:
        """Free about `n_pages` frames of what was not used lately; returns how many became free."""
        return reclaim.reclaim(self, n_pages)

    def punch(self, file: File, first: int, end: int) -> Procedure[None]:
        """Make pages [first, end) of a file zeros; of a device's memory, revoke them: who touches them faults anew."""
        return file_changes.punch(self, file, first, end)

    def migrate(
        self, process: Process, numbers: Sequence[int], *, owner: object = None, to: DeviceMemory | None = None
    ) -> Procedure[int]:
        """Move pages of a process to other frames, of a device if `to`; returns how many moved.

        What cannot move stays. The owner's own devices are not told.
        """
        return migrate.migrate(process, numbers, owner=owner, to=to)

    def merge_identical(self) -> Procedure[int]:
        """Merge pages with the same bytes, of mappings that are `mergeable`; returns how many frames that freed."""
        return merge.merge_identical(self)

    def collapse_huge(self, process: Process, number: int) -> Procedure[bool]:
        """Make the 2 MiB around a page one huge page; False if that cannot be."""
        return huge.collapse(process, number)

    def split_huge(self, process: Process, number: int) -> None:
        """Call the pages of a huge one pages of their own; they stay where they are."""
        huge.split(process, number)

    def forget(self, process: Process) -> None:
        """Take a process whose memory is gone off the list."""
        assert not len(process.table)
        del self.processes[process.pid]

    # Pages

    def new_page(self, memory: DeviceMemory | None = None) -> Procedure[Page]:
        """Allocate a page of zeros that nobody maps yet; the caller has its one reference. May reclaim others.

        Raises:
            NoMemory: nothing is free, and nothing can be reclaimed.
        """
        yield self.steps.zero
        frame = self._free_frame(memory)
        if frame is None:
            frame = yield from self._reclaimed_frame()
        page = Page(frame)
        self._queue_of(frame)[page] = None
        return page

    def new_frame(self, memory: DeviceMemory | None = None) -> Procedure[int]:
        """Allocate a frame of zeros, with one reference. May reclaim pages, but not a device's. Raises `NoMemory`."""
        frame = self._free_frame(memory)
        return frame if frame is not None else (yield from self._reclaimed_frame())

    def _free_frame(self, memory: DeviceMemory | None) -> int | None:
        """Allocate a frame if one is free; None if one of the host's own is to be reclaimed first."""
        if memory is None:
            frame = None if self.fires("frame") else self.frames.allocate()
            if self.background is not None:
                self.background.look()
            return frame
        frame = self.frames.allocate_from(memory.pool)
        if frame is None:
            raise NoMemory(f"{self.name}: the memory of {memory.name} is full")
        return frame

    def _reclaimed_frame(self) -> Procedure[int]:
        for _ in range(RECLAIM_ATTEMPTS):
            yield from reclaim.reclaim(self, reclaim.BATCH)
            frame = self.frames.allocate()
            if frame is not None:
                return frame
        raise NoMemory(f"{self.name}: none of {self.frames.n_frames} frames is free, and none can be freed")

    def enqueue(self, page: Page) -> None:
        """Have reclaim look at a page of the host's own memory, last; and at none of a device's."""
        self.lru.pop(page, None)
        self.device_pages.pop(page, None)
        self._queue_of(page.frame)[page] = None

    def _queue_of(self, frame: int) -> dict[Page, None]:
        return self.lru if frame < self.frames.n_frames else self.device_pages

    def readable(self, page: Page) -> Present | Private:
        """Return an entry that lets who can reach a page read it."""
        memory = self.memory_of(page.frame)
        if memory is not None and memory.private:
            return Private(page, memory, writable=False)
        return Present(page, writable=False)

    def put_page(self, page: Page) -> None:
        """Give a reference of a page back."""
        if page is not self.zero_page and (not self.frames.put(page.frame) or page.slot is not None):
            self._tidy(page)

    def let_go(self, entry: Entry) -> None:
        """Give back what an entry that was taken out held."""
        if not isinstance(entry, Swapped):
            self.put_page(entry.page)
            return
        cached = self.swap.cache.get(entry.slot)
        self.swap.let_go(entry.slot)
        if cached is not None:
            self._tidy(cached)

    def drop_slot(self, page: Page) -> None:
        """Take a page out of the swap cache; its slot is free unless others use it."""
        self.swap.drop(page)
        self._tidy(page)

    def to_tail(self, page: Page) -> None:
        """Have reclaim look at a page last."""
        self.lru.move_to_end(page)

    def lock(self, page: Page) -> Procedure[None]:
        """Take a page's lock. Requires: the caller has a reference of it."""
        while page.busy is not None:
            yield Pause(page.busy)
        page.busy = Gate()

    def until_unlocked(self, page: Page) -> Procedure[None]:
        """Wait until whoever has a page's lock gives it back. Others may take it at once."""
        self.frames.get(page.frame)  # or it might be another's meanwhile
        if page.busy is not None:
            yield Pause(page.busy)
        self.put_page(page)

    def unlock(self, page: Page) -> None:
        """Give it back."""
        gate, page.busy = page.busy, None
        assert gate is not None
        self.scheduler.open(gate)
        self._tidy(page)

    def _tidy(self, page: Page) -> None:
        """Take a page off the queue if it is free; drop it from the swap cache if nobody can want it any more."""
        if not self.frames.n_references(page.frame):
            self.lru.pop(page, None)
            self.device_pages.pop(page, None)
            return
        unwanted = page.slot is not None and self.swap.n_users(page.slot) == 0 and not page.mappings
        if unwanted and page.busy is None:
            self.drop_slot(page)

    def check(self) -> None:
        """Assert that references add up. Requires: nobody is in the middle of anything."""
        users: dict[int, int] = {}
        for process in self.processes.values():
            process.table.check_huge()
            for number, entry in process.table.entries(0, NO_PAGE):
                if isinstance(entry, Swapped):
                    users[entry.slot] = users.get(entry.slot, 0) + 1
                elif entry.page is not self.zero_page:
                    assert (process.pid, number) in entry.page.mappings
        counted = {self.zero_page.frame: 1}
        for page in (*self.lru, *self.device_pages):
            assert page.busy is None
            for pid, number in page.mappings:
                mapped = self.processes[pid].table.get(number)
                assert mapped is not None
                assert not isinstance(mapped, Swapped)
                assert mapped.page is page
            cached = (page.slot is not None) + (page.file is not None)
            counted[page.frame] = len(page.mappings) + cached + page.n_pins
        held = {frame: self.frames.n_references(frame) for frame in self.frames.in_use()}
        assert held == counted, "references that nobody has, or that are missing"
        assert users == self.swap.users(), "users of slots that there are not, or that are missing"

    def _boot_frame(self) -> int:
        frame = self.frames.allocate()
        assert frame is not None, "a host without memory"
        return frame
