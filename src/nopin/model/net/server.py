"""A device server of a modelled host: a NIC, shares by name, peers; it may be killed, and has successors.

Real are: the list of those who hold something for a successor, the book in which shares outlive it, the message by
which a peer attaches and its proof, and the NIC.
Modelled is what lies between: processes that end, connections whose ends hear of each other a while later.

    down -> starting (it listens, and reads the books) -> up -> down, and so on; it may be killed while it starts

Where a server is killed what its NIC has sent is on its way, what it was told is forgotten, and memory is as its last
turn left it. Nothing reaches memory through its registrations any more: they were in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from nopin.control.exchange import Attach, Attached, Denied, proof_of
from nopin.control.legacy import Legacy
from nopin.control.mending import LOST
from nopin.control.share_book import SLOT_BYTES, ShareBook, ShareEntry
from nopin.errors import ServerGone
from nopin.model.effects import Gate, Pause, Procedure, Work
from nopin.model.host.process import Process
from nopin.model.net.client import ALL_RIGHTS, bring_up
from nopin.model.net.nic_host import HostClient, NicHost
from nopin.model.scheduler import Scheduler
from nopin.nic.abi import Access, Discipline
from nopin.nic.attributes import QpAttr
from nopin.nic.errors import VerbsError
from nopin.nic.mr import Region
from nopin.nic.wire.batch import Endpoint
from nopin.units import S_NS

BOOK_SLOTS = 2
KEEPALIVE_NS = 60 * S_NS
"""After which a server knows of a peer that it was cut off from."""


class Line:
    """A peer's connection to a server, by which it lives: either end hears of the other's end as news comes by.

    Attributes:
        cause: why it ended, as the peer knows by now; empty while it lives.
        spoke: called when the peer hears of that.
        closed: the peer has closed it.
    """

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.cause = ""
        self.spoke: Callable[[], None] = _nothing
        self.closed = False
        self._scheduler = scheduler
        self._name = name
        self._is_cut = False
        self._hang_up: Callable[[], None] = _nothing

    def served_by(self, hang_up: Callable[[], None]) -> None:
        """Have a server hear of the peer's end."""
        self._hang_up = hang_up

    def close(self) -> None:
        """End it, as the peer. Twice is fine."""
        if not self.closed:
            self.closed = True
            self._later("server hears that it was closed", self._hang_up, KEEPALIVE_NS if self._is_cut else 0)

    def cut(self) -> None:
        """Have the network fail: the peer gives the connection up, and the server does not hear of that for long."""
        self._is_cut = True
        self.end(LOST)

    def end(self, cause: str) -> None:
        """End it, as the server, or as the kernel that cleans up behind one."""
        self._later("peer hears that it ended", lambda: self._ended(cause))

    def _ended(self, cause: str) -> None:
        self.cause = self.cause or cause
        self.spoke()

    def _later(self, what: str, callback: Callable[[], None], delay_ns: int = 0) -> None:
        self._scheduler.call_at(self._scheduler.now_ns + delay_ns, f"{self._name}: {what}", callback)


@dataclass(eq=False)
class Published:
    """A share, as a server has it."""

    token: bytes
    process: Process
    region: Region


@dataclass(eq=False)
class _Peer:
    """Who is attached: by which connection, with which queue pair."""

    share: Published
    attach: Attach
    line: Line
    client: HostClient


@dataclass(eq=False)
class _Life:
    """What dies with a server.

    Attributes:
        books: who holds a share book.
        hung_up: what clients are to be told by the end of their connections.
    """

    nic: NicHost
    books: Legacy[Process]
    up: Gate = field(default_factory=Gate)
    shares: dict[str, Published] = field(default_factory=dict)
    peers: list[_Peer] = field(default_factory=list)
    hung_up: list[Callable[[], None]] = field(default_factory=list)


