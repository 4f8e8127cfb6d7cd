"""The queue pair: identity, attributes, and the two halves' state.

Nothing here decides. `requester.py` and `completer.py` own `SendSide` (what we ask of the peer), `responder.py` owns
`ReceiveSide` (what the peer asks of us), `direct.py` replaces both where the peer lives on the same device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import numpy as np
from numpy.typing import NDArray

from nopin.mm.space import IoVec
from nopin.nic.abi import QpState
from nopin.nic.attributes import QpAttr, QpCaps
from nopin.nic.cq import Cq
from nopin.nic.mr import Pd, Region
from nopin.nic.packets import Packets
from nopin.nic.parts import Part
from nopin.nic.rings import WorkConsumer
from nopin.nic.runs import Run
from nopin.nic.timers import NOMINAL, Timers
from nopin.nic.wire.aeth import MSN_MASK
from nopin.nic.wire.batch import Path
from nopin.nic.wire.psn import psn_add
from nopin.nic.work import RecvWork, SendWork

RECEIVING_STATES = (QpState.RTR, QpState.RTS, QpState.SQD)

WINDOW_PACKETS_MAX = 2048
"""Four batches: two are received, as one, while the next two are built."""
WINDOW_PACKETS_MIN = 16


@dataclass(slots=True, eq=False)
class SendSide:
    """What we ask of the peer.

    PSN space, each compared modulo 2^24: `una` <= `sent` <= `high` <= `next_psn`.

    Attributes:
        works: taken from the ring and not yet completed, oldest first; their PSNs are consecutive.
        acked: how many PSNs of the oldest work lie before `una`; of a run, which gets shorter, those of its first work.
        next_psn: for the next work taken.
        una: oldest PSN not acknowledged or answered.
        sent: next PSN to put on the wire; goes back to `una` on a retry.
        high: one past the highest PSN ever sent; a response at or beyond it is a ghost.
        asked: first and last PSN of each READ or atomic request that is not fully answered. A retry keeps these
            bounds, because the responder repeats an answer only inside one request it has saved.
        window: PSNs that may be outstanding; halves on loss, grows with progress.
        deadline: when the acknowledge timer fires.
        wait_until: an RNR wait in progress.
        n_retries: how often what is outstanding is sent again without progress; `retries_left` of them are left.
        halted: work that cannot be sent; fails once everything before it has been answered.
        parked: a local page is being brought in: "gather" (nothing is sent) or "scatter" (responses are held).
        held: responses that wait for a parked scatter; `n_held` packets.
        gap_at: `una` at which a gap in responses was already answered by a retry.
    """

    works: deque[SendWork | Run] = field(default_factory=deque)
    acked: int = 0
    next_psn: int = 0
    una: int = 0
    sent: int = 0
    high: int = 0
    asked: deque[tuple[int, int]] = field(default_factory=deque)
    window: int = WINDOW_PACKETS_MAX // 2
    grown: int = 0
    deadline: int | None = None
    wait_until: int | None = None
    n_retries: int = 7
    retries_left: int = 7
    rnr_left: int = 7
    halted: SendWork | None = None
    parked: str = ""
    held: list[Packets] = field(default_factory=list)
    n_held: int = 0
    gap_at: int | None = None

    def unroll(self) -> deque[SendWork]:
        """Hold every work by itself, because something is special about one; returns them, as `works` now has them."""
        by_itself = (work.works() if isinstance(work, Run) else (work,) for work in self.works)
        works = deque(chain.from_iterable(by_itself))
        self.works = cast("deque[SendWork | Run]", works)
        return works


@dataclass(slots=True, eq=False)
class Inbound:
    """A message of several packets that is arriving.

    Attributes:
        recv: the receive work in use (SEND); None for a WRITE.
        region: where a WRITE goes; None for a SEND or a WRITE of nothing.
        va: virtual address of its first byte (WRITE).
        length: of the whole message (WRITE); a SEND's is known at its last packet.
        received: bytes so far.
    """

    recv: RecvWork | None = None
    region: Region | None = None
    va: int = 0
    length: int = 0
    received: int = 0


@dataclass(slots=True, eq=False)
class SavedRequest:
    """A READ or atomic that was executed, kept to answer its duplicates."""

    psn: int
    n_psn: int
    rkey: int
    address: int
    length: int
    original: int | None = None
    """Atomic: the value to send again."""


@dataclass(slots=True, eq=False)
class ReadStream:
    """A READ being answered: the next response to send and the range left."""

    psn: int
    n_left: int
    rkey: int
    address: int
    left: int
    first: bool
    msn: int
    region: Region | None

    @property
    def end(self) -> int:
        """One past its last PSN."""
        return psn_add(self.psn, self.n_left)


@dataclass(slots=True, eq=False)
class ReadRun:
    """READs of one region that follow one another, being answered: what is left of them.

    Attributes:
        psn: of the next response.
        addresses, lengths: what each asks for: (n,).
        ends: (n,) int64, responses up to the end of each.
        mtu: payload bytes of each response but a READ's last.
        msn: of the first READ.
        sent: how many responses were.
    """

    psn: int
    rkey: int
    addresses: NDArray[np.uint64]
    lengths: NDArray[np.uint32]
    ends: NDArray[np.int64]
    mtu: int
    msn: int
    region: Region
    sent: int = 0

    @property
    def n_left(self) -> int:
        """Responses left to send."""
        return int(self.ends[-1]) - self.sent

    @property
    def end(self) -> int:
        """One past its last PSN."""
        return psn_add(self.psn, self.n_left)

    def next_part(self, n: int) -> Part:
        """Return its next n responses."""
        return Part.cut(self.ends, self.lengths, self.mtu, self.sent, self.sent + n)

    def remote(self, part: Part) -> IoVec:
        """Return where the bytes of a part are, by virtual address: (k, 2) uint64."""
        return part.clip(self.region.places(self.addresses[part.messages], part.lengths))

    def streams(self, first: int = 0) -> Iterator[ReadStream]:
        """Yield by themselves those READs, from one on, that are not answered yet, or what is left of them."""
        rows = zip(self.addresses.tolist(), self.lengths.tolist(), self.ends.tolist(), strict=True)
        start = 0
        for nth, (address, length, end) in enumerate(rows):
            if nth >= first and end > self.sent:
                done = max(0, self.sent - start)
                psn, msn = psn_add(self.psn, start + done - self.sent), self.msn + nth & MSN_MASK
                skip = done * self.mtu
                yield ReadStream(
                    psn, end - start - done, self.rkey, address + skip, length - skip, done == 0, msn, self.region
                )
            start = end


@dataclass(slots=True, eq=False)
class Reply:
    """An acknowledge to send: ACK, NAK, RNR NAK, or an atomic's answer when `original` is set."""

    psn: int
    syndrome: int
    msn: int
    original: int | None = None

    @property
    def end(self) -> int:
        """One past its PSN."""
        return psn_add(self.psn, 1)


