"""The queue pair that answers one attached peer on behalf of a share's owner.

It has no work of its own: rings of one entry in the server's own memory, and one completion queue that
nothing is ever written to, because nothing is posted.
"""

from __future__ import annotations

import contextlib
import secrets

import numpy as np

from nopin.control.exchange import Attach, Attached
from nopin.linux.fence import fence
from nopin.nic.abi import CQE_BYTES, Access, QpState, ring_bytes
from nopin.nic.attributes import RD_ATOMIC_MAX, AddressVector, QpAttr, QpCaps
from nopin.nic.cq import Cq
from nopin.nic.errors import VerbsError
from nopin.nic.nic import Nic
from nopin.nic.rings import CompletionProducer
from nopin.server.core import Core
from nopin.server.queues import RingLayout
from nopin.server.shares import Share
from nopin.units import U64_MAX

_CAPS = QpCaps(max_send_wr=1, max_recv_wr=1, max_send_sge=1, max_recv_sge=1, max_inline=0)
_REMOTE = Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
_MIN_RNR_TIMER = 12  # 0.64 ms, the usual default
_TIMEOUT = 14  # 67 ms
_RETRIES = 7


class SilentCq:
    """The completion queue of all responders."""

    def __init__(self, nic: Nic) -> None:
        self.cq: Cq = nic.create_cq(CompletionProducer(np.zeros(ring_bytes(1, CQE_BYTES), np.uint8), 1, fence))


class Responder:
    """A queue pair in the owner's protection domain, connected to a peer.

    Raises:
        VerbsError: the device has no room, or refuses the peer's coordinates.
    """

    def __init__(self, core: Core, cq: Cq, share: Share, attach: Attach) -> None:
        self.share = share
        self._peer = attach
        self.path_mtu = min(core.link.mtu, attach.path_mtu)
        self.max_rd_atomic = min(RD_ATOMIC_MAX, attach.max_rd_atomic)
        self._core = core
        self._psn = secrets.randbelow(1 << 24)
        layout = RingLayout.of(_CAPS)
        rings = layout.rings(np.zeros(layout.n_bytes, np.uint8))
        share.domain.enter()
        try:
            self.qp = core.nic.create_qp(share.domain.pd, cq, cq, *rings, layout.caps, False)
        except VerbsError:
            share.domain.leave()
            raise
        self.qp.owner = self
        core.responders.add(self)
        try:
            self._connect(attach)
        except VerbsError:
            self.destroy()
            raise

    def attached(self) -> Attached:
        """Return what the peer has to know, without the proof."""
        region, layout = self.share.region, self.share.layout
        endpoint = self._core.link.endpoint
        return Attached(
            dtype=layout.dtype,
            shape=list(layout.shape),
            strides=list(layout.strides),
            address=region.iova + layout.offset,
            start=region.iova,
            span=min(region.length, U64_MAX),
            rkey=region.rkey,
            access=int(region.access & _REMOTE),
            qpn=self.qp.qpn,
            psn=self._psn,
            gid=endpoint.gid,
            port=endpoint.port,
            path_mtu=self.path_mtu,
            max_rd_atomic=self.max_rd_atomic,
        )

    def is_replaced_by(self, attach: Attach) -> bool:
        """Tell whether the peer asks for another one in place of this."""
        return self._peer.is_replaced_by(attach)

    def revoke(self) -> None:
        """Take the peer's rights away: from now on its requests get access errors."""
        with contextlib.suppress(VerbsError):  # the queue pair is in ERR already
            self._core.nic.modify_qp(self.qp, QpAttr(access=int(Access.NONE)), self._core.clock())

    def destroy(self) -> None:
        """Destroy the queue pair."""
        self._core.nic.destroy_qp(self.qp)
        self.qp.owner = None
        self._core.responders.discard(self)
        self.share.domain.leave()

    def _connect(self, attach: Attach) -> None:
        steps = (
            QpAttr(
                state=int(QpState.INIT),
                pkey_index=0,
                port_num=1,
                access=int(self.share.region.access & _REMOTE),
            ),
            QpAttr(
                state=int(QpState.RTR),
                av=AddressVector(gid=attach.gid, port=attach.port),
                path_mtu=self.path_mtu,
                dest_qpn=attach.qpn,
                rq_psn=attach.psn,
                max_dest_rd_atomic=self.max_rd_atomic,
                min_rnr_timer=_MIN_RNR_TIMER,
            ),
            QpAttr(
                state=int(QpState.RTS),
                timeout=_TIMEOUT,
                retry_cnt=_RETRIES,
                rnr_retry=_RETRIES,
                sq_psn=self._psn,
                max_rd_atomic=0,
            ),
        )
        for step in steps:
            self._core.nic.modify_qp(self.qp, step, self._core.clock())