class Server:
    """The server of a host, whichever it is at the moment. See above.

    Args:
        name: stable from run to run.
        make_nic: makes the NIC of the first, second, ... server of this name, at one address.
        mtu: of connections.
    """

    def __init__(self, scheduler: Scheduler, name: str, make_nic: Callable[[int], NicHost], *, mtu: int) -> None:
        self.name = name
        self.mtu = mtu
        self.n_lives = 0
        self._scheduler = scheduler
        self._make_nic = make_nic
        self._books: dict[Process, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}  # in memory of theirs
        self._registry: tuple[Process, ...] = ()  # on disk
        self._life: _Life | None = None

    # Its life

    def start(self) -> Procedure[None]:
        """Have a server there, which goes on with what is in the books of its clients."""
        assert self._life is None
        self.n_lives += 1
        life = self._life = _Life(self._make_nic(self.n_lives), Legacy(self._registry))
        return self._take_over(life)

    def _take_over(self, life: _Life) -> Procedure[None]:
        yield Work("listens")
        for process in life.books.left:
            memory = self._books[process]
            left = ShareBook(memory, bytes(memory)).entries if process.alive else []
            yield Work("has read a book")
            for entry in left:
                if self._life is not life:
                    return  # killed
                self._restore(life, process, entry)
                yield Work("has restored a share")
            if self._life is not life:
                return
            (life.books.add if left else life.books.remove)(process)
            self._registry = life.books.records
        if self._life is not life:
            return
        self._scheduler.open(life.up)
        for process in life.books.records:
            if not process.alive:
                self.owner_ended(process)

    def kill(self) -> None:
        """Kill it; its clients and peers hear of that as news comes by. Requires: it is up, or starting."""
        life, self._life = self._life, None
        assert life is not None
        if not life.up.is_open:
            self._scheduler.open(life.up)  # who waits for it finds it gone
        life.nic.end()
        for peer in life.peers:
            peer.line.end(LOST)
        for tell in life.hung_up:
            self._scheduler.call_at(self._scheduler.now_ns, f"{self.name}: a client hears of its end", tell)

    def until_up(self) -> Procedure[NicHost]:
        """Wait until it serves, and return its NIC.

        Raises:
            ServerGone: there is none, or it was killed meanwhile.
        """
        life = self._life
        if life is not None:
            yield Pause(life.up)
        if life is None or self._life is not life:
            raise ServerGone(f"no server is at {self.name}")
        return life.nic

    def is_run_by(self, nic: NicHost) -> bool:
        """Tell whether the server with that NIC still lives."""
        return self._life is not None and self._life.nic is nic

    def when_killed(self, tell: Callable[[], None]) -> None:
        """Have a client hear of the end of its connection. Requires: it is up."""
        assert self._life is not None
        self._life.hung_up.append(tell)

    # What owners ask

    def publish(self, process: Process, name: str, token: bytes, va: int, length: int) -> Procedure[None]:
        """Publish memory of a process; when this returns it outlives the server.

        Raises:
            ServerGone: the server was killed; perhaps it is published.
        """
        nic = yield from self.until_up()
        memory = self._books.setdefault(process, np.zeros(BOOK_SLOTS * SLOT_BYTES, np.uint8))
        entry = ShareEntry(
            name=name,
            token=token,
            address=va,
            length=length,
            iova=va,
            access=int(ALL_RIGHTS),
            discipline=int(Discipline.ON_DEMAND),
            ring_fd=None,
            dtype="<u8",
            shape=[length // 8],
            strides=[8],
            offset=0,
        )
        life = self._life
        assert life is not None
        self._restore(life, process, entry)
        yield Work("has published")
        if not self.is_run_by(nic):
            raise ServerGone(f"the server at {self.name} was killed")
        ShareBook(memory, bytes(memory)).note(entry)
        life.books.add(process)
        self._registry = life.books.records
        yield Work("has noted the share")

    def withdraw(self, process: Process, name: str) -> Procedure[None]:
        """Have a share end, whether there is a server or not; when this returns nothing reaches memory by it.

        Where there is none it is struck out of the book first, and then a successor that may have read that is asked.
        """
        try:
            yield from self._end_share(process, name)
        except ServerGone:
            self._strike(process, name)
            yield Work("has struck the share out")
            with suppress(ServerGone):  # then the next one reads the book as it is now
                yield from self._end_share(process, name)

    def owner_ended(self, process: Process) -> None:
        """A process has exited, as the server hears; one that is starting asks when it is up."""
        life = self._life
        for name, share in list(life.shares.items()) if life is not None else ():
            if share.process is process:
                assert life is not None
                self._end(life, name, "owner exited")

    def _end_share(self, process: Process, name: str) -> Procedure[None]:
        nic = yield from self.until_up()
        life = self._life
        assert life is not None
        self._strike(process, name)
        if name in life.shares:
            self._end(life, name, "withdrawn")
        yield Work("has withdrawn")
        if not self.is_run_by(nic):
            raise ServerGone(f"the server at {self.name} was killed")

    def _strike(self, process: Process, name: str) -> None:
        memory = self._books[process]
        ShareBook(memory, bytes(memory)).strike(name)

    def _end(self, life: _Life, name: str, cause: str) -> None:
        """Take a share away, and the rights of who is attached; they are told why."""
        share = life.shares.pop(name)
        for peer in life.peers:
            if peer.share is share:
                with suppress(VerbsError):  # the queue pair is in ERR already
                    none = QpAttr(access=int(Access.NONE))
                    life.nic.nic.modify_qp(peer.client.client.qp, none, self._scheduler.now_ns)
                peer.line.end(cause)
        life.nic.deregister(share.region)

    def _restore(self, life: _Life, process: Process, entry: ShareEntry) -> None:
        assert entry.length is not None
        region = life.nic.register(process, entry.address, entry.length, access=Access(entry.access), walk=True)
        life.shares[entry.name] = Published(entry.token, process, region)

    # What peers ask

    def attach(self, attach: Attach, nonce: bytes, line: Line) -> Attached | Denied:
        """Decide about a peer, and connect it. Requires: the server is up."""
        life = self._life
        assert life is not None
        share = life.shares.get(attach.share)
        if share is None or proof_of(attach, share.token, nonce) != attach.proof:
            return Denied(code="token", message="no such share, or wrong token")
        for peer in list(life.peers):
            if peer.share is share and peer.attach.is_replaced_by(attach):
                self._hang_up(life, peer)
        client = life.nic.client(depth=2)
        peer = _Peer(share, attach, line, client)
        life.peers.append(peer)
        line.served_by(lambda: self._hang_up(life, peer))
        there = Endpoint(attach.gid, attach.port)
        bring_up(
            client.client,
            there,
            attach.qpn,
            mtu=self.mtu,
            now=self._scheduler.now_ns,
            psn=attach.psn,
            access=Access(share.region.access),
            max_rd_atomic=attach.max_rd_atomic,
            min_rnr_timer=1,
        )
        region, here = share.region, life.nic.nic.endpoint
        return Attached(
            dtype="<u8",
            shape=[region.length // 8],
            strides=[8],
            address=region.iova,
            start=region.iova,
            span=region.length,
            rkey=region.rkey,
            access=int(region.access),
            qpn=client.client.qp.qpn,
            psn=attach.psn,
            gid=here.gid,
            port=here.port,
            path_mtu=self.mtu,
            max_rd_atomic=attach.max_rd_atomic,
        )

    def _hang_up(self, life: _Life, peer: _Peer) -> None:
        if peer in life.peers:
            life.peers.remove(peer)
            life.nic.drop(peer.client)


def _nothing() -> None:
    """Nobody is there to be told."""
