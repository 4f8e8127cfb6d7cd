"""The engine of a remote array: many operations of many pieces on one queue pair.

Operations are posted in the order of submission, each as a series of batches; only the last request of a batch
is signalled, and requests of one queue pair complete in order, so one completion stands for a batch. What does
not fit into the queue waits here and is posted as completions make room.

Any thread may submit. One thread at a time waits in the kernel (the leader) and makes progress for all; when
it has what it wanted, another that still waits takes over. Event loops make progress beside it. Whoever takes a
completion that somebody else waits for tells them by a way of their own: a word on the shared eventfd could be
taken by the wrong one.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.errors import NopinError, ServerGone, WorkError
from nopin.nic.abi import SendFlags, WcStatus, WrOpcode
from nopin.units import S_NS
from nopin.verbs.operation import Operation
from nopin.verbs.qp import QueuePair
from nopin.verbs.wr import encode_one

if TYPE_CHECKING:
    import asyncio

BATCH_MAX = 128
"""Requests of one batch, so that room is made long before a queue runs dry."""


class Batch(NamedTuple):
    """Where the pieces of a part of a transfer lie; arrays of one length, or one number for all."""

    local_address: NDArray[np.uint64]
    remote_address: NDArray[np.uint64]
    length: NDArray[np.uint32]


class Pieces:
    """A transfer as one-sided requests.

    Args:
        opcode: RDMA_READ, RDMA_WRITE or an atomic (of one piece).
        n: how many pieces.
        cut: returns pieces [first, first + n).
        single: (local address, length, remote address), for a transfer of one piece.
        compare_add: operand of an atomic; `swap` likewise.
    """

    __slots__ = ("compare_add", "cut", "n", "opcode", "single", "swap")

    def __init__(
        self,
        opcode: WrOpcode,
        n: int,
        cut: Callable[[int, int], Batch] | None,
        single: tuple[int, int, int] | None = None,
        compare_add: int = 0,
        swap: int = 0,
    ) -> None:
        self.opcode = opcode
        self.n = n
        self.cut = cut
        self.single = single
        self.compare_add = compare_add
        self.swap = swap


@dataclass(slots=True)
class Task:
    """An operation under way.

    Attributes:
        keep: held until it ends: the local memory.
        n_posted: pieces that the device may have begun.
        serial: grows from each operation to the next.
    """

    operation: Operation[Any]
    pieces: Pieces
    keep: object
    n_posted: int = 0
    serial: int = field(default_factory=itertools.count().__next__)

    @property
    def opcode(self) -> WrOpcode:
        """Of all its pieces."""
        return self.pieces.opcode


class _Posted(NamedTuple):
    task: Task
    serial: int
    n: int
    last: bool


class Transfers:
    """Posts operations on a connected queue pair and completes them.

    Args:
        qp: its send queue and completion queue are used by nobody else.
        lkey: covers all local memory; `rkey` the peer's.
        explain: turns a completion status and an operation's description into the error to raise.
        ended: called once, with the error that ended the connection and what was under way, oldest first. It takes care
            of those: they are not touched here any more.
    """

    def __init__(
        self,
        qp: QueuePair,
        lkey: int,
        rkey: int,
        explain: Callable[[int, str], NopinError],
        ended: Callable[[NopinError, list[Task]], None],
    ) -> None:
        self._qp = qp
        self._ring = qp.send_cq.ring
        self._waiter = qp.send_cq.waiter
        self._lkey = lkey
        self._rkey = rkey
        self._explain = explain
        self._ended = ended
        self._lock = threading.RLock()
        self._waiting: deque[Task] = deque()
        self._posted: deque[_Posted] = deque()
        self._serial = 0
        self._room = qp.send_cq.depth  # completions that fit; each request can need one, if it is flushed
        self._dead: NopinError | None = None
        self._turn_lock = threading.Lock()  # taken as such: a condition's own way to it costs five times as much
        self._turn = threading.Condition(self._turn_lock)
        self._leader = 0  # its thread; 0 is nobody
        self._n_followers = 0
        self._attended: dict[asyncio.AbstractEventLoop, int] = {}
        self._leaving = threading.Lock()  # over what follows
        self._n_leaving = 0
        self._once_left: list[Callable[[], None]] = []

    @property
    def dead(self) -> NopinError | None:
        """Why nothing can be done any more, or None."""
        return self._dead

    def submit(self, task: Task) -> bool:
        """Start an operation; False if the connection is dead."""
        with self._lock:
            if self._dead is not None:
                return False
            self._waiting.append(task)
            self._post()
            if self._waiting:
                self._take_completions()
            return True

    def progress(self) -> bool:
        """Take note of completions and post what waits, without sleeping; True when an operation ended."""
        with self._lock:
            return self._dead is None and self._take_completions()

    def drive(self, operation: Operation[Any], deadline_ns: int | None) -> None:
        """Make progress until the operation ends, the connection does, or the deadline passes."""
        while not operation.ended and self._dead is None:
            if self._become_leader(operation, deadline_ns):
                try:
                    self._lead(operation, deadline_ns)
                finally:
                    self._step_down()
                return
            if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                return

    def attend(self, future: asyncio.Future[None]) -> None:
        """Make progress from the running event loop while the future is pending."""
        loop, fd = future.get_loop(), self._waiter.fileno()
        if loop not in self._attended:
            loop.add_reader(fd, self._on_readable)
        self._attended[loop] = self._attended.get(loop, 0) + 1

        def settled(_: asyncio.Future[None]) -> None:
            if loop not in self._attended:  # it was let go of
                return
            self._attended[loop] -= 1
            if not self._attended[loop]:
                del self._attended[loop]
                loop.remove_reader(fd)

        future.add_done_callback(settled)
        self._on_readable()

    def let_go_of_loops(self, then: Callable[[], None]) -> None:
        """Make progress from no event loop any more, and call `then` once none has our descriptor: it may be closed."""
        with self._leaving:
            loops = list(self._attended)
            self._attended.clear()
            self._n_leaving += len(loops) + 1
            self._once_left.append(then)
        for loop in loops:
            try:
                loop.call_soon_threadsafe(self._leave, loop)
            except RuntimeError:  # it has been closed
                self._one_left()
        self._one_left()

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._waiter.fileno())
        self._one_left()

    def _one_left(self) -> None:
        with self._leaving:
            self._n_leaving -= 1
            if self._n_leaving:
                return
            callbacks, self._once_left = self._once_left, []
        for callback in callbacks:
            callback()

    def die(self, error: NopinError) -> None:
        """End, and hand over what is under way.

        Requires: the queue pair is in ERR or gone, so that the device touches no memory of ours any more.
        """
        with self._lock:
            if self._dead is not None:
                return
            self._dead = error
            tasks = self._take_tasks()
        self._ended(error, tasks)
        self._tell_waiters()

    def abandon(self, error: NopinError) -> None:
        """Be dead in a forked child: rings and descriptors are the parent's, locks may be held by nobody."""
        self._lock = threading.RLock()
        self._turn_lock = threading.Lock()
        self._turn = threading.Condition(self._turn_lock)
        self._leader = 0
        self._dead = error
        fail_all(self._take_tasks(), error)

    # --- posting and completing; all under the lock

    def _take_tasks(self) -> list[Task]:
        """Take what has not ended, each once: it may have several batches under way, and more to be posted."""
        found = {id(task): task for task in [*(posted.task for posted in self._posted), *self._waiting]}
        self._posted.clear()
        self._waiting.clear()
        return [task for task in found.values() if not task.operation.ended]

    def _post(self) -> None:
        while self._waiting:
            task = self._waiting[0]
            n = min(task.pieces.n - task.n_posted, self._qp.send_ring.free, self._room, BATCH_MAX)
            if n <= 0:
                return
            self._serial += 1
            if task.pieces.single is not None:
                self._post_single(task.pieces)
            else:
                self._post_batch(task.pieces, task.n_posted, n)
            task.n_posted += n
            self._room -= n
            last = task.n_posted == task.pieces.n
            self._posted.append(_Posted(task, self._serial, n, last))
            if last:
                self._waiting.popleft()

    def _post_single(self, pieces: Pieces) -> None:
        assert pieces.single is not None
        local, length, remote = pieces.single
        entry = encode_one(
            pieces.opcode,
            self._serial,
            SendFlags.SIGNALED,
            remote,
            self._rkey,
            pieces.compare_add,
            pieces.swap,
            (local, length, self._lkey),
        )
        self._qp.post_encoded(entry)

    def _post_batch(self, pieces: Pieces, first: int, n: int) -> None:
        assert pieces.cut is not None
        batch = pieces.cut(first, n)
        flags = np.zeros(n, np.uint8)
        flags[-1] = SendFlags.SIGNALED
        self._qp.post_send_array(
            n,
            opcode=pieces.opcode,
            local_address=batch.local_address,
            length=batch.length,
            lkey=self._lkey,
            remote_address=batch.remote_address,
            rkey=self._rkey,
            wr_id=self._serial,
            flags=flags,
        )

    def _take_completions(self) -> bool:
        poll_one = self._ring.poll_one
        ended = False
        while (entry := poll_one()) is not None:
            if entry[1] != WcStatus.SUCCESS:
                self._failed(entry[0], entry[1])
                return True
            posted = self._posted.popleft()
            assert posted.serial == entry[0], "requests of one queue pair complete in order"
            self._room += posted.n
            if posted.last:
                posted.task.operation.complete()
                ended = True
        if self._waiting:
            self._post()
        if ended:
            self._tell_waiters()
        return ended

    def _failed(self, serial: int, status: int) -> None:
        """The first error ends the connection: what was posted before it is done, what came after is not."""
        while self._posted and self._posted[0].serial < serial:
            self._posted.popleft()
        culprit = self._posted[0].task.operation
        error = self._explain(status, culprit.what)
        if isinstance(error, WorkError):
            culprit.fail(error)
            text = f"an earlier operation ended this connection ({error}); attach again"
            error = WorkError(text, status=WcStatus.WR_FLUSH_ERR)
        self.die(error)

    # --- waiting

    def _become_leader(self, operation: Operation[Any], deadline_ns: int | None) -> bool:
        """Be the one who waits in the kernel; False after waiting for somebody else to make progress."""
        with self._turn_lock:
            if not self._leader:
                self._leader = threading.get_ident()
                return True
            if operation.ended:
                return False
            self._n_followers += 1
            left_s = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / S_NS)
            self._turn.wait(left_s)
            self._n_followers -= 1
            return False

    def _step_down(self) -> None:
        with self._turn_lock:
            self._leader = 0
            if self._n_followers:
                self._turn.notify_all()
        for loop in list(self._attended):
            with contextlib.suppress(RuntimeError):  # that loop has been closed with work under way
                loop.call_soon_threadsafe(self._on_readable)  # it has to arm the ring itself again

    def _tell_waiters(self) -> None:
        """Operations ended: whoever waits in another thread looks at its own."""
        if self._leader and self._leader != threading.get_ident():
            self._waiter.wake()
        if self._n_followers:
            with self._turn_lock:
                self._turn.notify_all()

    def _lead(self, operation: Operation[Any], deadline_ns: int | None) -> None:
        until = self._until(operation)
        while not operation.ended and self._dead is None:
            try:
                in_time = self._waiter.wait(deadline_ns, until=until)
            except ServerGone as gone:
                self.die(gone)
                return
            self.progress()
            if not in_time:
                return

    def _until(self, operation: Operation[Any]) -> Callable[[], bool]:
        return lambda: operation.ended or self._dead is not None

    def _on_readable(self) -> None:
        """The event loop woke up, or begins to wait: take note, and ask to be woken again."""
        if self._dead is not None:
            return
        try:
            self._waiter.collect()
        except ServerGone as gone:
            self.die(gone)
            return
        self.progress()
        while self._dead is None and (self._attended or self._leader) and self._waiter.armed_and_ready():
            self.progress()


def fail_all(tasks: list[Task], error: NopinError) -> None:
    """End operations with an error."""
    for task in tasks:
        task.operation.fail(error)
