"""The scheduler: order, time, lanes, locks, choices, and the same trace everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Sequence
from random import Random
from typing import Any

import pytest

from nopin.mm.effects import Backoff, Gate, Open, Pause, Quiesce
from nopin.mm.subscriber import Fence
from nopin.model.choice import Drawn
from nopin.model.effects import Acquire, Lane, Lock, Release, Work
from nopin.model.scheduler import LATER, Performed, Scheduler, Task, _Later
from nopin.model.streams import Streams
from nopin.model.trace import Trace

Steps = Generator[Any, Any, Any]


class Last:
    """A chooser that takes the last option."""

    def __init__(self, *, jumps: bool = False) -> None:
        self.jumps = jumps
        self.asked: list[list[str]] = []

    def choose(self, site: str, options: Sequence[str]) -> int:
        assert site == "next"
        self.asked.append(list(options))
        return len(options) - 1


def worker(log: list[str], name: str, *costs: int) -> Steps:
    for at, cost in enumerate(costs):
        log.append(f"{name}{at}")
        yield Work(name, cost)
    log.append(f"{name}!")


def test_steps_go_by_time_and_then_by_insertion() -> None:
    scheduler, log = Scheduler(), list[str]()
    scheduler.spawn("a", worker(log, "a", 10, 10))
    scheduler.spawn("b", worker(log, "b", 10, 5))
    assert scheduler.run()
    assert log == ["a0", "b0", "a1", "b1", "b!", "a!"]
    assert scheduler.now_ns == 20


def test_a_chooser_decides_among_all_that_is_due() -> None:
    chooser, log = Last(), list[str]()
    scheduler = Scheduler(chooser)
    scheduler.spawn("a", worker(log, "a", 0))
    scheduler.spawn("b", worker(log, "b", 0))
    assert scheduler.run()
    assert log == ["b0", "b!", "a0", "a!"]
    assert chooser.asked == [["a", "b"], ["a", "b"]]


@pytest.mark.parametrize("jumps", [False, True])
def test_a_timer_overtakes_what_is_ready_only_if_the_chooser_jumps(jumps: bool) -> None:
    log: list[str] = []
    scheduler = Scheduler(Last(jumps=jumps))
    scheduler.spawn("a", worker(log, "a", 0))
    scheduler.call_at(100, "timer", lambda: log.append("timer"))
    assert scheduler.run()
    assert log == (["timer", "a0", "a!"] if jumps else ["a0", "a!", "timer"])


def test_tasks_of_a_lane_go_on_one_at_a_time_and_wait_for_each_other() -> None:
    scheduler, lane, log = Scheduler(), Lane("loop"), list[str]()
    scheduler.spawn("a", worker(log, "a", 10, 10), lane=lane)
    scheduler.spawn("b", worker(log, "b", 10), lane=lane)
    assert scheduler.run()
    assert log == ["a0", "a1", "a!", "b0", "b!"]
    assert scheduler.now_ns == 30


@pytest.mark.parametrize("chooser", [None, Last(), Drawn(Random(1))])
def test_what_waits_gives_its_lane_up(chooser: Any) -> None:
    scheduler, lane, log = Scheduler(chooser), Lane("loop"), list[str]()

    def waits() -> Steps:
        yield Backoff(100)
        log.append("waited")

    scheduler.spawn("a", waits(), lane=lane)
    scheduler.spawn("b", worker(log, "b", 10), lane=lane)
    assert scheduler.run()
    assert log == ["b0", "b!", "waited"]


def test_gates_and_fences_wake_who_waits() -> None:
    scheduler, gate, fence, log = Scheduler(), Gate(), Fence(), list[str]()

    def waits() -> Steps:
        yield Pause(gate)
        yield Quiesce([fence])
        log.append(f"after {scheduler.now_ns}")
        yield Pause(gate)
        yield Quiesce([fence])

    def opens() -> Steps:
        yield Work("thinks", 7)
        yield Open(gate)
        yield Work("thinks", 5)
        fence.signal()

    task = scheduler.spawn("waits", waits())
    scheduler.spawn("opens", opens())
    assert scheduler.run()
    assert task.ended
    assert log == ["after 12"]


def test_a_lock_is_held_alone_or_shared_in_order_of_arrival() -> None:
    scheduler, lock, log = Scheduler(), Lock("mm"), list[str]()

    def holds(name: str, *, shared: bool) -> Steps:
        yield Acquire(lock, shared)
        log.append(f"{name} {scheduler.now_ns}")
        yield Work("holds", 10)
        yield Release(lock)

    for name, shared in (("r1", True), ("r2", True), ("w", False), ("r3", True)):
        scheduler.spawn(name, holds(name, shared=shared))
    assert scheduler.run()
    assert log == ["r1 0", "r2 0", "w 10", "r3 20"]


class Medium:
    """A port that answers later."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Task]] = []

    def perform(self, effect: Any, task: Task) -> Performed | _Later:
        if effect == "now":
            return Performed("done", 3)
        self.asked.append((effect, task))
        return LATER


