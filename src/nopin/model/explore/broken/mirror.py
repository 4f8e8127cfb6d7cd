"""Mutants of notifiers, sequences, mirrors and of what devices do when told to stop. See `mm/notifier.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nopin.iommu import mirror
from nopin.iommu.mirror import Mirror
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import Backoff, PageRun, Procedure
from nopin.mm.notifier import Bracket, Notifiers
from nopin.mm.sequence import Eras, Reading
from nopin.mm.space import Reason
from nopin.mm.subscriber import Answer, Fence, Invalidation
from nopin.model.device import atomic
from nopin.model.device.engine import Engine
from nopin.model.explore.mutants import Patch, mutant
from nopin.model.host.process import Process
from nopin.model.host.table import Exclusive
from nopin.ranges import Range

# The sequence


@mutant("fault_vs_munmap", "fault_vs_map_anew")
def drop_retry(patch: Patch) -> None:
    """What a fill learned is thrown away if an invalidation came in between."""
    patch.setattr(Notifiers, "read_retry", lambda _notifiers, _reading: False)


@mutant("fault_vs_munmap")
def install_before_asking(patch: Patch) -> None:
    """Entries are installed after it was asked whether they are still true, in the same step."""

    def fill(self: Mirror, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        where = Range(pages.first, pages.end)
        for _ in range(mirror.ATTEMPTS):
            if self._released:
                return FaultPages(0, Reason.OWNER_GONE)
            reading = self._notifiers.read_begin(where)
            came = yield from self.pager.device_fault(pages, write=write)
            self._install(pages.first, came.n_done, write=write)
            yield Backoff(0)
            stale = self._notifiers.read_retry(reading)
            self._notifiers.read_end(reading)
            if not stale:
                return came
            self.unhold(pages, came)
        return FaultPages(0, Reason.BUSY)

    patch.setattr(Mirror, "fill", fill)


@mutant("fault_vs_munmap_at_wrap")
def sequence_of_eight_bits(patch: Patch) -> None:
    """The sequence never wraps (KVM kept it in an int, 2023)."""

    def note(eras: Eras, ranges: Sequence[Range]) -> None:
        eras._clock = eras._clock + 1 & 0xFF
        if eras._readings:
            eras._noted.append((eras._clock, ranges))

    patch.setattr(Eras, "_note", note)


@mutant("fault_vs_munmap", "fault_vs_discard")
def fills_may_begin_during_an_invalidation(patch: Patch) -> None:
    """A fill that began after an invalidation's start, and ended before its end, is stale, too."""
    patch.setattr(Eras, "running", lambda _eras, _where: False)


@mutant("two_faults_vs_munmap")
def one_reading_ends_for_all(patch: Patch) -> None:
    """What other open readings need is kept when one is closed."""

    def close(eras: Eras, reading: Reading) -> None:
        del eras._readings[reading]
        eras._noted.clear()

    patch.setattr(Eras, "close", close)


@mutant("fault_vs_endless_invalidation")
def retry_without_bound(patch: Patch) -> None:
    """A fill that is always beaten ends with BUSY (hmm_range_fault's users once tested the time on one path only)."""
    patch.setattr(mirror, "ATTEMPTS", 1 << 40)


# Notifiers


@mutant("fault_vs_munmap", "access_vs_munmap")
def only_the_first_page_is_invalidated(patch: Patch) -> None:
    """All of a range is let go of, not its first page."""
    original = Notifiers.invalidate_start

    def short(notifiers: Notifiers, ranges: Iterable[Range], *args: Any, **named: Any) -> Bracket:
        return original(notifiers, [Range(each.start, each.start + 1) for each in ranges], *args, **named)

    patch.setattr(Notifiers, "invalidate_start", short)


@mutant("fault_vs_again")
def end_forgotten_after_again(patch: Patch) -> None:
    """An invalidation that was put off has ended (the counter that leaked in HMM, 2019)."""

    def give_up(notifiers: Notifiers, bracket: Bracket) -> None:
        bracket.again = True
        bracket._era = None

    patch.setattr(Notifiers, "_give_up", give_up)


@mutant("access_vs_exit", "write_access_vs_exit")
def end_of_a_process_is_not_told(patch: Patch) -> None:
    """Devices hear of the end of an address space before its pages are freed."""
    patch.setattr(Notifiers, "release", lambda _notifiers: ())


@mutant("arena_evict_vs_refusal")
def refusals_are_not_heeded(patch: Patch) -> None:
    """Pages that a device refused to let go of stay where they are."""
    original = Notifiers._note_answer

    def deaf(notifiers: Notifiers, subscription: Any, bracket: Bracket, event: Invalidation, answer: Answer) -> None:
        original(notifiers, subscription, bracket, event, answer)
        bracket.kept.clear()

    patch.setattr(Notifiers, "_note_answer", deaf)


# Mirrors


@mutant("fault_vs_munmap", "access_vs_munmap")
def entries_stay_when_their_pages_go(patch: Patch) -> None:
    """A mirror drops its entries when it is told to."""
    patch.setattr(Mirror, "invalidate_start", lambda _mirror, _event: None)


@mutant("write_access_vs_protect")
def right_to_write_stays(patch: Patch) -> None:
    """PROTECT takes the right to write away."""
    patch.setattr(Mirror, "protect", lambda _mirror, _event: None)


