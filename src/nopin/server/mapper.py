"""One process that maps an arena: where it has which pages, and the userfaultfd that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from nopin.linux.fd_identity import Identity
from nopin.linux.madvise_spy import Advice, advice_of, gives_up
from nopin.linux.paging_uffd import READ_MESSAGES, Message, PagingUffd
from nopin.linux.pidfd import PidFd
from nopin.linux.proc import Maps
from nopin.linux.uffd_handshake import EventKind
from nopin.mm.effects import PageRun
from nopin.ranges import Range
from nopin.server.arena_pager import Removals
from nopin.units import PAGE_BYTES, PAGE_SHIFT

if TYPE_CHECKING:  # a view shows places
    from nopin.server.owner_view import OwnerView


UNKNOWN, GIVES_UP, KEEPS = 0, 1, 2
"""The last word of a REMOVE message: what becomes of the bytes. The kernel leaves it 0."""
_LOOKS_MAX = 1024
"""At a message whose sender is not to be seen: some 300 ms, in which it falls asleep unless all CPUs are long taken."""

IS_GIVEN_UP = {UNKNOWN: None, GIVES_UP: True, KEEPS: False}


@dataclass(slots=True)
class Madvices:
    """Messages of madvise, by what was made of them, since an arena is served.

    Attributes:
        given_up: bytes were given up. kept: only the view of them.
        unknown: which of the two could not be seen. Bytes that were in swap alone were kept.
        put_off: looks at such a message, or one of munmap and the like, that found no sender: it was left unread.
    """

    given_up: int = 0
    kept: int = 0
    unknown: int = 0
    put_off: int = 0

    def count(self, *, dropped: bool | None) -> None:
        """Count a message."""
        if dropped is None:
            self.unknown += 1
        elif dropped:
            self.given_up += 1
        else:
            self.kept += 1


def _marked(message: Message, advice: list[Advice]) -> Message:
    kind, start, end, _ = message
    if kind != EventKind.REMOVE:
        return message
    given_up = gives_up(advice, Range(start, end))
    return kind, start, end, UNKNOWN if given_up is None else GIVES_UP if given_up else KEEPS


class Placed(NamedTuple):
    """Consecutive pages at consecutive addresses of one process."""

    first: int
    n: int
    address: int

    @property
    def end(self) -> int:
        """One past the last page."""
        return self.first + self.n

    @property
    def where(self) -> Range:
        """The addresses."""
        return Range.of_length(self.address, self.n * PAGE_BYTES)

    def part(self, where: Range) -> Placed | None:
        """Return what of it lies at these addresses."""
        inside = self.where.intersection(where)
        if inside is None:
            return None
        skipped = (inside.start - self.address) >> PAGE_SHIFT
        return Placed(self.first + skipped, inside.length >> PAGE_SHIFT, inside.start)


class Mapper:
    """A process with (parts of) the arena mapped. Owns its descriptors.

    Attributes:
        number: names it in effects.
        worker: its faults are a device's, and the arena does not live for its sake.
        process: it.
        unread: messages that were read in order to go on, still to be dealt with.
        to_wake: addresses of threads to be woken once the process can be served again.
        gone: its address space has ended.
        owed: threads that were seen to wait when the last message was read, but for its sender, if it is clear who that
            was; else one of them may be gone.
        removals: who is told what it gives up, before that is read; None: it is not served yet.
        madvices: its arena's count of messages of madvise.
        views: the arena in its address space, for each connection of the process through which devices reach that.
        low, high, bias: where all is in one place, pages [low, high) lie at bias + page * 4096; else no page is in
            [low, high).
        doubled: some page is at more than one place.
    """

    __slots__ = (
        "_n_owed_may_be_gone",
        "_n_unseen",
        "bias",
        "doubled",
        "gone",
        "high",
        "low",
        "madvices",
        "number",
        "owed",
        "places",
        "process",
        "removals",
        "to_wake",
        "uffd",
        "unread",
        "views",
        "worker",
    )

    def __init__(
        self,
        number: int,
        uffd: PagingUffd,
        places: list[Placed],
        process: PidFd,
        *,
        worker: bool,
    ) -> None:
        self.number = number
        self.uffd = uffd
        self.process = process
        self.worker = worker
        self.unread: list[Message] = []
        self.to_wake: list[Range] = []
        self.gone = False
        self.removals: Removals | None = None
        self.madvices = Madvices()
        self._n_unseen = 0
        self.owed: set[int] = set()
        self._n_owed_may_be_gone = 0
        self.views: list[OwnerView] = []
        self._set_places(places)

    def look_and_read(self) -> list[Message]:
        """Read messages that wait, as `PagingUffd.read`; the last word of a REMOVE says what was asked for.

        Whoever sent a message of something else than a fault waits until it is read. So nothing is read that was not
        looked at before, and such a message is left for later until its sender is seen, and whoever was seen before and
        waits since, as long as it may take to fall asleep. We may be killed right after reading, so what it gives up is
        noted for a successor before. Nor is anything read behind a message that is still to be dealt with: where pages
        are then is not known yet.
        """
        n_faults = self.uffd.n_faults()
        if n_faults:
            return self.uffd.read(min(n_faults, READ_MESSAGES))
        if not self.uffd.waits() or any(message[0] != EventKind.PAGEFAULT for message in self.unread):
            return []
        advice = advice_of(self.process.pid, [place.where for place in self.places])
        unseen = advice is None or len(self.owed - {each.thread for each in advice}) > self._n_owed_may_be_gone
        if unseen and self._n_unseen < _LOOKS_MAX:
            self._n_unseen += 1
            self.madvices.put_off += 1
            return []
        self._n_unseen = 0
        return self._read_event(advice or [])

    def look_and_read_fault(self) -> Message | None:
        """Read one fault, if one waits; what else waits is left for `look_and_read`."""
        return self.uffd.read_one() if self.uffd.n_faults() else None

    def _read_event(self, advice: list[Advice]) -> list[Message]:
        given_up = [run for each in advice if each.gives_up for run in self.runs_at(each.where)]
        if not given_up or self.removals is None:
            messages = self._read_one(advice)
        else:
            expected = self.removals.expect_removal(given_up)
            messages = self._read_one(advice)
            removals = [Range(*each[1:3]) for each in messages if each[0] == EventKind.REMOVE and each[3] == GIVES_UP]
            self.removals.expect_no_more(expected, [run for where in removals for run in self.runs_at(where)])
        return messages

    def _read_one(self, advice: list[Advice]) -> list[Message]:
        """Read one message. It wakes the senders of all others, too, until they have seen that it was not theirs."""
        messages = [_marked(message, advice) for message in self.uffd.read(1)]
        read = [Range(*each[1:3]) for each in messages if each[0] == EventKind.REMOVE]
        senders = {each.thread for each in advice if any(each.where.contains(where) for where in read)}
        seen = {each.thread for each in advice}
        is_clear = len(senders) < 2
        self.owed = seen - senders if is_clear else seen
        self._n_owed_may_be_gone = 0 if is_clear else 1
        return messages

    def runs_at(self, where: Range) -> list[PageRun]:
        """Return the pages at some addresses."""
        parts = [part for part in (place.part(where) for place in self.places) if part is not None]
        return [PageRun(part.first, part.n) for part in parts]

    def _set_places(self, places: list[Placed]) -> None:
        """Note where pages are; with only one place, looking up is one addition."""
        self.places = places
        one = places[0] if len(places) == 1 else Placed(0, 0, 0)
        self.low, self.high = one.first, one.end
        self.bias = one.address - (one.first << PAGE_SHIFT)
        by_page = sorted(places)
        self.doubled = any(before.end > after.first for before, after in pairwise(by_page))

    def learn(self, address: int, file: Identity, n_pages: int) -> Placed | None:
        """Ask the kernel what is mapped at an address; returns it if it is the arena's file, and known from now on.

        Args:
            n_pages: it has.
        """
        try:
            maps = Maps(self.process.pid)
        except OSError:  # it is gone, or not ours to look at
            return None
        try:
            found = next(maps.within(Range(address, address + 1)), None)
        finally:
            maps.close()
        if found is None or (found.device, found.inode) != file:
            return None
        first, n = found.offset >> PAGE_SHIFT, found.where.length >> PAGE_SHIFT
        place = Placed(first, min(n, n_pages - first), found.where.start)
        if place.n <= 0 or not place.where.contains(Range(address, address + 1)):
            return None
        self.cut(place.where)
        self.add(place)
        return place

    def address_of(self, pages: PageRun) -> int | None:
        """Return where a run is, if all of it is there, in one piece, and nowhere else, where it would be missed."""
        first, n = pages.first, pages.n
        if self.low <= first and first + n <= self.high:
            return self.bias + (first << PAGE_SHIFT)
        if self.doubled:
            return None
        for place in self.places:
            if place.first <= first and first + n <= place.end:
                return place.address + ((first - place.first) << PAGE_SHIFT)
        return None

    def page_at(self, address: int) -> int | None:
        """Return which page is at an address."""
        page = (address - self.bias) >> PAGE_SHIFT
        if self.low <= page < self.high:
            return page
        for place in self.places:
            offset = address - place.address
            if 0 <= offset < place.n * PAGE_BYTES:
                return place.first + (offset >> PAGE_SHIFT)
        return None

    def pieces(self, pages: PageRun) -> list[Placed]:
        """Return the parts of a run that are mapped, by address."""
        first, end = pages.first, pages.end
        found: list[Placed] = []
        for place in self.places:
            low, high = max(first, place.first), min(end, place.end)
            if low < high:
                found.append(Placed(low, high - low, place.address + ((low - place.first) << PAGE_SHIFT)))
        return found

    def add(self, place: Placed) -> None:
        """Note that pages are mapped."""
        self._set_places(sorted([*self.places, place], key=lambda each: each.address))

    def cut(self, where: Range) -> list[Placed]:
        """Note that nothing of the arena is at these addresses any more; returns what was."""
        left: list[Placed] = []
        gone: list[Placed] = []
        for place in self.places:
            part = place.part(where)
            if part is None:
                left.append(place)
                continue
            gone.append(part)
            if place.first < part.first:
                left.append(Placed(place.first, part.first - place.first, place.address))
            if part.end < place.end:
                left.append(Placed(part.end, place.end - part.end, part.address + part.n * PAGE_BYTES))
        self._set_places(left)
        return gone

    def close(self) -> None:
        """Let go of the process. Twice is fine."""
        self.uffd.close()
        self.process.close()
