"""The oracle of modelled hosts: it hears what programs and devices do, and knows what they may see.

It is told by hooks and asks nobody, so a bug in notifiers, mirrors, faults or the modelled kernel cannot talk it round:

- Every read, of a program or a device, finds a value that may be there (`memory.py`), in a page that is mapped, with
  the right to read it. So no store is lost, none is seen twice, none by whom it does not concern.
- A device touches only frames that are in use, and only pages it has asked for since it was last told to let go of
  them. It writes none whose right to be written was taken back, and no process that is gone.
- Who is refused an access was refused it for a reason that was there while it was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.device.observer import DeviceObserver
from nopin.model.host.files import File
from nopin.model.host.observer import HostObserver
from nopin.model.host.process import Process
from nopin.model.oracle.memory import WORD_BYTES, WORDS, Memory
from nopin.model.oracle.private import PrivateMemory
from nopin.model.oracle.violation import violate
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, PAGE_SHIFT, U64_MAX, page_ceil

_EXCUSES = {Reason.LOST: {"swap read", "file read"}, Reason.BUSY: {"frame"}}
"""Refusals that the medium, or want of memory, is to blame for."""

_STILL_MIRRORED = frozenset({Cause.PROTECT, Cause.SYNC})
"""After these a device need not ask anew in order to read."""


class Space:
    """What the oracle knows of one address space.

    Attributes:
        rights: of each page that is mapped: (read, write).
        bad_at: when a page last was not to be had, in full or in part.
        changing: of which an access may be refused just now.
        copy: what the child of a fork that is under way may find.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory = Memory()
        self.rights: dict[int, tuple[bool, bool]] = {}
        self.bad_at: dict[int, int] = {}
        self.released_at: int | None = None
        self.changing: list[Range] = []
        self.copy: Memory | None = None

    def allows(self, page: int, *, write: bool) -> bool:
        """Tell whether a page is mapped, with that right."""
        rights = self.rights.get(page)
        return rights is not None and rights[write]


