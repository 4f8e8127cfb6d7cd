"""Two modelled hosts with a NIC each, and a process on each with memory registered for all."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from hosts import PAGE

from nopin.model.choice import Chooser
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.net.client import connect
from nopin.model.net.link import LinkLaw
from nopin.model.net.network import Network
from nopin.model.net.nic_host import HostClient, NicHost
from nopin.model.scheduler import Scheduler
from nopin.model.trace import Trace
from nopin.nic.abi import Discipline, WcStatus, WrOpcode
from nopin.nic.mr import Region


@dataclass
class End:
    """One host: its process has `n_pages` mapped at `va`, all of them registered."""

    host: Host
    process: Process
    nic_host: NicHost
    client: HostClient
    region: Region
    va: int

    def send(self, opcode: WrOpcode, at: int, length: int, to: End | None = None, there: int = 0) -> None:
        """Post one send of bytes at `at` from the start of our memory; `there` counts from the start of theirs."""
        remote = (to.va + there, to.region.rkey) if to is not None else (0, 0)
        sges = [(self.va + at, length, self.region.lkey)]
        self.client.post_send(opcode, sges, remote=remote[0], rkey=remote[1])

    def recv(self, at: int, length: int) -> None:
        """Post one receive."""
        self.client.post_recv([(self.va + at, length, self.region.lkey)])


@dataclass
class Two:
    """Two ends, connected."""

    scheduler: Scheduler
    a: End
    b: End

    def run(self, procedure: Any) -> Any:
        """Run a procedure, and all that follows, to the end."""
        task = self.scheduler.spawn("main", procedure)
        assert self.scheduler.run(max_steps=1_000_000)
        assert task.ended, f"it waits for {task.waits_for}"
        return task.result

    def statuses(self) -> tuple[list[WcStatus], list[WcStatus]]:
        """Run to the end; return the completions of both sides."""
        assert self.scheduler.run(max_steps=1_000_000)
        a, b = ([status for _, status in end.client.client.poll()] for end in (self.a, self.b))
        return a, b


def two_ends(
    *,
    n_pages: int = 8,
    law: LinkLaw | None = None,
    chooser: Chooser | None = None,
    trace: Trace | None = None,
    discipline: Discipline = Discipline.ON_DEMAND,
    walk: bool = False,
    connection: dict[str, Any] | None = None,
    **settings: Any,
) -> Two:
    """Build both; settings go to each `NicHost`."""
    scheduler = Scheduler(chooser, trace)
    network = Network(scheduler, law)
    ends: list[End] = []
    for number in (1, 2):
        host = Host(f"host {number}", scheduler, 4 * n_pages + 8)
        process = host.spawn_process()
        mapping = scheduler.spawn("map", process.mmap(n_pages))
        assert scheduler.run()
        draw = Random(number).randrange
        nic_host = NicHost(scheduler, network, f"nic {number}", f"10.0.0.{number}", draw=draw, **settings)
        if discipline is Discipline.PINNED:
            pinning = scheduler.spawn("pin", nic_host.register_pinned(process, mapping.result, n_pages * PAGE))
            assert scheduler.run()
            region = pinning.result
        else:
            region = nic_host.register(process, mapping.result, n_pages * PAGE, discipline=discipline, walk=walk)
        ends.append(End(host, process, nic_host, nic_host.client(), region, mapping.result))
    a, b = ends
    connect(a.client.client, b.client.client, now=scheduler.now_ns, **(connection or {}))
    return Two(scheduler, a, b)
