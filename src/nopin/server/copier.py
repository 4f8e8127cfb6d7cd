"""Direct copies on two CPUs: the server and a copier process copy a message's chunks by turns.

A copy between two processes takes two system calls, one out of the source and one into the target, so in turn it is
at most half as fast as process_vm_readv alone. Here one process reads its chunk while the other writes the one before;
the writes stay in order. The outcome is that of `relay_in_turn`, which also does what is too short to be worth it,
what the copier cannot reach, and what it left when it failed.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median

from nopin.iommu.relay import UNTIL_DONE, Copy, Ends, Relayed, Turn, after, relay_in_turn, start_of
from nopin.linux.process_memory import ProcessMemory
from nopin.mm.plain import PlainSpace
from nopin.mm.space import AddressSpace, Staging
from nopin.server.copier_child import Chunk, CopierChild, Memories
from nopin.server.copier_process import CHUNK_BYTES_MAX, N_CHUNKS_MAX
from nopin.units import S_NS, page_ceil

MIN_BYTES = 512 << 10
"""Shorter copies gain nothing: there are too few chunks to overlap."""

CHUNK_BYTES_MIN = 64 << 10
N_CHUNKS = 8
"""More chunks overlap better and cost more calls."""

HEAD_BYTES = 256 << 10
"""What the server copies by itself while a copier that sleeps wakes up."""

TRIES = 3
"""Times in a row that a way is tried: the first wakes the copier up, or leaves it to sleep, and says little about those
after it. Of so many the median counts."""

TRY_BYTES = 4 << 20
"""What is copied without help at a time: in a try not more than it takes to know."""

TRY_AGAIN_FIRST, TRY_AGAIN_LAST = 8, 256
"""After how many copies the slower way is tried again, to see whether it still is: at first, and at last."""

RESTART_NS = S_NS
"""How long to do without after a copier had to be ended."""


class Copier:
    """A `Relay` with a copier process, started at the first copy that is long enough. Owns the process.

    Attributes:
        n_helped: relays that the process had a part in from start to end.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.n_helped = 0
        self._clock = clock
        self._child: CopierChild | None = None
        self._start_at = 0
        self._speeds = Speeds()

    @property
    def pid(self) -> int | None:
        """The process, if it has come up and not failed."""
        return self._child.pid if self._child is not None and self._child.ready else None

    def __call__(
        self, ends: Ends, copies: Sequence[Copy], staging: Staging, grain: int, turn: Turn = UNTIL_DONE
    ) -> Relayed:
        """Carry copies out; see `nopin.iommu.relay.Relay`."""
        child = self._ready_child() if _total(copies) >= MIN_BYTES and _memories(ends) is not None else None
        if child is None:
            return relay_in_turn(ends, copies, staging, grain, turn)
        outcome, left = Relayed(0, 0), copies
        while left and not turn.over:
            began = self._clock()
            helped = self._speeds.prefer_help()
            some = left if helped else _first(left, TRY_BYTES)
            relay = partial(self._helped, child) if helped else relay_in_turn
            done = relay(ends, some, staging, grain, turn)
            outcome = outcome.then(done)
            if done.n_written < _total(some):
                break
            self._speeds.learn(self._clock() - began, done.n_written, helped=helped)
            left = left[len(some) :]
        return outcome

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _ready_child(self) -> CopierChild | None:
        """Return the process if it is of use now; start one if there is none."""
        if self._child is not None:
            return self._child if self._child.ready else None
        now = self._clock()
        if now >= self._start_at:
            self._start_at = now + RESTART_NS
            with contextlib.suppress(OSError):  # without one it is slower, nothing else
                self._child = CopierChild()
        return None

    def _helped(
        self, child: CopierChild, ends: Ends, copies: Sequence[Copy], staging: Staging, grain: int, turn: Turn
    ) -> Relayed:
        """Copy together, and what the copier leaves alone."""
        outcome = self._together(child, ends, copies, staging, grain, turn)
        done = outcome.n_read
        if outcome.n_written < done or turn.over:
            return outcome
        return outcome.then(relay_in_turn(ends, list(after(copies, done)), staging, grain, turn))

    def _together(
        self, child: CopierChild, ends: Ends, copies: Sequence[Copy], staging: Staging, grain: int, turn: Turn
    ) -> Relayed:
        """Copy as far as the two come.

        The copier reaches memory by process number. Before and after, everybody is asked whether they have ended:
        what was copied in between counts only if not, and no number comes back as quickly as that.
        """
        memories = _memories(ends)
        assert memories is not None
        total = _total(copies)
        n_head = min(HEAD_BYTES, copies[0].length) if child.asleep else 0
        head = [copies[0]._replace(length=n_head)] if n_head else []
        chunks = _chunks(after(copies, n_head) if n_head else copies, chunk_bytes(total - n_head))
        if len(chunks) > 2 * N_CHUNKS_MAX or _any_gone(ends):
            return Relayed(0, 0)
        child.begin(memories, chunks[1::2])
        outcome = relay_in_turn(ends, head, staging, grain)
        if outcome.n_written == n_head:
            outcome = outcome.then(_by_turns(child, memories, chunks, staging, turn))
        if outcome.n_written < total:
            child.cancel()
        else:
            self.n_helped += 1
        if not child.finished():
            child.kill()
            self._child = None
            self._start_at = self._clock() + RESTART_NS
        return Relayed(0, 0) if _any_gone(ends) else outcome


