"""Attaching to a share."""

from __future__ import annotations

import contextlib

import numpy as np

from nopin.control.exchange import Attach, Attached
from nopin.control.url import ShareUrl
from nopin.errors import PeerError
from nopin.nic.attributes import QpCaps
from nopin.units import S_NS
from nopin.verbs.device import Device, default_device
from nopin.verbs.peer import PeerConnection
from nopin.verbs.qp import QpEndpoint
from nopin.verbs.remote import RemoteArray
from nopin.verbs.waiting import deadline_after

DEPTH = 512
MAX_RD_ATOMIC = 16


def attach(url: str, *, device: Device | None = None, timeout: float = 5.0) -> RemoteArray:
    """Attach to memory that another process shares.

    Args:
        url: the owner's `Share.url`.
        device: through which to reach it; None for this process's default device.
        timeout: seconds for the set-up.

    Raises:
        UsageError: the text is no share URL.
        AttachRefused: no such share, wrong token, or no room there.
        PeerError: nobody answers, or not as the owner's server would.
        ServerError: our own device server cannot be used.
    """
    parsed = ShareUrl.parse(url)
    deadline_ns = deadline_after(timeout) or S_NS
    device = device or default_device()
    with contextlib.ExitStack() as undo:
        peer = PeerConnection(parsed, deadline_ns)
        undo.callback(peer.close)
        cq = undo.enter_context(device.create_cq(DEPTH))
        caps = QpCaps(max_send_wr=DEPTH, max_recv_wr=1, max_send_sge=1, max_recv_sge=1, max_inline=0)
        qp = undo.enter_context(device.default_pd.create_qp(cq, caps=caps))
        ours = qp.endpoint
        attached = peer.attach(
            Attach(
                share=parsed.share,
                qpn=ours.qpn,
                psn=ours.psn,
                gid=ours.gid,
                port=ours.port,
                path_mtu=device.info.mtu,
                max_rd_atomic=MAX_RD_ATOMIC,
            )
        )
        _check(attached)
        theirs = QpEndpoint(attached.gid, attached.port, attached.qpn, attached.psn)
        qp.connect(theirs, path_mtu=attached.path_mtu, max_rd_atomic=min(MAX_RD_ATOMIC, attached.max_rd_atomic))
        array = RemoteArray(device, qp, peer, attached)
        undo.pop_all()
    return array


def _check(attached: Attached) -> None:
    """Refuse a description that makes no sense, before numpy sees it as ours."""
    try:
        dtype = np.dtype(attached.dtype)
    except (TypeError, ValueError) as problem:
        raise PeerError(f"the peer describes an array of {attached.dtype!r}: {problem}") from problem
    if dtype.hasobject or not dtype.itemsize or len(attached.shape) != len(attached.strides):
        raise PeerError(f"the peer describes an impossible array of {dtype}")
    if any(n < 0 for n in attached.shape):
        raise PeerError(f"the peer describes an array of shape {attached.shape}")
