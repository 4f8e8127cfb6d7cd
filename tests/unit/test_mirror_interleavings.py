"""Every order of small events between a memory manager, a device's fills and its accesses.

Each case is a handful of procedures. They are run in every order in which their steps can follow each other. The memory
manager is the oracle: it alone says which pages are there and which may be written, and it looks at the mirror after
each step, and at each access. It is of the nasty kind: a device fault learns what is so, then lets others go on, and
only then answers. It knows nothing of sequences, so what keeps a stale answer out is the mirror.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pytest

from nopin.iommu.mirror import Mirror
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import Backoff, PageRun, Procedure
from nopin.mm.notifier import Notifiers
from nopin.mm.sequence import Reading
from nopin.mm.space import Reason
from nopin.mm.subscriber import Invalidation
from nopin.ranges import Range

Steps = Generator[object, None, object]
BOTH = Range(0, 2)
STEP = Backoff(0)
CHANGED = "something that others may have waited for"


class Manager:
    """Two pages: whether each is there, and whether it may be written. `told` is what devices said they wrote."""

    def __init__(self, notifiers: Notifiers | None = None) -> None:
        self.present = {0, 1}
        self.writable = {0, 1}
        self.going: list[set[int]] = []  # by each invalidation that has started and not ended
        self.unwritable: list[set[int]] = []
        self.held = 0
        self.written: set[int] = set()  # what the device has written and nobody was told yet
        self.notifiers = Notifiers() if notifiers is None else notifiers  # empty ones count as False
        self.mirror = Mirror(self.notifiers, self, 2)
        self.n_accesses = 0

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        if not self.notifiers.running(Range(pages.first, pages.end)):
            self.present |= set(range(pages.first, pages.end))
            self.writable |= set(range(pages.first, pages.end)) if write else set()
        n = next((k for k in range(pages.n) if pages.first + k not in self.present), pages.n)
        yield STEP  # here the answer may become false
        if n < pages.n:
            return FaultPages(0, Reason.BUSY)
        self.held += n
        return FaultPages(n)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        numbers = set(range(pages.first, pages.end))
        if not numbers <= self.present:
            return False
        self.writable |= numbers if write else set()
        return True

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        if self.notifiers.running(Range(pages.first, pages.end)):
            return False
        yield STEP  # the pages come after it
        numbers = set(range(pages.first, pages.end))
        self.present |= numbers
        self.writable |= numbers if write else set()
        return True

    def release(self, pages: PageRun) -> None:
        self.held -= pages.n

    def filled(self) -> Manager:
        """Have both pages in the mirror, with all rights."""
        for _ in self.fill(0, 2, write=True):
            continue
        return self

    # Procedures

    def fill(self, page: int, n: int = 1, *, write: bool = False) -> Steps:
        came = yield from self.mirror.fill(PageRun(page, n), write=write)
        self.mirror.unhold(PageRun(page, n), came)
        return came

    def take_in(self, page: int, n: int = 1, *, write: bool = False) -> Steps:
        if self.settled(PageRun(page, n), write=write):
            self.mirror.take_in(PageRun(page, n), write=write)
        yield CHANGED
        return None

    def bring(self, page: int, n: int = 1, *, write: bool = False) -> Steps:
        if (yield from self.settle(PageRun(page, n), write=write)):
            self.mirror.take_in(PageRun(page, n), write=write)
        yield CHANGED
        return None

    def take_away(self, pages: Range, cause: Cause) -> Steps:
        gone = set(range(pages.start, pages.end))
        bracket = self.notifiers.invalidate_start([pages], cause)
        self.going.append(gone)
        self.hear(bracket.harvest.dirty)
        yield CHANGED
        self.present -= gone
        self.writable -= gone
        yield CHANGED
        self.going.remove(gone)
        bracket.end()
        return None

    def protect(self, pages: Range) -> Steps:
        numbers = set(range(pages.start, pages.end))
        bracket = self.notifiers.invalidate_start([pages], Cause.PROTECT)
        self.unwritable.append(numbers)
        self.hear(bracket.harvest.dirty)
        yield CHANGED
        self.writable -= numbers
        yield CHANGED
        self.unwritable.remove(numbers)
        bracket.end()
        return None

    def sync(self, pages: Range) -> Steps:
        bracket = self.notifiers.invalidate_start([pages], Cause.SYNC)
        self.hear(bracket.harvest.dirty)
        yield CHANGED
        bracket.end()
        return None

    def access(self, page: int, *, write: bool) -> Steps:
        if self.mirror.use(page, 1, write=write):
            self.n_accesses += 1
            assert page in self.present, f"page {page} was accessed, and is not there"
            assert not write or page in self.writable, f"page {page} was written, and may not be"
            self.written |= {page} if write else set()
        yield CHANGED
        return None

    def release_all(self) -> Steps:
        self.notifiers.release()
        self.present.clear()
        self.writable.clear()
        self.written.clear()  # nobody asks any more
        yield CHANGED
        return None

    # The oracle

    def hear(self, dirty: set[int]) -> None:
        assert dirty <= self.written, "told of a write that did not happen"
        self.written -= dirty

    def look(self) -> None:
        gone = set().union(*self.going)
        fixed = set().union(*self.unwritable)
        for page in (0, 1):
            if self.mirror.holds(page, 1, write=False):
                assert page in self.present, f"page {page} is held, and is not there"
                assert page not in gone, f"page {page} is held, and its invalidation has started"
            if self.mirror.holds(page, 1, write=True):
                assert page in self.writable - fixed, f"page {page} is held for writing, and is protected"
        unheard = {page for page in (0, 1) if self.mirror.dirty_bitmap(PageRun(page, 1))[0]}
        assert unheard == self.written, "a write would be forgotten"
        self.mirror.check()


Case = Callable[[Manager], list[Steps]]

CASES: dict[str, Case] = {
    "fill against reclaim": lambda m: [m.fill(0, 2), m.take_away(BOTH, Cause.RECLAIM), m.access(1, write=False)],
    "fill against two that overlap": lambda m: [
        m.fill(0, 2),
        m.take_away(Range(0, 1), Cause.RECLAIM),
        m.take_away(BOTH, Cause.UNMAP),
    ],
    "fill against protection": lambda m: [m.fill(0, write=True), m.protect(BOTH), m.access(0, write=True)],
    "fill against protection and copy on write": lambda m: [
        m.fill(1, write=True),
        m.protect(BOTH),
        m.take_away(Range(1, 2), Cause.COW),
    ],
    "fills of different rights against migration": lambda m: [
        m.fill(0),
        m.fill(0, write=True),
        m.take_away(Range(0, 1), Cause.MIGRATE),
    ],
    "fill against release": lambda m: [m.fill(0, 2, write=True), m.release_all(), m.access(1, write=True)],
    "fill against reclaim and release": lambda m: [m.fill(0), m.take_away(BOTH, Cause.RECLAIM), m.release_all()],
    "pages taken in at once, and accessed, against reclaim": lambda m: [
        m.take_in(0, 2),
        m.take_away(Range(1, 2), Cause.RECLAIM),
        m.take_in(1),
        m.access(1, write=False),
    ],
    "pages taken in at once, and accessed by writing, against protection": lambda m: [
        m.take_in(0),
        m.take_in(0, write=True),
        m.protect(Range(0, 1)),
        m.access(0, write=True),
    ],
    "pages brought at once, and accessed, against reclaim": lambda m: [
        m.bring(0, 2),
        m.take_away(Range(1, 2), Cause.RECLAIM),
        m.access(1, write=False),
    ],
    "pages brought at once against protection and release": lambda m: [
        m.bring(0, write=True),
        m.protect(Range(0, 1)),
        m.take_away(BOTH, Cause.UNMAP),
    ],
    "pages taken in at once against release": lambda m: [
        m.take_in(0, write=True),
        m.take_in(0, 2),
        m.take_away(BOTH, Cause.UNMAP),
        m.release_all(),
    ],
    "access by writing against sync and reclaim": lambda m: [
        m.filled().sync(BOTH),
        m.take_away(BOTH, Cause.RECLAIM),
        m.access(0, write=True),
    ],
    "access by writing against protection and reclaim": lambda m: [
        m.filled().protect(Range(0, 1)),
        m.take_away(Range(0, 1), Cause.RECLAIM),
        m.access(0, write=True),
    ],
}


def orders(case: Case, make: Callable[[], Manager] = Manager) -> Iterator[Manager]:
    """Run a case in every order of its steps; yields the manager at the end of each.

    Generators cannot be copied, so each order is run from the start: `prefix` says who goes, step by step. Who waits a
    while goes on when something has changed: until then it would find what it has just found.
    """
    pending: list[list[int]] = [[]]
    while pending:
        prefix = pending.pop()
        manager = make()
        live, waiting = dict(enumerate(case(manager))), set[int]()
        at, n_seen = 0, len(prefix) - 1  # what led here was looked at before
        while live:
            choices = sorted(set(live) - waiting) or sorted(live)
            if at == len(prefix):
                pending += [[*prefix, other] for other in choices[1:]]
                prefix = [*prefix, choices[0]]
            who = prefix[at]
            at += 1
            try:
                step = next(live[who])
            except StopIteration:
                step = CHANGED
                del live[who]
            if step == CHANGED:
                waiting.clear()
            elif step != STEP:
                waiting.add(who)
            if at > n_seen:
                manager.look()
        yield manager


def run_all(name: str, make: Callable[[], Manager]) -> None:
    for _ in orders(CASES[name], make):
        continue


@pytest.mark.parametrize("name", CASES)
def test_no_order_of_events_lets_a_device_use_a_stale_translation(name: str) -> None:
    n_orders = n_accesses = n_retries = 0
    for manager in orders(CASES[name]):
        assert manager.held == 0, "pages held for ever"
        n_orders += 1
        n_accesses += manager.n_accesses
        n_retries += manager.mirror.statistics().retries
    assert n_orders > 50, "an exploration of too little"
    assert n_retries or "fill" not in name, "no order made a fill try again"
    assert n_accesses or "access" not in name, "no order let an access through"


class Trusting(Notifiers):
    """Notifiers that never find an answer stale: what a device would be without the check."""

    def read_retry(self, reading: Reading) -> bool:
        return False


@pytest.mark.parametrize("name", ["fill against reclaim", "fill against protection"])
def test_the_oracle_finds_a_mirror_that_does_not_check(name: str) -> None:
    with pytest.raises(AssertionError, match="is held"):
        run_all(name, lambda: Manager(Trusting()))


class Calm(Notifiers):
    """Notifiers that never say that an invalidation runs."""

    def running(self, where: Range) -> bool:
        return False


@pytest.mark.parametrize("name", [name for name in CASES if "taken in" in name and "release" not in name])
def test_the_oracle_finds_a_mirror_that_takes_pages_in_while_they_go(name: str) -> None:
    with pytest.raises(AssertionError, match="is held"):
        run_all(name, lambda: Manager(Calm()))


class Deaf(Mirror):
    """A mirror that hears nothing."""

    def invalidate_start(self, event: Invalidation) -> None:
        del event


def test_the_oracle_finds_a_mirror_that_misses_invalidations() -> None:
    def make() -> Manager:
        manager = Manager()
        manager.mirror.close()
        manager.mirror = Deaf(manager.notifiers, manager, 2)
        return manager

    with pytest.raises(AssertionError, match="is held"):
        run_all("fill against reclaim", make)