@mutant("load_vs_first_write", "first_write_vs_first_write")
def read_faults_allow_writes(patch: Patch) -> None:
    """A page brought for reading may be shared (with all zeros there are), so a write asks again (bug B1 of rxe)."""
    original = Mirror._install

    def install(self: Mirror, first: int, n: int, *, write: bool) -> None:
        del write
        original(self, first, n, write=True)

    patch.setattr(Mirror, "_install", install)


@mutant("access_vs_exit")
def release_is_not_heard(patch: Patch) -> None:
    """A mirror whose process is gone holds nothing."""
    patch.setattr(Mirror, "release", lambda _mirror, _event: None)


@mutant("arena_device_read_vs_evict", "arena_device_read_vs_prefetch")
def holds_are_never_given_back(patch: Patch) -> None:
    """Pages are held until they have been used, and no longer."""
    patch.setattr(Mirror, "unhold", lambda _mirror, _pages, _came: None)


@mutant("arena_device_read_vs_evict", "arena_device_read_vs_device_read")
def holds_are_given_back_twice(patch: Patch) -> None:
    """Each hold is given back once."""
    original = Mirror.unhold

    def twice(self: Mirror, pages: PageRun, came: FaultPages) -> None:
        original(self, pages, came)
        original(self, pages, came)

    patch.setattr(Mirror, "unhold", twice)


# Devices


@mutant("write_access_vs_munmap")
def writes_go_on_when_told_to_stop(patch: Patch) -> None:
    """Writes stop before the invalidation's start returns, whatever the cause."""
    patch.setattr(Engine, "_stop_writes", lambda _engine, _event: None)


@mutant("access_vs_munmap")
def reads_under_way_are_not_waited_for(patch: Patch) -> None:
    """Who still reads says so with a fence."""

    def stop(engine: Engine, event: Invalidation, *, reads: bool) -> Fence | None:
        del reads
        engine._stop_writes(event)
        engine._quiet(event)
        return None

    patch.setattr(Engine, "_stop", stop)


def told_elsewhere(patch: Patch, cause: Cause) -> None:
    """Have invalidations of one cause told where nobody is."""
    original = Notifiers.invalidate_start
    nowhere = [Range(1 << 51, (1 << 51) + 1)]

    def start(notifiers: Notifiers, ranges: Iterable[Range], why: Cause, **named: Any) -> Bracket:
        return original(notifiers, nowhere if why is cause else ranges, why, **named)

    patch.setattr(Notifiers, "invalidate_start", start)


@mutant("access_vs_mremap", "fault_vs_mremap")
def moves_are_not_told(patch: Patch) -> None:
    """mremap tells devices (REMAP): the old address has no memory any more."""
    told_elsewhere(patch, Cause.REMAP)


@mutant("access_vs_first_store", "first_write_vs_first_store")
def copies_on_write_are_not_told(patch: Patch) -> None:
    """Replacing a shared page by a copy tells devices (COW): what they hold is no longer this process's page."""
    told_elsewhere(patch, Cause.COW)


@mutant("write_access_vs_fork", "write_access_vs_fork_exit")
def forks_are_not_told(patch: Patch) -> None:
    """fork tells devices (FORK): pages are shared with the child until either side writes."""
    told_elsewhere(patch, Cause.FORK)


@mutant("access_vs_discard", "fault_vs_discard")
def discards_are_not_told(patch: Patch) -> None:
    """MADV_DONTNEED tells devices (REMOVE)."""
    told_elsewhere(patch, Cause.REMOVE)


@mutant("access_vs_reclaim", "write_access_vs_reclaim")
def reclaim_is_not_told(patch: Patch) -> None:
    """Reclaim tells devices (RECLAIM) before it reads the bytes that it writes out."""
    told_elsewhere(patch, Cause.RECLAIM)


@mutant("file_write_access_vs_writeback")
def writes_go_on_when_their_dirty_bit_is_taken(patch: Patch) -> None:
    """A write under way stops at SYNC, so that its rest makes the page dirty again."""
    patch.setattr(Engine, "sync", lambda _engine, _event: None)


@mutant("file_access_vs_truncate", "file_write_access_vs_truncate")
def truncation_is_not_told(patch: Patch) -> None:
    """Making a file shorter tells devices (TRUNCATE)."""
    told_elsewhere(patch, Cause.TRUNCATE)


@mutant("access_vs_migrate", "write_access_vs_migrate")
def migration_is_not_told(patch: Patch) -> None:
    """Moving pages to other frames tells devices (MIGRATE)."""
    told_elsewhere(patch, Cause.MIGRATE)


@mutant("store_vs_atomic", "write_access_vs_atomic")
def taking_a_page_back_is_not_told(patch: Patch) -> None:
    """Taking back a page that a device has to itself tells that device (EXCLUSIVE), and giving it tells all others."""
    told_elsewhere(patch, Cause.EXCLUSIVE)


@mutant("store_vs_atomic")
def exclusive_use_begins_while_a_page_is_taken_back(patch: Patch) -> None:
    """A device that was told to let go of a page does not begin to use it before that is over."""

    def lookup(process: Process, number: int, owner: object) -> int | None:
        entry = process.table.get(number)
        return entry.page.frame if isinstance(entry, Exclusive) and entry.owner is owner else None

    patch.setattr(atomic, "lookup_exclusive", lookup)
