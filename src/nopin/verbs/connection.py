"""A queue pair, the engine that uses it, and the word of the owner's server: what reaches a share until it breaks."""

from __future__ import annotations

from collections.abc import Callable

from nopin.control.mending import MAY_MEAN_GONE, gone
from nopin.errors import NopinError
from nopin.nic.abi import QpState
from nopin.nic.attributes import QpAttr
from nopin.verbs.explain import work_error
from nopin.verbs.peer import PeerConnection
from nopin.verbs.qp import QueuePair
from nopin.verbs.transfer import Task, Transfers

GRACE_S = 0.05
"""How long to wait for the owner's word on why an access was refused."""


class Connection:
    """A connected queue pair and the exchange connection that it lives by. Owns both.

    Args:
        lkey: covers all local memory; `rkey` the peer's.
        ended: as of `Transfers`; whether another connection may do better, `mending.is_mendable` tells.
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
        if status in MAY_MEAN_GONE and (cause := self.peer.ended(GRACE_S)):
            return gone(cause, what)
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
        self.transfers.die(gone(cause, "the operation was not completed"))
