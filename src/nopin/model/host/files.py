"""Files of a modelled host: bytes on a medium, pages of them in memory, and faults of mappings of them.

A page of a file is found in the file's cache and locked before it is mapped, and the size of the file is looked at in
that very step. So whoever holds a page's lock (truncate, writeback, reclaim) sees all its mappings and no new one, and
after a file has been made shorter nothing beyond its end is mapped any more.

Shared anonymous memory is a file without a name: it ends with its last mapping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nopin.model.effects import Gate, Lock, Procedure
from nopin.model.host.errors import Bus, PageLost
from nopin.model.host.page import Page
from nopin.model.host.table import Present
from nopin.model.host.vma import Vma
from nopin.units import PAGE_BYTES, PAGE_SHIFT

if TYPE_CHECKING:
    from nopin.model.host.device_memory import DeviceMemory
    from nopin.model.host.host import Host
    from nopin.model.host.process import Process


@dataclass(slots=True, eq=False)
class File:
    """A file, or a piece of shared anonymous memory (`name` empty).

    Attributes:
        length_bytes: accesses past the last page that has a byte of it are SIGBUS.
        cache: pages in memory, by number from the start of the file.
        stored: pages on the medium; what is not there reads as zeros.
        lock: held, alone, by who changes the length or punches holes.
        memory: of a device, where its pages are; None: the host's.
    """

    name: str
    length_bytes: int
    lock: Lock
    memory: DeviceMemory | None = None
    cache: dict[int, Page] = field(default_factory=dict)
    stored: dict[int, bytes] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        """Tell whether a page has a byte of the file."""
        return index << PAGE_SHIFT < self.length_bytes


def cached(host: Host, file: File, index: int) -> Procedure[Page]:
    """Return a page of a file, in its cache, locked, with a reference for the caller; within the file at that moment.

    Raises:
        Bus: the file ends before it.
        PageLost: the medium failed.
        NoMemory: there is no frame for it.
    """
    while True:
        _check_length(file, index)
        page = file.cache.get(index)
        if page is None:
            page = yield from _read(host, file, index)
        else:
            host.frames.get(page.frame)  # or it might be dropped while its lock is waited for
            yield from host.lock(page)
        if page is not None and page.file is file and file.has(index):
            return page
        if page is not None:
            host.unlock(page)
            host.put_page(page)


def _check_length(file: File, index: int) -> None:
    if not file.has(index):
        raise Bus(f"page {index} of {file.name or 'shared memory'}, which has {file.length_bytes} bytes")


def _read(host: Host, file: File, index: int) -> Procedure[Page | None]:
    """Make a page of the cache and fill it; returned as by `cached`. None: another was faster."""
    page = yield from host.new_page(file.memory)
    if index in file.cache or not file.has(index):
        host.put_page(page)
        return None
    page.busy = Gate()
    page.file, page.index = file, index
    file.cache[index] = page
    host.frames.get(page.frame)
    if index in file.stored:
        yield from host.file_medium.read(1)
        if host.fires("file read"):
            drop(host, page)
            host.unlock(page)
            host.put_page(page)
            raise PageLost(f"page {index} of {file.name}: it cannot be read")
        host.frames.write(page.frame, 0, file.stored.get(index, bytes(PAGE_BYTES)))
    return page


def drop(host: Host, page: Page) -> None:
    """Take a page out of its file's cache; the reference that the cache had is given back. Requires: it is locked."""
    assert page.file is not None
    del page.file.cache[page.index]
    page.file = None
    host.put_page(page)


def bring(process: Process, vma: Vma, number: int, *, write: bool) -> Procedure[None]:
    """Serve a fault at an absent page of a mapping of a file: by the file's page, or by a copy to be written."""
    assert vma.file is not None
    host = process.host
    own = (yield from host.new_page()) if write and not vma.shared else None
    try:
        page = yield from cached(host, vma.file, vma.index(number))
    except (Bus, PageLost):
        if own is not None:
            host.put_page(own)
        raise
    if process.table.get(number) is not None:
        entered, left = None, [page, own]
    elif own is not None:
        host.frames.copy(page.frame, own.frame)
        entered, left = own, [page]
    else:
        page.dirty = page.dirty or write
        entered, left = page, []
    if entered is not None:
        process.map(number, entered, writable=write, dirty=write)
    host.unlock(page)
    for other in left:
        if other is not None:
            host.put_page(other)


def make_writable(process: Process, number: int, entry: Present) -> Procedure[None]:
    """Give the right to write to a page of a shared mapping; it counts as written from here on (page_mkwrite)."""
    page = entry.page
    if page.busy is not None:  # it is being written out, say
        yield from process.host.until_unlocked(page)
        return
    page.dirty = True
    process.table.replace(number, Present(page, writable=True, dirty=True))
