"""Prefetches: bytes of managed memory made resident in the background, before a CPU or a device asks for them."""

from __future__ import annotations

import itertools
import select as system_select
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nopin.control.arena_messages import CancelPrefetch, PrefetchStarted, PrefetchState, QueryPrefetch
from nopin.control.arena_messages import Prefetch as PrefetchRequest
from nopin.errors import NopinError, PrefetchFailed, UsageError
from nopin.ranges import Range, coalesce
from nopin.units import PAGE_BYTES, PAGE_SHIFT, S_NS
from nopin.verbs.operation import Operation
from nopin.verbs.selection import select

if TYPE_CHECKING:  # importing asyncio takes as long as all the rest of nopin
    import asyncio

    from nopin.verbs.device import Device
    from nopin.verbs.session import Session

RANGES_MAX = 1024
"""In one request; a selection of more separate pieces is asked for with the narrowest gaps between them."""
_CANCELLED = "cancelled"
_LOOK_FIRST_S, _LOOK_LAST_S = 0.001, 0.05

_WHY = {
    "lost": "a page is lost: its copy in swap cannot be read",
    "swap_full": "swap is full, so that no room can be made; free arrays, or give the server more swap",
    "no_room": "the budget has no room for it; raise it with set_budget",
    "memory": "the machine is out of memory",
}


class Prefetch(Operation[int]):
    """A prefetch under way. Its result is the number of bytes made resident, whole pages.

    A cancelled one ends well, with what it had done. Dropping it does not stop it.
    """

    __slots__ = ("_number", "_session", "bytes_done", "cancelled")

    def __init__(self, session: Session, number: int, what: str) -> None:
        super().__init__(self, lambda: self.bytes_done, lambda: what)
        self._session = session
        self._number = number
        self.bytes_done = 0
        self.cancelled = False

    def cancel(self) -> bool:
        """Stop it after the piece that is under way; False if it has ended already."""
        if not self.ended:
            self._ask(CancelPrefetch(seq=0, prefetch=self._number))
        return not self.ended or self.cancelled

    # Driver of itself

    def progress(self) -> bool:
        """Ask how far it is; True if it has ended just now."""
        if self.ended:
            return False
        self._ask(QueryPrefetch(seq=0, prefetch=self._number))
        return self.ended

    def drive(self, _operation: Operation[Any], deadline_ns: int | None) -> None:
        """Wait until it has ended or the deadline has passed; the server's word of its end wakes us."""
        waiter = system_select.poll()
        waiter.register(self._session.control.fileno(), system_select.POLLIN)
        pause_s = _LOOK_FIRST_S
        while not self.progress():
            left_s = pause_s if deadline_ns is None else (deadline_ns - time.monotonic_ns()) / S_NS
            if left_s <= 0 or self.ended:
                return
            waiter.poll(min(left_s, pause_s) * 1000)  # another thread may take that word, so never for long
            pause_s = min(2 * pause_s, _LOOK_LAST_S)

    def attend(self, future: asyncio.Future[None]) -> None:
        """Ask now and then from the running event loop."""
        loop = future.get_loop()

        def look(pause_s: float) -> None:
            if not future.done() and not self.progress():
                loop.call_later(pause_s, look, min(2 * pause_s, _LOOK_LAST_S))

        look(_LOOK_FIRST_S)

    def _ask(self, request: QueryPrefetch | CancelPrefetch) -> None:
        try:
            state, _ = self._session.request(request, PrefetchState)
        except NopinError as problem:
            self.fail(problem)
            return
        self.bytes_done = state.bytes_done
        if not state.ended:
            return
        self.cancelled = state.reason == _CANCELLED
        if state.reason and not self.cancelled:
            why = _WHY.get(state.reason, state.reason)
            text = f"{self.what} ended after {self.bytes_done} bytes: {why}"
            self.fail(PrefetchFailed(text, reason=state.reason, bytes_done=self.bytes_done))
        else:
            self.complete()


def start_prefetch(
    device: Device,
    key: object,
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    itemsize: int,
    *,
    write: bool,
) -> Prefetch:
    """Start making what an index selects of an array resident.

    Args:
        key: as for numpy's basic indexing.
        address: of the array's first element; `strides` in bytes.
        write: it is going to be written.

    Raises:
        UsageError: the array is in no arena of the device, or the key is none.
        ServerRefused: too many prefetches are under way.
    """
    device._require_open()
    pieces = _pages_of(key, address, shape, strides, itemsize)
    arena = next((a for a in device.arenas if not pieces or a.where.contains(pieces[0])), None)
    if arena is None or (pieces and not arena.where.contains(pieces[-1])):
        raise UsageError(
            f"the array at {address:#x} is in ordinary memory, whose pages the kernel brings; prefetch is for arrays "
            "made with dev.zeros, dev.empty or dev.asarray"
        )
    ranges = [(piece.start - arena.where.start, piece.length) for piece in pieces]

    def start(session: Session) -> Prefetch:
        request = PrefetchRequest(seq=0, arena=arena.handle, ranges=ranges, write=write)
        started, _ = session.request(request, PrefetchStarted)
        return Prefetch(session, started.prefetch, f"prefetch of {started.n_bytes} bytes at {address:#x}")

    return device.lifeline.through(start)


def _pages_of(key: object, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[Range]:
    """The pages a selection touches, in order, at most `RANGES_MAX` runs of them."""
    selection = select(key, shape, strides, itemsize)
    if not selection.n_bytes:
        return []
    starts = selection.offsets() + address
    pages = np.stack([starts >> PAGE_SHIFT, (starts + selection.run_bytes + PAGE_BYTES - 1) >> PAGE_SHIFT], 1)
    merged = coalesce(Range(first, end) for first, end in np.unique(pages, axis=0).tolist())
    return [Range(each.start * PAGE_BYTES, each.end * PAGE_BYTES) for each in _at_most(RANGES_MAX, merged)]


def _at_most(n: int, runs: list[Range]) -> list[Range]:
    """Join runs across the narrowest gaps until there are no more than `n`."""
    if len(runs) <= n:
        return runs
    by_gap = sorted(range(1, len(runs)), key=lambda i: runs[i].start - runs[i - 1].end, reverse=True)
    cuts = [0, *sorted(by_gap[: n - 1]), len(runs)]
    return [Range(runs[a].start, runs[b - 1].end) for a, b in itertools.pairwise(cuts)]
