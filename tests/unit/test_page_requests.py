"""Page requests: merging, the bound, wake-ups, patience and forgetting."""

from __future__ import annotations

import pytest

from nopin.iommu.page_requests import PARKS_MAX, Meter, PageRequests
from nopin.ranges import Range

A, B, C = Range(0x1000, 0x2000), Range(0x5000, 0x7000), Range(0x6000, 0x9000)


def park(requests: PageRequests, waiter: str, *ranges: Range, pasid: int = 1, write: bool = False) -> Meter:
    meter = Meter()
    requests.park(waiter, pasid, ranges, meter, write=write)
    return meter


def taken(requests: PageRequests) -> list[tuple[int, int, bool]]:
    return [(request.start, request.end, request.write) for request in requests.take()]


def test_identical_faults_make_one_request_and_wake_everybody_in_order() -> None:
    requests = PageRequests(16)
    for waiter in ("first", "second", "third"):
        park(requests, waiter, A)
    (request,) = requests.take()
    assert requests.take() == []
    requests.answer(request)
    assert requests.take_wakeups() == ["first", "second", "third"]
    assert requests.take_wakeups() == []


def test_a_request_nobody_took_yet_is_widened() -> None:
    requests = PageRequests(16)
    park(requests, "reader", B)
    park(requests, "writer", C, write=True)
    assert taken(requests) == [(0x5000, 0x9000, True)]


def test_a_request_in_service_is_not_widened_but_joined_when_it_covers() -> None:
    requests = PageRequests(16)
    park(requests, "first", C)
    requests.take()
    park(requests, "inside", Range(0x7000, 0x8000))
    park(requests, "beyond", B)
    assert taken(requests) == [(0x5000, 0x7000, False)]


def test_a_write_does_not_join_a_read_in_service() -> None:
    requests = PageRequests(16)
    park(requests, "reader", A)
    requests.take()
    park(requests, "writer", A, write=True)
    assert taken(requests) == [(0x1000, 0x2000, True)]


def test_the_same_addresses_in_two_processes_are_two_requests() -> None:
    requests = PageRequests(16)
    park(requests, "one", A, pasid=1)
    park(requests, "two", A, pasid=2)
    assert len(requests.take()) == 2


def test_a_waiter_of_several_ranges_wakes_after_the_last() -> None:
    requests = PageRequests(16)
    meter = park(requests, "list", A, B)
    first, second = requests.take()
    requests.answer(second)
    assert requests.take_wakeups() == []
    requests.answer(first)
    assert requests.take_wakeups() == ["list"]
    assert meter.page_faults_handled == 2


def test_what_does_not_fit_becomes_a_request_when_there_is_room() -> None:
    requests = PageRequests(2)
    where = [Range(n * 0x10000, n * 0x10000 + 0x1000) for n in range(50)]
    for n, piece in enumerate(where):
        park(requests, f"waiter {n}", piece)
    assert (len(requests), requests.n_backlogged) == (2, 48)
    woken: list[object] = []
    served: list[int] = []
    for _ in where:
        for request in requests.take():
            served.append(request.start)
            requests.answer(request)
            assert len(requests) <= 2
        woken += requests.take_wakeups()
    assert served == [piece.start for piece in where]
    assert woken == [f"waiter {n}" for n in range(50)]
    assert (len(requests), requests.n_backlogged) == (0, 0)


def test_a_waiter_is_let_through_after_parking_often_enough_and_then_begins_anew() -> None:
    requests = PageRequests(16)
    for _ in range(PARKS_MAX):
        assert not requests.lets_through("waiter")
        park(requests, "waiter", A)
        assert not requests.was_resumed("another")
        for request in requests.take():
            requests.answer(request)
        assert requests.was_resumed("waiter")
        requests.take_wakeups()
    assert requests.lets_through("waiter")
    requests.settle("waiter")
    assert not requests.was_resumed("waiter")
    assert not requests.lets_through("waiter")


@pytest.mark.parametrize("moment", ["queued", "in service", "backlogged", "woken"])
def test_a_forgotten_waiter_is_never_woken(moment: str) -> None:
    requests = PageRequests(1)
    if moment == "backlogged":
        park(requests, "other", B)
    park(requests, "gone", A)
    in_service = requests.take() if moment != "queued" else []
    if moment == "woken":
        requests.answer(in_service.pop())
    requests.forget("gone")
    for request in [*in_service, *requests.take()]:
        requests.answer(request)
    assert "gone" not in requests.take_wakeups()
    assert not requests.was_resumed("gone")
    assert (len(requests), requests.n_backlogged) == (0, 0)


def test_a_dropped_space_wakes_its_waiters_and_ignores_late_answers() -> None:
    requests = PageRequests(2)
    park(requests, "served", A, pasid=1)
    (in_service,) = requests.take()
    park(requests, "queued", B, pasid=1)
    park(requests, "backlogged", Range(0x20000, 0x21000), pasid=1)
    park(requests, "other space", A, pasid=2)
    requests.drop_space(1)
    assert requests.take_wakeups() == ["served", "queued", "backlogged"]
    requests.answer(in_service)
    assert requests.take_wakeups() == []
    assert [request.pasid for request in requests.take()] == [2]


def test_parking_again_while_parked_waits_once() -> None:
    requests = PageRequests(16)
    park(requests, "waiter", A)
    park(requests, "waiter", A)
    (request,) = requests.take()
    requests.answer(request)
    assert requests.take_wakeups() == ["waiter"]
