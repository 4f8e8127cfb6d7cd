"""The connection of a device to its server, and to whichever server comes after that.

A server that was killed gets a successor: the library's keeper starts one, or somebody does, by `nopin serve
--takeover`. A device that finds its connection broken looks for the successor at the same path, for a bounded time,
shows it the share book, and claims its arenas and shares. Everything else that the old server had for it is gone:
queue pairs, completion queues, regions. Those objects keep their connection, which is dead, so they say `ServerGone`,
and no number of the old server is ever told to the new one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from nopin.errors import ServerGone
from nopin.pending import checked_timeout
from nopin.verbs.session import Session

RECONNECT_S = 10.0
_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.005, 0.2

R = TypeVar("R")


def patience(reconnect: float | None) -> float:
    """Return `reconnect` in seconds, infinity for None. Raises as `checked_timeout`."""
    seconds = checked_timeout(reconnect)
    return math.inf if seconds is None else seconds


class GoesOn(Protocol):
    """What goes on with a successor."""

    @property
    def session(self) -> Session:
        """With the server that has it."""
        ...

    def close(self) -> None:
        """End it."""
        ...


M = TypeVar("M", bound=GoesOn)


class Lifeline:
    """The current session of a device. Any thread may use it.

    Args:
        session: the first one.
        patience_s: how long to look for a successor.
        resume: called with a new session and the dead one, to claim what goes on. `ServerGone` from it means that this
            server was killed as well.

    Attributes:
        current: the session, alive or not.
    """

    def __init__(self, session: Session, patience_s: float, resume: Callable[[Session, Session], None]) -> None:
        self.current = session
        self._patience_s = patience_s
        self._resume = resume
        self._lock = threading.RLock()
        self._is_reconnecting = False
        self._closed = False

    @property
    def session(self) -> Session:
        """The session, alive as far as that is known; a successor's if the old server is gone.

        Raises:
            ServerGone: there is none, and none came in time. Asked again, it does not wait as long again.
        """
        if self.current.control.hung_up:
            try:
                self._reconnect(self._patience_s)
            except ServerGone:
                self._patience_s = 0.0
                raise
        return self.current

    def through(self, action: Callable[[Session], R]) -> R:
        """Do something that may be done twice: once more with the successor if the server is killed meanwhile."""
        session = self.session
        try:
            return action(session)
        except ServerGone:
            if self.session is session:
                raise
            return action(self.current)

    def make(self, action: Callable[[Session], M]) -> M:
        """Make something that goes on with a successor; as `through`.

        What was finished while another thread claimed what goes on was not claimed, and is made again.
        """
        while True:
            made = self.through(action)
            with self._lock:
                if made.session is self.current:
                    return made
            made.close()

    def look_for_successor(self) -> bool:
        """Reconnect if a successor is there already; False if there is none."""
        try:
            self._reconnect(0.0)
        except ServerGone:
            return False
        return not self.current.control.hung_up

    def close(self) -> None:
        """End the connection, for good."""
        self._closed = True
        self.current.close()

    def abandon(self) -> None:
        """Close this process's copies of the descriptors only: for a child after fork."""
        self._closed = True
        self._lock = threading.RLock()  # it may be held by nobody
        self.current.abandon()

    def _reconnect(self, patience_s: float) -> None:
        with self._lock:
            if self._is_reconnecting:  # we are a finaliser, below the work on a new session
                raise self._gone()
            self._is_reconnecting = True
            try:
                self._look(time.monotonic() + patience_s)
            finally:
                self._is_reconnecting = False

    def _look(self, deadline: float) -> None:
        pause_s = _PAUSE_FIRST_S
        while self.current.control.hung_up:
            if self._closed:
                raise self._gone()
            try:
                self._go_on()
            except ServerGone as problem:
                if time.monotonic() >= deadline:
                    raise self._gone() from problem
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_LAST_S)

    def _go_on(self) -> None:
        """Connect to a new server and claim what goes on there.

        Raises:
            ServerGone: there is none, or it was killed meanwhile.
        """
        before = self.current
        fresh = Session(before.control.path, before)
        try:
            self._resume(fresh, before)
        except BaseException:
            fresh.close()
            raise
        self.current = fresh
        before.close()

    def _gone(self) -> ServerGone:
        return ServerGone(
            f"the device server at {self.current.control.path} went away, and no other has come there; start one by "
            "nopin serve --takeover, or make a new Device"
        )
