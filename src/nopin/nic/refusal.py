"""How a responder's step ends when it does not simply succeed, and the check that decides."""

from __future__ import annotations

from nopin.nic.abi import AsyncEventType, Discipline, WcStatus
from nopin.nic.core import Core, Waiter, fail, recv_done
from nopin.nic.mr import LENGTH_BYTES_MAX, Region
from nopin.nic.qp import QueuePair
from nopin.nic.scatter import prepare_pieces
from nopin.nic.wire.aeth import Nak
from nopin.nic.work import Piece

_FAILED = {
    Nak.INVALID_REQUEST: AsyncEventType.QP_REQ_ERR,
    Nak.REMOTE_ACCESS_ERROR: AsyncEventType.QP_ACCESS_ERR,
    Nak.REMOTE_OPERATIONAL_ERROR: AsyncEventType.QP_FATAL,
}


class Refusal(Exception):
    """A request that must not be executed.

    Attributes:
        nak: what the peer is told.
        status: of the receive work in use, if there is one.
    """

    def __init__(self, nak: Nak, status: WcStatus) -> None:
        super().__init__(nak.name)
        self.nak = nak
        self.status = status


class Parked(Exception):
    """The step needs a page that is being brought in; nothing of it was executed."""


class NotReady(Exception):
    """No receive work is posted for a message that needs one."""


def no_access() -> Refusal:
    """The key, a right, the range, or the memory itself does not allow it."""
    return Refusal(Nak.REMOTE_ACCESS_ERROR, WcStatus.LOC_ACCESS_ERR)


def invalid_request() -> Refusal:
    """The request makes no sense here: wrong order, wrong length, misaligned."""
    return Refusal(Nak.INVALID_REQUEST, WcStatus.REM_INV_REQ_ERR)


def check_target(core: Core, qp: QueuePair, rkey: int, address: int, length: int, need: int) -> Region:
    """Return the region a remote request may use.

    Raises:
        Refusal: the queue pair or the region does not allow it, or the range is outside.
    """
    if length > LENGTH_BYTES_MAX:
        raise invalid_request()
    if need & ~(qp.attr.access or 0):
        raise no_access()
    region = core.regions.check(rkey, qp.pd, address, length, need)
    if region is None:
        core.counters.bad_key += 1
        raise no_access()
    return region


def prepare(core: Core, region: Region, va: int, length: int, waiter: Waiter, *, write: bool) -> None:
    """Make a whole operation's pages present where the region's discipline asks for it.

    Raises:
        Parked: pages are on their way.
    """
    if region.discipline is not Discipline.SHORT_TERM:
        return
    if not prepare_pieces(core, [Piece(region, va, length)], waiter, write=write):
        raise Parked


def fail_request(core: Core, qp: QueuePair, refusal: Refusal) -> None:
    """End a refused request at the responder: count it, complete the receive in use, fail the queue pair."""
    if refusal.nak == Nak.REMOTE_ACCESS_ERROR:
        core.counters.access_error += 1
    inbound, qp.recv.inbound = qp.recv.inbound, None
    if inbound is not None and inbound.recv is not None:
        recv_done(core, qp, inbound.recv, refusal.status)
    core.event(_FAILED[refusal.nak], qp)
    fail(core, qp)
