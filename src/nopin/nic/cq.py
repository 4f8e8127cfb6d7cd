"""Completion queues."""

from __future__ import annotations

from dataclasses import dataclass

from nopin.nic.rings import CompletionProducer


@dataclass(slots=True, eq=False)
class Cq:
    """A completion queue: its ring, and whether it still works.

    Attributes:
        broken: it overran or its ring was scribbled on; completions are lost and its queue pairs fail.
        n_users: queue pairs that use it (one that sends and receives through it counts twice).
    """

    ring: CompletionProducer
    n_users: int = 0
    broken: bool = False
    owner: object = None
