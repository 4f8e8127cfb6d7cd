"""Waiting for a completion: look at memory for a moment, then sleep until the device says so.

A wake-up across CPUs costs as much as a whole small transfer, so short waits never sleep. While it looks, a
waiter offers its CPU to whoever needs one: on a small machine that is the server it waits for. On the only CPU it
sleeps at once: the kernel does not always let who was just woken run instead of who yields.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable

from nopin.control.messages import NOTICES
from nopin.control.socket import ControlSocket
from nopin.control.spin import SpinBudget
from nopin.errors import ServerGone
from nopin.linux.cpus import n_cpus
from nopin.nic.rings import CompletionConsumer
from nopin.pending import checked_timeout
from nopin.units import S_NS, US_NS

SPIN_US = 100
"""How long a waiter looks before it sleeps at most, microseconds; less while waits are long anyway."""
LOOKS_PER_YIELD = 8

_WAKE_AGAIN_S = 0.05


class Waiter:
    """Waits for completions of one ring.

    Args:
        ring: where completions appear.
        channel_fd: of its completion channel.
        control: the connection whose end is the server's end.
        spin_us: how long to look before sleeping.

    Attributes:
        on_side_event: called when one of the further descriptors (`also`) is readable.
    """

    def __init__(
        self, ring: CompletionConsumer, channel_fd: int, control: ControlSocket, spin_us: int = SPIN_US
    ) -> None:
        self._ring = ring
        self._channel_fd = channel_fd
        self._control = control
        self._spin = SpinBudget(spin_us * US_NS if n_cpus() > 1 else 0)
        self._events = select.epoll()
        self._events.register(channel_fd, select.EPOLLIN)
        self._events.register(control.fileno(), 0)  # EPOLLHUP comes unasked; events there are not for us
        self._nudge_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._bed = select.epoll()
        self._bed.register(self._events, select.EPOLLIN)
        self._bed.register(self._nudge_fd, select.EPOLLIN)
        self._asleep = threading.RLock()  # held by whoever sleeps
        self._pid = os.getpid()
        self._side_fd = -1
        self.on_side_event: Callable[[], None] = _nothing

    def fileno(self) -> int:
        """Return a descriptor that is readable when `collect` has something to do."""
        return self._events.fileno()

    def also(self, fd: int) -> None:
        """Wake up for one more descriptor."""
        self._side_fd = fd
        self._events.register(fd, select.EPOLLIN | select.EPOLLRDHUP)

    def no_longer(self) -> None:
        """Forget the descriptor given to `also`."""
        fd, self._side_fd = self._side_fd, -1
        self.on_side_event = _nothing
        if fd >= 0:
            with contextlib.suppress(OSError):  # closed already
                self._events.unregister(fd)

    def wait(self, deadline_ns: int | None, *, until: Callable[[], bool]) -> bool:
        """Wait for a completion in the ring, or until `until()` holds (asked when woken for another reason).

        Args:
            deadline_ns: on the monotonic clock; None waits for ever.

        Returns:
            False when the deadline passed first.

        Raises:
            ServerGone: the server went away.
        """
        began = time.monotonic_ns()
        if self._look(began, deadline_ns):
            return True
        try:
            with self._asleep:
                return self._sleep(deadline_ns, until)
        finally:
            self._spin.waited(time.monotonic_ns() - began)

    def _sleep(self, deadline_ns: int | None, until: Callable[[], bool]) -> bool:
        while True:
            if until() or self.armed_and_ready():
                return True
            left_s = -1.0 if deadline_ns is None else (deadline_ns - time.monotonic_ns()) / S_NS
            if deadline_ns is not None and left_s <= 0:
                return False
            woken = self._bed.poll(left_s)
            if until():  # also when this object has just been closed
                return True
            if self._ring.ready:  # as nearly always: what else has happened can wait for the next time
                self._take_notices()
                return True
            if any(fd == self._nudge_fd for fd, _ in woken):
                self._rise()
            self.collect()
            if self._ring.ready or until():
                return True

    def armed_and_ready(self) -> bool:
        """Ask for a notice at the next completion; True if one is there already."""
        self._ring.arm()
        return self._ring.ready

    def collect(self) -> None:
        """Take note of what has happened, without sleeping.

        Raises:
            ServerGone: the server went away.
        """
        for fd, _ in self._events.poll(0):
            if fd == self._channel_fd:
                self._take_notices()
            elif fd == self._side_fd:
                self.on_side_event()
            else:
                self._control.close()
        if self._control.gone:
            raise ServerGone(f"the device server at {self._control.path} went away, and what was made there with it")

    def wake(self) -> None:
        """Wake the thread that sleeps in `wait`; nobody else can take this word away, as `collect` could."""
        if self._nudge_fd >= 0:
            os.eventfd_write(self._nudge_fd, 1)

    def close(self) -> None:
        """Close the descriptors of this object; those given stay open.

        A thread that sleeps is woken and waited for: a descriptor that is closed takes its event with it, and a thread
        that was about to be woken by it would sleep on. Requires: its `until()` holds.
        """
        if os.getpid() == self._pid:  # in a forked child nobody sleeps, whatever the lock says
            self._let_sleeper_leave()
        self._bed.close()
        self._events.close()
        fd, self._nudge_fd = self._nudge_fd, -1
        os.close(fd)

    def _let_sleeper_leave(self) -> None:
        while not self._asleep.acquire(timeout=_WAKE_AGAIN_S):
            self.wake()
        self._asleep.release()

    def _take_notices(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._channel_fd, NOTICES)

    def _rise(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._nudge_fd)

    def _look(self, began: int, deadline_ns: int | None) -> bool:
        ring, now = self._ring, time.monotonic_ns
        end = began + self._spin.budget_ns
        if deadline_ns is not None:
            end = min(end, deadline_ns)
        while True:
            for _ in range(LOOKS_PER_YIELD):
                if ring.ready:
                    return True
            if now() >= end:
                return False
            os.sched_yield()


def deadline_after(timeout_s: float | None) -> int | None:
    """Return the monotonic time `timeout_s` from now, nanoseconds; None for ever. Raises as `checked_timeout`."""
    timeout_s = checked_timeout(timeout_s)
    return None if timeout_s is None else time.monotonic_ns() + int(timeout_s * S_NS)


def _nothing() -> None:
    pass
