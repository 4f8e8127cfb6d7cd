"""What the steps of the modelled memory management cost.

All are 0 by default: in exploration only the order counts. Presets fill them in.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nopin.model.effects import Work


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Nanoseconds of each kind of step.

    Attributes:
        access_ns: a CPU's load or store within a page that is mapped.
        fault_ns: trap, lookup and return of a fault, without what it takes to get the bytes.
        zero_ns, copy_ns: filling a frame with zeros, with another's bytes.
        notify_ns: calling the notifiers, without what their fences take.
        clear_ns: clearing entries, per step (see `Host.pages_per_step`).
        flush_ns: making CPUs forget them.
        free_ns: giving the frames back.
        syscall_ns: going in and out.
        medium_read_ns, medium_write_ns: one request of the swap or file medium, without its pages.
        medium_page_ns: each page of it.
    """

    access_ns: int = 0
    fault_ns: int = 0
    zero_ns: int = 0
    copy_ns: int = 0
    notify_ns: int = 0
    clear_ns: int = 0
    flush_ns: int = 0
    free_ns: int = 0
    syscall_ns: int = 0
    medium_read_ns: int = 0
    medium_write_ns: int = 0
    medium_page_ns: int = 0


class Steps:
    """The ordinary steps, made once: yielding one says that others may go on there.

    Args:
        costs: of each.
    """

    __slots__ = ("access", "clear", "copy", "fault", "flush", "free", "notify", "syscall", "zero")

    access: Work
    clear: Work
    copy: Work
    fault: Work
    flush: Work
    free: Work
    notify: Work
    syscall: Work
    zero: Work

    def __init__(self, costs: HostCosts) -> None:
        for field in fields(costs):
            name = field.name.removesuffix("_ns")
            if name in self.__slots__:
                setattr(self, name, Work(name, getattr(costs, field.name)))
