"""Servers of one kind that modelled work queues for, beside the lanes and locks of `model/effects.py`."""

from __future__ import annotations

from collections import deque

from nopin.model.effects import Gate, Open, Pause, Procedure, Work


class Pool:
    """Some servers (CPUs, slots of a medium's queue, workers, contexts of a device), first come first served.

    Args:
        n: how many there are.
    """

    def __init__(self, n: int) -> None:
        assert n > 0
        self._n_free = n
        self._queue: deque[Gate] = deque()

    @property
    def n_waiting(self) -> int:
        """How many wait for one."""
        return len(self._queue)

    def take(self) -> Procedure[None]:
        """Wait for a server and have it."""
        if self._n_free:
            self._n_free -= 1
            return
        gate = Gate()
        self._queue.append(gate)
        yield Pause(gate)

    def give(self) -> Procedure[None]:
        """Give it back: who waits longest has it next."""
        if self._queue:
            yield Open(self._queue.popleft())
        else:
            self._n_free += 1

    def serve(self, what: str, cost_ns: int) -> Procedure[None]:
        """Have a server for a time."""
        yield from self.take()
        yield Work(what, cost_ns)
        yield from self.give()
