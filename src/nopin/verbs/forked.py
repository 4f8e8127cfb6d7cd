"""A forked child makes sure that its userfaultfd is safe before it goes on with an arena.

The kernel makes a child's userfaultfd at fork and gives it to whoever reads the message of it: the device server, which
puts it into the arena's store at once. A server that is killed between these two steps takes it along. The kernel then
drops the registration, and the child would read zeros where pages are out.

So the child looks, inside of fork. Each arena has one page behind its last, the *canary*, that nothing uses and nobody
else touches. The child tries to register it with a userfaultfd that it opens itself. Usually that is refused, because
another one has it: then a touch of the canary waits until that one's server answers, which it does only once it has put
it into the store. If the canary is still taken afterwards, all is well. If it can be registered, before or after, the
child's first userfaultfd is lost. It registers the whole arena with its own, and asks the next server to serve it.

Children that are forked by other means than `os.fork` do not look; for them that moment, some microseconds, remains.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path

from nopin.control.arena_messages import MapArena, MapperKind
from nopin.control.messages import Handle
from nopin.errors import HostLacks, ServerError, ServerGone
from nopin.linux.arena_file import drop_view, forbid
from nopin.linux.paging_uffd import open_paging, register_paging
from nopin.ranges import Range
from nopin.units import PAGE_BYTES
from nopin.verbs.session import Session

_PAUSE_S = 0.02


def make_sure(where: Range, memory_fd: int, server: Path) -> None:
    """See to it that faults of this process, a forked child, are answered in an arena, whatever became of the server.

    Waits for a server if there is none. What none serves any more is made inaccessible: SIGSEGV instead of zeros.

    Args:
        where: the arena, its last page the canary.
        memory_fd: the file of its bytes.
        server: path of the socket.

    Raises:
        ServerError, HostLacks, OSError: it is inaccessible.
    """
    try:
        uffd, features = open_paging()
        try:
            if _is_lost(uffd, Range(where.end - PAGE_BYTES, where.end)):
                register_paging(uffd, where)
                request = MapArena(
                    seq=0,
                    arena=0,
                    base=where.start,
                    offset=0,
                    length=where.length,
                    uffd_features=int(features),
                    kind=MapperKind.CHILD,
                )
                _be_served(request, [uffd, memory_fd], server)
        finally:
            os.close(uffd)
    except (ServerError, HostLacks, OSError):
        forbid(where)
        raise


def _is_lost(uffd: int, canary: Range) -> bool:
    """Tell whether nobody has the userfaultfd that this process got from fork."""
    if _can_register(uffd, canary):
        return True
    ctypes.string_at(canary.start, 1)
    drop_view(canary)  # so that the touch of a child of ours waits as well
    return _can_register(uffd, canary)


def _can_register(uffd: int, where: Range) -> bool:
    try:
        register_paging(uffd, where)
    except OSError as problem:
        if problem.errno != errno.EBUSY:
            raise
        return False
    return True


def _be_served(request: MapArena, fds: list[int], server: Path) -> None:
    while True:
        try:
            session = Session(server)
            try:
                session.request(request, Handle, fds)
                return
            finally:
                session.close()
        except ServerGone:
            time.sleep(_PAUSE_S)
