"""Copies from one address space to another through the device's staging buffer.

`Relay` is a port: the device asks for whole copies, and whoever runs it may overlap the parts of them (the live
server has the help of a second CPU). What every implementation keeps: bytes are written in order, and nothing is
written after a byte that could not be.

Where in the buffer the bytes wait is not indifferent: some processors copy four times slower to an address whose place
in its page is a few bytes after that of the source (see `start_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from nopin.mm.space import AddressSpace, Staging
from nopin.units import PAGE_BYTES

SLOW_BYTES = 32
"""Zen 3 copies by ``rep movsb`` some four times slower when the target lies 1 to 31 bytes further in its page than the
source in its own. Measured with process_vm_readv and writev; slow unaligned moves of Zen 3 are described for memcpy at
lunnova.dev/articles/ryzen-slow-short-rep-mov."""


TURN_BYTES = 8 << 20
"""What one queue pair may do before the others get their turn."""


class Copy(NamedTuple):
    """A range to be copied from one space to another; `length` is positive, in bytes."""

    source_address: int
    target_address: int
    length: int


class Ends(NamedTuple):
    """The spaces that copies go from and to."""

    source: AddressSpace
    target: AddressSpace


class Relayed(NamedTuple):
    """Outcome of a relay, in bytes from the start of the first copy to where it ended in the last it came to.

    Attributes:
        n_read: bytes read before the first that could not be.
        n_written: bytes written; less than `n_read` when the target refused, or in the last packet of a short source.
    """

    n_read: int
    n_written: int

    def then(self, rest: Relayed) -> Relayed:
        """Return the outcome of both, one after the other."""
        return Relayed(self.n_read + rest.n_read, self.n_written + rest.n_written)


class Turn:
    """How long a relay of many copies may go on: after a turn's bytes only while nobody else waits.

    Args:
        others_wait: looks around.

    Attributes:
        over: somebody was found waiting.
    """

    def __init__(self, others_wait: Callable[[], bool]) -> None:
        self.over = False
        self._others_wait = others_wait
        self._n_left = TURN_BYTES

    def is_over_after(self, n_bytes: int) -> bool:
        """So many more bytes are copied, or soon will be; tell whether to end where a copy ends."""
        self._n_left -= n_bytes
        if self._n_left <= 0 and not self.over:
            self._n_left = TURN_BYTES
            self.over = self._others_wait()
        return self.over


def nobody_waits() -> bool:
    """For who is alone."""
    return False


UNTIL_DONE = Turn(nobody_waits)
"""The turn that never ends."""


class Relay(Protocol):
    """Carries out copies one after the other, until one cannot be completed, or between two because the turn is over.

    When a source ends early, what is written of that copy is cut down to a multiple of `grain` bytes, as if it had
    left in packets of that size.
    """

    def __call__(
        self, ends: Ends, copies: Sequence[Copy], staging: Staging, grain: int, turn: Turn = UNTIL_DONE
    ) -> Relayed:
        """Carry the copies out."""
        ...


def relay_in_turn(ends: Ends, copies: Sequence[Copy], staging: Staging, grain: int, turn: Turn = UNTIL_DONE) -> Relayed:
    """Read a staging buffer full, in whole packets, write it, and so on."""
    room = len(staging.array)
    longest = max(room - PAGE_BYTES, min(room, PAGE_BYTES)) // grain * grain
    n_before = 0
    for source, target, length in copies:
        for at in range(0, length, longest):
            step = min(length - at, longest)
            outcome = relay_once(ends, source + at, target + at, step, staging, grain)
            if outcome.n_written < step:
                return Relayed(n_before + at, n_before + at).then(outcome)
        n_before += length
        if turn.is_over_after(length):
            break
    return Relayed(n_before, n_before)


def relay_once(
    ends: Ends, source_address: int, target_address: int, length: int, staging: Staging, grain: int
) -> Relayed:
    """Copy what fits the staging buffer: the plain form, for what is too short to be worth more."""
    at = start_of(source_address, target_address, staging.address) if length + PAGE_BYTES <= len(staging.array) else 0
    n_read = ends.source.read(source_address, length, staging, at)
    n_whole = n_read if n_read == length else n_read - n_read % grain
    return Relayed(n_read, ends.target.write(target_address, n_whole, staging, at))


def are_present(ends: Ends, copies: Sequence[Copy]) -> bool:
    """Tell whether all pages of both sides are there. Neighbours are looked up together: long messages mostly are."""
    source, target = ends
    return all(
        source.absent(start, end) is None for start, end in _stretches((copy[0], copy[2]) for copy in copies)
    ) and all(
        target.absent(start, end, write=True) is None
        for start, end in _stretches((copy[1], copy[2]) for copy in copies)
    )


def _stretches(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ranges (address, length) that touch or cover the one before: (start, end)."""
    start = end = -1
    for address, length in ranges:
        if start <= address <= end:
            end = max(end, address + length)
            continue
        if end >= 0:
            yield start, end
        start, end = address, address + length
    if end >= 0:
        yield start, end


def start_of(source_address: int, target_address: int, buffer_address: int) -> int:
    """Return where in a buffer, less than a page from its start, a copy can wait without being slow on either way.

    That is at the source's place in its page, or half a page from there where the target lies just after it.
    """
    start = source_address - buffer_address
    if 0 < (target_address - source_address) % PAGE_BYTES < SLOW_BYTES:
        start += PAGE_BYTES // 2
    return start % PAGE_BYTES


def after(copies: Iterable[Copy], done: int) -> Iterator[Copy]:
    """Yield what is left of copies once their first `done` bytes are copied."""
    for source, target, length in copies:
        if done < length:
            yield Copy(source + done, target + done, length - done)
        done = max(0, done - length)