def test_a_port_answers_now_with_a_cost_or_later() -> None:
    scheduler, medium = Scheduler(), Medium()

    def reads() -> Steps:
        first = yield "now"
        second = yield "read"
        return first, second, scheduler.now_ns

    task = scheduler.spawn("reads", reads(), port=medium)
    assert scheduler.run()
    assert not task.ended
    scheduler.resume(medium.asked[0][1], "bytes", delay_ns=40)
    assert scheduler.run()
    assert task.result == ("done", "bytes", 43)


def test_dropped_tasks_and_cancelled_timers_never_go_on() -> None:
    scheduler, lane, log = Scheduler(), Lane("loop"), list[str]()
    first = scheduler.spawn("a", worker(log, "a", 10, 10), lane=lane)
    scheduler.spawn("b", worker(log, "b"), lane=lane)
    scheduler.call_at(5, "kill", lambda: scheduler.drop(first))
    scheduler.call_at(6, "never", lambda: log.append("never")).cancel()
    assert scheduler.run()
    assert log == ["a0", "b!"]


def test_a_run_can_be_cut_and_gone_on_with() -> None:
    scheduler, log = Scheduler(), list[str]()
    scheduler.spawn("a", worker(log, "a", 10, 10, 10))
    assert not scheduler.run(until_ns=15)
    assert log == ["a0", "a1"]
    assert scheduler.now_ns == 15
    assert not scheduler.run(max_steps=1)
    assert scheduler.run()
    assert log[-1] == "a!"


def storm(seed: int) -> str:
    trace = Trace()
    scheduler = Scheduler(Drawn(Streams(seed)["order"], jumps=True), trace)
    gates, lock, lane = [Gate() for _ in range(5)], Lock("lock"), Lane("lane")

    def runs(at: int) -> Steps:
        random = Streams(seed)[f"task {at}"]
        for _ in range(50):
            yield Work("works", random.randrange(5))
            yield Acquire(lock, bool(random.randrange(2)))
            yield Work("holds")
            yield Release(lock)
            yield Backoff(random.randrange(9))
            yield Open(gates[random.randrange(5)])
            yield Pause(gates[0]) if gates[0].is_open else Work("not yet")

    for at in range(8):
        scheduler.spawn(f"t{at}", runs(at), lane=lane if at % 2 else None)
    assert scheduler.run()
    return trace.digest()


def test_a_seed_gives_one_trace_in_every_process() -> None:
    script = "from tests.model.test_scheduler import storm; print(storm(3))"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "1", "77")
    }
    assert digests == {storm(3)}
    assert storm(4) != storm(3)


def test_streams_do_not_disturb_each_other() -> None:
    one, two = Streams(1), Streams(1)
    one["other"].random()
    assert one["mine"].random() == two["mine"].random()
    assert Streams(2)["mine"].random() != two["mine"].random()
