"""V1: what a NIC's page fault takes, and what an invalidation takes.

A process sends a message from memory that was never touched. The real NIC parks the work, the real page request goes
through the stages of the fault service, the real mirror is filled from the modelled process, and the work goes on.
The memory is registered short-term, because then all pages of a work request are asked for at once, as the measured
card does; on-demand, our NIC asks for what its next batch of packets needs.

The stages of one page and their slopes are the parameters themselves. What the model predicts is how they add up:
through one request, through a thousand requests of a page each, and where several senders fault at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.mm.causes import Cause
from nopin.model.costs import Costs
from nopin.model.device.service import FaultService
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.process import Process
from nopin.model.machine import Machine
from nopin.model.net.client import connect
from nopin.model.net.nic_host import HostClient
from nopin.nic.abi import Discipline, WcStatus, WrOpcode
from nopin.ranges import Range
from nopin.units import MS_NS, PAGE_BYTES, PAGE_SHIFT, US_NS

_STAGES = ("report", "driver", "table", "resume")
_PUBLISHED_US = {1: (129.1, 5.4, 6.8, 78.1, 219.3), 1024: (153.3, 105.7, 19.7, 77.2, 356.0)}
_PERCENTILES_US = {1: {50: 215, 95: 250, 99: 261}, 1024: {50: 352, 95: 431, 99: 440}}


@dataclass(frozen=True)
class Sending:
    """Cold messages to be sent; a point of the experiment.

    Attributes:
        n_pages: of each message. n_messages: sent by each sender, one after the other.
        tail: draw service times.
    """

    costs: Costs
    n_pages: int
    n_messages: int
    n_senders: int = 1
    tail: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Sent:
    """What came of it, in nanoseconds.

    Attributes:
        stage_ns: mean of each stage. service_ns: of each request.
        latency_ns: of each message, from post to completion.
    """

    stage_ns: dict[str, float]
    service_ns: list[int]
    latency_ns: list[int]


def send(sending: Sending) -> Sent:
    """Send cold messages from one host to another, whose receive buffer is warm."""
    machine = Machine(seed=sending.seed, preset=sending.costs, tail=sending.tail)
    length = sending.n_pages * PAGE_BYTES
    host, peer = machine.host("sender", memory_bytes=1 << 40), machine.host("receiver", memory_bytes=1 << 30)
    nic, peer_nic = machine.nic("nic"), machine.nic("peer nic")
    process, peer_process = host.spawn_process(), peer.spawn_process()
    target = machine.run(peer_process.mmap(sending.n_pages))
    region = peer_nic.register(peer_process, target, length)
    machine.run(peer_nic.prefetch(peer_process, target, length, write=True))
    latency_ns: list[int] = []

    def sender(client: HostClient, peer_client: HostClient) -> Procedure[None]:
        va = yield from process.mmap(sending.n_pages * sending.n_messages)
        whole = sending.n_messages * length
        local = nic.register(process, va, whole, discipline=Discipline.SHORT_TERM)
        for number in range(sending.n_messages):
            peer_client.post_recv([(target, length, region.lkey)])
            began_ns = machine.scheduler.now_ns
            client.post_send(WrOpcode.SEND, [(va + number * length, length, local.lkey)])
            for end in (client, peer_client):
                ((_, status),) = yield from end.completions()
                assert status is WcStatus.SUCCESS, status
            latency_ns.append(machine.scheduler.now_ns - began_ns)

    for number in range(sending.n_senders):
        client, peer_client = nic.client(), peer_nic.client()
        connect(client.client, peer_client.client, mtu=machine.mtu, retry_cnt=7, timeout=20)
        machine.scheduler.spawn(f"sender {number}", sender(client, peer_client))
    machine.scheduler.run()
    service: FaultService = machine.services["nic"]
    n = len(service.total_ns)
    assert len(latency_ns) == sending.n_senders * sending.n_messages
    return Sent({stage: service.stage_ns[stage] / n for stage in _STAGES}, service.total_ns, latency_ns)


def invalidate(costs: Costs) -> dict[str, int]:
    """Return how long (ns) invalidations of 1 and 1,024 mapped pages take, and one of a page never mapped."""
    machine = Machine(preset=costs)
    process = machine.host("host").spawn_process()
    device = machine.device("nic")
    va = machine.run(process.mmap(2048))
    machine.run(device.prefetch(process, va >> PAGE_SHIFT, 1025, write=False))

    def time(first: int, n: int) -> int:
        began_ns = machine.scheduler.now_ns
        machine.run(_bracket(process, Range(first, first + n)))
        return machine.scheduler.now_ns - began_ns

    first = va >> PAGE_SHIFT
    return {"1": time(first, 1), "1024": time(first + 1, 1024), "unmapped": time(first + 2000, 1)}


def _bracket(process: Process, pages: Range) -> Procedure[None]:
    bracket = process.begin([pages], Cause.MIGRATE)
    yield Quiesce(bracket.fences)
    bracket.end()


def _run(settings: Settings) -> list[Row]:
    costs, n = settings.costs, settings.integer("n_samples")
    points = [
        Sending(costs, 1, 1),
        Sending(costs, 1024, 1),
        Sending(replace(costs, pages_per_fault_request=1), 1024, 1),
        Sending(costs, 1, n, tail=True, seed=settings.seed),
        Sending(costs, 1024, max(1, n // 20), tail=True, seed=settings.seed),
        Sending(costs, 1, max(1, n // 16), n_senders=16, tail=True, seed=settings.seed),
    ]
    one, many, unbatched, one_drawn, many_drawn, crowd = settings.map(send, points)
    rows = _stage_rows(1, one) + _stage_rows(1024, many)
    ratio = sum(unbatched.service_ns) / many.service_ns[0]
    rows += [
        Row("4 MB, a page a request: message", "ms", unbatched.latency_ns[0] / MS_NS, 220, None, "P"),
        Row("4 MB, a page a request / batched", "", ratio, 625, 0.05, "P"),
    ]
    rows += _percentile_rows(1, one_drawn.service_ns) + _percentile_rows(1024, many_drawn.service_ns)
    rows += [Row(f"4 KB, 16 senders: p{at}", "us", percentile(crowd.latency_ns, at) / US_NS) for at in (50, 95, 99)]
    taken = invalidate(costs)
    return [
        *rows,
        Row("invalidate 1 page", "us", taken["1"] / US_NS, 16.9, 0.05, "P", calibrated=True),
        Row("invalidate 1,024 pages", "us", taken["1024"] / US_NS, 60.9, 0.05, "P", calibrated=True),
        Row("invalidate, never mapped", "us", taken["unmapped"] / US_NS, 2.7, 0.05, "P", calibrated=True),
    ]


def _stage_rows(n_pages: int, sent: Sent) -> list[Row]:
    size = "4 KB" if n_pages == 1 else "4 MB"
    *stages, total = _PUBLISHED_US[n_pages]
    rows = [
        Row(f"{size}: {stage}", "us", sent.stage_ns[stage] / US_NS, published, 0.10, "P", calibrated=True)
        for stage, published in zip(_STAGES, stages, strict=True)
    ]
    return [*rows, Row(f"{size}: service", "us", sent.service_ns[0] / US_NS, total, 0.05, "P")]


def _percentile_rows(n_pages: int, service_ns: Sequence[int]) -> list[Row]:
    size = "4 KB" if n_pages == 1 else "4 MB"
    return [
        Row(f"{size}: p{at}", "us", percentile(service_ns, at) / US_NS, published, 0.05, "P", calibrated=True)
        for at, published in _PERCENTILES_US[n_pages].items()
    ]


def percentile(values: Sequence[int], at: int) -> int:
    """Return the smallest value that at least `at` per cent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * at // 100) - 1)]


EXPERIMENT = Experiment(
    name="V1",
    title="NIC fault service and invalidation",
    machine="connectib56",
    source="Lesokhin et al., NPF, ASPLOS'17, Fig 3 and Table 4",
    run=_run,
    parameters={
        "n_samples": Parameter(2000, "", "X", "messages of 4 KB for percentiles; a twentieth of them of 4 MB"),
    },
    missing="The driver serves one request at a time; how many threads the measured one had is not published.",
)
