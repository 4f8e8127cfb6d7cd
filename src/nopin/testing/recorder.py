"""A subscriber that writes down what it hears and answers what it is told to."""

from __future__ import annotations

from collections import deque

from nopin.mm.subscriber import Answer, Invalidation, Subscriber


class Recorder(Subscriber):
    """Holds nothing.

    Attributes:
        heard: starts, in order.
        ended: ends, in order.
        answers: given to the next starts, in order; None once they are used up.
    """

    def __init__(self, *answers: Answer) -> None:
        self.heard: list[Invalidation] = []
        self.ended: list[Invalidation] = []
        self.answers: deque[Answer] = deque(answers)

    def invalidate_start(self, event: Invalidation) -> Answer:
        """Note it and answer."""
        self.heard.append(event)
        return self.answers.popleft() if self.answers else None

    def invalidate_end(self, event: Invalidation) -> None:
        """Note it."""
        self.ended.append(event)
