"""Completion queues and queue pairs of a client, and the shared memory of their rings."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nopin.control.messages import CreateCq, CreateQp
from nopin.errors import ServerRefused
from nopin.linux import memfd
from nopin.linux.fence import fence
from nopin.mm.space import Bytes
from nopin.nic.abi import CQE_BYTES, ring_bytes, wqe_stride
from nopin.nic.attributes import QpCaps
from nopin.nic.errors import VerbsError
from nopin.nic.rings import CompletionProducer, WorkConsumer
from nopin.server.limits import Usage
from nopin.server.objects import ClientCq, ClientQp, find
from nopin.server.refusal import refuse

if TYPE_CHECKING:
    from nopin.server.session import Session


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the two rings of a queue pair lie in one piece of memory.

    Attributes:
        caps: as granted, depths rounded up to powers of two.
        recv_offset: where the receive ring starts; the send ring is at 0.
    """

    caps: QpCaps
    send_stride: int
    recv_stride: int
    recv_offset: int
    n_bytes: int

    @classmethod
    def of(cls, caps: QpCaps) -> RingLayout:
        """Lay out the rings for these capacities."""
        granted = QpCaps(
            max_send_wr=power_of_two(caps.max_send_wr),
            max_recv_wr=power_of_two(caps.max_recv_wr),
            max_send_sge=caps.max_send_sge,
            max_recv_sge=caps.max_recv_sge,
            max_inline=caps.max_inline,
        )
        send_stride = wqe_stride(granted.max_send_sge, granted.max_inline)
        recv_stride = wqe_stride(granted.max_recv_sge, 0)
        recv_offset = ring_bytes(granted.max_send_wr, send_stride)
        n_bytes = recv_offset + ring_bytes(granted.max_recv_wr, recv_stride)
        return cls(granted, send_stride, recv_stride, recv_offset, n_bytes)

    def rings(self, memory: Bytes) -> tuple[WorkConsumer, WorkConsumer]:
        """Return the device's ends of the send and the receive ring."""
        send = WorkConsumer(memory[: self.recv_offset], self.caps.max_send_wr, self.send_stride)
        recv = WorkConsumer(memory[self.recv_offset :], self.caps.max_recv_wr, self.recv_stride)
        return send, recv


def power_of_two(depth: int) -> int:
    """Round a queue's depth up to a power of two, at least 1."""
    return 1 << max(depth - 1, 0).bit_length()


def create_cq(session: Session, request: CreateCq) -> tuple[ClientCq, int]:
    """Make a completion queue; returns it with the descriptor of its ring, for the client.

    Raises:
        ServerRefused: a limit is reached, the depth is impossible, or the channel unknown.
    """
    objects = session.objects
    if request.depth < 1:
        raise refuse(f"a completion queue of depth {request.depth}", errno.EINVAL)
    objects.usage.check("cq_depth", request.depth)
    channel = None
    if request.channel is not None:
        channel = find(objects.channels, request.channel, "completion channel")
    depth = power_of_two(request.depth)
    n_bytes = ring_bytes(depth, CQE_BYTES)
    fd, memory = _ring_memory(objects.usage, n_bytes, "cqs")
    cq = session.core.nic.create_cq(CompletionProducer(memory, depth, fence))
    entry = ClientCq(session, objects.new_handle(), cq, n_bytes, channel)
    cq.owner = entry
    objects.cqs[entry.object_id] = entry
    if channel is not None:
        channel.n_users += 1
    return entry, fd


def destroy_cq(session: Session, entry: ClientCq) -> None:
    """Destroy a completion queue.

    Raises:
        VerbsError: EBUSY, queue pairs use it.
    """
    session.core.nic.destroy_cq(entry.cq)
    entry.cq.owner = None  # no cycle is left, so the ring is unmapped now and not at some later collection
    del session.objects.cqs[entry.object_id]
    if entry.channel is not None:
        entry.channel.n_users -= 1
    session.objects.usage.give(cqs=1, ring_bytes=entry.n_bytes, descriptors=1)


def create_qp(session: Session, request: CreateQp) -> tuple[ClientQp, RingLayout, int]:
    """Make a queue pair; returns it with its rings' layout and descriptor, for the client.

    Raises:
        ServerRefused: a limit is reached, a capacity is impossible, or an object unknown.
        VerbsError: the device refuses.
    """
    objects = session.objects
    domain = find(objects.domains, request.pd, "protection domain")
    send_cq = find(objects.cqs, request.send_cq, "completion queue").cq
    recv_cq = find(objects.cqs, request.recv_cq, "completion queue").cq
    _check_caps(objects.usage, request.caps)
    layout = RingLayout.of(request.caps)
    fd, memory = _ring_memory(objects.usage, layout.n_bytes, "qps")
    try:
        qp = session.core.nic.create_qp(
            domain.pd, send_cq, recv_cq, *layout.rings(memory), layout.caps, request.sq_sig_all
        )
    except VerbsError:
        os.close(fd)
        objects.usage.give(qps=1, ring_bytes=layout.n_bytes, descriptors=1)
        raise
    entry = ClientQp(session, qp, layout.n_bytes)
    qp.owner = entry
    objects.qps[qp.qpn] = entry
    return entry, layout, fd


def destroy_qp(session: Session, entry: ClientQp) -> None:
    """Destroy a queue pair."""
    session.core.nic.destroy_qp(entry.qp)
    entry.qp.owner = None  # as above
    del session.objects.qps[entry.qp.qpn]
    session.objects.usage.give(qps=1, ring_bytes=entry.n_bytes, descriptors=1)


def _check_caps(usage: Usage, caps: QpCaps) -> None:
    """Check the capacities a client asks for.

    Raises:
        ServerRefused: one is negative, zero where something is needed, or over its limit.
    """
    if min(caps.max_send_wr, caps.max_recv_wr, caps.max_send_sge, caps.max_recv_sge, caps.max_inline) < 0:
        raise refuse(f"negative capacity in {caps}", errno.EINVAL)
    usage.check("qp_depth", max(caps.max_send_wr, caps.max_recv_wr))
    usage.check("sge", max(caps.max_send_sge, caps.max_recv_sge))
    usage.check("inline_bytes", caps.max_inline)


def _ring_memory(usage: Usage, n_bytes: int, kind: str) -> tuple[int, Bytes]:
    """Make and map a sealed memfd, counted against the client.

    Raises:
        ServerRefused: a limit is reached, or the host is out of descriptors or memory.
    """
    amounts = {kind: 1, "ring_bytes": n_bytes, "descriptors": 1}
    usage.take(**amounts)
    try:
        return _mapped(n_bytes)
    except OSError as problem:
        usage.give(**amounts)
        raise _no_memory(n_bytes, problem) from problem


def _mapped(n_bytes: int) -> tuple[int, Bytes]:
    fd = memfd.create("nopin-ring", n_bytes)
    try:
        return fd, memfd.map_array(fd)
    except OSError:
        os.close(fd)
        raise


def _no_memory(n_bytes: int, problem: OSError) -> ServerRefused:
    return refuse(f"cannot make a ring of {n_bytes} bytes: {problem.strerror}", problem.errno or errno.ENOMEM)
