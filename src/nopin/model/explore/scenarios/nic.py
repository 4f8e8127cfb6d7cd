"""The real NIC on two modelled hosts: a transfer, while something happens to the memory at one of its ends.

A process on either host has two pages, written by it, of which its NIC knows nothing yet. A transfer is of bytes of
both, in one packet or in two. So each end faults, and parks; packets are lost or doubled where trouble is explored.

What must hold beside what the oracles of both hosts know: a transfer that is reported done has moved its bytes; what
a READ brings was there; one that fails was refused for a reason; and in the end nobody waits, is held, or is charged.
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.mm.space import Reason
from nopin.model.explore.ends import End, check_moved
from nopin.model.explore.scenario import add, scenario
from nopin.model.explore.world import Steps, World
from nopin.model.host.advice import Advice
from nopin.model.host.errors import ModelFault
from nopin.model.host.vma import Prot
from nopin.model.net.client import connect
from nopin.model.net.network import Network
from nopin.model.net.nic_host import HostClient
from nopin.model.oracle.memory import WORD_BYTES
from nopin.model.oracle.violation import violate
from nopin.nic.abi import QpState, WcStatus, WrOpcode
from nopin.units import PAGE_BYTES, U64_MAX

MTU = 256
SHORT = 2 * WORD_BYTES
"""Of a transfer: the last word of one page and the first of the next, in one packet."""
LONG = 2 * MTU
"""A packet in each page."""
COUNTER = 0
"""Of the two pages: where atomics go."""


class Two:
    """Both ends, and transfers between them."""

    def __init__(self, world: World, length: int = SHORT, *, retry_cnt: int = 7) -> None:
        self.world = world
        self.retry_cnt = retry_cnt
        self.length = length
        network = Network(world.scheduler)
        self.ours, self.theirs = (End(world, network, number) for number in range(2))
        self._n_values = self.n_added = 0
        for end in (self.ours, self.theirs):
            world.prepare(end.prepare(self.fresh()))
        self.peers: list[HostClient] = []
        self.client, self.peer = self.connected()
        world.afterwards(self._load_everything)
        for end in (self.ours, self.theirs):
            world.at_end(end.check)

    def connected(self) -> tuple[HostClient, HostClient]:
        """Return two connected queue pairs."""
        client, peer = self.ours.nic.client(depth=8), self.theirs.nic.client(depth=8)
        connect(client.client, peer.client, mtu=MTU, min_rnr_timer=1, retry_cnt=self.retry_cnt)
        self.peers.append(peer)
        return client, peer

    def fresh(self) -> bytes:
        """Return a transfer's worth of words that nobody wrote before."""
        first = self._n_values + 1
        self._n_values += self.length // WORD_BYTES
        words = range(first, self._n_values + 1)
        return b"".join((n * 0x9E3779B97F4A7C15 & U64_MAX).to_bytes(WORD_BYTES, "little") for n in words)

    # Transfers

    def writes(self, client: HostClient | None = None) -> Steps:
        """Write our words into their memory."""
        client = client or self.client
        since = self._clocks()
        here, there = self.ours.at, self.theirs.at
        client.post_send(
            WrOpcode.RDMA_WRITE,
            [(here, self.length, self.ours.region.lkey)],
            remote=there,
            rkey=self.theirs.region.rkey,
        )
        status = yield from _only(client)
        if self._succeeded(status, since, write=True):
            check_moved(self.ours.seen.read, here, self.theirs.seen.written, there, self.length)

    def reads(self) -> Steps:
        """Read their words into our memory."""
        since = self._clocks()
        here, there = self.ours.at, self.theirs.at
        self.client.post_send(
            WrOpcode.RDMA_READ,
            [(here, self.length, self.ours.region.lkey)],
            remote=there,
            rkey=self.theirs.region.rkey,
        )
        status = yield from _only(self.client)
        if self._succeeded(status, since, write=False):
            check_moved(self.theirs.seen.read, there, self.ours.seen.written, here, self.length)

    def sends(self) -> Steps:
        """Send our words to where they want them."""
        since = self._clocks()
        here, there = self.ours.at, self.theirs.at
        self.peer.post_recv([(there, self.length, self.theirs.region.lkey)])
        self.client.post_send(WrOpcode.SEND, [(here, self.length, self.ours.region.lkey)])
        status = yield from _only(self.client)
        if self._succeeded(status, since, write=True):
            check_moved(self.ours.seen.read, here, self.theirs.seen.written, there, self.length)
            status = yield from _only(self.peer)
            if status is not WcStatus.SUCCESS:
                violate("transient_as_permanent", f"the peer was told that its receive failed: {status.name}")

    def adds(self, n: int, client: HostClient | None = None) -> Steps:
        """Add to a word of theirs."""
        client = client or self.client
        here, there = self.ours.va + COUNTER, self.theirs.va + COUNTER
        sges = [(here, WORD_BYTES, self.ours.region.lkey)]
        client.post_send(WrOpcode.ATOMIC_FETCH_AND_ADD, sges, remote=there, rkey=self.theirs.region.rkey, compare_add=n)
        status = yield from _only(client)
        if status is WcStatus.SUCCESS:
            self.n_added += n
        elif not self._gave_up(status):
            violate("transient_as_permanent", f"an atomic failed: {status.name}")

    def expect_sum(self) -> None:
        """Have the word that is added to hold, in the end, the sum of what was reported done."""

        def loads() -> Steps:
            found = yield from self.theirs.process.load(self.theirs.va + COUNTER, WORD_BYTES)
            total = int.from_bytes(found, "little")
            if total != self.n_added and not self.world.guide.jumps:
                violate("wrong_bytes", f"the sum is {total}, of {self.n_added} that were added")

        self.world.afterwards(loads)

    def _was_refused(self, status: WcStatus) -> bool:
        """Tell whether the other end refused, and its answer was lost: a dead queue pair answers no more."""
        dead = any(each.client.qp.state is QpState.ERR for each in self.peers)
        return status is WcStatus.RETRY_EXC_ERR and dead and bool(self.ours.n_lost)

    def _gave_up(self, status: WcStatus) -> bool:
        """Tell whether a connection gave up, and may have: of losses, or where time jumps and no answer is in time."""
        n_lost = self.ours.n_lost + self.theirs.n_lost
        return status is WcStatus.RETRY_EXC_ERR and (n_lost > self.retry_cnt or self.world.guide.jumps)

    def _clocks(self) -> tuple[int, int]:
        return self.ours.oracle.clock, self.theirs.oracle.clock

    def _succeeded(self, status: WcStatus, since: tuple[int, int], *, write: bool) -> bool:
        """Tell whether a transfer was reported done; if not, there must have been a reason at the end that is named."""
        if status is WcStatus.SUCCESS:
            return True
        if self._gave_up(status):
            return False
        at_home = status is WcStatus.LOC_PROT_ERR
        told = status in (WcStatus.REM_ACCESS_ERR, WcStatus.REM_OP_ERR)
        if not at_home and not told and not self._was_refused(status):
            violate("transient_as_permanent", f"a transfer failed for no reason that was there: {status.name}")
        end = self.ours if at_home else self.theirs
        if not end.deregistered:
            where = end.process, end.at, self.length, Reason.NO_ACCESS
            end.oracle.refused(end.nic.name, *where, write=write != at_home, since=since[not at_home])
        return False

    # Afterwards

    def _load_everything(self) -> Steps:
        for end in (self.ours, self.theirs):
            for process in list(end.host.processes.values()):
                if process.alive:
                    yield from _unless_refused(process.load(end.at, self.length))


