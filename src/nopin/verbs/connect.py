"""Connecting to a share: a queue pair of ours and one of the owner's server, which learn of each other by TCP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nopin.control.dtypes import parse_dtype
from nopin.control.exchange import Attach, Attached
from nopin.control.url import ShareUrl
from nopin.errors import NopinError, PeerError
from nopin.nic.attributes import RD_ATOMIC_MAX, QpCaps
from nopin.units import S_NS
from nopin.verbs.connection import Connection
from nopin.verbs.peer import PeerConnection
from nopin.verbs.qp import QpEndpoint
from nopin.verbs.transfer import Task

if TYPE_CHECKING:
    from nopin.verbs.device import Device

DEPTH = 512


def connect(
    device: Device, url: ShareUrl, timeout_s: float, ended: Callable[[NopinError, list[Task]], None], replaces: int = 0
) -> tuple[Connection, Attached]:
    """Connect; returns the connection, and what the owner's server says of the array.

    Args:
        timeout_s: for the exchange.
        ended: as of `Connection`.
        replaces: number of the queue pair that was ours until its connection broke, which the owner's server may not
            know yet: nothing of it reaches memory once we are connected. 0 for none.

    Raises:
        AttachRefused: no such share, wrong token, or no room there.
        PeerError: nobody answers, or not as the owner's server would.
        ServerError: our own device server cannot be used.
    """
    deadline_ns = time.monotonic_ns() + int(timeout_s * S_NS)
    with contextlib.ExitStack() as undo:
        mtu = device.session.welcome.mtu
        whole = device.whole_process
        cq = undo.enter_context(device.create_cq(DEPTH))
        caps = QpCaps(max_send_wr=DEPTH, max_recv_wr=1, max_send_sge=1, max_recv_sge=1, max_inline=0)
        qp = undo.enter_context(whole.pd.create_qp(cq, caps=caps))
        peer = PeerConnection(url, deadline_ns)
        undo.callback(peer.close)
        ours = qp.endpoint
        attached = peer.attach(
            Attach(
                share=url.share,
                qpn=ours.qpn,
                psn=ours.psn,
                gid=ours.gid,
                port=ours.port,
                path_mtu=mtu,
                max_rd_atomic=RD_ATOMIC_MAX,
                replaces=replaces,
            )
        )
        _check(attached)
        theirs = QpEndpoint(attached.gid, attached.port, attached.qpn, attached.psn)
        qp.connect(theirs, path_mtu=attached.path_mtu, max_rd_atomic=min(RD_ATOMIC_MAX, attached.max_rd_atomic))
        connection = Connection(qp, peer, whole.lkey, attached.rkey, ended)
        undo.pop_all()
    return connection, attached


def _check(attached: Attached) -> None:
    """Refuse a description that makes no sense, before numpy sees it as ours."""
    try:
        dtype = parse_dtype(attached.dtype)
    except ValueError as problem:
        raise PeerError(f"the peer describes an impossible array: {problem}") from problem
    if not dtype.itemsize or len(attached.shape) != len(attached.strides):
        raise PeerError(f"the peer describes an impossible array of {dtype}")
    if any(n < 0 for n in attached.shape):
        raise PeerError(f"the peer describes an array of shape {attached.shape}")
