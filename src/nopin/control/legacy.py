"""What a server leaves to its successor, in so far as it is a list: of what is to be found where.

Kept outside of the server, by whoever uses this, and replaced as a whole with each change. Servers may be killed at any
moment, the successor as well while it takes things over. So what was left counts until it was looked at: a list begins
as its predecessor's, and each record goes only when there is nothing behind it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)


class Legacy(Generic[R]):
    """A list.

    Args:
        left: by a predecessor.

    Attributes:
        left: the same.
    """

    def __init__(self, left: Iterable[R] = ()) -> None:
        self.left = tuple(left)
        self._records = dict.fromkeys(self.left)

    @property
    def records(self) -> tuple[R, ...]:
        """What a successor is to find now."""
        return tuple(self._records)

    def add(self, record: R) -> None:
        """Note something. Twice is fine."""
        self._records[record] = None

    def remove(self, record: R) -> bool:
        """There is nothing behind a record any more; False if it was not noted."""
        return self._records.pop(record, self) is not self

    def disown(self) -> None:
        """Leave nothing of what was left."""
        for record in self.left:
            self.remove(record)
