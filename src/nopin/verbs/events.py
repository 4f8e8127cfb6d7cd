"""Asynchronous events: what happened to an object without a request for it."""

from __future__ import annotations

from dataclasses import dataclass

from nopin.nic.abi import AsyncEventType
from nopin.verbs.objects import DeviceObject


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """An asynchronous event.

    Attributes:
        kind: what happened.
        target: the queue pair, completion queue, region or arena; None when it is closed already, for a prefetch, and
            for SERVER_REPLACED, which is about all of them.
        object_id: the QPN of a queue pair, the handle of another; for SERVER_REPLACED the new server's process.
        cause: for REGION_INVALIDATED: "unmap", "remap", "remove" or "fork"; for SERVER_REPLACED: the shares and arenas
            that could not go on, and why; empty if all do.
        start: first byte concerned; `end` one past the last.
        generation: counts the invalidations of that region, from 1.
    """

    kind: AsyncEventType
    target: DeviceObject | None
    object_id: int
    cause: str = ""
    start: int = 0
    end: int = 0
    generation: int = 0

    def __str__(self) -> str:
        if self.kind is AsyncEventType.SERVER_REPLACED:
            lost = f"; lost: {self.cause}" if self.cause else ""
            return f"{self.kind.name}: the device server ended, process {self.object_id} goes on{lost}"
        about = f"object {self.object_id}" if self.target is None else repr(self.target)
        where = f" [{self.start:#x}, {self.end:#x})" if self.end else ""
        which = f", number {self.generation}" if self.generation else ""
        return f"{self.kind.name}: {self.cause}{' ' if self.cause else ''}{where.strip()}{which} of {about}"