class HostOracle(HostObserver):
    """See above; give it to hosts, `devices` to devices, and `walkers` to those that walk the table of a process.

    Args:
        note: told what happens in words, for the trace; None where there is none.

    Attributes:
        clock: counts changes of what may be accessed, from 1.
        trouble: sites of trouble that had their way.
    """

    def __init__(self, note: Callable[[str, str], None] | None) -> None:
        self.clock = 1
        self.devices = DeviceOracle(self)
        self.walkers = WalkerOracle(self)
        self.note = note
        self.in_use: set[int] = set()
        self.trouble: set[str] = set()
        self._spaces: dict[int, Space] = {}
        self._files: dict[File, Memory] = {}
        self._has_private = False  # somebody has a private mapping of a file

    def space(self, process: Process) -> Space:
        """Return what is known of a process."""
        found = self._spaces.get(process.pid)
        if found is None:
            found = self._spaces[process.pid] = Space(process.name)
        return found

    def refused(
        self, who: str, process: Process, va: int, n_bytes: int, reason: Reason, *, write: bool, since: int
    ) -> None:
        """An access failed for good that began when the clock was `since`: was there ever a reason?"""
        if self.trouble & _EXCUSES.get(reason, set()):
            return
        space = self.space(process)
        pages = range(va >> PAGE_SHIFT, (va + n_bytes - 1 >> PAGE_SHIFT) + 1)
        bad = any(not space.allows(page, write=write) or space.bad_at.get(page, 0) > since for page in pages)
        bad = bad or any(where.overlaps(Range(va, va + n_bytes)) for where in space.changing)
        if not bad and space.released_at is None:
            violate(
                "transient_as_permanent", f"{who} is refused {va:#x}, which could be had all the time: {reason.value}"
            )

    def check_idle(self) -> None:
        """Check what holds when nothing is under way."""
        self.devices.check_idle()

    def read(self, who: str, process: Process, va: int, data: bytes) -> None:
        """Somebody found bytes in a page."""
        space = self._spaces.get(process.pid) or self.space(process)
        rights = space.rights.get(va >> PAGE_SHIFT)
        if rights is None or not rights[0]:
            violate("stale_access", f"{who} reads {va:#x} of {space.name}, which is not mapped or not to be read")
        memory, at = space.memory, va
        for found in WORDS[len(data)](data):
            if self.note is not None:
                self.note(who, f"reads {found:#x} at {at:#x}")
            right = memory.load(at, found)
            if right is not None:
                may_be = " or ".join(f"{each:#x}" for each in right)
                which = "lost_write" if found == 0 else "wrong_bytes"
                violate(which, f"{who} reads {found:#x} at {at:#x} of {space.name}; it may be {may_be}")
            at += WORD_BYTES

    def wrote(self, who: str, process: Process, va: int, data: bytes) -> None:
        """Somebody put bytes into a page."""
        space = self._spaces.get(process.pid) or self.space(process)
        rights = space.rights.get(va >> PAGE_SHIFT)
        if rights is None:
            violate("stale_access", f"{who} writes {va:#x} of {space.name}, which is not mapped")
        if not rights[1]:
            violate("write_after_protect", f"{who} writes {va:#x} of {space.name}, which may not be written")
        memory, at = space.memory, va
        for value in WORDS[len(data)](data):
            if self.note is not None:
                self.note(who, f"writes {value:#x} at {at:#x}")
            if self._has_private:
                home, there = memory.home(at)
                home.peek(there)
                with self._changing(home, Range(there, there + WORD_BYTES)):
                    memory.store(at, value)
            else:
                memory.store(at, value)
            if space.copy is not None:
                space.copy.also(at, value)
            at += WORD_BYTES

    # What hosts tell

    def allocated(self, frame: int) -> None:
        """See `FrameObserver`."""
        assert frame not in self.in_use, f"frame {frame} is given out twice"
        self.in_use.add(frame)

    def freed(self, frame: int) -> None:
        """See `FrameObserver`."""
        if frame not in self.in_use:
            violate("released_twice", f"frame {frame} is freed, and is free")
        self.in_use.discard(frame)

    def cpu_loaded(self, process: Process, va: int, data: bytes) -> None:
        """See `HostObserver`."""
        self.read(process.name, process, va, data)

    def cpu_stored(self, process: Process, va: int, data: bytes) -> None:
        """See `HostObserver`."""
        self.wrote(process.name, process, va, data)

    def mapped(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        space = self.space(process)
        space.memory.map(where)
        self._set(space, where, (True, True))

    def file_mapped(self, process: Process, where: Range, file: File, offset: int, *, shared: bool) -> None:
        """See `HostObserver`."""
        space = self.space(process)
        if shared:
            space.memory.map_window(where, self._file(file), offset * PAGE_BYTES)
        else:
            self._has_private = True
            space.memory = own = PrivateMemory.over(space.memory)
            own.map_private(where, self._file(file), offset * PAGE_BYTES)
        self._set(space, where, (True, True))

    def truncate_begins(self, file: File, length_bytes: int) -> None:
        """See `HostObserver`."""
        for space, where in self._beyond(file, length_bytes):
            space.changing.append(where)

    def truncate_ends(self, file: File, length_bytes: int) -> None:
        """See `HostObserver`."""
        self._file(file).map(Range(page_ceil(length_bytes), U64_MAX))
        for space, where in self._beyond(file, length_bytes):
            self._set(space, where, None)
            if where in space.changing:  # or it was unmapped meanwhile, in part
                space.changing.remove(where)

    def punch_begins(self, file: File, first: int, end: int) -> None:
        """See `HostObserver`."""
        where = Range(first * PAGE_BYTES, end * PAGE_BYTES)
        with self._changing(self._file(file), where):
            self._file(file).discard_begins(where)

    def punch_ends(self, file: File, first: int, end: int) -> None:
        """See `HostObserver`."""
        self._file(file).discard_ends(Range(first * PAGE_BYTES, end * PAGE_BYTES))

    def unmap_begins(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        self.space(process).changing.append(where)

    def unmap_ends(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        space = self.space(process)
        space.changing.remove(where)
        space.memory.map(where)
        self._set(space, where, None)

    def discard_begins(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        self.space(process).memory.discard_begins(where)

    def discard_ends(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        self.space(process).memory.discard_ends(where)

    def give_up_begins(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        self.space(process).memory.give_up_begins(where)

    def give_up_ends(self, process: Process, where: Range) -> None:
        """See `HostObserver`."""
        self.space(process).memory.give_up_ends(where)

    def protected(self, process: Process, where: Range, *, read: bool, write: bool) -> None:
        """See `HostObserver`."""
        space = self.space(process)
        self._is_bad(space, where)
        for page in _pages(where):
            if page in space.rights:  # or it is past the end of a file
                space.rights[page] = read, write

    def move_begins(self, process: Process, source: Range, target: Range) -> None:
        """See `HostObserver`."""
        space = self.space(process)
        space.memory.move_begins(source, target)
        shift = (target.start - source.start) >> PAGE_SHIFT
        for page in _pages(source):
            space.rights[page + shift] = space.rights[page]
        space.changing.append(source)

    def move_ends(self, process: Process, source: Range, target: Range) -> None:
        """See `HostObserver`."""
        space = self.space(process)
        space.changing.remove(source)
        space.memory.move_ends(source, target)
        self._set(space, source, None)
        self._is_bad(space, target)  # until now

    def fork_begins(self, parent: Process) -> None:
        """See `HostObserver`."""
        space = self.space(parent)
        space.copy = space.memory.copy()

    def fork_ends(self, parent: Process, child: Process) -> None:
        """See `HostObserver`."""
        space, twin = self.space(parent), self.space(child)
        assert space.copy is not None, "a fork that ends and has not begun"
        twin.memory, space.copy = space.copy, None
        twin.rights = dict(space.rights)

    def released(self, process: Process) -> None:
        """See `HostObserver`."""
        self.clock += 1
        self.space(process).released_at = self.clock

    @contextmanager
    def _changing(self, file: Memory, where: Range) -> Iterator[None]:
        """Have those know that words of a file change who may, or may not, have copied them before."""
        memories = [each for space in self._spaces.values() for each in (space.memory, space.copy)]
        private = [each for each in memories if isinstance(each, PrivateMemory)]
        for each in private:
            each.before_change(file, where)
        yield
        for each in private:
            each.after_change(file, where)

    def _file(self, file: File) -> Memory:
        found = self._files.get(file)
        if found is None:
            found = self._files[file] = Memory()
        return found

    def _beyond(self, file: File, length_bytes: int) -> list[tuple[Space, Range]]:
        """Return where pages beyond a length of a file are mapped. Files are made shorter only."""
        found: list[tuple[Space, Range]] = []
        for space in self._spaces.values():
            for where, start in space.memory.windows_of(self._file(file)):
                first = max(where.start, where.start - start + page_ceil(length_bytes))
                if first < where.end:
                    found.append((space, Range(first, where.end)))
        return found

    def _set(self, space: Space, where: Range, rights: tuple[bool, bool] | None) -> None:
        self._is_bad(space, where)
        if rights is not None:
            space.rights.update(dict.fromkeys(_pages(where), rights))
            return
        for page in _pages(where):
            space.rights.pop(page, None)

    def _is_bad(self, space: Space, where: Range) -> None:
        """Note that for a moment pages were not to be had, or not for all uses."""
        self.clock += 1
        space.bad_at.update(dict.fromkeys(_pages(where), self.clock))


class _Seen:
    """What a device may know of a process.

    Attributes:
        asked: pages that it asked for since it was last told to let go of them; and those that it asked to write.
        quiet: the process was released, and no fence is left.
    """

    __slots__ = ("asked", "quiet")

    def __init__(self) -> None:
        self.asked: tuple[set[int], set[int]] = (set(), set())
        self.quiet = False


class DeviceOracle(DeviceObserver):
    """The part that devices tell."""

    def __init__(self, host: HostOracle) -> None:
        self._host = host
        self._seen: dict[tuple[str, int], _Seen] = {}  # by device and process
        self._open: dict[tuple[str, int, PageRun], list[bool]] = {}  # faults, by who lacks what: for writing?

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check_access(device, process, va, frame, write=False)
        self._host.read(device, process, va, data)

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check_access(device, process, va, frame, write=True)
        self._host.wrote(device, process, va, data)

    def invalidation_returned(self, process: Process, device: str, pages: Sequence[Range], cause: Cause) -> None:
        """See `DeviceObserver`."""
        if self._host.note is not None:
            self._host.note(device, f"reaches nothing of {_text(pages)} any more: {cause.value}")
        seen = self._seen.get((device, process.pid))
        if seen is None:
            return
        for asked in () if cause is Cause.SYNC else seen.asked[cause in _STILL_MIRRORED :]:
            for part in pages:
                start, end = part.start, part.end
                asked.difference_update([page for page in asked if start <= page < end])
        if cause is Cause.RELEASE:
            seen.quiet = True

    def fault_raised(self, device: str, process: Process, pages: PageRun, *, write: bool) -> None:
        """See `DeviceObserver`."""
        self._open.setdefault((device, process.pid, pages), []).append(write)

    def fault_answered(self, device: str, process: Process, pages: PageRun, reason: Reason | None) -> None:
        """See `DeviceObserver`."""
        writes = self._open.get((device, process.pid, pages))
        assert writes, "an answer to a fault that was not raised"
        write = any(writes)  # which of several it is, is not told
        writes.remove(min(writes))
        if not writes:
            del self._open[device, process.pid, pages]
        seen = self._seen.get((device, process.pid))
        if seen is None:
            seen = self._seen[device, process.pid] = _Seen()
        for asked in seen.asked[: 1 + write]:
            asked.update(range(pages.first, pages.end))

    def check_idle(self) -> None:
        """Check that every fault was answered."""
        if self._open:
            device, pid, pages = next(iter(self._open))
            violate("unanswered_fault", f"{device} asked for page {pages.first} of process {pid} and was not answered")

    def _check_access(self, device: str, process: Process, va: int, frame: int, *, write: bool) -> None:
        page, seen = va >> PAGE_SHIFT, self._seen.get((device, process.pid))
        if frame not in self._host.in_use:
            wrong = "which is free"
        elif seen is None or page not in seen.asked[write]:
            wrong = "and has not asked for it since it was told to let go"
        elif seen.quiet or (write and self._host.space(process).released_at is not None):
            wrong = "which is gone"
        else:
            return
        verb = "writes" if write else "reads"
        violate("stale_access", f"{device} {verb} page {page:#x} of process {process.pid} in frame {frame}, {wrong}")


class WalkerOracle(DeviceObserver):
    """The part that devices tell which translate at each access: they hold nothing, so nobody tells them to let go."""

    def __init__(self, host: HostOracle) -> None:
        self._host = host

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check(device, va, frame)
        self._host.read(device, process, va, data)

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check(device, va, frame)
        self._host.wrote(device, process, va, data)

    def _check(self, device: str, va: int, frame: int) -> None:
        if frame not in self._host.in_use:
            violate("stale_access", f"{device} reaches {va:#x} in frame {frame}, which is free")


def _pages(where: Range) -> range:
    return range(where.start >> PAGE_SHIFT, where.end >> PAGE_SHIFT)


def _text(pages: Sequence[Range]) -> str:
    return ", ".join(str(part) for part in pages)
