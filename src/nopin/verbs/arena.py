"""Arenas: memory whose pages the device server brings and takes away, with plain numpy arrays in it.

An arena is mapped from a file that the server made and this process keeps open, and registered with a userfaultfd of
this process, of which the server has a copy. Both outlive the server: while there is none, whoever touches a page
that is out waits.

An arena can be closed when no array is left in it. Closing the device leaves arrays alone: the arena then stays
mapped, and the server serves it, until its last array dies.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nopin.accel.forked import Bequest
from nopin.control.arena_messages import (
    ArenaCreated,
    CreateArena,
    DestroyArena,
    DiscardRange,
    MapArena,
    ReclaimArena,
    SetBudget,
)
from nopin.control.messages import Handle
from nopin.errors import ArenaFull, Closed, ServerError, ServerRefused, UsageError
from nopin.linux.arena_file import map_somewhere
from nopin.linux.libc import unmap
from nopin.linux.paging_uffd import open_paging, register_paging, unregister
from nopin.linux.pidfd import PidFd
from nopin.ranges import Range
from nopin.units import format_bytes, page_ceil, parse_bytes
from nopin.verbs.heap import Heap
from nopin.verbs.numpy_handler import NumpyHandler
from nopin.verbs.objects import FORKED, DeviceObject

if TYPE_CHECKING:
    from nopin.verbs.device import Device
    from nopin.verbs.session import Session

CAPACITY_BYTES = 64 << 30
"""Addresses cost nothing until they are touched; giving an arena up costs a look at each page's state."""
_KEEP_BYTES_MAX = 64 << 20
_KEEP_SHARE = 8
"""Freed memory is kept for reuse up to this part of the budget."""

_LOOKS, _LOOK_S = 100, 0.01
"""At a server that closed the connection and has not ended."""

Order = Literal["C", "F"]


