"""Forked children have arenas, too: each maps them anew, as its parent has them, before it goes on.

The kernel could let a child inherit the mapping, and give a userfaultfd for it to whoever reads the message of the
fork. But a device server that is killed when it has read that, and not yet put it into the arena's store, takes it
along: the child would read zeros where pages are out, and leave pages of zeros in the file, which all others would then
read. So mappings of arenas are kept from children (MADV_DONTFORK; `ibv_fork_init` does so with registered memory), and
the hooks of `os.fork` do the rest:

    before      note what of each arena is mapped where, and how: some may have been moved, protected or unmapped
    in child    map the same, register it with a userfaultfd of this process, have it served; wait if there is no server
    in parent   wait until the child is served: an arena that nobody has mapped any more is given up

A child made by other means, by C code that does not tell Python, has no arena. It gets SIGSEGV there, never zeros:
nothing else comes to lie in that part of the address space by itself (`linux.arena_file`). The same goes for a child
whose server does not know the arena any more, or whose parent is killed in the middle of this.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nopin.control.arena_messages import MapArena, MapperKind
from nopin.control.packets import close_all
from nopin.control.socket import ControlSocket
from nopin.errors import HostLacks, ServerError, ServerGone
from nopin.linux.arena_file import Piece, map_piece, pieces_of, reserve
from nopin.linux.paging_uffd import open_paging, register_paging
from nopin.ranges import Range

_PAUSE_S = 0.02
_SERVED = b"!"


class Bequest:
    """What children forked from now on need in order to have an arena as this process has it.

    Args:
        memory_fd: the file of its bytes; stays the caller's.
        server: path of the socket.
    """

    def __init__(self, memory_fd: int, server: Path) -> None:
        self.memory_fd = os.dup(memory_fd)
        self.server = server
        _bequests.append(self)

    def close(self) -> None:
        """Have them do without. Twice is fine."""
        if self in _bequests:
            _bequests.remove(self)
            os.close(self.memory_fd)


class _Fork(NamedTuple):
    """A fork under way.

    Attributes:
        inherited: the arenas, each with what is mapped of it.
        told, tell: two ends of a pipe, by which the child says that it is served, or ends.
    """

    inherited: list[tuple[Bequest, list[Piece]]]
    told: int
    tell: int


_bequests: list[Bequest] = []
_forks: list[_Fork | None] = []  # more than one: a signal handler forks while a fork is waited for
_one_at_a_time = threading.RLock()  # a child of another thread would keep our pipe open


def _before() -> None:
    _one_at_a_time.acquire()
    _forks.append(None)
    if _bequests:
        pieces = pieces_of([each.memory_fd for each in _bequests])
        _forks[-1] = _Fork(list(zip(_bequests, pieces, strict=True)), *os.pipe())


def _in_parent() -> None:
    fork = _forks.pop()
    try:
        if fork is not None:
            os.close(fork.tell)
            try:
                os.read(fork.told, 1)
            finally:
                os.close(fork.told)
    finally:
        _one_at_a_time.release()


def _in_child() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.RLock()
    fork = _forks.pop()
    _forks.clear()
    if fork is None:
        return
    try:
        with contextlib.ExitStack() as each:  # what cannot be had is told on standard error; the others can be used
            for bequest, pieces in fork.inherited:
                each.callback(_inherit, bequest, pieces)
    finally:
        os.write(fork.tell, _SERVED)
        os.close(fork.tell)
        os.close(fork.told)


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def _inherit(bequest: Bequest, pieces: list[Piece]) -> None:
    """Have an arena in this process, a forked child, as its parent has it. Waits for a server if there is none.

    Raises:
        ServerError, HostLacks, OSError: that cannot be; accesses get SIGSEGV.
    """
    for piece in pieces:
        try:
            map_piece(bequest.memory_fd, piece)
        except FileExistsError:  # arrays of the arena would be arrays of what came there
            sys.stderr.write(f"nopin: {piece.where} of a forked child was taken before its arena could be mapped\n")
            os.abort()
    uffds: list[int] = []  # open as long as this process: a server that dies does not take them along
    try:
        requests = [_register(run, uffds) for run in _in_a_row(pieces)]
        _be_served(bequest, list(zip(requests, uffds, strict=True)))
    except (ServerError, HostLacks, OSError):
        close_all(uffds)  # else nobody would read that the mappings go
        for piece in pieces:
            reserve(piece.where)
        raise


def _in_a_row(pieces: list[Piece]) -> Iterator[Piece]:
    """Join pieces that are one but for their protection."""
    run: Piece | None = None
    for piece in pieces:
        if run is not None and run.where.end == piece.where.start and run.offset + run.where.length == piece.offset:
            run = run._replace(where=Range(run.where.start, piece.where.end))
            continue
        if run is not None:
            yield run
        run = piece
    if run is not None:
        yield run


def _register(run: Piece, uffds: list[int]) -> MapArena:
    """Register a mapping with a userfaultfd, which is added to those; returns the request to serve it."""
    uffd, features = open_paging()
    uffds.append(uffd)
    register_paging(uffd, run.where)
    return MapArena(
        seq=0,
        arena=0,
        base=run.where.start,
        offset=run.offset,
        length=run.where.length,
        uffd_features=int(features),
        kind=MapperKind.CHILD,
    )


def _be_served(bequest: Bequest, mappings: list[tuple[MapArena, int]]) -> None:
    """Have a server serve mappings. One that is killed meanwhile has a successor, which may know some of them."""
    while mappings:
        try:
            control = ControlSocket(bequest.server)
            with contextlib.closing(control):
                for request, uffd in mappings:
                    control.request(request, [uffd, bequest.memory_fd])
                return
        except ServerGone:
            time.sleep(_PAUSE_S)
