"""Which rings the device looks at: those in which something is posted now and then.

Looking is what makes a post cheap, and it is paid for on every turn, for every ring: of many queue pairs of which few
are used, the looks would take longer than the work. So a ring in which nothing was posted for a while is left: who
posts there has to ring, as where the device sleeps, and the first post brings the looks back. As NAPI of Linux has it:
poll what is busy, be interrupted by what is not.

No post is missed, as with sleep: client and device both write, then fence, then read what the other wrote.

    client: write entry, write index, fence, read "unattended"   -> ring if it is
    device: write "unattended", fence, read the index            -> attend again if there is work
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.nic.abi import QpState
from nopin.nic.qp import QueuePair

_ERR = QpState.ERR


class Attention:
    """The queue pairs whose rings are looked at.

    Attributes:
        queue_pairs: in the order in which they got attention; those that may post, or whose posts are to be flushed.
    """

    def __init__(self) -> None:
        self.queue_pairs: dict[QueuePair, None] = {}
        self._n_taken: dict[QueuePair, int] = {}

    def attend(self, qp: QueuePair) -> None:
        """Look at its rings from now on. Twice is fine."""
        qp.send_ring.attend()
        self.queue_pairs[qp] = None

    def forget(self, qp: QueuePair) -> None:
        """Look no more: nothing can be posted. Twice is fine."""
        self.queue_pairs.pop(qp, None)
        self._n_taken.pop(qp, None)

    def leave_idle(self, fence: Callable[[], None]) -> None:
        """Leave the rings in which nothing was posted since the last call.

        Not those in ERR, where receives are looked for, too, to be flushed; nobody rings for them.
        """
        before, self._n_taken = self._n_taken, {qp: qp.send_ring.n_taken for qp in self.queue_pairs}
        idle = [qp for qp, n_taken in self._n_taken.items() if before.get(qp) == n_taken and qp.state is not _ERR]
        for qp in idle:
            qp.send_ring.leave()
        fence()
        for qp in idle:
            if qp.send_ring.has_work:
                qp.send_ring.attend()
            else:
                self.forget(qp)
