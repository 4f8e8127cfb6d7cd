"""Device faults against a modelled process: `DeviceFaults` as `hmm_range_fault` is.

A walk of the process's page table takes down where each page is. A page that is absent, or may not be written by who
wants to write, is faulted in, and the walk goes on at that page; what was taken down before may be stale by then. It
is not this file's to notice: the mirror's fill asks `read_retry` afterwards, as drivers do.

Nothing is held when the walk has ended, and so nothing is pinned: from there on only notifiers protect the device.
`release` therefore has nothing to give back, and pages may be gone again before who asked for them comes; it faults
again then.

Source: hmm_range_fault of Linux (mm/hmm.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.device.translations import Translations
from nopin.model.effects import Procedure, Work
from nopin.model.host.fault import fault_pages, lookup
from nopin.model.host.process import Process

WALKS_MAX = 16
"""How often in a row a page may be gone again when the walk comes back to it."""

Resolve = Callable[[PageRun, bool], Procedure[FaultPages]]
"""Brings pages (run, write) as far as they can be had."""


class FaultPath(Protocol):
    """How a fault gets from the device to the memory manager and back: what that takes, and who else is in the way."""

    def serve(self, pages: PageRun, write: bool, resolve: Resolve) -> Procedure[FaultPages]:
        """Carry a fault to `resolve`, whole or in pieces, and its answer back."""
        ...


class ProcessFaults:
    """See above.

    Args:
        process: whose pages.
        translations: where to take down the frames that are found.
        path: None: the device asks the memory manager at once.
    """

    def __init__(self, process: Process, translations: Translations, path: FaultPath | None = None) -> None:
        self._process = process
        self._translations = translations
        self._path = path
        self.n_faults = 0

    def device_fault(self, pages: PageRun, *, write: bool) -> Procedure[FaultPages]:
        """See `DeviceFaults`."""
        self.n_faults += 1
        if self._path is None:
            return self._resolve(pages, write)
        return self._path.serve(pages, write, self._resolve)

    def settled(self, pages: PageRun, *, write: bool) -> bool:
        """Never: every fault takes its way, and its time."""
        del pages, write
        return False

    def settle(self, pages: PageRun, *, write: bool) -> Procedure[bool]:
        """Never, either."""
        del pages, write
        yield from ()
        return False

    def release(self, pages: PageRun) -> None:
        """Nothing is held."""

    def _resolve(self, pages: PageRun, write: bool) -> Procedure[FaultPages]:
        page, n_walks = pages.first, 0
        while page < pages.end:
            pte = lookup(self._process, page)
            if pte is not None and (pte.writable or not write):
                self._translations.capture(page, pte.frame)
                page, n_walks = page + 1, 0
                continue
            if n_walks == WALKS_MAX:
                return FaultPages(page - pages.first, Reason.BUSY)
            came = yield from fault_pages(self._process, page, pages.end - page, write=write)
            if not came.n_done:
                assert came.reason is not None, "a fault that did nothing says why"
                return FaultPages(page - pages.first, came.reason)
            n_walks += 1
        yield Work("translations learned")  # a driver takes the lock of its table here
        return FaultPages(pages.n)
