"""A machine room to build: hosts, their devices and NICs, one network, one virtual time.

    machine = Machine(seed=1, preset="connectib56")
    host = machine.host("server")
    process = host.spawn_process()
    va = machine.run(process.mmap(1024))
    gpu = machine.device("gpu")
    machine.run(gpu.write(process, va, b"bytes"))
    machine.now_us

What things cost comes from the preset; without one nothing costs anything, and only the order of events is left, which
is what exploration wants. Everything random is drawn from streams named after who draws.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

from nopin.model.costs import Costs
from nopin.model.device.dma import DmaDevice
from nopin.model.device.engine import QuiesceTime
from nopin.model.device.observer import DeviceObserver
from nopin.model.device.service import FaultService, invalidation_time
from nopin.model.host.costs import HostCosts
from nopin.model.host.host import Host
from nopin.model.host.observer import HostObserver
from nopin.model.net.fates import Fates, all_pass
from nopin.model.net.link import LinkLaw
from nopin.model.net.network import Network
from nopin.model.net.nic_host import NicHost
from nopin.model.presets import preset_named
from nopin.model.scheduler import Scheduler
from nopin.model.streams import Streams
from nopin.nic.plan import PACKETS_MAX
from nopin.nic.timers import NOMINAL, Timers
from nopin.nic.wire.opcodes import BTH_BYTES, ICRC_BYTES
from nopin.units import PAGE_SHIFT, US_NS

T = TypeVar("T")


class Machine:
    """See above.

    Args:
        seed: of everything drawn.
        preset: a machine of `model/presets.py`, costs of one's own, or None: nothing costs anything.
        mtu: path MTU of the network in bytes.
        tail: draw the service time of faults from its published tail, instead of taking the mean.
        link: in place of what the costs say.
        scheduler: one with a chooser or a trace, or one that others use, too.

    Attributes:
        costs: None without a preset.
        services: the fault service of each device, by the device's name, where faults cost something.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        preset: str | Costs | None = None,
        mtu: int = 4096,
        tail: bool = False,
        link: LinkLaw | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.costs = preset_named(preset).costs() if isinstance(preset, str) else preset
        self.mtu = mtu
        self.streams = Streams(seed)
        self.scheduler = scheduler or Scheduler()
        self.network = Network(self.scheduler, link or (LinkLaw() if self.costs is None else link_of(self.costs, mtu)))
        self.services: dict[str, FaultService] = {}
        self._tail = tail
        self._n_nics = 0

    @property
    def now_us(self) -> float:
        """Virtual time in microseconds."""
        return self.scheduler.now_ns / US_NS

    def host(
        self,
        name: str,
        *,
        memory_bytes: int = 1 << 30,
        costs: HostCosts | None = None,
        observer: HostObserver | None = None,
        pages_per_step: int = 1,
    ) -> Host:
        """Add a host; its memory costs nothing until it is touched."""
        n_frames = memory_bytes >> PAGE_SHIFT
        return Host(name, self.scheduler, n_frames, observer=observer, costs=costs, pages_per_step=pages_per_step)

    def device(self, name: str, *, slow: bool = False, observer: DeviceObserver | None = None) -> DmaDevice:
        """Add a device that reads and writes memory of processes."""
        path, quiesce = self._service(name), self._quiesce(name)
        return DmaDevice(name, self.scheduler, slow=slow, observer=observer, path=path, quiesce=quiesce)

    def nic(
        self,
        name: str,
        *,
        timers: Timers | None = None,
        batch_packets: int = PACKETS_MAX,
        observer: DeviceObserver | None = None,
        fates: Fates = all_pass,
    ) -> NicHost:
        """Add a NIC to the network, and to the hosts whose processes it is bound to.

        Args:
            timers: in place of what the costs say.
        """
        self._n_nics += 1
        return NicHost(
            self.scheduler,
            self.network,
            name,
            f"10.0.{self._n_nics >> 8}.{self._n_nics & 255}",
            draw=self.streams[f"{name} keys"].randrange,
            mtu=self.mtu,
            timers=timers or (NOMINAL if self.costs is None else timers_of(self.costs)),
            batch_packets=batch_packets,
            observer=observer,
            path=self._service(name),
            quiesce=self._quiesce(name),
            pin_time=(lambda _length: 0) if self.costs is None else self.costs.pin_range_ns,
            fates=fates,
        )

    def run(self, procedure: Generator[Any, Any, T]) -> T:
        """Run a procedure, and whatever else is under way, until it has ended; other things may be left.

        Raises:
            AssertionError: it waits for something that never comes.
        """
        task = self.scheduler.spawn("main", procedure)
        while not task.ended:
            assert self.scheduler.step(), f"nothing is left to do, and main waits for {task.waits_for}"
        result: T = task.result
        return result

    def _service(self, name: str) -> FaultService | None:
        if self.costs is None:
            return None
        random = self.streams[f"{name} faults"] if self._tail else None
        made = self.services[name] = FaultService(self.scheduler, self.costs, random=random)
        return made

    def _quiesce(self, name: str) -> QuiesceTime | None:
        return None if self.costs is None else invalidation_time(self.costs, self.streams[f"{name} quiesce"])


def link_of(costs: Costs, mtu: int) -> LinkLaw:
    """Return a link that carries payload at the line rate of a machine in packets of one MTU."""
    packet_bytes = mtu + BTH_BYTES + ICRC_BYTES
    return LinkLaw(bits_per_s=costs.line_rate_bits_per_s * packet_bytes // mtu, latency_ns=costs.send_32b_ns)


def timers_of(costs: Costs, *, park_bound_ns: int = NOMINAL.park_bound_ns) -> Timers:
    """Return the timer laws of a machine. The first timeout varies there; here it is the middle of what was seen."""
    first_permille = (costs.ack_first_min_permille + costs.ack_first_max_permille) / 2
    return Timers(
        rnr_wait_factor=costs.rnr_wait_permille / 1000,
        rnr_wait_min_ns=costs.rnr_floor_ns,
        ack_code_min=costs.ack_floor_exponent,
        ack_factor=costs.ack_interval_factor,
        ack_first_factor=first_permille / 1000,
        more_timeouts=costs.ack_timeouts_more - costs.ack_timeouts_less,
        park_bound_ns=park_bound_ns,
    )
