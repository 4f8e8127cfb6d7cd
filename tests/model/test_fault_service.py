"""The stages of a device fault, what they queue on, and what invalidations take."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hosts import PAGE, host_of, run

from nopin.mm.causes import Cause
from nopin.mm.space import Reason
from nopin.model.costs import Costs
from nopin.model.device.dma import DmaDevice
from nopin.model.device.service import (
    FaultService,
    invalidation_time,
    mean_of,
    quantile,
    tail_of,
)
from nopin.model.host.host import Host
from nopin.units import MS_NS

COSTS = Costs()


def test_a_fault_takes_its_stages_one_after_the_other() -> None:
    host = host_of()
    service = FaultService(host.scheduler, COSTS)
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    device = DmaDevice("dma", host.scheduler, path=service)
    assert run(host, device.read(process, va, 3 * PAGE)) == bytes(3 * PAGE)
    assert host.scheduler.now_ns == COSTS.fault_service_ns(3) == service.total_ns[0]
    assert service.stage_ns == {
        "report": COSTS.fault_report_ns(3),
        "driver": COSTS.fault_driver_ns(3),
        "table": COSTS.fault_table_ns(3),
        "resume": COSTS.nic_resume_ns,
    }


def test_pages_reported_one_by_one_take_that_many_faults() -> None:
    host = host_of()
    service = FaultService(host.scheduler, replace(COSTS, pages_per_fault_request=1))
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    device = DmaDevice("dma", host.scheduler, path=service)
    run(host, device.read(process, va, 3 * PAGE))
    assert host.scheduler.now_ns == 3 * COSTS.fault_service_ns(1)
    assert device.attachment(process).faults.n_faults == 1, "the mirror asked once"


def test_a_bad_page_ends_a_fault_that_is_reported_page_by_page() -> None:
    host = host_of()
    service = FaultService(host.scheduler, replace(COSTS, pages_per_fault_request=1))
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    run(host, process.munmap(va + PAGE, PAGE))
    device = DmaDevice("dma", host.scheduler, path=service)
    came = run(host, device.prefetch(process, va >> 12, 4, write=False))
    assert came == (1, Reason.NO_ACCESS)
    assert len(service.total_ns) == 2


def faults_at_once(n: int, *, write: bool, service_of: Host, costs: Costs) -> list[int]:
    """Have n processes fault at once on one device; returns when each is done."""
    host = service_of
    device = DmaDevice("dma", host.scheduler, path=FaultService(host.scheduler, costs))
    done: list[int] = []
    processes = [host.spawn_process() for _ in range(n)]
    places = [(process, run(host, process.mmap(1))) for process in processes]
    for number, (process, va) in enumerate(places):
        access = device.write(process, va, b"x") if write else device.read(process, va, 1)
        host.scheduler.spawn(f"access {number}", access, done=lambda _: done.append(host.scheduler.now_ns))
    assert host.scheduler.run()
    return done


def test_more_faults_than_contexts_wait_for_each_other() -> None:
    costs = replace(COSTS, driver_fault_ns=0)
    done = faults_at_once(9, write=True, service_of=host_of(), costs=costs)
    one = costs.fault_service_ns(1)
    assert done == [one] * 4 + [2 * one] * 4 + [3 * one]


def test_the_driver_serves_one_request_at_a_time() -> None:
    costs = replace(COSTS, driver_fault_ns=1 * MS_NS, outstanding_faults=8)
    done = faults_at_once(3, write=True, service_of=host_of(), costs=costs)
    assert [after - before for before, after in pairwise(done)] == [MS_NS, MS_NS]


def test_reads_and_writes_have_contexts_of_their_own() -> None:
    host = host_of()
    costs = replace(COSTS, driver_fault_ns=0, outstanding_faults=1)
    device = DmaDevice("dma", host.scheduler, path=FaultService(host.scheduler, costs))
    process = host.spawn_process()
    va = run(host, process.mmap(2))
    host.scheduler.spawn("reads", device.read(process, va, 1))
    host.scheduler.spawn("writes", device.write(process, va + PAGE, b"x"))
    assert host.scheduler.run()
    assert host.scheduler.now_ns == costs.fault_service_ns(1)


@pytest.mark.parametrize(("n_pages", "published"), [(1, (215, 250, 261, 464)), (1024, (352, 431, 440, 687))])
def test_the_tail_has_the_published_quantiles_and_keeps_the_mean(n_pages: int, published: tuple[int, ...]) -> None:
    tail = tail_of(COSTS, n_pages)
    median_us = COSTS.fault_service_ns(n_pages) / mean_of(tail) / 1000
    for at, value in zip((0.5, 0.95, 0.99, 1.0), published, strict=True):
        assert median_us * quantile(tail, at) == pytest.approx(value, rel=0.02)


def test_draws_from_the_tail_have_its_mean() -> None:
    service = FaultService(host_of().scheduler, COSTS, random=Random(1))
    draws = [service._draw(1) for _ in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(1, abs=0.002)
    assert quantile(tail_of(COSTS, 1), 0) / mean_of(tail_of(COSTS, 1)) <= min(draws)


def test_an_invalidation_takes_its_checks_or_all_its_parts() -> None:
    time = invalidation_time(COSTS, Random(1))
    assert time(0, Cause.UNMAP) == 2_700
    assert time(1, Cause.UNMAP) == 16_800
    assert time(1024, Cause.RECLAIM) == 16_800 + 1023 * 43


def test_a_device_slow_to_quiesce_draws_its_time() -> None:
    costs = replace(COSTS, device_quiesce_min_ns=10 * MS_NS, device_quiesce_max_ns=50 * MS_NS)
    time = invalidation_time(costs, Random(1))
    times = [time(1, Cause.UNMAP) - 16_800 for _ in range(400)]
    assert 10 * MS_NS <= min(times) < 11 * MS_NS
    assert 49 * MS_NS < max(times) <= 50 * MS_NS
    assert time(0, Cause.UNMAP) == 2_700, "nothing of it is there to be drained"
