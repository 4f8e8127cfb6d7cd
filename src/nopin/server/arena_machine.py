"""What an arena consists of on this machine, and the pager's effects on it as system calls.

The frames are a memfd. The server maps all of it for itself: devices copy there with no system call, and what they
need is filled in there. Nothing of ours touches a hole; but the owner can punch its own file at any moment, and the
server must not get a signal for it. So a hole touched there becomes a page of zeros, which is what its owner made it.

**Processes in the middle of something.** Filling and mapping fail with EAGAIN while a mapper is inside fork, munmap,
mremap or madvise, which may be long. The pager's effects must not wait there: another
procedure could come between. So what belongs to the file is done through the server's own mapping, which is never
in such a state, and the mapper is merely woken a little later: its thread faults again, and finds the page. Nor are
marks of write protection lifted late; one that stays too long costs a fault and changes nothing. Write protection
itself cannot be left out, and is tried until it succeeds.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nopin.linux import arena_file, memfd
from nopin.linux.paging_uffd import PagingUffd, open_for_filling, register_for_filling
from nopin.mm.effects import (
    SERVER,
    Fill,
    HasGoneOn,
    MapIn,
    Outcome,
    PageRun,
    Poison,
    Present,
    Punch,
    Unprotect,
    Wake,
    WriteProtect,
    Zero,
)
from nopin.mm.residency import Pages
from nopin.mm.space import Bytes, Staging
from nopin.ranges import Range, subtract
from nopin.server.mapper import Mapper, Placed
from nopin.units import PAGE_BYTES, PAGE_SHIFT, page_ceil


class ServerMapping:
    """The server's own mapping of an arena; implements `mm.device_faults.Frames`. Owns the file's descriptor.

    Attributes:
        fd: the file.
        memory: all of it, holes included.
        uffd: where holes are filled.

    Raises:
        OSError, HostLacks: it cannot be mapped or registered.
    """

    def __init__(self, fd: int, n_pages: int) -> None:
        self.fd = fd
        array = memfd.map_array(fd, n_pages * PAGE_BYTES)
        self.memory = Staging(array)
        self.n_pages = n_pages
        self._first_words = array.view(np.uint64)[:: PAGE_BYTES // 8]
        self.uffd = PagingUffd(open_for_filling())
        register_for_filling(self.uffd.fileno(), Range.of_length(self.memory.address, n_pages * PAGE_BYTES))

    def view(self, pages: PageRun) -> Bytes:
        """Return (n * 4096,) uint8, the bytes themselves. Requires: every page of the run is in the file."""
        return self.memory.array[pages.first * PAGE_BYTES : pages.end * PAGE_BYTES]

    def begin_with_zeros(self, pages: Pages) -> NDArray[np.bool_]:
        """Tell of each page whether its first word is zero."""
        found: NDArray[np.bool_] = self._first_words[pages] == 0
        return found

    def close(self) -> None:
        """Let go of the mapping: it goes with the last array over it."""
        self.uffd.close()


_SETTLE_ATTEMPTS = 8
"""How often to read, yield the CPU and try again before a mapper counts as being in the middle of something."""


class ArenaMachine:
    """Carries out the effects of one arena's pager that need not wait.

    Args:
        frames: the server's mapping.
        attention: called with a mapper that has unread messages, threads to be woken later, or is gone.

    Attributes:
        mappers: by number; the server's own is not among them.
    """

    def __init__(self, frames: ServerMapping, attention: Callable[[Mapper], None]) -> None:
        self.frames = frames
        self._one = Staging(np.empty(PAGE_BYTES, np.uint8))  # single pages are filled from here
        self.mappers: dict[int, Mapper] = {}
        self._attention = attention

    # Effects

    def zero(self, effect: Zero) -> Outcome:
        """Make zero pages and map them."""
        pages = effect.pages
        mapper = self.mappers.get(effect.mapper)
        if mapper is not None:
            return self.zero_at(mapper, pages.first, pages.n)
        if effect.mapper != SERVER:
            return Outcome(0, errno.ESRCH)
        return self._through_server(None, pages, 0, 0)

    def zero_at(self, mapper: Mapper, first: int, n: int) -> Outcome:
        """Do the same without an effect."""
        inside = mapper.low <= first and first + n <= mapper.high
        address = mapper.bias + (first << PAGE_SHIFT) if inside else mapper.address_of(PageRun(first, n))
        n_done = 0
        if address is not None:
            length = n << PAGE_SHIFT
            done, problem = mapper.uffd.zero(address, length)
            if not problem:
                return Outcome(n, 0)
            outcome = self._go_on(mapper, mapper.uffd.zero, address, length, done, problem)
            if outcome.errno != errno.EAGAIN:
                return outcome
            n_done = outcome.n_done
        return self._through_server(mapper, PageRun(first, n), n_done, 0)

    def fill(self, effect: Fill) -> Outcome:
        """Make pages from bytes and map them. EINTR: a message was read on the way, which may give these pages up."""
        pages = effect.pages
        if pages.n == 1:  # to copy it takes less time than to ask for its address
            self._one.view[:] = effect.data
            source = self._one.address
        else:
            source = np.frombuffer(effect.data, np.uint8).ctypes.data
        if effect.mapper == SERVER:
            return self._through_server(None, pages, 0, source)
        mapper = self.mappers.get(effect.mapper)
        if mapper is None:
            return Outcome(0, errno.ESRCH)
        address = mapper.address_of(pages)
        if address is None:
            return self._through_server(mapper, pages, 0, source)
        uffd, protect, length = mapper.uffd, effect.protect, pages.n * PAGE_BYTES
        done, problem = uffd.copy(address, source, length, protect=protect)
        if not problem:
            return Outcome(pages.n, 0)

        def operation(start: int, length: int) -> tuple[int, int]:
            return uffd.copy(start, source + start - address, length, protect=protect)

        outcome = self._go_on(mapper, operation, address, length, done, problem, ends_when_told=True)
        if outcome.errno != errno.EAGAIN:
            return outcome
        return self._through_server(mapper, pages, outcome.n_done, source)

    def map_in(self, effect: MapIn) -> Outcome:
        """Map pages of the file."""
        pages = effect.pages
        mapper = self.mappers.get(effect.mapper)
        if mapper is None:  # the server's mapping takes pages of the file by itself
            return Outcome(pages.n, 0) if effect.mapper == SERVER else Outcome(0, errno.ESRCH)
        uffd, protect = mapper.uffd, effect.protect

        def operation(start: int, length: int) -> tuple[int, int]:
            return uffd.map_in(start, length, protect=protect)

        address = mapper.address_of(pages)
        if address is None:
            return self._map_pieces(mapper, pages, operation)
        outcome = self._go_on(mapper, operation, address, pages.n * PAGE_BYTES, 0, errno.EAGAIN)
        if outcome.errno != errno.EAGAIN:
            return outcome
        self._wake_later(mapper, pages)
        return Outcome(pages.n, 0)

    def write_protect(self, effect: WriteProtect) -> bool:
        """Have stores wait; False if that must be tried again."""
        for mapper in self._addressed(effect.mapper):
            for piece in mapper.pieces(effect.pages):
                problem = self._settled(mapper, mapper.uffd.protect, piece)
                # A message read meanwhile may say that pages have moved, with none of them protected there.
                if problem == errno.EAGAIN or mapper.unread:
                    return False
        return True

    def unprotect(self, effect: Unprotect) -> None:
        """Allow stores and wake who waits."""
        for mapper in self._addressed(effect.mapper):
            for piece in mapper.pieces(effect.pages):
                problem = self._settled(mapper, mapper.uffd.lift, piece)
                if problem == errno.EAGAIN:
                    self._wake_later(mapper, PageRun(piece.first, piece.n))

    def wake(self, effect: Wake) -> None:
        """Have whoever waits try again."""
        for mapper in self._addressed(effect.mapper):
            for piece in mapper.pieces(effect.pages):
                mapper.uffd.wake(piece.address, piece.n * PAGE_BYTES)

    def poison(self, effect: Poison) -> Outcome:
        """Have accesses to holes answered by SIGBUS."""
        mapper = self.mappers.get(effect.mapper)
        if mapper is None:
            return Outcome(0, errno.ESRCH)
        return self._map_pieces(mapper, effect.pages, mapper.uffd.poison)

    def punch(self, effect: Punch) -> None:
        """Give pages back."""
        pages = effect.pages
        arena_file.punch(self.frames.fd, pages.first * PAGE_BYTES, pages.n * PAGE_BYTES)

    def present(self, effect: Present) -> NDArray[np.bool_]:
        """Tell which pages are in the file."""
        return arena_file.present(self.frames.fd, effect.pages.first, effect.pages.n)

    def has_gone_on(self, effect: HasGoneOn) -> bool:
        """Tell whether who was read of has run since; also true of who has ended."""
        mapper = self.mappers.get(effect.mapper)
        return mapper is None or mapper.uffd.has_gone_on()

    # How

    def _addressed(self, number: int | None) -> list[Mapper]:
        if number is None:
            return list(self.mappers.values())
        mapper = self.mappers.get(number)
        return [mapper] if mapper is not None else []

    def _map_pieces(self, mapper: Mapper, pages: PageRun, operation: Callable[[int, int], tuple[int, int]]) -> Outcome:
        """Do the same for pages that are not all mapped, or in several pieces, or at several places."""
        missing = [Range(pages.first, pages.end)]
        for piece in sorted(mapper.pieces(pages)):
            outcome = self._go_on(mapper, operation, piece.address, piece.n * PAGE_BYTES, 0, errno.EAGAIN)
            if outcome.errno == errno.EAGAIN:
                self._wake_later(mapper, PageRun(piece.first, piece.n))
            elif outcome.errno and outcome.errno != errno.EEXIST:
                missing = subtract(missing, Range(piece.first, piece.first + outcome.n_done))
                return Outcome(pages.n - _length(missing), outcome.errno)
            missing = subtract(missing, Range(piece.first, piece.end))
        n_missing = _length(missing)
        return Outcome(pages.n - n_missing, errno.ENOENT if n_missing else 0)

    def _go_on(
        self,
        mapper: Mapper,
        operation: Callable[[int, int], tuple[int, int]],
        address: int,
        length: int,
        done: int,
        problem: int,
        *,
        ends_when_told: bool = False,
    ) -> Outcome:
        """Go on with an operation that came to `done`, until all is done or it cannot go on.

        After EAGAIN it is repeated. ENOENT may mean that the range crosses from one mapping into the next (mprotect
        cuts them): an operation stays inside of one, so what lies in the first is done; the outcome says how far.

        Args:
            ends_when_told: a message that had to be read first ends it, with EINTR.
        """
        attempts, end = 0, length
        while problem == errno.EAGAIN or (problem == errno.ENOENT and end - done > PAGE_BYTES):
            if problem == errno.ENOENT:
                end = done + page_ceil((end - done) // 2)
            elif attempts >= _SETTLE_ATTEMPTS:
                break
            more, problem = operation(address + done, end - done)
            done += more
            if problem == errno.EAGAIN and not more:
                attempts += 1
                if self._settle(mapper) and ends_when_told:
                    return Outcome(done // PAGE_BYTES, errno.EINTR)
        if problem == errno.ESRCH:
            self._gone(mapper)
        if not problem and end < length:
            problem = errno.ENOENT
        return Outcome(done // PAGE_BYTES, problem)

    def _settled(self, mapper: Mapper, operation: Callable[[int, int], int], piece: Placed) -> int:
        """Do something without partial results, reading messages that are in its way; returns the errno."""
        for _ in range(_SETTLE_ATTEMPTS):
            problem = operation(piece.address, piece.n * PAGE_BYTES)
            if problem != errno.EAGAIN:
                break
            self._settle(mapper)
        if problem == errno.ESRCH:
            self._gone(mapper)
        return problem

    def _settle(self, mapper: Mapper) -> bool:
        """Read what the mapper waits to be read, and let it run; tell whether there was anything."""
        messages = mapper.look_and_read()
        if messages:
            mapper.unread += messages
            self._attention(mapper)
        os.sched_yield()
        return bool(messages)

    def _gone(self, mapper: Mapper) -> None:
        mapper.gone = True
        self._attention(mapper)

    def _wake_later(self, mapper: Mapper, pages: PageRun) -> None:
        mapper.to_wake += [piece.where for piece in mapper.pieces(pages)]
        self._attention(mapper)

    def _through_server(self, mapper: Mapper | None, pages: PageRun, n_done: int, source: int) -> Outcome:
        """Fill pages from the n_done-th on by the server's own mapping; who waits finds them there a little later.

        Args:
            source: address of the bytes of all of them; 0: they are zeros.
        """
        frames = self.frames
        start = frames.memory.address + pages.first * PAGE_BYTES
        done, length, problem = n_done * PAGE_BYTES, pages.n * PAGE_BYTES, errno.EAGAIN
        while problem == errno.EAGAIN:  # for each page that another has, one more
            if source:
                more, problem = frames.uffd.copy(start + done, source + done, length - done, protect=False)
            else:
                more, problem = frames.uffd.zero(start + done, length - done)
            done += more
        if mapper is not None:
            self._wake_later(mapper, pages)
        return Outcome(done // PAGE_BYTES, problem)


def _length(parts: list[Range]) -> int:
    return sum(part.length for part in parts)