def _only(client: HostClient) -> Steps:
    """Wait for one completion; returns its status."""
    ((_, status),) = yield from client.completions()
    return status


def _unless_refused(procedure: Steps) -> Steps:
    try:
        yield from procedure
    except ModelFault:
        return


def _maps_anew(end: End) -> Steps:
    yield from end.process.munmap(end.va, 2 * PAGE_BYTES)
    yield from end.process.mmap(2, at=end.va)


def _stores(two: Two, end: End) -> Steps:
    yield from end.process.store(end.at, two.fresh())


def _forks(two: Two, end: End) -> Steps:
    child = yield from end.process.fork()
    yield from child.store(end.at, two.fresh())
    yield from child.exit()


Event = Callable[[Two, End], Steps]

EVENTS: dict[str, Event] = {
    "munmap": lambda two, end: end.process.munmap(end.va, 2 * PAGE_BYTES),
    "map_anew": lambda two, end: _maps_anew(end),
    "discard": lambda two, end: end.process.madvise(end.va, 2 * PAGE_BYTES, Advice.DONTNEED),
    "store": _stores,
    "fork": _forks,
    "protect": lambda two, end: end.process.mprotect(end.va, 2 * PAGE_BYTES, Prot.READ),
    "reclaim": lambda two, end: end.host.reclaim(2),
    "exit": lambda two, end: end.process.exit(),
    "dereg": lambda two, end: end.deregister(),
}

