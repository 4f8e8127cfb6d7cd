"""The server's small parts: timers, spinning, the poller, the outbox, the fault workers."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from time import sleep

import pytest

from nopin.control.packets import receive_packet
from nopin.control.spin import SpinBudget
from nopin.errors import ServerRefused
from nopin.iommu.page_requests import PageRequest
from nopin.mm.space import FaultResult, Reason
from nopin.model.net.nothing import NothingMapped
from nopin.server.limits import Limits, Usage
from nopin.server.outbox import EVENTS_KEPT, Outbox
from nopin.server.poller import Poller
from nopin.server.timers import Timers
from nopin.server.workers import STUCK_NS, Workers


def test_timers_run_in_order_of_time_and_only_when_due() -> None:
    timers, ran = Timers(), list[str]()
    timers.at(30, lambda: ran.append("c"))
    timers.at(10, lambda: ran.append("a"))
    timers.at(20, lambda: ran.append("b"))
    assert timers.next_deadline() == 10
    timers.run(20)
    assert ran == ["a", "b"]
    assert timers.next_deadline() == 30


def test_a_cancelled_timer_neither_runs_nor_counts() -> None:
    timers, ran = Timers(), list[str]()
    timer = timers.at(10, lambda: ran.append("never"))
    timer.cancel()
    assert timers.next_deadline() is None
    timers.run(100)
    assert ran == []


def test_a_timer_may_cancel_another_that_is_due() -> None:
    timers, ran = Timers(), list[str]()
    second = timers.at(20, lambda: ran.append("second"))
    timers.at(10, second.cancel)
    timers.run(100)
    assert ran == []


def test_spinning_shrinks_while_sleeps_are_long_and_grows_back_when_they_are_short() -> None:
    spin = SpinBudget(50_000)
    for _ in range(20):
        spin.waited(10_000_000)
    assert spin.budget_ns == 0
    spin.waited(90_000)
    assert spin.budget_ns == 50_000, "a wait that full looking would nearly have covered counts as short"


def test_without_a_maximum_nothing_spins() -> None:
    spin = SpinBudget(0)
    spin.waited(0)
    assert spin.budget_ns == 0


def test_a_callback_is_not_called_for_a_descriptor_closed_in_the_same_round() -> None:
    poller = Poller()
    first, second = os.eventfd(1), os.eventfd(1)
    called: list[int] = []

    def closes(fd: int, other: int) -> None:
        """Close the other and let its number be used again for something that is not ready."""
        called.append(fd)
        poller.forget(other)
        os.close(other)
        again = os.eventfd(0)
        assert again == other
        poller.watch(again, lambda _mask: called.append(-1))

    poller.watch(first, lambda _mask: closes(first, second))
    poller.watch(second, lambda _mask: closes(second, first))
    assert poller.poll(0) == 2
    assert len(called) == 1
    assert -1 not in called
    poller.close()
    os.close(first)
    os.close(second)


def test_a_usage_takes_all_or_nothing() -> None:
    usage = Usage(Limits(cqs=2, ring_bytes=100))
    usage.take(cqs=1, ring_bytes=90)
    with pytest.raises(ServerRefused, match="ring_bytes"):
        usage.take(cqs=1, ring_bytes=20)
    usage.take(cqs=1, ring_bytes=10)
    usage.give(cqs=2, ring_bytes=100)
    assert set(usage.as_dict().values()) == {0}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def received(sock: socket.socket) -> list[bytes]:
    found = []
    while select.select([sock], [], [], 0)[0]:
        found.append(receive_packet(sock, 4).data)
    return found


def test_of_events_that_are_not_read_the_oldest_go(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    for n in range(EVENTS_KEPT + 10):
        outbox.event(b"%d" % n)
    assert outbox.n_dropped == 10
    while outbox.waiting:
        outbox.flush()
        assert all(int(data) >= 10 for data in received(theirs))


def test_replies_go_before_events_and_none_is_lost(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    outbox.event(b"event")
    for n in range(600):
        outbox.reply(b"%d" % n)
    got: list[bytes] = []
    while outbox.waiting:
        outbox.flush()
        got += received(theirs)
    assert got == [b"%d" % n for n in range(600)] + [b"event"]


def test_descriptors_of_unsent_replies_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    fd = os.eventfd(0)
    outbox = Outbox(ours)
    outbox.reply(b"x", [fd])
    outbox.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class GatedSpace(NothingMapped):
    """An address space whose pages come when the test says so."""

    def __init__(self, *, raises: bool = False) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self._raises = raises

    def fault(self, start: int, end: int, *, write: bool) -> FaultResult:
        self.entered.release()
        self.gate.wait(10)
        if self._raises:
            raise ProcessLookupError
        return FaultResult(end - start)

    def close(self) -> None:
        self.gate.set()


def request(pasid: int, page: int = 0) -> PageRequest:
    return PageRequest(pasid, page * 4096, (page + 1) * 4096, False)


def collect(workers: Workers, n: int) -> list[tuple[PageRequest, FaultResult]]:
    done: list[tuple[PageRequest, FaultResult]] = []
    while len(done) < n:
        assert select.select([workers.fd], [], [], 10)[0], "no result came"
        done += workers.collect()
    return done


class Time:
    """A clock that the test turns, and the timers that go by it."""

    def __init__(self) -> None:
        self.now = 0
        self.timers = Timers()

    def pass_by(self, duration_ns: int) -> None:
        self.now += duration_ns
        self.timers.run(self.now)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def workers(time: Time) -> Iterator[Workers]:
    made = Workers(4, time.timers, lambda: time.now)
    yield made
    made.close()


def test_an_address_space_that_hangs_does_not_stop_others(workers: Workers) -> None:
    stuck, quick = GatedSpace(), GatedSpace()
    quick.gate.set()
    for page in range(20):
        workers.submit(request(1, page), stuck)
    for page in range(20):
        workers.submit(request(2, page), quick)
    assert {done.pasid for done, _ in collect(workers, 20)} == {2}
    stuck.gate.set()
    assert len(collect(workers, 20)) == 20


def n_fault_threads() -> int:
    return sum(thread.name.startswith("nopin-fault") for thread in threading.enumerate())


def test_address_spaces_that_hang_together_do_not_stop_others(workers: Workers, time: Time) -> None:
    before = n_fault_threads()
    hung = [GatedSpace() for _ in range(3)]
    quick = GatedSpace()
    quick.gate.set()
    for pasid, space in enumerate(hung):
        for page in range(6):
            workers.submit(request(pasid, page), space)
    workers.submit(request(9), quick)
    time.pass_by(STUCK_NS - 1)
    assert workers.collect() == []
    time.pass_by(1)
    assert [done.pasid for done, _ in collect(workers, 1)] == [9]
    assert n_fault_threads() <= before + 3, "each space has its share of two, and no more"
    for space in hung:
        space.gate.set()
    assert len(collect(workers, 18)) == 18
    workers.submit(request(9), quick)
    collect(workers, 1)
    for _ in range(1000):
        if n_fault_threads() == before:
            break
        sleep(0.01)
    assert n_fault_threads() == before, "threads beyond the pool end when the written-off ones come back"


def test_threads_that_are_written_off_are_bounded(
    workers: Workers, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nopin.server.workers.REPLACED_MAX", 2)
    before = n_fault_threads()
    hung = [GatedSpace() for _ in range(8)]
    for pasid, space in enumerate(hung):
        workers.submit(request(pasid), space)
    for _ in range(5):
        time.pass_by(STUCK_NS)
    assert n_fault_threads() == before + 2
    hung[0].gate.set()
    assert len(collect(workers, 1)) == 1
    assert workers.collect() == []
    for space in hung:
        space.gate.set()
    assert len(collect(workers, 7)) == 7


def test_an_address_space_is_let_go_only_when_no_thread_is_inside(workers: Workers) -> None:
    space, idle = GatedSpace(), list[bool]()
    for page in range(5):
        workers.submit(request(1, page), space)
    assert space.entered.acquire(timeout=10)
    workers.when_idle(1, lambda: idle.append(True))
    assert idle == []
    space.gate.set()
    collect(workers, 1)
    while not idle:
        collect(workers, 1)
    assert idle == [True]


def test_an_idle_address_space_is_let_go_at_once(workers: Workers) -> None:
    idle: list[bool] = []
    workers.when_idle(9, lambda: idle.append(True))
    assert idle == [True]


def test_a_process_that_vanishes_during_a_fault_is_an_answer_too(workers: Workers) -> None:
    space = GatedSpace(raises=True)
    space.gate.set()
    workers.submit(request(1), space)
    ((_, result),) = collect(workers, 1)
    assert result.reason is Reason.OWNER_GONE
