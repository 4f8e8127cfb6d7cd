"""Asynchronous events of the NIC, for the owner of the object they concern."""

from __future__ import annotations

from dataclasses import dataclass

from nopin.nic.abi import AsyncEventType


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """Something happened outside any work request.

    Attributes:
        kind: what.
        target: the QueuePair or Cq concerned.
    """

    kind: AsyncEventType
    target: object
