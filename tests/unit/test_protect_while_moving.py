"""Write protection while a process moves pages: it counts only once it is known where they are."""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import Any, cast

import pytest

from nopin.linux.paging_uffd import PagingUffd
from nopin.linux.pidfd import PidFd
from nopin.linux.uffd_handshake import EventKind
from nopin.mm.effects import PageRun, WriteProtect
from nopin.server.arena_machine import ArenaMachine, ServerMapping
from nopin.server.mapper import Mapper, Placed


class MovingUffd:
    """Of a process inside mremap: nothing can be protected until its message is read."""

    def __init__(self) -> None:
        self.messages: deque[Any] = deque([(EventKind.REMAP, 0x10000, 0x90000, 0x8000)])
        self.n_protected = 0

    def n_faults(self) -> int:
        return 0

    def waits(self) -> bool:
        return len(self.messages) > 0

    def read(self, n_most: int) -> list[Any]:
        return [self.messages.popleft() for _ in range(min(n_most, len(self.messages)))]

    def protect(self, _address: int, _length: int) -> int:
        if self.messages:
            return errno.EAGAIN
        self.n_protected += 1
        return 0


def test_protection_is_tried_again_until_the_move_was_dealt_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nopin.server.mapper.advice_of", lambda _pid, _mapped: [])
    attention: list[Mapper] = []
    machine = ArenaMachine(cast(ServerMapping, None), attention.append)
    uffd = MovingUffd()
    process = PidFd.open(os.getpid())
    mapper = Mapper(1, cast(PagingUffd, uffd), [Placed(0, 8, 0x10000)], process, worker=False)
    machine.mappers[1] = mapper
    effect = WriteProtect(PageRun(0, 4))
    assert not machine.write_protect(effect), "the process runs, and nobody protected its pages where they are"
    assert attention[-1] is mapper
    assert [message[0] for message in mapper.unread] == [EventKind.REMAP]
    assert not machine.write_protect(effect), "still not dealt with"
    mapper.unread.clear()
    assert machine.write_protect(effect)
    assert uffd.n_protected
    process.close()
