"""What an access is: where, for whom, and who waits."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from nopin.iommu.page_requests import Meter

PARKED = -1
"""Returned instead of a byte count: nothing was moved, and the waiter will be in `take_wakeups`."""


class Span(NamedTuple):
    """Where a copy begins, and who waits (None: nobody) when pages there are slow to come."""

    pasid: int
    address: int
    meter: Meter
    waiter: Hashable | None


class Access(NamedTuple):
    """A range that is going to be copied, one of several that wait together."""

    span: Span
    length: int
    write: bool
