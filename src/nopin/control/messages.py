"""Messages between a client and its device server, over the Unix socket.

One SOCK_SEQPACKET packet carries one msgpack message of at most MESSAGE_BYTES_MAX. A request carries a `seq`
chosen by the client; its reply carries the same one. Events carry none. Descriptors travel beside the message
that mentions them, in the order it lists.

Handles (`pd`, `mr`, `cq`, `channel`) are per-client numbers chosen by the server; queue pairs go by QPN.
"""

from __future__ import annotations

from typing import Any

import msgspec

from nopin.nic.attributes import QpAttr, QpCaps

PROTOCOL_VERSION = 2
"""One more with each change of messages, of rings, or of who rings when: 2 has rings that are not looked at."""
MESSAGE_BYTES_MAX = 65536
NOTICES = 4096
"""Bytes to read from a completion channel at once: each is a notice, and any number mean the same as one."""


class Request(msgspec.Struct, tag_field="op", kw_only=True):
    """Base of every request."""

    seq: int


class Hello(Request, tag="hello"):
    """First message of a client. Beside it: its userfaultfd if `has_uffd`, then its share book if `has_book`.

    Answered by Welcome. A client whose server was killed shows the successor the book it got from that one, and goes on
    with the shares in it: see Reclaim.
    """

    version: int
    has_uffd: bool = False
    uffd_features: int = 0
    has_book: bool = False


class Reclaim(Request, tag="reclaim"):
    """Say which shares of the share book this client still has; the others end. Answered by Reclaimed."""

    shares: list[str]


class AllocPd(Request, tag="alloc_pd"):
    """Make a protection domain. Answered by Handle."""


class DeallocPd(Request, tag="dealloc_pd"):
    """Destroy a protection domain; refused (EBUSY) while it has regions or queue pairs."""

    pd: int


class Register(Request, tag="register"):
    """Register memory of the calling process. Answered by Registered.

    `length` None with address 0 is the implicit region. For Discipline.PINNED, `ring_fd` is the number, in
    the client, of the io_uring descriptor whose registered buffer 0 is [address, address + length); the
    server takes it with pidfd_getfd.
    """

    pd: int
    address: int
    length: int | None
    iova: int
    access: int
    discipline: int
    ring_fd: int | None = None


class Deregister(Request, tag="deregister"):
    """Destroy a region: no access is under way in it when Done comes."""

    mr: int


class Publish(Request, tag="publish"):
    """Let peers that know a secret attach to a region. Answered by Published.

    `dtype` is as `control.dtypes` writes it, `shape` and `strides` (bytes) describe the array inside the region,
    `offset` is where it starts from the region's start.
    """

    mr: int
    dtype: str
    shape: list[int]
    strides: list[int]
    offset: int = 0


class Withdraw(Request, tag="withdraw"):
    """Stop publishing: attached peers are told, their queue pairs get access errors."""

    share: str


class CreateChannel(Request, tag="create_channel"):
    """Make a completion channel. Answered by Handle with one descriptor beside it, to be read: a pipe."""


class DestroyChannel(Request, tag="destroy_channel"):
    """Destroy a completion channel; refused (EBUSY) while a completion queue uses it."""

    channel: int


class CreateCq(Request, tag="create_cq"):
    """Make a completion queue. Answered by Handle with one descriptor beside it: the ring's memfd."""

    depth: int
    channel: int | None = None


class DestroyCq(Request, tag="destroy_cq"):
    """Destroy a completion queue; refused (EBUSY) while queue pairs use it."""

    cq: int


class CreateQp(Request, tag="create_qp"):
    """Make an RC queue pair. Answered by QpCreated, with the memfd of its rings beside it.

    The memfd holds the send ring, then at `recv_offset` the receive ring (layouts in nic/abi.py).
    """

    pd: int
    send_cq: int
    recv_cq: int
    caps: QpCaps
    sq_sig_all: bool = False