class Speeds:
    """Whether help makes copies quicker: not where other processes want the CPUs, or where those are far apart.

    Each way is known by the median of its last copies, so a hiccup says nothing. The way in use is left as soon as it
    is slower than what is known of the other; the other is tried now and then, for it may have changed: soon after a
    change, more and more rarely while it stays slower.
    """

    def __init__(self) -> None:
        self._latest: dict[bool, deque[float]] = {way: deque(maxlen=TRIES) for way in (True, False)}
        self._way = self._used = True
        self._trying = True
        self._n_left = TRIES
        self._pause = TRY_AGAIN_FIRST

    def prefer_help(self) -> bool:
        """Choose for the next copy."""
        if self._n_left <= 0 or not (self._trying or self._is_better(self._way)):
            self._choose()
        self._n_left -= 1
        return self._way

    def learn(self, duration_ns: int, n_bytes: int, *, helped: bool) -> None:
        """Take note of what a copy took."""
        self._latest[helped].append(duration_ns / n_bytes)

    def _choose(self) -> None:
        """Begin to try the other way, or to use the better one."""
        if not all(self._latest.values()) or (not self._trying and self._is_better(self._way)):
            self._trying, self._way, self._n_left = True, not self._way, TRIES
            return
        better = self._is_better(True)
        self._pause = TRY_AGAIN_FIRST if better != self._used else min(2 * self._pause, TRY_AGAIN_LAST)
        self._trying, self._way, self._used, self._n_left = False, better, better, self._pause

    def _is_better(self, helped: bool) -> bool:
        return median(self._latest[helped]) <= median(self._latest[not helped])


def _total(copies: Sequence[Copy]) -> int:
    return sum(copy.length for copy in copies)


def _first(copies: Sequence[Copy], n_bytes: int) -> Sequence[Copy]:
    """Return the first copies, so many that they make up that many bytes if there are."""
    total = 0
    for n, copy in enumerate(copies, 1):
        total += copy.length
        if total >= n_bytes:
            return copies[:n]
    return copies


def chunk_bytes(total: int) -> int:
    """Return how long the chunks of a copy are at most: whole pages."""
    return min(max(page_ceil(total // N_CHUNKS), CHUNK_BYTES_MIN), CHUNK_BYTES_MAX)


def _memories(ends: Ends) -> Memories | None:
    """Return the memory of both sides if process numbers are all it takes to reach it; pinned frames take more."""
    source, target = _memory_of(ends.source), _memory_of(ends.target)
    return None if source is None or target is None else (source, target)


def _memory_of(space: AddressSpace) -> ProcessMemory | None:
    port = space.port if isinstance(space, PlainSpace) else None
    return port if isinstance(port, ProcessMemory) else None


def _any_gone(ends: Ends) -> bool:
    return ends.source.gone or ends.target.gone


def _chunks(copies: Iterable[Copy], longest: int) -> list[Chunk]:
    """Cut copies in chunks, those of one copy alike.

    Their number is even, unless they are too short for that: messages often use the same memory again, and then each
    process always meets the same part of it, and the two do not get in each other's way.
    """
    chunks: list[Chunk] = []
    for source, target, length in copies:
        n_chunks = -(-length // longest)
        if n_chunks % 2 and length >= (n_chunks + 1) * CHUNK_BYTES_MIN:
            n_chunks += 1
        step = page_ceil(-(-length // n_chunks))
        start = start_of(source, target, 0)  # chunks are whole pages: all lie alike
        for at in range(0, length, step):
            n_left = length - at
            chunks.append(Chunk(source + at, target + at, min(step, n_left), start, n_left <= step))
    return chunks


def _by_turns(child: CopierChild, memories: Memories, chunks: Sequence[Chunk], staging: Staging, turn: Turn) -> Relayed:
    """Copy chunks 0, 2, 4 and so on, the copier the others. Whether others wait is asked while the copier is at work.

    What was read and not written is what the target refused. Where both end short and alike, either the copier did
    not come along or a source ends: whoever reads on will know.
    """
    source, target = memories
    buffer = page_ceil(staging.address)
    done = 0
    for n in range(0, len(chunks), 2):
        if n and turn.is_over_after(chunks[n - 2].length + chunks[n - 1].length) and chunks[n - 1].ends_copy:
            return _ended(child, chunks, n, done)
        source_address, target_address, length, start, ends_copy = chunks[n]
        n_read = source.read(source_address, length, buffer + start)
        if not child.await_written(n):
            return Relayed(done, done)
        if n:
            done += chunks[n - 1].length
        if n_read < length:
            return Relayed(done, done)
        n_written = target.write(target_address, length, buffer + start)
        if n_written < length:
            return Relayed(done + length, done + n_written)
        done += length
        if ends_copy and turn.over:
            return Relayed(done, done)
        child.pass_on(n + 1)
    return _ended(child, chunks, len(chunks), done)


def _ended(child: CopierChild, chunks: Sequence[Chunk], n: int, done: int) -> Relayed:
    """End before chunk n, once the copier's chunk before it is written."""
    if n % 2 == 0 and child.await_written(n):
        done += chunks[n - 1].length
    return Relayed(done, done)
