"""epoll with a callback per descriptor."""

from __future__ import annotations

import select
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
EDGE = select.EPOLLET
"""Beside READ: call back once for each time something comes, and not for as long as it is there."""

Callback = Callable[[int], None]
"""Called with the epoll event mask."""


class Poller:
    """Calls back when descriptors are ready; level-triggered unless told otherwise."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, list[Callback]] = {}
        look = select.poll()
        look.register(self._epoll, select.POLLIN)
        self._look = look.poll

    def watch(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call back whenever the descriptor is ready, until `forget`."""
        self._epoll.register(fd, events)
        self._watched[fd] = [callback]

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of a watched descriptor; 0 leaves errors and hang-ups only."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop; to be called before the descriptor is closed. Not watched is fine."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def poll(self, timeout_s: float) -> int:
        """Wait, call back for what is ready, return how many descriptors were.

        A callback may forget or close descriptors that were ready in the same round, and their numbers may be
        in use again by then: each is called only if its registration is still the one that was ready.
        """
        ready = self._epoll.poll(timeout_s)
        if not ready:
            return 0
        watched = self._watched
        for fd, mask, registration in [(fd, mask, watched.get(fd)) for fd, mask in ready]:
            if registration is not None and watched.get(fd) is registration:
                registration[0](mask)
        return len(ready)

    def has_ready(self) -> bool:
        """Tell whether any descriptor is ready, without calling back."""
        return bool(self._look(0))

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()
