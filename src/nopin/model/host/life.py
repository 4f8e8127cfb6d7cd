"""The end of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.model.effects import Acquire, Procedure, Quiesce, Release
from nopin.model.host import mapping
from nopin.model.host.vma import NO_PAGE

if TYPE_CHECKING:
    from nopin.model.host.process import Process


def exit(process: Process) -> Procedure[None]:
    """Tell devices, wait for those that need time, then free everything (exit_mmap).

    System calls and faults that are under way end first, or give up where they next look; new ones are refused.
    """
    if not process.alive:
        return
    process.alive = False
    fences = process.notifiers.release()
    process.host.observer.released(process)
    yield process.host.steps.notify
    if fences:
        yield Quiesce(fences)
    yield Acquire(process.mmap_lock)
    yield from mapping.free_range(process, 0, NO_PAGE)
    process.vmas.remove(0, NO_PAGE)
    process.host.forget(process)
    yield Release(process.mmap_lock)
