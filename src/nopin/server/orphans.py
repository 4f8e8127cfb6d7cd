"""Clients whose server was killed: what they share goes on, before they know of the new server and after.

A successor makes a session without a connection for each client that has shares, from its share book: the same regions
of the same process, under the same names and tokens, so that peers attach by the URL they have. The client may be
waiting at a page fault meanwhile, or computing. When it makes its next request it connects anew and shows its book,
and that session gets the connection.

A client can also come back to a server that was not told to take over. Then its shares begin again with its greeting.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import TYPE_CHECKING

from nopin.errors import ServerRefused, UsageError
from nopin.nic.errors import VerbsError
from nopin.server import regions
from nopin.server.client_book import ClientBook
from nopin.server.core import log
from nopin.server.domain import Domain
from nopin.server.refusal import refuse
from nopin.server.registry import Record

if TYPE_CHECKING:
    from nopin.server.session import Session


def heir_of(newcomer: Session, book_fd: int) -> Session:
    """Return the session that goes on for a client that shows this book: one that waited for it, or the new one.

    Raises:
        ServerRefused: it is no share book.
    """
    with contextlib.suppress(OSError):
        waiting = newcomer.core.orphans.get(Record.of(newcomer.pid, [book_fd]))
        if waiting is not None:
            return waiting
    begin_book(newcomer, book_fd, fresh=False)
    restore(newcomer)
    return newcomer


def begin_book(session: Session, book_fd: int, *, fresh: bool) -> None:
    """Keep a session's shares in this book; the descriptor stays the caller's.

    Raises:
        ServerRefused: it is no share book.
        OSError: it cannot be mapped.
    """
    try:
        session.book = ClientBook(session.core.registry, session.pid, book_fd, fresh=fresh)
    except UsageError as problem:
        raise refuse(f"the descriptor beside Hello: {problem}", errno.EINVAL) from problem


def restore(session: Session) -> None:
    """Publish again what is in a session's book; strike out what cannot be."""
    book, objects = session.book, session.objects
    assert book is not None
    if not book.left:
        return
    book.announce()
    objects.usage.take(pds=1)
    handle = objects.new_handle()
    objects.domains[handle] = Domain(session.core.nic)
    for left in book.left:
        try:
            regions.restore(session, handle, left)
        except (ServerRefused, VerbsError, OSError) as problem:
            log.warning("a share of client %d (%s) cannot go on: %s", session.pid, session.name, problem)
            book.strike(left.name)


def name_of(pid: int) -> str:
    """Return a process's command name, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""
