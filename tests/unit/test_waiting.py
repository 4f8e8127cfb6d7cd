"""Waiting for completions: who closes what somebody sleeps on waits until he has left."""

from __future__ import annotations

import os
import threading
import time

import numpy as np

from nopin.nic.abi import CQE_BYTES, ring_bytes
from nopin.nic.rings import CompletionConsumer
from nopin.testing.pair import no_fence
from nopin.verbs.waiting import Waiter, deadline_after

DEPTH = 8


class Quiet:
    """A control connection on which nothing ever happens."""

    gone = False
    path = "nowhere"

    def __init__(self) -> None:
        self._ends = os.pipe()

    def fileno(self) -> int:
        return self._ends[0]

    def close(self) -> None:
        for fd in self._ends:
            os.close(fd)


def test_closing_never_takes_the_wake_up_of_a_sleeper_away() -> None:
    """The word that wakes a sleeper goes with the descriptor it came by; seen as waits until the deadline."""
    quiet = Quiet()
    channel = os.pipe()
    ring = CompletionConsumer(np.zeros(ring_bytes(DEPTH, CQE_BYTES), np.uint8), DEPTH, no_fence)
    for n in range(300):
        waiter = Waiter(ring, channel[0], quiet, spin_us=0)  # type: ignore[arg-type]  # only these three are used
        over = threading.Event()
        outcome: list[bool] = []

        def sleep(waiter: Waiter = waiter, over: threading.Event = over, outcome: list[bool] = outcome) -> None:
            outcome.append(waiter.wait(deadline_after(30), until=over.is_set))

        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        time.sleep(n % 3 * 0.0005)
        over.set()
        waiter.wake()
        waiter.close()
        sleeper.join(timeout=10)
        assert not sleeper.is_alive(), "it slept on"
        assert outcome == [True]
    quiet.close()
    for fd in channel:
        os.close(fd)


def test_a_wait_ends_at_its_deadline() -> None:
    quiet = Quiet()
    channel = os.pipe()
    ring = CompletionConsumer(np.zeros(ring_bytes(DEPTH, CQE_BYTES), np.uint8), DEPTH, no_fence)
    waiter = Waiter(ring, channel[0], quiet)  # type: ignore[arg-type]  # as above
    assert waiter.wait(deadline_after(0.01), until=lambda: False) is False
    waiter.close()
    quiet.close()
    for fd in channel:
        os.close(fd)
