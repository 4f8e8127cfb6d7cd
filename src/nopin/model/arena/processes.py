"""Processes of an arena machine, as its server knows them: what each has mapped, who sleeps, what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nopin.mm.effects import Gate, Procedure, WriteProtect
from nopin.model.scheduler import Task


class Fault(NamedTuple):
    """What a touch met: a message of userfaultfd."""

    mapper: int
    page: int
    write: bool
    minor: bool
    protected: bool


class Message(NamedTuple):
    """What a process has to say to the server.

    Attributes:
        answer: called when it has been read; returns what the server does then.
        sender: number of the mapping, of what is no fault.
        read: opened then: senders of what is no fault go on. Between that and the answer the server can be killed.
        look: done before it is read, while its sender waits; returns what is done when it has been.
    """

    name: str
    answer: Callable[[], Procedure[Any]]
    read: Gate | None = None
    look: Callable[[], Callable[[], None]] | None = None
    sender: int = 0


class Killed(Exception):
    """SIGBUS: the page's bytes are lost, or there is no room for it."""


@dataclass(slots=True)
class Mapping:
    """One process's page table of the arena.

    Attributes:
        writable: mapped pages, and whether stores pass. marked: pages whose protection outlived them.
        asleep: threads that wait, by page.
        inside: threads inside a call that sends a message, until they run again.
        to_protect: what waits for that, and for whom.
        alive: False: every operation fails with ESRCH.
    """

    writable: dict[int, bool] = field(default_factory=dict)
    marked: set[int] = field(default_factory=set)
    poisoned: set[int] = field(default_factory=set)
    asleep: dict[int, list[Task]] = field(default_factory=dict)
    inside: int = 0
    to_protect: list[tuple[WriteProtect, Task]] = field(default_factory=list)
    alive: bool = True


@dataclass(slots=True)
class Asleep:
    """Effect of a thread: wait at a page until it is woken there."""

    fault: Fault