class Arena(DeviceObject):
    """Managed memory of this process. Made by `Device.arena`.

    Attributes:
        handle: its number at the server.
        where: its addresses, the same in every process that maps it.
        memory_fd: the file of its bytes; `table_fd` of its page table; `uffd` the userfaultfd of this process. They
            stay open, mapped or not, because they are what a new server starts from.
        budget_bytes: may be resident.
    """

    def __init__(self, device: Device, capacity_bytes: int, budget_bytes: int | None, name: str = "") -> None:
        device._require_open()
        self.session = device.session
        self._lifeline = device.lifeline
        self._siblings = device.arenas
        self._server: PidFd | None = PidFd.open(self.session.welcome.server_pid)
        self._fds: list[int] = []
        self._store: list[int] = []
        self._mapped: list[Range] = []
        self._bequest: Bequest | None = None
        request = CreateArena(
            seq=0,
            capacity_bytes=page_ceil(capacity_bytes),
            budget_bytes=budget_bytes,
            name=name or f"pid {os.getpid()}",
        )
        try:
            created, fds = self.session.request(request, ArenaCreated)
            self._fds, self._store = fds[:2], fds[2:]
            self.handle, self.budget_bytes = created.arena, created.budget_bytes
            self.memory_fd, self.table_fd = self._fds
            self._map(request.capacity_bytes)
            self._bequest = Bequest(self.memory_fd, self.server)
        except BaseException:
            self._dissolve()
            raise
        super().__init__(device)
        keep = min(self.budget_bytes // _KEEP_SHARE, _KEEP_BYTES_MAX)
        self._heap = Heap(self.where, self._discard, keep_bytes=keep)
        self._handler = NumpyHandler(self._heap)
        self._siblings.append(self)

    def _map(self, length: int) -> None:
        self.where = Range.of_length(map_somewhere(self.memory_fd, length), length)
        self._mapped.append(self.where)
        self.uffd, features = open_paging()
        self._fds.append(self.uffd)
        register_paging(self.uffd, self.where)
        request = MapArena(
            seq=0, arena=self.handle, base=self.where.start, offset=0, length=length, uffd_features=int(features)
        )
        self.session.request(request, Handle, [self.uffd])

    def _described(self) -> str:
        return f"{self.where} budget {format_bytes(self.budget_bytes)}"

    @property
    def server(self) -> Path:
        """Path of the device server's socket."""
        return self.session.control.path

    @property
    def n_arrays(self) -> int:
        """Arrays that live in it, views not counted."""
        return self._heap.n_blocks

    def contains(self, array: NDArray[Any]) -> bool:
        """Tell whether an array's bytes are in it."""
        return self._heap.owns(array.__array_interface__["data"][0])

    def zeros(self, shape: Any, dtype: DTypeLike = np.float64, order: Order = "C") -> NDArray[Any]:
        """Return an array of zeros in this arena; as `Device.zeros`."""
        return self._make(np.zeros, shape, dtype, order)

    def empty(self, shape: Any, dtype: DTypeLike = np.float64, order: Order = "C") -> NDArray[Any]:
        """Return an array of arbitrary bytes in this arena; as `Device.empty`."""
        return self._make(np.empty, shape, dtype, order)

    def asarray(self, what: ArrayLike, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return an array with these values in this arena; as `Device.asarray`."""
        plain = np.asarray(what, dtype)
        if self.contains(plain):
            return plain
        fortran = plain.flags.f_contiguous and not plain.flags.c_contiguous
        array = self.empty(plain.shape, plain.dtype, "F" if fortran else "C")
        array[...] = plain
        return array

    @contextlib.contextmanager
    def numpy_memory(self) -> Iterator[None]:
        """Have every array that NumPy makes inside, in this thread or task, lie in this arena."""
        self._require_open()
        with self._handler.active():
            yield

    def set_budget(self, budget: int | str) -> None:
        """Change how many bytes may be resident; no more are when this returns.

        Raises:
            UsageError: it is no size.
            ServerRefused: it is less than a page.
        """
        self._require_open()
        n_bytes = size_of(budget)
        self._lifeline.through(lambda session: session.tell(SetBudget(seq=0, budget_bytes=n_bytes, arena=self.handle)))
        self.budget_bytes = n_bytes

    def trim(self) -> None:
        """Have the server forget the bytes of all freed arrays, which frees their frames and swap space."""
        self._require_open()
        self._heap.discard_freed()

    def close(self) -> None:
        """Unmap it and give it back to the server. Twice is fine.

        Raises:
            UsageError: arrays are left in it; nothing was changed.
        """
        if not self.closed and (n := self.n_arrays):
            raise UsageError(f"{n} arrays live in this {self!r}; let go of them (and of their views) first")
        super().close()

    def _retire(self) -> None:
        """Give nothing out any more, and end with the last array. For the device that is being closed."""
        if self.closed:
            return
        if not self.n_arrays:
            self.close()
            return
        self._why_closed = "belongs to a Device that was closed"
        self._heap.on_empty = self._dissolve
        if not self.n_arrays:  # the last one has died meanwhile
            self._dissolve()

    def _resume(self, session: Session) -> None:
        """Go on with a new server, which has taken the arena over.

        Raises:
            ServerRefused: it has not.
            ServerGone: it was killed as well.
        """
        told, _ = session.request(ReclaimArena(seq=0), ArenaCreated, [self.memory_fd])
        before, self._server = self._server, PidFd.open(session.welcome.server_pid)
        if before is not None:
            before.close()
        self.session, self.handle = session, told.arena

    def _end(self) -> None:
        if self.session.control.hung_up and self._lifeline.look_for_successor():
            current = self._lifeline.current
            if self.session is not current:  # we were not one of the device's yet when it claimed those
                with contextlib.suppress(ServerRefused):
                    self._resume(current)
        self._unmap()
        self.session.tell(DestroyArena(seq=0, arena=self.handle))

    def _let_go(self) -> None:
        if self._why_closed == FORKED:
            self._heap.sealed = True
            self._mapped.clear()  # arrays live there
            self._store.clear()  # a new server finds the arena by us, should our parent be gone
            self._bequest = None  # our own children have it, too
        self._dissolve()

    def _dissolve(self) -> None:
        """Unmap it and close the descriptors. Twice is fine."""
        if self._bequest is not None:
            self._bequest.close()
        self._unmap()
        if self in self._siblings:
            self._siblings.remove(self)
        for kept in (self._fds, self._store):
            while kept:
                os.close(kept.pop())
        if self._server is not None:
            self._server.close()
            self._server = None

    def _unmap(self) -> None:
        """Unmap it. The server hears of that, and munmap waits until it does; not so if there is no server."""
        while self._mapped:
            where = self._mapped.pop()
            if self._server is None or self._server_ended():
                with contextlib.suppress(OSError):  # it was not registered yet
                    unregister(self.uffd, where)
            unmap(where.start, where.length)

    def _server_ended(self) -> bool:
        """Tell whether the server has ended; one that is being killed closes its connections a moment before."""
        assert self._server is not None
        for _ in range(_LOOKS):
            if self._server.exited() or not self.session.control.hung_up:
                break
            time.sleep(_LOOK_S)
        return self._server.exited()

    def _discard(self, offset: int, length: int) -> bool:
        """Make bytes read as zeros, if the connection is free: we may be in a finaliser inside of a request."""
        if self.closed or self.session.control.busy:
            return False
        try:
            self.session.control.request(DiscardRange(seq=0, arena=self.handle, offset=offset, length=length))
        except ServerError:
            return False
        return True

    def _make(
        self, function: Callable[[Any, DTypeLike, Order], NDArray[Any]], shape: Any, dtype: DTypeLike, order: Order
    ) -> NDArray[Any]:
        self._require_open()
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise UsageError("an array of Python objects holds addresses of this process, not values; use numpy's own")
        try:
            return self._handler.call(function, shape, kind, order)
        except MemoryError:
            raise ArenaFull(
                f"{self!r} has no room for an array of {kind}, shape {shape}; let go of arrays, or make an "
                "arena with a larger capacity: dev.arena(capacity=...)"
            ) from None

    def _closed_error(self) -> Closed:
        if self._why_closed == FORKED:
            return Closed(
                "this Arena belongs to the process this one was forked from: its arrays can be used here, but new ones "
                "need a new Device"
            )
        return super()._closed_error()


def size_of(size: int | str) -> int:
    """Read a size given as a number of bytes, or as text such as "256MiB".

    Raises:
        UsageError: it is no size, or nothing.
    """
    try:
        n_bytes = parse_bytes(size) if isinstance(size, str) else int(size)
    except ValueError as problem:
        raise UsageError(str(problem)) from None
    if n_bytes <= 0:
        raise UsageError(f"a size of {size!r}; give a number of bytes above 0, or text such as '256MiB'")
    return n_bytes