TRANSFERS: dict[str, Callable[[Two], Steps]] = {
    "write": lambda two: two.writes(),
    "read": lambda two: two.reads(),
    "send": lambda two: two.sends(),
}


def _build(transfer: str, event: str, at: str) -> Callable[[World], None]:
    def build(world: World) -> None:
        two = Two(world)
        end = two.ours if at == "ours" else two.theirs
        world.spawn(f"a: {transfer}", TRANSFERS[transfer](two))
        world.spawn(f"b: {event}", _unless_refused(EVENTS[event](two, end)))

    return build


PAIRS = (
    *(("write", event, "theirs") for event in EVENTS),
    *(("read", event, "theirs") for event in EVENTS),
    *(("send", event, "theirs") for event in ("munmap", "discard", "exit")),
    *(("write", event, "ours") for event in ("munmap", "store", "exit")),
    *(("read", event, "ours") for event in ("munmap", "map_anew", "fork", "protect", "exit")),
)

for _transfer, _event, _at in PAIRS:
    _whose = "our" if _at == "ours" else "their"
    _about = f"an RDMA {_transfer} between two hosts, and {_event} at {_whose} end"
    add(f"{_transfer}_vs_{_event}_of_{_at}", _build(_transfer, _event, _at), _about)


def _long(transfer: str, event: str) -> Callable[[World], None]:
    def build(world: World) -> None:
        two = Two(world, LONG)
        world.spawn(f"a: {transfer}", TRANSFERS[transfer](two))
        world.spawn(f"b: {event}", EVENTS[event](two, two.theirs))

    return build


for _transfer in TRANSFERS:
    for _event in ("discard", "dereg"):
        _about = f"an RDMA {_transfer} of two packets, and {_event} at their end"
        add(f"long_{_transfer}_vs_{_event}", _long(_transfer, _event), _about)


@scenario("read_without_retries_vs_munmap")
def read_without_retries_vs_munmap(world: World) -> None:
    """A READ that may not be sent again, whose answer finds no place: nothing of it may be left to wait for."""
    two = Two(world, retry_cnt=0)
    world.spawn("a: read", two.reads())
    world.spawn("b: munmap", _unless_refused(EVENTS["munmap"](two, two.ours)))


@scenario("two_writes_at_once")
def two_writes_at_once(world: World) -> None:
    """Two queue pairs write to the same pages, and the NICs can have one page request open."""
    two = Two(world, LONG)
    for name in "ab":
        client, _ = two.connected()
        world.spawn(f"{name}: write", two.writes(client))


@scenario("read_and_write_at_once")
def read_and_write_at_once(world: World) -> None:
    """One queue pair reads what another writes; each NIC needs two page requests, and can have one open."""
    two = Two(world)
    client, _ = two.connected()
    world.spawn("a: write", two.writes(client))
    world.spawn("b: read", two.reads())


@scenario("two_adds_at_once")
def two_adds_at_once(world: World) -> None:
    """Two queue pairs add to one word; a request or its answer may be lost, and each counts once."""
    two = Two(world)
    for n in (1, 2):
        client, _ = two.connected()
        world.spawn(f"{n}: add", two.adds(n, client))
    two.expect_sum()
