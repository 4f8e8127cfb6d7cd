"""Two processes, one of which has attached plain memory that the other shares, and servers that may be killed.

A process on either host has two pages, written by it. Theirs shares them; ours has attached the share, and has its own
two pages for buffer. Both are reached by walking their tables, as plain memory is. Each host has a server, or both
processes are clients of one.

What must hold beside what the oracles know: an operation that is reported done has moved its bytes; one that fails was
refused for a reason, or is an atomic of which nobody knows; nothing reaches memory through a share that has ended, nor
through a server that was killed; and in the end the share is there, or was withdrawn, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from nopin.errors import NopinError, PeerError, RegionGone, ServerGone, WorkError
from nopin.mm.space import Reason
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Work
from nopin.model.explore.ends import Seen, check_moved
from nopin.model.explore.world import Steps, World
from nopin.model.host.errors import ModelFault
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.net.attached import AttachedArray, Operation
from nopin.model.net.fates import Fate
from nopin.model.net.network import Network
from nopin.model.net.nic_host import NicHost
from nopin.model.net.server import Server
from nopin.model.oracle.host_oracle import HostOracle
from nopin.model.oracle.memory import WORD_BYTES
from nopin.model.oracle.violation import violate
from nopin.nic.abi import WcStatus, WrOpcode
from nopin.ranges import Range
from nopin.units import PAGE_BYTES, U64_MAX

MTU = 256
SHORT = 2 * WORD_BYTES
"""Of a transfer: the last word of one page and the first of the next, in one packet."""
LONG = 2 * MTU
"""A packet in each page."""
COUNTER = 0
"""Of the two pages: where atomics go."""
_NAME, _OURS, _TOKEN = "share", "ours", bytes(range(32))


class OneLife(DeviceObserver):
    """What the NIC of one server reads and writes, by whose memory it is, until the server is killed."""

    def __init__(self) -> None:
        self.seen: dict[Process, Seen] = {}
        self.killed = False

    def device_read(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check(device, va)
        self.seen[process].device_read(device, process, va, frame, data)

    def device_wrote(self, device: str, process: Process, va: int, frame: int, data: bytes) -> None:
        """See `DeviceObserver`."""
        self._check(device, va)
        self.seen[process].device_wrote(device, process, va, frame, data)

    def _check(self, device: str, va: int) -> None:
        if self.killed:
            violate("stale_access", f"{device} reaches {va:#x}, and its server was killed")


class Served:
    """A host with its server, of which there may be several, one after the other.

    Attributes:
        seen: of each process.
        n_killed: servers that were killed.
        n_late: packets on their way here that may be late by long, from now on.
    """

    def __init__(self, world: World, network: Network, name: str, number: int) -> None:
        self.world = world
        self.oracle = HostOracle(world.note)
        self.host = Host(name, world.scheduler, 16, observer=self.oracle)
        self.server = Server(world.scheduler, f"server of {name}", self._make_nic, mtu=MTU)
        self.seen: dict[Process, Seen] = {}
        self.n_killed = self.n_late = 0
        self.nics: list[NicHost] = []
        self._network = network
        self._name = name
        self._number = number
        self._life = OneLife()

    def process(self) -> Process:
        """Make a client."""
        made = self.host.spawn_process()
        self.seen[made] = Seen(self.oracle.walkers)
        return made

    def is_replaced(self) -> Steps:
        """Kill the server, and start another a while later."""
        yield Work("kills the server")
        self._kill()
        yield Work("starts another")
        yield from self.server.start()

    def is_replaced_twice(self) -> Steps:
        """Kill the server, and the next one, too, perhaps while it starts."""
        yield Work("kills the server")
        self._kill()
        yield Work("starts another")
        self.world.spawn("starts", self.server.start())
        yield Work("kills that, too")
        self._kill()
        yield Work("starts a third")
        yield from self.server.start()

    def _kill(self) -> None:
        self.n_killed += 1
        self._life.killed = True
        self.server.kill()

    def check(self) -> None:
        """Check what holds when nothing is under way."""
        self.oracle.check_idle()
        self.host.check()
        requests = self.nics[-1].iommu._requests
        if len(requests) or requests.n_backlogged:
            violate("unbalanced", f"{self.nics[-1].name} has {len(requests)} page requests left")

    def _make_nic(self, life: int) -> NicHost:
        self._life = OneLife()
        self._life.seen = self.seen
        made = NicHost(
            self.world.scheduler,
            self._network,
            f"nic {life} of {self._name}",
            f"10.0.0.{self._number}",
            draw=Random(10 * self._number + life).randrange,
            batch_packets=4,
            observer=self._life,
            fates=self._fates,
        )
        self.nics.append(made)
        return made

    def _fates(self, n_packets: int) -> Sequence[Fate] | None:
        return [self._fate() for _ in range(n_packets)] if self.n_late else None

    def _fate(self) -> Fate:
        if self.n_late and self.world.either("is a packet late"):
            self.n_late -= 1
            return Fate.LATE
        return Fate.PASS


class Sharing:
    """See above.

    Args:
        length: of a transfer.
        one_server: both processes are clients of it.
        both_share: ours shares its pages as well.
    """

    def __init__(
        self, world: World, length: int = SHORT, *, one_server: bool = False, both_share: bool = False
    ) -> None:
        self.world = world
        self.length = length
        network = Network(world.scheduler)
        self.theirs = Served(world, network, "theirs", 1)
        self.ours = self.theirs if one_server else Served(world, network, "ours", 2)
        self.owner, self.peer = self.theirs.process(), self.ours.process()
        self.ended = False  # the share, by its owner
        self.over = False  # the attachment, by an operation that failed
        self.n_added = self.n_doubtful = 0
        self._both_share = both_share
        self._n_values = 0
        self._last: bytes | None = None
        world.prepare(self._prepare())
        world.afterwards(self._use_it)
        world.afterwards(self._load_everything)
        for place in dict.fromkeys((self.theirs, self.ours)):
            world.at_end(place.check)

    def fresh(self) -> bytes:
        """Return a transfer's worth of words that nobody wrote before."""
        first = self._n_values + 1
        self._n_values += self.length // WORD_BYTES
        words = range(first, self._n_values + 1)
        return b"".join((n * 0x9E3779B97F4A7C15 & U64_MAX).to_bytes(WORD_BYTES, "little") for n in words)

    def _prepare(self) -> Steps:
        self.va = yield from self.owner.mmap(2)
        self.buffer = yield from self.peer.mmap(2)
        offset = PAGE_BYTES - self.length // 2
        self.there, self.here = self.va + offset, self.buffer + offset
        yield from self.owner.store(self.there, self.fresh())
        yield from self.peer.store(self.here, self.fresh())
        for place in dict.fromkeys((self.theirs, self.ours)):
            yield from place.server.start()
        yield from self.theirs.server.publish(self.owner, _NAME, _TOKEN, self.va, 2 * PAGE_BYTES)
        if self._both_share:
            yield from self.ours.server.publish(self.peer, _OURS, _TOKEN, self.buffer, 2 * PAGE_BYTES)
        self.array = self._new_array()
        yield from self.array.attach()

    def _new_array(self, name: str = _NAME) -> AttachedArray:
        where = Range.of_length(self.buffer, 2 * PAGE_BYTES)
        whose = self.theirs if name == _NAME else self.ours
        return AttachedArray(self.world.scheduler, self.peer, self.ours.server, whose.server, name, _TOKEN, where)

    # What ours does

    def writes(self) -> Steps:
        """Write our words into theirs."""
        self._last = None
        done = yield from self._carry_out(WrOpcode.RDMA_WRITE)
        if done:
            check_moved(
                self.ours.seen[self.peer].read, self.here, self.theirs.seen[self.owner].written, self.there, self.length
            )
            self._last = yield from self.peer.load(self.here, self.length)

    def reads(self) -> Steps:
        """Read theirs into our words."""
        done = yield from self._carry_out(WrOpcode.RDMA_READ)
        if done:
            check_moved(
                self.theirs.seen[self.owner].read, self.there, self.ours.seen[self.peer].written, self.here, self.length
            )

    def writes_twice(self) -> Steps:
        """Write to one place twice, the second when the first is done: from then on the second is there."""
        yield from self.writes()
        yield from self.peer.store(self.here, self.fresh())
        yield from self.writes()
        self.world.afterwards(self._expect_last)

    def writes_in_a_row(self) -> Steps:
        """Write two words to one place without waiting in between: the second is there when both are done."""
        first = self._submit(WrOpcode.RDMA_WRITE, self.here, WORD_BYTES)
        second = self._submit(WrOpcode.RDMA_WRITE, self.here + WORD_BYTES, WORD_BYTES)
        for operation in (first, second):
            yield from self.array.drive(operation)
            self._judge(operation)
        if first.error is None and second.error is None:
            self._last = yield from self.peer.load(self.here + WORD_BYTES, WORD_BYTES)
            self.world.afterwards(self._expect_last)

    def adds(self) -> Steps:
        """Add to a word of theirs, twice without waiting."""
        adding = [self._submit(WrOpcode.ATOMIC_FETCH_AND_ADD, self.buffer, WORD_BYTES, COUNTER, n) for n in (1, 2)]
        for operation in adding:
            yield from self.array.drive(operation)
            killed = self.theirs.n_killed or self.ours.n_killed
            if operation.error is None:
                self.n_added += operation.add
            elif (isinstance(operation.error, RegionGone) and killed) or not self._judge(operation):
                self.n_doubtful += operation.add

    def is_cut_off(self) -> Steps:
        """Have the network between the hosts fail, when a packet may be late in it, and mend."""
        self.theirs.n_late = 1
        yield Work("may be late")
        self.array.cut_off()

    # What theirs does

    def withdraws(self) -> Steps:
        """End the share: nothing reaches our memory by it when that has returned."""
        self.ended = True
        yield from self.theirs.server.withdraw(self.owner, _NAME)
        self.theirs.seen[self.owner].shut = "its share was withdrawn"

    def exits(self) -> Steps:
        """End the process; its server hears of that."""
        self.ended = True
        yield from self.owner.exit()
        yield Work("is noticed")
        self.theirs.server.owner_ended(self.owner)

    # Operations

    def _submit(self, opcode: WrOpcode, local: int, length: int, offset: int | None = None, add: int = 0) -> Operation:
        where = self.there - self.va if offset is None else offset
        return self.array.submit(opcode, local, length, where, add=add)

    def _carry_out(self, opcode: WrOpcode) -> Steps:
        """Do a transfer; returns whether it is done. Else there was a reason."""
        since = self.ours.oracle.clock, self.theirs.oracle.clock
        try:
            operation = self._submit(opcode, self.here, self.length)
        except NopinError as problem:
            self._must_have_ended(problem)
            return False
        yield from self.array.drive(operation)
        return self._judge(operation, since)

    def _judge(self, operation: Operation, since: tuple[int, int] = (0, 0)) -> bool:
        if operation.error is None:
            return True
        if not isinstance(operation.error, WorkError):
            self._must_have_ended(operation.error)
            return False
        was_over, self.over = self.over, True
        late = operation.error.status == WcStatus.RETRY_EXC_ERR and self.world.guide.jumps
        if was_over or late or self.ended:
            return False
        write = operation.opcode is WrOpcode.RDMA_WRITE
        at_home = operation.error.status == WcStatus.LOC_PROT_ERR
        oracle, process, va = (
            (self.ours.oracle, self.peer, operation.local)
            if at_home
            else (self.theirs.oracle, self.owner, self.va + operation.offset)
        )
        reason = Reason.NO_ACCESS
        oracle.refused("a NIC", process, va, operation.length, reason, write=write != at_home, since=since[not at_home])
        return False

    def _must_have_ended(self, error: NopinError) -> None:
        if not self.ended and not (self.over and isinstance(error, WorkError)):
            violate("transient_as_permanent", f"the share lives, and an operation failed: {error}")

    # Afterwards

    def _use_it(self) -> Steps:
        """The array goes on, or says that the share has ended; and so it is for who comes anew."""
        yield from self._carry_out(WrOpcode.RDMA_READ)
        other = self._new_array()
        try:
            yield from other.attach()
        except (PeerError, ServerGone) as problem:
            self._must_have_ended(problem)
        else:
            if self.ended:
                violate("stale_access", "the share has ended, and somebody attached to it")
        if self._both_share:
            yield from self._attach_to_ours()

    def _attach_to_ours(self) -> Steps:
        try:
            yield from self._new_array(_OURS).attach()
        except (PeerError, ServerGone) as problem:
            violate("transient_as_permanent", f"the share of ours lives, and nobody can attach to it: {problem}")

    def _expect_last(self) -> Steps:
        if self._last is not None:
            found = yield from self.owner.load(self.there, len(self._last))
            if found != self._last:
                violate("lost_write", f"{self._last.hex()} was written last and is done, and {found.hex()} is there")

    def expect_sum(self) -> None:
        """Have the word that is added to hold what was reported done, and of what nobody knows as much as may be."""
        self.world.afterwards(self._check_sum)

    def _check_sum(self) -> Steps:
        found = yield from self.owner.load(self.va + COUNTER, WORD_BYTES)
        total = int.from_bytes(found, "little")
        if total - self.n_added not in {n for n in range(4) if n & ~self.n_doubtful == 0}:
            violate("wrong_bytes", f"the sum is {total}: {self.n_added} done, of {self.n_doubtful} nobody knows")

    def _load_everything(self) -> Steps:
        for process, at in ((self.owner, self.there), (self.peer, self.here)):
            if process.alive:
                try:
                    yield from process.load(at, self.length)
                except ModelFault:
                    continue
