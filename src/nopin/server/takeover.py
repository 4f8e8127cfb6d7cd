"""Takeover: a new server goes on with the arenas of one that was killed.

What it needs is in the owners' processes, which may all be waiting at a page fault (`linux.fd_store`,
`server.arena_store`); the registry says where. For each arena:

1. Take the store's ends out of the owner (`pidfd_getfd`), and from it the files and every mapper's userfaultfd.
2. Map the file, put a pager around the table, and have it recover (`mm.recovery`): what is in the file is right, the
   table says what the holes are. Marks of write protection of a half-done eviction are lifted.
3. Wake every thread that waits. Those whose fault the dead server had read raise it again; the others' messages are
   still there.

Connections, queue pairs and regions died with the old server. An arena that was taken over lives as long as a process
maps it; its owner's next connection finds it in its address space.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial

from nopin.control.packets import close_all
from nopin.errors import HostLacks, UsageError
from nopin.linux.fd_store import FdStore
from nopin.linux.paging_uffd import PagingUffd
from nopin.linux.pidfd import PidFd, pid_of
from nopin.linux.uffd_handshake import LINK
from nopin.server.arena import Arena
from nopin.server.arena_store import ArenaStore, Left, Mapped
from nopin.server.client_book import ClientBook
from nopin.server.core import Core, log
from nopin.server.mapper import Mapper, Placed
from nopin.server.orphans import name_of, restore
from nopin.server.registry import Content, Record
from nopin.server.session import Session
from nopin.units import PAGE_BYTES, S_NS

CHILDREN_COME_WITHIN_NS = 10 * S_NS
"""A child that is on its way inside of fork (`accel.forked`) comes by then. Perhaps it is all that is left."""


def take_over(core: Core, left: Content) -> None:
    """Go on with what a predecessor left: arenas, then what lies in them and elsewhere and is shared.

    What cannot be taken over is logged, and no successor of ours finds it.
    """
    for record in left.arenas:
        try:
            if _take_over_arena(core, record):
                continue
        except (OSError, UsageError, HostLacks) as problem:
            log.warning("the arena of process %d cannot be taken over: %s", record.pid, problem)
        core.registry.remove_arena(record)
    for record in left.books:
        try:
            n_shares = _take_over_shares(core, record)
            log.info("took over %d shares of process %d", n_shares, record.pid)
            if n_shares:
                continue
        except (OSError, UsageError) as problem:
            log.warning("the shares of process %d cannot be taken over: %s", record.pid, problem)
        core.registry.remove_book(record)


def _take_over_shares(core: Core, record: Record) -> int:
    """Go on with the shares of a client that a predecessor had; returns how many. What cannot be is logged.

    Raises:
        OSError, UsageError: out of descriptors, or what its owner holds is no share book.
    """
    held = record.from_owner()
    if held is None:
        return 0
    try:
        book = ClientBook(core.registry, record.pid, held.fds[0], fresh=False)
        session = Session(core, None, held.process, name_of(record.pid))
    except BaseException:
        held.process.close()
        raise
    finally:
        close_all(held.fds)
    session.book = book
    core.sessions.add(session)
    restore(session)
    n_shares = len(session.objects.shares)
    if n_shares:
        core.orphans[book.record] = session
        session.arenas.find_all()
    else:
        session.end("nothing of it could be taken over")
    return n_shares


def _take_over_arena(core: Core, record: Record) -> bool:
    """Go on with one arena; False if nobody holds it any more.

    Raises:
        OSError, UsageError, HostLacks: it cannot be.
    """
    held = record.from_anyone()
    if held is None:
        return False
    held.process.close()
    try:
        store = ArenaStore(FdStore(*held.fds))
    except OSError:
        close_all(held.fds)
        raise
    left = store.left()
    if left is None:
        store.close()
        raise UsageError("its owner holds nothing that makes sense")
    arena = _restore(core, left, store)
    arena.record = record
    core.registry.add_arena(record)
    log.info("took over the arena %r of process %d: %d pages", left.entry.name, record.pid, left.entry.n_pages)
    return True


def _restore(core: Core, left: Left, store: ArenaStore) -> Arena:
    """Put an arena together: all of it, or nothing.

    Raises:
        OSError, UsageError, HostLacks: something of it is not what it should be. Nothing is kept.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(store.close)
        undo.callback(close_all, left.fds)
        for mapped in left.mappers:
            undo.callback(close_all, mapped.fds)
        for mapped in left.mappers:
            _check(mapped)
        parts = core.arena_maker.adopt(left.entry, left.fds, store)
        undo.pop_all()
    arena = core.arenas.create(left.entry.name, parts)
    core.iommu.attach(parts.device)
    arena.wanted = False  # nobody's connection is behind it
    mappers = [_restore_mapper(arena, mapped) for mapped in left.mappers]
    arena.runner.start(parts.pager.recover())
    for mapper in mappers:
        for place in mapper.places:
            mapper.uffd.wake(place.address, place.n * PAGE_BYTES)
    arena.awaited = True
    core.arenas.after(CHILDREN_COME_WITHIN_NS, partial(_await_no_more, arena))
    return arena


def _await_no_more(arena: Arena) -> None:
    arena.awaited = False
    arena.close_if_unused()


def _check(mapped: Mapped) -> None:
    """Check that the descriptors of a mapper are a userfaultfd and the pidfd of its process.

    Raises:
        UsageError: they are not.
    """
    entry, (uffd, pidfd) = mapped
    if os.readlink(f"/proc/self/fd/{uffd}") != LINK:
        raise UsageError(f"what is kept of mapper {entry.number} is no userfaultfd")
    if pid_of(pidfd) not in (entry.pid, -1):
        raise UsageError(f"what is kept of mapper {entry.number} is not the pidfd of process {entry.pid}")


def _restore_mapper(arena: Arena, mapped: Mapped) -> Mapper:
    """Serve a process that a predecessor served."""
    entry, (uffd, pidfd) = mapped
    os.set_blocking(uffd, False)
    places = [
        Placed(first, n, address) for first, n, address in entry.places if 0 <= first < first + n <= arena.n_pages
    ]
    return arena.adopt(Mapper(entry.number, PagingUffd(uffd), places, PidFd(entry.pid, pidfd), worker=entry.worker))
