"""What all objects of a device have in common: who depends on whom, and how each ends.

An object is closed once, its children first. One that is dropped without being closed is closed by its device
at the next request (a finaliser may run anywhere, even inside a request, so it must not make one). Memory is
the exception: regions are held until closed, because memory that peers can reach must not be freed.

A child process after fork shares the parent's rings and sockets. Its copies of the objects are marked closed
and only its descriptors are closed, so that it cannot disturb the parent.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from types import TracebackType
from typing import NoReturn, Self

from nopin.errors import Closed, ServerGone

FORKED = "belongs to the process this one was forked from; make a new Device here"
CLOSED = "was closed"
LOST = "was lost when its device server ended"


class DeviceObject:
    """Base of everything that belongs to a device.

    Args:
        parents: what has to outlive this object; closing one of them closes this first.
        retired: where it goes when it is dropped without being closed.
    """

    def __init__(self, *parents: DeviceObject, retired: deque[DeviceObject] | None = None) -> None:
        self._why_closed = ""
        self._parents = parents
        self._children: weakref.WeakSet[DeviceObject] = weakref.WeakSet()
        self._retired: deque[DeviceObject] | None = retired
        if parents:
            self._retired = parents[0]._retired
        for parent in parents:
            parent._require_open()
        for parent in parents:
            parent._children.add(self)

    def __repr__(self) -> str:
        words = [type(self).__name__, self._described(), f"({self._why_closed})" if self.closed else ""]
        return f"<{' '.join(filter(None, words))}>"

    def _described(self) -> str:
        """Return what tells it from others of its kind, for `repr`."""
        return ""

    @property
    def closed(self) -> bool:
        """True once it can no longer be used."""
        return bool(self._why_closed)

    def close(self) -> None:
        """Close it, its children first. Twice is fine, and so is closing after the server went away."""
        if self._why_closed:
            return
        for child in list(self._children):
            child.close()
        if self._why_closed:  # a child that owns its parent has closed it
            return
        self._why_closed = CLOSED
        for parent in self._parents:
            parent._children.discard(self)
        try:
            with contextlib.suppress(ServerGone):
                self._end()
        finally:
            self._let_go()

    def _abandon(self) -> None:
        """Be dead in a forked child: let go of local things, tell nobody."""
        if self._why_closed == FORKED:
            return
        for child in list(self._children):
            child._abandon()
        was_open = not self._why_closed
        self._why_closed = FORKED
        if was_open:
            self._let_go()

    def _end(self) -> None:
        """End the object at the server."""

    def _let_go(self) -> None:
        """Let go of descriptors and memory of this process."""

    def _require_open(self) -> None:
        if self._why_closed:
            raise self._closed_error()

    def _closed_error(self) -> Closed:
        return Closed(f"this {type(self).__name__} {self._why_closed}")

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(f"{self!r} belongs to this process: it cannot be copied or pickled{self._instead()}")

    def _instead(self) -> str:
        """Return what to do where a copy is wanted, for an error message."""
        return ""

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move_to(self, *parents: DeviceObject) -> None:
        """Depend on other parents from now on."""
        for parent in self._parents:
            parent._children.discard(self)
        self._parents = parents
        for parent in parents:
            parent._children.add(self)

    def _rejoin(self) -> None:
        """Be known to the parents again: the garbage collector drops weak references before finalisers run."""
        if not self._why_closed:
            for parent in self._parents:
                parent._children.add(self)

    def __del__(self) -> None:
        if getattr(self, "_why_closed", CLOSED) == "" and self._retired is not None:
            self._retired.append(self)
