"""When the loop leaves a CPU to who posts work, and how."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from nopin.linux.cpus import RunQueue, current_cpu, move_over, n_cpus
from nopin.server.elbow_room import LONG_YIELD_NS, PAUSE_NS, ElbowRoom


def room(n_runnable: int, n_cpus: int = 2) -> ElbowRoom:
    return ElbowRoom(n_cpus, lambda: n_runnable)


def test_a_long_yield_while_another_cpu_idles_is_a_reason_to_move() -> None:
    assert room(2).yielded(0, LONG_YIELD_NS)


def test_a_short_yield_says_that_nobody_else_is_here() -> None:
    assert not room(2).yielded(0, LONG_YIELD_NS - 1)


@pytest.mark.parametrize("n_runnable", [1, 3])
def test_there_is_no_going_where_all_cpus_are_taken_and_no_reason_where_nobody_else_runs(n_runnable: int) -> None:
    assert not room(n_runnable).yielded(0, LONG_YIELD_NS)


def test_after_a_decision_there_is_none_for_a_while() -> None:
    asked: list[int] = []

    def n_runnable() -> int:
        asked.append(1)
        return 3

    crowd = ElbowRoom(2, n_runnable)
    assert not crowd.yielded(0, LONG_YIELD_NS)
    assert not crowd.yielded(LONG_YIELD_NS, LONG_YIELD_NS + PAUSE_NS - 1)
    assert len(asked) == 1
    crowd.yielded(PAUSE_NS, LONG_YIELD_NS + PAUSE_NS)
    assert len(asked) == 2


def in_a_thread(work: Callable[[], None]) -> None:
    """Affinity is of a thread: what is tried here leaves the test's own alone."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


@pytest.mark.skipif(n_cpus() < 2, reason="needs two CPUs")
def test_moving_over_leads_to_another_cpu_and_forbids_none() -> None:
    def work() -> None:
        allowed = os.sched_getaffinity(0)
        here = min(allowed)
        os.sched_setaffinity(0, {here})
        assert current_cpu() == here
        assert not move_over()
        assert os.sched_getaffinity(0) == {here}
        os.sched_setaffinity(0, allowed)
        assert move_over()
        assert os.sched_getaffinity(0) == allowed

    in_a_thread(work)


def test_who_counts_what_is_runnable_is_among_it() -> None:
    queue = RunQueue()
    try:
        assert queue.n_runnable() >= 1
    finally:
        queue.close()
