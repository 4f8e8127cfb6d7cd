"""A queue pair, the engine that uses it, and the word of the owner's server: what reaches a share until it breaks."""

from __future__ import annotations

from collections.abc import Callable

from nopin.errors import NopinError, RegionGone
from nopin.nic.abi import QpState, WcStatus
from nopin.nic.attributes import QpAttr
from nopin.verbs.explain import work_error
from nopin.verbs.peer import LOST, PeerConnection
from nopin.verbs.qp import QueuePair
from nopin.verbs.transfer import Task, Transfers

GRACE_S = 0.05
"""How long to wait for the owner's word on why an access was refused."""
_MAY_MEAN_GONE = frozenset({WcStatus.REM_ACCESS_ERR, WcStatus.REM_OP_ERR, WcStatus.RETRY_EXC_ERR})


class PeerLost(RegionGone):
    """The connection to the owner's server broke, without a word that the share has ended."""


class Connection:
    """A connected queue pair and the exchange connection that it lives by. Owns both.

    Args:
        lkey: covers all local memory; `rkey` the peer's.
        ended: as of `Transfers`; `PeerLost` or `ServerGone` mean that another connection may do better.
    """

    def __init__(
        self,
        qp: QueuePair,
        peer: PeerConnection,
        lkey: int,
        rkey: int,
        ended: Callable[[NopinError, list[Task]], None],
    ) -> None:
        self.peer = peer
        self.qp = qp
        self.transfers = Transfers(qp, lkey, rkey, self._explain, ended)
        self._waiter = qp.send_cq.waiter
        self._waiter.on_side_event = self._peer_spoke
        self._waiter.also(peer.fileno())

    def close(self, why: NopinError) -> None:
        """End the queue pair; what is still under way is handed over with `why`."""
        self._waiter.no_longer()
        self.qp.close()
        self.transfers.die(why)
        self.transfers.let_go_of_loops(self.qp.send_cq.close)
        self.peer.close()

    def _explain(self, status: int, what: str) -> NopinError:
        """Turn a completion status into the error to raise: the owner may have told why."""
        if status in _MAY_MEAN_GONE and (cause := self.peer.ended(GRACE_S)):
            return _gone(cause, what)
        return work_error(status, what)

    def _peer_spoke(self) -> None:
        """The exchange connection is readable: the share ended, or the peer's server is gone."""
        cause = self.peer.ended()
        if not cause:
            return
        self._waiter.no_longer()
        self.transfers.progress()
        if self.transfers.dead is not None:
            return
        try:
            self.qp.modify(QpAttr(state=QpState.ERR))  # no byte of ours is touched once this returns
        except NopinError as problem:
            self.transfers.die(problem)
            return
        self.transfers.die(_gone(cause, "the operation was not completed"))


def _gone(cause: str, what: str) -> RegionGone:
    if cause == LOST:
        return PeerLost(f"{what}: the server that publishes the shared region ended, or the network was cut")
    return RegionGone(f"{what}: the shared region is gone: {cause}")
