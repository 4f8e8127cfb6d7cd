"""The real NIC on a modelled host: its calls as steps of the scheduler, its memory a modelled process's.

Nothing about the protocol is decided here. A *turn* is what the live server's loop does: packets that arrived go in,
rings are looked at, timers that are due fire, who waited for pages and has them goes on, packets come out, and page
requests are set off, each a task of its own. A turn follows whenever there may be something to do: packets, a post,
an answered request, a timer, or room on the link.

The link takes packets at line rate, and what it was given cannot be taken back; so the NIC is asked for more only
when little is left of what it sent (`ahead_ns`), as hardware reads its queues.

How memory is reached is in `nic_memory.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nopin.iommu.windows import page_run
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.model.device.attachment import Attachment
from nopin.model.device.engine import QuiesceTime
from nopin.model.device.faults import FaultPath
from nopin.model.device.observer import DeviceObserver
from nopin.model.effects import Gate, Pause, Procedure, Work
from nopin.model.host.process import Process
from nopin.model.net.client import ALL_RIGHTS, Client, make_client, no_bell
from nopin.model.net.fates import Fates, all_pass
from nopin.model.net.network import Network
from nopin.model.net.nic_memory import NicMemory
from nopin.model.scheduler import Scheduler, Timer
from nopin.nic.abi import Access, Discipline, WcStatus
from nopin.nic.events import AsyncEvent
from nopin.nic.mr import Pd, Region
from nopin.nic.nic import Nic
from nopin.nic.plan import PACKETS_MAX
from nopin.nic.timers import NOMINAL, Timers
from nopin.nic.wire.batch import ROCE_PORT, Endpoint, PacketBatch
from nopin.nic.wire.gid import gid_of
from nopin.units import US_NS


class NicHost:
    """A NIC in a host; one protection domain for all its clients.

    Args:
        name: stable from run to run. address: its IPv4 address.
        draw: `draw(n)` returns a random integer in [0, n), for keys and numbers.
        timers, batch_packets: see `Nic`.
        ahead_ns: how much sending the link may have before it, when the NIC is asked for more.
        observer, path, quiesce, queue_limit: see `NicMemory`.
        pin_time: how long (ns) pinning and registering so many bytes takes, once they are there.
        fates: what befalls packets on their way to it.

    Attributes:
        memory: how it reaches processes.
        events: asynchronous events, in order.
        ended: it was killed: it takes no turn any more.
        before_receive: called with each batch before the NIC has it; returns what it is to have, one after the other.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        name: str,
        address: str,
        *,
        draw: Callable[[int], int],
        mtu: int = 4096,
        timers: Timers = NOMINAL,
        batch_packets: int = PACKETS_MAX,
        ahead_ns: int = 1 * US_NS,
        observer: DeviceObserver | None = None,
        path: FaultPath | None = None,
        quiesce: QuiesceTime | None = None,
        pin_time: Callable[[int], int] = lambda _length: 0,
        queue_limit: int = 4096,
        fates: Fates = all_pass,
    ) -> None:
        self.name = name
        self.memory = NicMemory(scheduler, name, observer=observer, path=path, quiesce=quiesce, queue_limit=queue_limit)
        self.iommu = self.memory.iommu
        endpoint = Endpoint(gid_of(address), ROCE_PORT)
        self.nic = Nic(
            iommu=self.iommu, endpoint=endpoint, mtu=mtu, draw=draw, timers=timers, batch_packets=batch_packets
        )
        self.pd: Pd = self.nic.alloc_pd()
        self.events: list[AsyncEvent] = []
        self.before_receive: Callable[[PacketBatch], list[PacketBatch]] | None = None
        self.ended = False
        self.scheduler = scheduler
        self._network = network
        self._port = network.attach(name, endpoint, self._arrived, fates)
        self._ahead_ns = ahead_ns
        self._pin_time = pin_time
        self._inbox: deque[PacketBatch] = deque()
        self._clients: list[HostClient] = []
        self._turn_timer: Timer | None = None
        self._turn_at_ns = 0
        self._n_answered = 0
        self._n_faults = 0

    # Memory

    def bind(self, process: Process) -> int:
        """Give a process a PASID, and mirror it. Twice is fine: the same.

        Raises:
            OwnerGone: it has exited.
        """
        return self.memory.mirror(process)

    def attachment(self, process: Process) -> Attachment:
        """Return what the NIC has of a process. Requires: it is mirrored."""
        return self.memory.attachment(process)

    def register(
        self,
        process: Process,
        va: int,
        length: int,
        *,
        access: Access = ALL_RIGHTS,
        discipline: Discipline = Discipline.ON_DEMAND,
        walk: bool = False,
    ) -> Region:
        """Register memory of a process, without pinning it.

        Args:
            walk: reach it through the process's own page table instead of a mirror.
        """
        pasid = self.memory.walk(process) if walk else self.memory.mirror(process)
        return self._register(pasid, va, length, access, discipline)

    def register_pinned(
        self, process: Process, va: int, length: int, *, access: Access = ALL_RIGHTS
    ) -> Procedure[Region]:
        """Pin memory of a process and register it.

        Raises:
            ModelFault: as `Process.pin`; nothing is registered then.
        """
        pin = yield from process.pin(va, length, write=True)
        yield Work("pin", self._pin_time(length))
        return self._register(self.memory.pin(pin), va, length, access, Discipline.PINNED)

    def deregister(self, region: Region) -> None:
        """Remove a region; what was pinned for it is let go of. Twice is fine."""
        self.nic.deregister(region)
        self.memory.unpin(region.pasid)

    def _register(self, pasid: int, va: int, length: int, access: Access, discipline: Discipline) -> Region:
        return self.nic.register(
            self.pd, pasid=pasid, address=va, length=length, iova=va, access=access, discipline=discipline
        )

    def prefetch(self, process: Process, va: int, length: int, *, write: bool) -> Procedure[FaultPages]:
        """Bring pages before the first packet needs them; returns how far that came."""
        self.bind(process)
        mirror, pages = self.attachment(process).mirror, PageRun(*page_run(va, length))
        came = yield from mirror.fill(pages, write=write)
        mirror.unhold(pages, came)
        return came

    def client(self, *, depth: int = 256) -> HostClient:
        """Make a queue pair; bring it to life with `client.connect`."""
        made = HostClient(self, make_client(self.nic, self.pd, depth=depth))
        self._clients.append(made)
        return made

    def drop(self, client: HostClient) -> None:
        """Destroy a queue pair. Twice is fine."""
        if client in self._clients:
            self._clients.remove(client)
            self.nic.destroy_qp(client.client.qp)

    def end(self) -> None:
        """End as its server does that is killed: it takes no turn any more, and has no address.

        What it has sent is on its way. Faults that it set off go on, as system calls of a dying process do.
        """
        self.ended = True
        self._inbox.clear()
        self._clients.clear()
        if self._turn_timer is not None:
            self._turn_timer.cancel()
        self._network.detach(self.nic.endpoint)

    # Turns

    def kick(self) -> None:
        """There may be something to do: have a turn now."""
        if not self.ended:
            self._turn_by(self.scheduler.now_ns)

    def _arrived(self, batch: PacketBatch) -> None:
        if not self.ended:
            self._inbox.append(batch)
            self.kick()

    def _turn_by(self, at_ns: int) -> None:
        """Have a turn at a time, or earlier."""
        if self._turn_timer is not None:
            if self._turn_at_ns <= at_ns:
                return
            self._turn_timer.cancel()
        self._turn_at_ns = at_ns
        self._turn_timer = self.scheduler.call_at(at_ns, f"{self.name} turn", self._turn)

    def _turn(self) -> None:
        self._turn_timer = None
        now, nic = self.scheduler.now_ns, self.nic
        self._receive(now)
        nic.poll_rings(now)
        if nic.is_due(now):
            nic.on_deadline(now)
        if self._n_answered:
            self._n_answered = 0
            nic.resume(self.iommu.take_wakeups(), now)
        if self._port.up.free_at_ns - now <= self._ahead_ns:
            for batch in nic.transmit(now):
                self._port.send(batch)
        self._set_off_faults()
        self.events += nic.take_events()
        assert not nic.take_corrupt(), "a client of the model wrote nonsense into its rings"
        nic.take_notices()
        for client in self._clients:
            client.notice()
        self._plan_turn(now)

    def _receive(self, now: int) -> None:
        for _ in range(len(self._inbox)):
            batch = self._inbox.popleft()
            if self.before_receive is None:
                self.nic.receive(batch, now)
                continue
            for part in self.before_receive(batch):
                self.nic.receive(part, now)

    def _set_off_faults(self) -> None:
        for procedure in self.memory.take_faults():
            self._n_faults += 1
            self.scheduler.spawn(f"{self.name} fault {self._n_faults}", procedure, done=self._answered)

    def _answered(self, _: None) -> None:
        self._n_answered += 1
        self.kick()

    def _plan_turn(self, now: int) -> None:
        if self.nic.busy:
            self._turn_by(max(now, self._port.up.free_at_ns - self._ahead_ns))
        deadline = self.nic.next_deadline()
        if deadline is not None:
            self._turn_by(max(now, deadline))


class HostClient:
    """A queue pair of a modelled host, as the programs there use it.

    Attributes:
        client: its rings, and the queue pair.
        post_send, post_recv: its own.
        completed: called when there are completions to be polled, for who waits for other things, too.
    """

    def __init__(self, host: NicHost, client: Client) -> None:
        self.host = host
        self.client = client
        self.post_send = client.post_send
        self.post_recv = client.post_receive
        client.ring = host.kick
        self.completed = no_bell
        self._gate: Gate | None = None

    def completions(self) -> Procedure[list[tuple[int, WcStatus]]]:
        """Wait for completions; returns at least one, as (wr_id, status)."""
        while not self.client.completions.ready:
            self._gate = Gate()
            yield Pause(self._gate)
        return self.client.poll()

    def notice(self) -> None:
        """Wake who waits for completions, if there are some."""
        if not self.client.completions.ready:
            return
        self.completed()
        if self._gate is not None:
            gate, self._gate = self._gate, None
            self.host.scheduler.open(gate)
