"""What a remote array stands on: a queue pair, the engine that uses it, and the word of the owner's server.

It knows nothing of the array, so that a dropped array is noticed at once and not when garbage is collected.
"""

from __future__ import annotations

from nopin.errors import NopinError, RegionGone
from nopin.nic.abi import QpState, WcStatus
from nopin.nic.attributes import QpAttr
from nopin.verbs.explain import work_error
from nopin.verbs.peer import LOST, PeerConnection
from nopin.verbs.qp import QueuePair
from nopin.verbs.transfer import Transfers

GRACE_S = 0.05
"""How long to wait for the owner's word on why an access was refused."""
_MAY_MEAN_GONE = frozenset({WcStatus.REM_ACCESS_ERR, WcStatus.REM_OP_ERR, WcStatus.RETRY_EXC_ERR})


class Connection:
    """A connected queue pair and the exchange connection that it lives by. Owns both.

    Args:
        lkey: covers all local memory; `rkey` the peer's.
    """

    def __init__(self, qp: QueuePair, peer: PeerConnection, lkey: int, rkey: int) -> None:
        self.peer = peer
        self.transfers = Transfers(qp, lkey, rkey, self._explain)
        self._qp = qp
        self._waiter = qp.send_cq.waiter
        self._waiter.on_side_event = self._peer_spoke
        self._waiter.also(peer.fileno())

    def close(self, why: NopinError) -> None:
        """End the queue pair; what is still under way fails with `why`."""
        self._waiter.no_longer()
        self._qp.close()
        self.transfers.die(why)
        self._qp.send_cq.close()

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
            self._qp.modify(QpAttr(state=QpState.ERR))  # no byte of ours is touched once this returns
        except NopinError as problem:
            self.transfers.die(problem)
            return
        self.transfers.die(_gone(cause, "the operation was not completed"))


def _gone(cause: str, what: str) -> RegionGone:
    explained = "the server that publishes it ended, or the network was cut" if cause == LOST else cause
    return RegionGone(f"{what}: the shared region is gone: {explained}")