class ModifyQp(Request, tag="modify_qp"):
    """Change attributes or state."""

    qpn: int
    attr: QpAttr


class QueryQp(Request, tag="query_qp"):
    """Ask for a queue pair's attributes. Answered by QpAttributes."""

    qpn: int


class DestroyQp(Request, tag="destroy_qp"):
    """Destroy a queue pair: no access on its behalf is under way when Done comes."""

    qpn: int


class GetStat(Request, tag="stat"):
    """Ask for the figures of this user's objects. Answered by Stat."""


class Reply(msgspec.Struct, tag_field="re", kw_only=True):
    """Base of every reply and event."""

    seq: int = 0


class Done(Reply, tag="done"):
    """The request was carried out."""


class Refused(Reply, tag="refused"):
    """The request was refused; nothing was changed. With seq 0: the connection is, and is closed after this."""

    code: str
    errno: int
    message: str


class Welcome(Reply, tag="welcome"):
    """Answer to Hello. Beside it: the server's state page (memfd, read-only), the doorbell (eventfd, its own), and the
    client's share book (`control.share_book`), which it keeps open for as long as it has shares.

    Attributes:
        server_pid: whom the client should name with PR_SET_PTRACER where Yama asks for it.
        gid: the server's own address; `port` its UDP port.
        exchange_host: where peers connect by TCP, with `exchange_port`.
        limits: name to the most this client may have.
        watching: userfaultfd events are delivered for this client.
    """

    version: int
    server_pid: int
    gid: bytes
    port: int
    mtu: int
    exchange_host: str
    exchange_port: int
    limits: dict[str, int]
    watching: bool


class Handle(Reply, tag="handle"):
    """A new object."""

    handle: int


class Registered(Reply, tag="registered"):
    """A new region.

    Attributes:
        watched: user actions on the range (munmap, mremap, madvise, fork) will arrive as events.
    """

    mr: int
    lkey: int
    rkey: int
    watched: bool


class ReclaimedShare(msgspec.Struct):
    """A share that goes on, and its region as the new server has it; attributes as of Published and Registered."""

    share: str
    mr: int
    lkey: int
    rkey: int
    watched: bool


class Reclaimed(Reply, tag="reclaimed"):
    """The shares that go on.

    Attributes:
        pd: the protection domain of all of them; None if there are none.
    """

    pd: int | None
    shares: list[ReclaimedShare]


class Published(Reply, tag="published"):
    """A published region: `share` names it, `token` (32 random bytes) admits to it."""

    share: str
    token: bytes


class QpCreated(Reply, tag="qp_created"):
    """A new queue pair and the layout of its rings.

    Attributes:
        caps: as granted; depths are rounded up to powers of two.
        recv_offset: where the receive ring starts in the memfd.
        n_bytes: the size of the memfd.
    """

    qpn: int
    caps: QpCaps
    send_stride: int
    recv_stride: int
    recv_offset: int
    n_bytes: int


class QpAttributes(Reply, tag="qp_attributes"):
    """Answer to QueryQp."""

    attr: QpAttr
    caps: QpCaps


class Stat(Reply, tag="stat"):
    """Rows of figures, one per object; each has a `kind` ("dev", "mr", "qp", "cq", "link", "client", "arena").

    Attributes:
        more: another Stat with the same seq follows, because one message cannot hold all rows.
    """

    rows: list[dict[str, Any]]
    more: bool = False


class Event(Reply, tag="event"):
    """An asynchronous event.

    Attributes:
        kind: an AsyncEventType.
        object_id: the QPN, or the handle of the region, completion queue or arena.
        cause: for REGION_INVALIDATED, the notifier cause ("unmap", "remap", "remove", "fork").
        start: first byte concerned; `end` one past the last.
        generation: counts invalidations of that region, from 1.
    """

    kind: int
    object_id: int
    cause: str = ""
    start: int = 0
    end: int = 0
    generation: int = 0
