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
from nopin.server.arena_pager import ArenaPager
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
        read, zero, touch = self._reader(mapper), mapper.uffd.zero, self._pager.first_touch
        begin, end, clock, latency = touch.begin, touch.end, self._clock, self._latency
        number, low, high, bias = mapper.number, mapper.low, mapper.high, mapper.bias
        n_answered = 0
        while len(messages) == 1:
            kind, flags, address, _ = messages[0]
            page = (address - bias) >> PAGE_SHIFT
            if kind != _PAGEFAULT or flags > FAULT_WRITE or not low <= page < high:
                break
            n = begin(number, page)
            if not n:
                break
            if n == 1 and not zero(address, PAGE_BYTES)[1]:
                end(page, 1, 1)
            elif not end(page, n, self._machine.zero_at(mapper, page, n).n_done):
                break
            n_answered += 1
            now = clock()
            latency[flags][(now - began_ns).bit_length()] += 1
            if n_answered >= n_most or self._noted():
                return n_answered, now, []
            began_ns, messages = now, read()
            if not messages:
                began_ns, messages = self._offer_cpu_and(read)
        return n_answered, began_ns, messages

    def read_on(self, mapper: Mapper) -> tuple[int, list[Message]]:
        """Read what comes next: the time before that, and the messages."""
        read, began_ns = self._reader(mapper), self._clock()
        messages = read()
        return (began_ns, messages) if messages else self._offer_cpu_and(read)

    def _offer_cpu_and(self, read: Callable[[], list[Message]]) -> tuple[int, list[Message]]:
        """Let a toucher on this CPU run; its own time until it faults is not that of the answer."""
        os.sched_yield()
        return self._clock(), read()

    def _reader(self, mapper: Mapper) -> Callable[[], list[Message]]:
        """Return what reads messages within a burst: see `Arena.read`."""
        return mapper.look_and_read if self._pager.uses_swap else mapper.uffd.read
