"""What becomes of operations when the connection below them breaks: which are done again, and in which order.

    attached -> mending -> attached again, and so on; from each of them -> ended, for good

What was under way is posted again on the next connection, oldest first, and before anything newer: a READ brings what
is there now; a WRITE stores the same bytes, so it may have been carried out twice. An atomic that the device may have
begun cannot be repeated: nobody knows whether it has happened.

No thread, lock or clock is here. The client has its own around it (`verbs.attachment`), and so has who explores the
orders of its calls.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

from nopin.control.exchange import Attached
from nopin.errors import AttachRefused, NopinError, RegionGone, ServerGone
from nopin.nic.abi import WcStatus, WrOpcode

LOST = "its server closed the connection"
"""Why a peer's connection ended, where its server has said nothing."""

MAY_MEAN_GONE = frozenset({WcStatus.REM_ACCESS_ERR, WcStatus.REM_OP_ERR, WcStatus.RETRY_EXC_ERR})
"""How an operation ends when the share has: worth waiting a moment for the word of the owner's server."""

REPEATABLE = frozenset({WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE})
"""What may be carried out twice."""


class PeerLost(RegionGone):
    """The connection to the owner's server broke, without a word that the share has ended."""


class UnderWay(Protocol):
    """An operation.

    Attributes:
        serial: grows from each operation to the next.
        n_posted: pieces that the device may have begun.
        opcode: of all its pieces.
    """

    n_posted: int

    @property
    def serial(self) -> int:
        """See above."""
        ...

    @property
    def opcode(self) -> WrOpcode:
        """See above."""
        ...


T = TypeVar("T", bound=UnderWay)


class Broken(NamedTuple, Generic[T]):
    """What has to be done now that a connection has ended.

    Attributes:
        doubtful: to fail: perhaps they were carried out, and they must not be twice.
        over: to fail, because the attachment has ended already.
        begins: mending begins with this; else it is under way, or there is nothing to mend.
    """

    doubtful: list[T]
    over: list[T]
    begins: bool


class Mending(Generic[T]):
    """One attachment's operations without a connection.

    Attributes:
        dead: why it has ended, or None.
        active: somebody is looking for a connection.
    """

    def __init__(self) -> None:
        self.dead: NopinError | None = None
        self.active = False
        self._pending: list[T] = []

    def hold(self, tasks: list[T]) -> None:
        """Keep operations that found no connection, or one that ended before they could be posted."""
        self._pending += tasks

    def broke(self, tasks: list[T]) -> Broken[T]:
        """A connection has ended with these under way; it may be one that was just made, and is nobody's yet."""
        doubtful, left = list[T](), list[T]()
        for each in tasks:
            (doubtful if each.n_posted and each.opcode not in REPEATABLE else left).append(each)
        if self.dead is not None:
            return Broken(doubtful, left, False)
        self._pending += left
        begins, self.active = not self.active, True
        return Broken(doubtful, [], begins)

    def take(self) -> list[T]:
        """Return what is to be posted on a new connection now, in this order; ask until there is nothing.

        With nothing left the new connection is everybody's.
        """
        tasks, self._pending = sorted(self._pending, key=lambda task: task.serial), []
        for task in tasks:
            task.n_posted = 0
        self.active = bool(tasks)
        return tasks

    def end(self, error: NopinError) -> list[T]:
        """End for good, with the first error that is told; returns what is to fail."""
        self.dead = self.dead or error
        tasks, self._pending = self._pending, []
        return tasks


def gone(cause: str, what: str) -> RegionGone:
    """Return the error of an operation, `what`, whose connection ended for a cause."""
    if cause == LOST:
        return PeerLost(f"{what}: the server that publishes the shared region ended, or the network was cut")
    return RegionGone(f"{what}: the shared region is gone: {cause}")


def is_mendable(error: NopinError) -> bool:
    """Tell whether another connection may do better than the one that ended with this."""
    return isinstance(error, PeerLost | ServerGone)


def is_final(problem: NopinError) -> bool:
    """Tell whether trying once more is of no use: the owner's server lives, and does not know the share."""
    return isinstance(problem, AttachRefused) and problem.code != "limit"


def is_same_array(one: Attached, other: Attached) -> bool:
    """Tell whether what was attached again is what was attached before."""
    return _place(one) == _place(other)


def _place(told: Attached) -> tuple[object, ...]:
    return told.dtype, told.shape, told.strides, told.address, told.access
