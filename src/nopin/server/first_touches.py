"""First touches answered in a row: the hottest code of a program that fills memory.

Other faults are answered one by one, by procedures; first touches by numbers and one system call each (see
`mm/first_touch.py`), as long as nothing else comes. A toucher on the server's CPU mostly gets it in the system call
that wakes it, and has faulted again when that returns. So what it says next is read at once, and only if that is
nothing the CPU is offered: two system calls a fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from nopin.linux.paging_uffd import FAULT_WRITE, Message
from nopin.linux.uffd_handshake import EventKind
from nopin.server.arena_machine import ArenaMachine
from nopin.server.arena_pager import ArenaPager, FirstTouch
from nopin.server.mapper import Mapper
from nopin.units import PAGE_BYTES, PAGE_SHIFT

_PAGEFAULT = EventKind.PAGEFAULT


class FirstTouches:
    """Answers the first touches of one arena's mappers.

    Args:
        latency: where the nanoseconds of each are counted, as `FaultTimes.counts`.
        noted: tells whether some mapper has to be attended to, which ends a burst.
    """

    def __init__(
        self,
        pager: ArenaPager,
        machine: ArenaMachine,
        clock: Callable[[], int],
        latency: list[list[int]],
        noted: Callable[[], bool],
    ) -> None:
        self._noted = noted
        self._pager = pager
        self._machine = machine
        self._clock = clock
        self._latency = latency

    def answer(
        self, mapper: Mapper, messages: list[Message], began_ns: int, n_most: int
    ) -> tuple[int, int, list[Message]]:
        """Answer up to `n_most`, the first of them the one message read at `began_ns`, until something else comes.

        Returns:
            How many, and the messages that are left, with the time of reading before them: none if no more is to be
            read now. Several that were read together are left: some of them may be what must be dealt with first.
        """
        if len(messages) != 1:
            return 0, began_ns, messages
        touch = self._pager.first_touch
        touch.open(mapper.number, n_most)
        try:
            return self._answer(mapper, messages[0], began_ns, n_most, touch)
        finally:
            touch.close()

    def _answer(
        self, mapper: Mapper, message: Message | None, began_ns: int, n_most: int, touch: FirstTouch
    ) -> tuple[int, int, list[Message]]:
        read, zero, begin = self._reader(mapper), mapper.uffd.zero, touch.begin
        clock, latency, low, high, bias = self._clock, self._latency, mapper.low, mapper.high, mapper.bias
        n_left = n_most
        while message is not None:
            kind, flags, address, _ = message
            page = (address - bias) >> PAGE_SHIFT
            if kind != _PAGEFAULT or flags > FAULT_WRITE or not low <= page < high or not (n := begin(page)):
                break
            if n == 1:
                if zero(address, PAGE_BYTES)[1]:
                    touch.failed()
                    break
            elif not touch.came(page, n, self._machine.zero_at(mapper, page, n).n_done):
                break
            n_left -= 1
            now = clock()
            latency[flags][(now - began_ns).bit_length()] += 1
            if not n_left or self._noted():
                return n_most - n_left, now, []
            began_ns, message = now, read()
            if message is None:
                began_ns, message = self._offer_cpu_and(read)
        return n_most - n_left, began_ns, [message] if message is not None else []

    def read_on(self, mapper: Mapper) -> tuple[int, list[Message]]:
        """Read what comes next: the time before that, and the messages."""
        read, began_ns = self._reader(mapper), self._clock()
        message = read()
        if message is None:
            began_ns, message = self._offer_cpu_and(read)
        return began_ns, [message] if message is not None else []

    def _offer_cpu_and(self, read: Callable[[], Message | None]) -> tuple[int, Message | None]:
        """Let a toucher on this CPU run; its own time until it faults is not that of the answer."""
        os.sched_yield()
        return self._clock(), read()

    def _reader(self, mapper: Mapper) -> Callable[[], Message | None]:
        """Return what reads a message within a burst: see `Arena.read`."""
        return mapper.look_and_read_fault if self._pager.uses_swap or mapper.owed else mapper.uffd.read_one
