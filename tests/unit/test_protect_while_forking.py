"""Write protection while a process forks: it counts only once the child is a mapper, too."""

from __future__ import annotations

import errno
from collections import deque
from typing import Any, cast

from nopin.linux.paging_uffd import PagingUffd
from nopin.linux.uffd_handshake import EventKind
from nopin.mm.effects import PageRun, WriteProtect
from nopin.server.arena_machine import ArenaMachine, ServerMapping
from nopin.server.mapper import Mapper, Placed


class ForkingUffd:
    """Of a process inside fork: nothing can be protected until its message is read."""

    def __init__(self) -> None:
        self.messages: deque[Any] = deque([(EventKind.FORK, 7, 0, 0)])
        self.n_protected = 0

    def event_waits(self) -> bool:
        return len(self.messages) > 0

    def read(self) -> list[Any]:
        messages = list(self.messages)
        self.messages.clear()
        return messages

    def protect(self, _address: int, _length: int) -> int:
        if self.messages:
            return errno.EAGAIN
        self.n_protected += 1
        return 0


def test_protection_is_tried_again_until_the_child_was_dealt_with() -> None:
    attention: list[Mapper] = []
    machine = ArenaMachine(cast(ServerMapping, None), attention.append)
    uffd = ForkingUffd()
    parent = Mapper(1, cast(PagingUffd, uffd), [Placed(0, 8, 0x10000)], None, worker=False)
    machine.mappers[1] = parent
    effect = WriteProtect(PageRun(0, 4))
    assert not machine.write_protect(effect), "the child runs, and nobody protected its pages"
    assert attention[-1] is parent
    assert [message[0] for message in parent.unread] == [EventKind.FORK]
    assert not machine.write_protect(effect), "still not dealt with"
    parent.unread.clear()
    assert machine.write_protect(effect)
    assert uffd.n_protected
