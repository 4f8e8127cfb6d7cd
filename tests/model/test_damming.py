"""Requests posted while another waits for a page: they are late, never lost until a timer finds out."""

from __future__ import annotations

import pytest
from hosts import PAGE
from nics import two_ends

from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.model.device.faults import Resolve
from nopin.model.effects import Procedure, Work
from nopin.model.net.link import LinkLaw
from nopin.nic.abi import WcStatus, WrOpcode
from nopin.nic.timers import Timers
from nopin.units import MS_NS, US_NS

IB = LinkLaw(bits_per_s=56_000_000_000, latency_ns=600)


class SlowPath:
    """Faults take a time."""

    def __init__(self, cost_ns: int) -> None:
        self._cost_ns = cost_ns

    def serve(self, pages: PageRun, write: bool, resolve: Resolve) -> Procedure[FaultPages]:
        yield Work("service", self._cost_ns)
        return (yield from resolve(pages, write))


@pytest.mark.parametrize("bound_ns", [0, 20 * MS_NS], ids=["rnr", "parking"])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
@pytest.mark.parametrize("after_ns", [0, 100 * US_NS, 700 * US_NS, 1500 * US_NS])
def test_a_request_posted_during_a_wait_does_not_hang_until_the_ack_timeout(
    bound_ns: int, opcode: WrOpcode, after_ns: int
) -> None:
    two = two_ends(
        law=IB,
        connection={"timeout": 17, "min_rnr_timer": 12},
        timers=Timers(park_bound_ns=bound_ns),
        path=SlowPath(MS_NS),
    )
    for end, write in ((two.a, True), (two.a, False)):  # our own side is warm
        two.run(end.nic_host.prefetch(end.process, end.va, 8 * PAGE, write=write))
    began_ns = two.scheduler.now_ns
    two.a.send(opcode, 0, 100, two.b)
    two.scheduler.call_at(began_ns + after_ns, "second", lambda: two.a.send(opcode, PAGE, 100, two.b, PAGE))
    assert two.statuses() == ([WcStatus.SUCCESS] * 2, [])
    counters = two.a.nic_host.nic.counters
    assert counters.ack_timeout == 0
    assert bool(counters.rcvd_rnr_nak) == (bound_ns == 0)
    rounds = 2 if bound_ns else 4  # one fault after the other; each RNR wait is 0.64 ms and may be just too short
    assert two.scheduler.now_ns - began_ns < after_ns + rounds * MS_NS + 10 * US_NS


def test_parking_answers_as_soon_as_the_page_is_there_and_rnr_when_its_timer_says() -> None:
    taken = {}
    for bound_ns in (0, 20 * MS_NS):
        two = two_ends(
            law=IB,
            connection={"timeout": 17, "min_rnr_timer": 14},
            timers=Timers(park_bound_ns=bound_ns),
            path=SlowPath(200 * US_NS),
        )
        two.run(two.a.nic_host.prefetch(two.a.process, two.a.va, PAGE, write=False))
        began_ns = two.scheduler.now_ns
        two.a.send(WrOpcode.RDMA_WRITE, 0, 100, two.b)
        two.run(two.a.client.completions())
        taken[bound_ns] = two.scheduler.now_ns - began_ns
    assert 200 * US_NS < taken[20 * MS_NS] < 210 * US_NS
    assert 1280 * US_NS < taken[0] < 1290 * US_NS