@dataclass(slots=True, eq=False)
class Patience:
    """Since when a step waits for pages, however often it was resumed and parked again meanwhile.

    Attributes:
        psn: of the step; -1: none waits. since_ns: when it parked first.
    """

    psn: int = -1
    since_ns: int = 0

    def park(self, psn: int, now: int) -> int:
        """A step parks; returns since when it waits."""
        if psn != self.psn:
            self.psn, self.since_ns = psn, now
        return self.since_ns

    def end(self) -> None:
        """The peer was told: what it asks again waits anew."""
        self.psn = -1


@dataclass(slots=True, eq=False)
class ReceiveSide:
    """What the peer asks of us.

    Attributes:
        epsn: the PSN expected next.
        msn: messages completed, modulo 2^24.
        inbound: a message in progress.
        next_recv: a receive taken from the ring for a message that could not begin yet.
        saved: answered READs and atomics, newest last, at most max_dest_rd_atomic.
        replies: responses to send, in PSN order; a plain ACK at the end absorbs later ones.
        nak_sent: the peer knows that `epsn` is missing; drop what comes before it.
        parked_at: since when faults have parked the request at `epsn`; None when not parked.
        stream_parked_at: since when they have parked the READ that is being answered; None when not parked.
        patience, stream_patience: tell the two apart from new ones when they park again.
        held: packets that arrived while parked, the parked one first.
        n_held: how many packets that is.
    """

    epsn: int = 0
    msn: int = 0
    inbound: Inbound | None = None
    next_recv: RecvWork | None = None
    saved: deque[SavedRequest] = field(default_factory=deque)
    replies: deque[ReadStream | ReadRun | Reply] = field(default_factory=deque)
    nak_sent: bool = False
    ack_due: bool = False
    parked_at: int | None = None
    stream_parked_at: int | None = None
    patience: Patience = field(default_factory=Patience)
    stream_patience: Patience = field(default_factory=Patience)
    held: list[Packets] = field(default_factory=list)
    n_held: int = 0

    def unroll(self) -> deque[ReadStream | Reply]:
        """Hold every READ by itself, because something is special about one; returns `replies` as they are now."""
        by_itself = (reply.streams() if isinstance(reply, ReadRun) else (reply,) for reply in self.replies)
        replies = deque[ReadStream | Reply](chain.from_iterable(by_itself))
        self.replies = cast("deque[ReadStream | ReadRun | Reply]", replies)
        return replies


@dataclass(slots=True, eq=False)
class QueuePair:
    """A reliable connection.

    Attributes:
        attr: current attributes.
        path: set when the peer is known (RTR).
        direct: the peer is a queue pair of this device.
        dest_qpn: the peer's number; known, as the path is, from RTR on.
        established: COMM_EST was reported. drained: SQ_DRAINED was reported since SQD was entered.
        requester_waiter, responder_waiter, direct_waiter, stream_waiter: the names under which our requests, the
            peer's, our requests on the direct path (for pages of the peer: what the wait for the peer's page earned
            must not be spent on a look at ours), and a READ being answered wait for pages.
    """

    qpn: int
    pd: Pd
    send_cq: Cq
    recv_cq: Cq
    send_ring: WorkConsumer
    recv_ring: WorkConsumer
    caps: QpCaps
    sq_sig_all: bool
    state: QpState = QpState.RESET
    attr: QpAttr = field(default_factory=QpAttr)
    path: Path | None = None
    dest_qpn: int = 0
    mtu: int = 1024
    direct: bool = False
    established: bool = False
    drained: bool = False
    send: SendSide = field(default_factory=SendSide)
    recv: ReceiveSide = field(default_factory=ReceiveSide)
    owner: object = None
    timers: Timers = NOMINAL
    requester_waiter: tuple[int, str] = field(init=False)
    responder_waiter: tuple[int, str] = field(init=False)
    direct_waiter: tuple[int, str] = field(init=False)
    stream_waiter: tuple[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.requester_waiter = (self.qpn, "send")
        self.responder_waiter = (self.qpn, "recv")
        self.direct_waiter = (self.qpn, "direct")
        self.stream_waiter = (self.qpn, "stream")

    @property
    def foreign(self) -> bool:
        """The peer is not nopin."""
        return self.attr.av is not None and self.attr.av.foreign

    def may_receive(self) -> bool:
        """Packets are taken from RTR on."""
        return self.state in RECEIVING_STATES
