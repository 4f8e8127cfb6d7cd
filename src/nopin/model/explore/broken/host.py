"""Mutants of the modelled kernel: the order of a change, and who is waited for. See `model/host/host.py`."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from nopin.mm.causes import Cause
from nopin.mm.effects import Quiesce
from nopin.model.effects import Procedure
from nopin.model.explore.mutants import Patch, mutant
from nopin.model.host import advice, cow, files, fork, huge, mapping, protect, reclaim
from nopin.model.host.background import BackgroundReclaim
from nopin.model.host.fork import _again
from nopin.model.host.host import Host
from nopin.model.host.page import Page
from nopin.model.host.process import Process
from nopin.model.host.table import Entry, Present, Swapped, Table
from nopin.model.host.vma import Prot, Vma
from nopin.ranges import Range, coalesce


def _nobody(_fences: object) -> Quiesce:
    """Wait for no fence."""
    return Quiesce(())


@mutant("access_vs_munmap")
def fences_are_not_waited_for(patch: Patch) -> None:
    """An unmapping waits for the fences of devices before it changes anything."""
    patch.setattr(mapping, "Quiesce", _nobody)


@mutant("access_vs_reclaim")
def frames_are_reused_before_fences_pass(patch: Patch) -> None:
    """Reads may go on through a reclaim, so its frames are free when the fences have passed."""
    patch.setattr(reclaim, "Quiesce", _nobody)


def _zap(patch: Patch, zap: object) -> None:
    patch.setattr(mapping, "zap", zap)
    patch.setattr(advice, "zap", zap)


@mutant("access_vs_munmap", "fault_vs_munmap")
def frames_are_freed_before_devices_are_told(patch: Patch) -> None:
    """Devices have let go before the first frame is given back."""

    def zap(owner: Process, ranges: Sequence[Range], cause: Cause) -> Procedure[None]:
        gone: list[Entry] = []
        for where in ranges:
            yield from mapping._clear(owner, where.start, where.end, gone)
        for entry in gone:
            owner.host.let_go(entry)
        yield owner.host.steps.free
        bracket = owner.begin(ranges, cause)
        yield Quiesce(bracket.fences)
        bracket.end()

    _zap(patch, zap)


@mutant("fault_vs_munmap")
def invalidation_ends_before_the_change(patch: Patch) -> None:
    """The end of an invalidation comes after its change: until then nothing new is learned."""

    def zap(owner: Process, ranges: Sequence[Range], cause: Cause) -> Procedure[None]:
        bracket = owner.begin(ranges, cause)
        yield Quiesce(bracket.fences)
        bracket.end()
        yield owner.host.steps.notify
        gone: list[Entry] = []
        for where in ranges:
            yield from mapping._clear(owner, where.start, where.end, gone)
        yield owner.host.steps.free
        for entry in gone:
            owner.host.let_go(entry)

    _zap(patch, zap)


@mutant("munmap_vs_discard", "munmap_vs_munmap")
def frames_are_given_back_twice(patch: Patch) -> None:
    """Each reference of a frame is given back once."""
    original = Host.let_go

    def twice(host: Host, entry: Entry) -> None:
        original(host, entry)
        original(host, entry)

    patch.setattr(Host, "let_go", twice)


@mutant("store_vs_fork", "write_access_vs_fork")
def parent_keeps_the_right_to_write(patch: Patch) -> None:
    """fork write-protects the parent's pages when it shares them, not later and not only the child's."""

    def share(parent: Process, child: Process, number: int, entry: Entry) -> None:
        if isinstance(entry, Swapped):
            parent.host.swap.hold(entry.slot)
            child.table.set(number, Swapped(entry.slot))
            return
        if entry.page is not parent.host.zero_page:
            entry.page.mappings[child.pid, number] = None
            parent.host.frames.get(entry.page.frame)
        child.table.set(number, _again(protect.lowered(entry)))

    patch.setattr(fork, "_share", share)


@mutant("write_fault_vs_protect")
def rights_are_changed_after_devices_are_told(patch: Patch) -> None:
    """mprotect changes the mapping first: a fault that comes after the invalidation finds the new rights."""

    def mprotect(owner: Process, va: int, n_bytes: int, prot: Prot) -> Procedure[None]:
        first, end = mapping.pages_of(va, n_bytes)
        pieces = owner.vmas.overlapping(first, end)
        lowered = [Range(max(vma.first, first), min(vma.end, end)) for vma in pieces if vma.prot & ~prot]
        bracket = owner.begin(coalesce(lowered), Cause.PROTECT)
        yield Quiesce(bracket.fences)
        bracket.end()
        yield owner.host.steps.notify
        for vma in owner.vmas.remove(first, end):
            owner.vmas.insert(replace(vma, prot=prot))
        for number, entry in owner.table.entries(first, end):
            owner.table.replace(number, protect.lowered(entry))
        owner.host.observer.protected(owner, mapping.bytes_of(first, end), read=True, write=Prot.WRITE in prot)

    patch.setattr(protect, "mprotect", mprotect)


@mutant("huge_first_store_vs_store", "huge_first_store_vs_write")
def a_huge_page_is_brought_over_small_ones(patch: Patch) -> None:
    """2 MiB are brought at once only if nothing is there by then."""
    patch.setattr(huge, "_something_there", lambda _process, _start: False)


@mutant("huge_store_vs_fork_exit", "huge_store_vs_munmap")
def huge_pages_are_not_split(patch: Patch) -> None:
    """What concerns a part of a huge page makes small pages of it."""
    patch.setattr(Table, "split", lambda _table, _page: None)


@mutant("private_store_vs_reclaim", "private_write_fault_vs_reclaim")
def private_stores_go_to_the_file(patch: Patch) -> None:
    """A private mapping of a file has pages of its own for what is written there."""
    bring = files.bring

    def shared(process: Process, vma: Vma, number: int, *, write: bool) -> Procedure[None]:
        return bring(process, replace(vma, shared=True), number, write=write)

    patch.setattr(files, "bring", shared)


@mutant("private_access_vs_first_store", "private_first_store_vs_their_store")
def pages_of_files_are_written_in_place(patch: Patch) -> None:
    """A page of a file is nobody's alone, though one process alone has it mapped: it is copied before it is written."""

    def alone(process: Process, page: Page) -> bool:
        return page is not process.host.zero_page and len(page.mappings) <= 1 and page.slot is None

    patch.setattr(cow, "alone", alone)


@mutant("store_vs_give_up", "write_access_vs_give_up")
def given_up_pages_are_dropped_though_written(patch: Patch) -> None:
    """A page that was given up (MADV_FREE) and is written since, by whomever, stays."""
    original = reclaim._unmap_one

    def unmap_one(process: Process, number: int, page: Page) -> bool:
        entry = process.table.get(number)
        if page.discardable and isinstance(entry, Present):
            page.dirty = entry.dirty = False
        return original(process, number, page)

    patch.setattr(reclaim, "_unmap_one", unmap_one)


@mutant("pressure_vs_store")
def nobody_reclaims_in_the_background(patch: Patch) -> None:
    """When few frames are free somebody begins to reclaim before the last one is wanted."""
    patch.setattr(BackgroundReclaim, "look", lambda _reclaimer: None)
