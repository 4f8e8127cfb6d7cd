"""What a remote array stands on: a connection to the share, and another one when that breaks.

    attached -> mending -> attached again, and so on; from each of them -> ended, for good

A connection breaks when a device server is killed: that of the share's owner, ours, or both if they are one. The share
outlives that (`server.orphans`), so an attachment attaches again by the same URL, for a bounded time. A share that was
withdrawn, or whose owner ended, is told of, and is not looked for.

What was under way is posted again, but for atomics that the device may have begun: those raise, and have happened or
not. What is repeated, and in which order, is decided in `control.mending`; here are the lock, the thread and the waits.

There is a thread only while the connection is mended. It knows nothing of the array, so that a dropped one is noticed.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from nopin.control.mending import Mending, is_final, is_mendable, is_same_array
from nopin.control.url import ShareUrl
from nopin.errors import Closed, NopinError, RegionGone, ServerGone
from nopin.units import S_NS
from nopin.verbs.connect import connect
from nopin.verbs.connection import Connection
from nopin.verbs.operation import Operation
from nopin.verbs.transfer import Pieces, Task, Transfers, fail_all

if TYPE_CHECKING:
    import asyncio

    from nopin.verbs.device import Device
    from nopin.verbs.objects import DeviceObject
    from nopin.verbs.qp import QueuePair

_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.005, 0.2
_TRY_S = 5.0
"""For one try."""


class Attachment:
    """An attached share, through all its connections. Drives the operations of its array.

    Args:
        timeout_s: for the first connection.
        patience_s: how long to try to attach again; 0 for not at all.

    Attributes:
        told: what the owner's server said of the array.

    Raises:
        AttachRefused, PeerError, ServerError: it cannot be attached.
    """

    def __init__(self, device: Device, url: ShareUrl, timeout_s: float, patience_s: float) -> None:
        self._device = device
        self._url = url
        self._patience_s = patience_s
        self._changed = threading.Condition(threading.Lock())
        self._mending: Mending[Task] = Mending()  # under that lock
        self._futures: set[asyncio.Future[None]] = set()
        self._array: weakref.ref[DeviceObject] | None = None
        self._connection, self.told = device.lifeline.through(
            lambda _: connect(device, url, timeout_s, self._connection_ended)
        )

    @property
    def qp(self) -> QueuePair:
        """The queue pair of now, for the array to be closed before it."""
        return self._connection.qp

    def carry(self, array: DeviceObject) -> None:
        """Be that of an array, whose parent is the queue pair of now, whichever that is."""
        self._array = weakref.ref(array)

    # What operations need

    def submit(self, operation: Operation[Any], pieces: Pieces, keep: object) -> None:
        """Start an operation; `keep` is held until it ends (the local memory).

        Raises:
            NopinError: the attachment has ended.
        """
        task = Task(operation, pieces, keep)
        while not self._connection.transfers.submit(task):
            with self._changed:
                if self._mending.dead is not None:
                    raise self._mending.dead
                if self._connection.transfers.dead is not None:
                    self._mending.hold([task])
                    return

    def progress(self) -> bool:
        """Take note of what has completed, without waiting; True when an operation ended."""
        return self._connection.transfers.progress()

    def drive(self, operation: Operation[Any], deadline_ns: int | None) -> None:
        """Make progress until the operation ends or the deadline passes."""
        while not operation.ended:
            transfers = self._connection.transfers
            transfers.drive(operation, deadline_ns)
            if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                return
            if transfers.dead is not None:
                self._await_change(transfers, operation, deadline_ns)

    def attend(self, future: asyncio.Future[None]) -> None:
        """Make progress from the running event loop for as long as the future is pending."""
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        self._attend(future)

    # Its end

    def close(self, why: NopinError) -> None:
        """Detach; what is still under way fails with `why`."""
        self._end(why, [])
        self._connection.close(why)

    def let_go(self) -> None:
        """Close this process's descriptors."""
        self._connection.peer.close()

    def abandon(self, error: NopinError) -> None:
        """Be dead in a forked child: rings and descriptors are the parent's, locks may be held by nobody."""
        self._changed = threading.Condition(threading.Lock())
        self._connection.transfers.abandon(error)
        fail_all(self._mending.end(error), error)

    def _end(self, error: NopinError, tasks: list[Task]) -> None:
        with self._changed:
            tasks = tasks + self._mending.end(error)
        fail_all(tasks, error)
        self._tell_waiters()

    def _tell_waiters(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _await_change(self, transfers: Transfers, operation: Operation[Any], deadline_ns: int | None) -> None:
        """Wait while the connection is mended."""
        left_s = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / S_NS)
        with self._changed:
            self._changed.wait_for(lambda: operation.ended or self._connection.transfers is not transfers, left_s)

    def _attend(self, future: asyncio.Future[None]) -> None:
        transfers = self._connection.transfers
        if not future.done() and transfers.dead is None:  # else once it is mended
            transfers.attend(future)

    # Mending

    def _connection_ended(self, error: NopinError, tasks: list[Task]) -> None:
        """The connection has ended with this under way; or one that has just been made, and is nobody's yet."""
        if not is_mendable(error) or not self._patience_s:
            self._end(error, tasks)
            return
        with self._changed:
            broken = self._mending.broke(tasks)
        if broken.begins:
            threading.Thread(target=self._mend, args=(error,), name="nopin-attach-again", daemon=True).start()
        for each in broken.doubtful:
            text = f"{each.operation.what}: the connection broke, and nobody knows whether it was carried out ({error})"
            each.operation.fail(RegionGone(text))
        fail_all(broken.over, error)
        self._connection.transfers.let_go_of_loops(_nothing)
        self._tell_waiters()

    def _mend(self, why: NopinError) -> None:
        try:
            self._attach_again(why)
        except BaseException as mistake:
            self._end(RegionGone(f"{why}; attaching again went wrong: {mistake!r}"), [])
            raise

    def _attach_again(self, why: NopinError) -> None:
        deadline, pause_s = time.monotonic() + self._patience_s, _PAUSE_FIRST_S
        while self._mending.dead is None:
            try:
                connection, told = connect(
                    self._device, self._url, _TRY_S, self._connection_ended, self._connection.qp.qpn
                )
            except NopinError as problem:
                if is_final(problem):
                    self._end(RegionGone(f"the shared region is gone: {why}; attaching again: {problem}"), [])
                elif time.monotonic() >= deadline:
                    text = f"{why}; attaching again failed for {self._patience_s:g} s: {problem}"
                    self._end(ServerGone(text) if isinstance(problem, ServerGone) else RegionGone(text), [])
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_LAST_S)
                continue
            if not is_same_array(told, self.told):
                self._end(RegionGone("the shared region is gone: another array is there now"), [])
            if self._go_on_with(connection):
                return
            connection.close(why)

    def _go_on_with(self, connection: Connection) -> bool:
        """Post again, in order, what was under way; then be for everybody. False if this one has ended, too."""
        while True:
            with self._changed:
                if self._mending.dead is not None or connection.transfers.dead is not None:
                    return False
                tasks = self._mending.take()
                if not tasks:
                    before, self._connection = self._connection, connection
                    break
            for at, task in enumerate(tasks):
                if not connection.transfers.submit(task):
                    with self._changed:
                        self._mending.hold(tasks[at:])
                    return False
        array = self._array() if self._array is not None else None
        if array is not None and not array.closed:
            array._move_to(connection.qp)
        self._tell_waiters()
        for future in list(self._futures):
            with contextlib.suppress(RuntimeError):  # its loop has been closed
                future.get_loop().call_soon_threadsafe(self._attend, future)
        before.close(Closed("this connection was replaced"))
        return True


def _nothing() -> None:
    pass
