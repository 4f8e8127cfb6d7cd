"""A modelled host: frames, processes, a swap area, files, and what the memory management does of its own accord.

**What happens between two yields** happens at once: it is what Linux does under a page table lock. Every `Work` is a
place where anything else may come in between.

**Locks**, in the order in which they are taken: a process's mmap lock (shared for faults and MADV_DONTNEED, alone for
what changes mappings), then the locks of single pages. Reclaim takes page locks only if they are free, so it may run
inside a fault, whatever that holds. Nobody waits for a second page's lock but in order of page numbers.

**When a frame may be used anew.** Whoever takes a translation away brackets it (`Process.begin`), clears the entry, and
gives the frame's reference back after the bracket's end; for a must-now cause the fences have passed before the end,
for a deferrable one they are waited for before the reference is given back. Every reference counts, so the frame is
free when the last one is given back, and then at once.
"""

from __future__ import annotations

from nopin.model.effects import Lock, Procedure
from nopin.model.host.costs import HostCosts, Steps
from nopin.model.host.errors import NoMemory
from nopin.model.host.frames import Frames
from nopin.model.host.observer import HostObserver
from nopin.model.host.page import Page
from nopin.model.host.process import Process
from nopin.model.host.table import Entry, Swapped
from nopin.model.host.vma import NO_PAGE
from nopin.model.scheduler import Scheduler


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

    Attributes:
        processes: alive and dying, by process id.
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
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.observer = observer or HostObserver()
        self.frames = Frames(n_frames, self.observer)
        self.steps = Steps(costs or HostCosts())
        self.pages_per_step = pages_per_step
        self.processes: dict[int, Process] = {}
        self.zero_page = self._new_page(self._boot_frame())
        self._last_pid = 0

    def spawn_process(self) -> Process:
        """Make a process with nothing mapped."""
        self._last_pid += 1
        process = self.processes[self._last_pid] = Process(self._last_pid, self)
        return process

    def forget(self, process: Process) -> None:
        """Take a process whose memory is gone off the list."""
        assert not len(process.table)
        del self.processes[process.pid]

    # Pages

    def new_page(self) -> Procedure[Page]:
        """Allocate a page of zeros that nobody maps yet; the caller has its one reference.

        Raises:
            NoMemory: nothing is free, and nothing can be reclaimed.
        """
        yield self.steps.zero
        frame = self.frames.allocate()
        if frame is None:
            raise NoMemory(f"{self.name}: none of {self.frames.n_frames} frames is free")
        return self._new_page(frame)

    def put_page(self, page: Page) -> None:
        """Give a reference of a page back."""
        if page is not self.zero_page:
            self.frames.put(page.frame)

    def let_go(self, entry: Entry) -> None:
        """Give back what an entry that was taken out held."""
        assert not isinstance(entry, Swapped)
        self.put_page(entry.page)

    def check(self) -> None:
        """Assert that references add up. Requires: nobody is in the middle of anything."""
        counted = {self.zero_page.frame: 1}
        for process in self.processes.values():
            for number, entry in process.table.entries(0, NO_PAGE):
                page = None if isinstance(entry, Swapped) else entry.page
                if page is None or page is self.zero_page:
                    continue
                assert (process.pid, number) in page.mappings
                counted[page.frame] = counted.get(page.frame, 0) + 1
        for frame in self.frames.in_use():
            n = self.frames.n_references(frame)
            assert n == counted.get(frame, 0), f"frame {frame}: {n} references, {counted.get(frame, 0)} known"

    def _boot_frame(self) -> int:
        frame = self.frames.allocate()
        assert frame is not None, "a host without memory"
        return frame

    def _new_page(self, frame: int) -> Page:
        return Page(frame, Lock(f"page {frame}"))
