"""The end of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Acquire, Procedure, Quiesce, Release
from nopin.model.host import mapping
from nopin.model.host.vma import NO_PAGE
from nopin.ranges import Range

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def exit(process: Process) -> Procedure[None]:
    """Tell devices, wait for those that need time, then free everything (exit_mmap).

    System calls and faults that are under way end first, or give up where they next look; new ones are refused.
    """
    if not process.alive:
        return
    process.alive = False
    host = process.host
    shared = [Range(vma.first, vma.end) for vma in process.vmas if vma.shared]
    bracket = process.begin(shared, Cause.SYNC) if shared else None  # what devices wrote must reach the files
    fences = process.notifiers.release()
    host.observer.released(process)
    yield host.steps.notify
    waits_for = [*fences, *(bracket.fences if bracket is not None else ())]
    if waits_for:
        yield Quiesce(waits_for)
    if bracket is not None:
        bracket.end()
    yield Acquire(process.mmap_lock)
    yield from mapping.free_range(process, 0, NO_PAGE)
    host.note_unmapped(process.vmas.remove(0, NO_PAGE))
    host.forget(process)
    yield Release(process.mmap_lock)
    yield from host.end_shared_memory()
