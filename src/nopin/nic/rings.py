"""Work and completion rings in memory that client and device share.

One side writes entries and then the producer index; the other reads the index and then the entries. On x86 stores
are seen in program order and aligned 8-byte stores through a memoryview of "Q" are single stores, so no barrier is
needed between entry and index. One is needed where a side writes an index and then *reads* what the other side
wrote to say "I sleep" (`fence`): without it both could miss each other.

The device believes nothing it reads here: an index that runs backwards or too far ahead is `RingCorrupt`, and
entries are copied before they are looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nopin.errors import QueueFull
from nopin.mm.space import Bytes
from nopin.nic.abi import (
    ARMED_OFFSET,
    CONSUMER_OFFSET,
    CONTROL_BYTES,
    CQE_BYTES,
    CQE_DTYPE,
    PRODUCER_OFFSET,
    UNATTENDED_OFFSET,
    ring_bytes,
)
from nopin.nic.errors import RingCorrupt

_PRODUCER = PRODUCER_OFFSET // 8
_CONSUMER = CONSUMER_OFFSET // 8
_ARMED = ARMED_OFFSET // 8
_UNATTENDED = UNATTENDED_OFFSET // 8

_CQE = struct.Struct("<Q8I")

ARMED_NO = 0
ARMED_NEXT = 1
ARMED_SOLICITED = 2


class _Ring:
    """The shared memory of one ring: index words and entries."""

    def __init__(self, memory: Bytes, depth: int, stride: int) -> None:
        assert depth > 0
        assert depth & (depth - 1) == 0, "a depth that is a power of two keeps slots in step with indexes"
        assert len(memory) >= ring_bytes(depth, stride)
        self.depth = depth
        self._stride = stride
        self._mask = depth - 1
        view = memory.data
        self._index = view[:CONTROL_BYTES].cast("Q")
        self._bytes = view[CONTROL_BYTES : CONTROL_BYTES + depth * stride]
        self._entries: NDArray[np.uint8] = memory[CONTROL_BYTES : CONTROL_BYTES + depth * stride].reshape(depth, stride)


class WorkProducer(_Ring):
    """The client's side of a send or receive ring."""

    def __init__(self, memory: Bytes, depth: int, stride: int) -> None:
        super().__init__(memory, depth, stride)
        self._next = self._index[_PRODUCER]

    @property
    def free(self) -> int:
        """Entries that can be posted now."""
        return self.depth - (self._next - self._index[_CONSUMER])

    @property
    def unattended(self) -> bool:
        """True while the device does not look here. To be asked behind a fence, after posting."""
        return self._index[_UNATTENDED] != 0

    def post(self, entries: Sequence[bytes]) -> None:
        """Write entries (each at most one stride long), then the index.

        Raises:
            QueueFull: fewer slots are free than entries given; nothing was posted.
        """
        stride, mask, at = self._stride, self._mask, self._next
        if at + len(entries) - self._index[_CONSUMER] > self.depth:
            text = f"{len(entries)} work requests for {self.free} free of {self.depth} entries"
            raise QueueFull(f"{text}; take completions first, or make deeper queues by QpCaps")
        for entry in entries:
            start = (at & mask) * stride
            self._bytes[start : start + len(entry)] = entry
            at += 1
        self._next = at
        self._index[_PRODUCER] = at

    def post_array(self, entries: NDArray[np.uint8]) -> None:
        """Write (n, stride) uint8 entries, then the index.

        Raises:
            QueueFull: as `post`.
        """
        n_entries = len(entries)
        if n_entries > self.free:
            raise QueueFull(f"{n_entries} work requests for {self.free} free of {self.depth} entries")
        first = self._next & self._mask
        head = min(n_entries, self.depth - first)
        self._entries[first : first + head] = entries[:head]
        self._entries[: n_entries - head] = entries[head:]
        self._next += n_entries
        self._index[_PRODUCER] = self._next


class WorkConsumer(_Ring):
    """The device's side of a send or receive ring.

    `take` hands out entries; their slots are the client's again only after `release`, when the work is done, so
    the depth bounds what is outstanding.
    """

    def __init__(self, memory: Bytes, depth: int, stride: int) -> None:
        super().__init__(memory, depth, stride)
        self._taken = 0
        self._released = 0

    @property
    def available(self) -> int:
        """Entries posted and not taken.

        Raises:
            RingCorrupt: the producer index is impossible.
        """
        n_entries = self._index[_PRODUCER] - self._taken
        if not 0 <= n_entries <= self.depth - (self._taken - self._released):
            raise RingCorrupt(f"work ring: producer index {self._index[_PRODUCER]} after {self._taken} taken")
        return n_entries

    @property
    def has_work(self) -> bool:
        """Quick form of `available`, for polling: the index moved, validity not judged."""
        return self._index[_PRODUCER] != self._taken

    @property
    def n_taken(self) -> int:
        """Entries taken since the ring was made."""
        return self._taken

    def leave(self) -> None:
        """Say that nobody looks here. A fence belongs after it, before looking once more."""
        self._index[_UNATTENDED] = 1

    def attend(self) -> None:
        """Say that somebody looks here again."""
        self._index[_UNATTENDED] = 0

    def take(self) -> bytes:
        """Copy the next entry out. Requires: `available` was positive."""
        start = (self._taken & self._mask) * self._stride
        self._taken += 1
        return bytes(self._bytes[start : start + self._stride])

    def fields(self, form: struct.Struct, nth: int = 0) -> tuple[int, ...]:
        """Copy the fields of the next entry, or the nth after it, without taking it. Requires: it is `available`."""
        return form.unpack_from(self._bytes, (self._taken + nth & self._mask) * self._stride)

    def finish(self) -> None:
        """Take the next entry and give its slot back, because its work is done already."""
        assert self._taken == self._released, "slots are given back in order"
        self._taken = self._released = self._index[_CONSUMER] = self._taken + 1

    def peek(self, n_entries: int) -> NDArray[np.uint8]:
        """Copy the next entries out without taking them: (n, stride). Requires: so many were `available`."""
        first = self._taken & self._mask
        wrapped = first + n_entries - self.depth
        if wrapped <= 0:
            return self._entries[first : first + n_entries].copy()
        return np.concatenate((self._entries[first:], self._entries[:wrapped]))

    def skip(self, n_entries: int) -> None:
        """Take entries that were copied by `peek`."""
        self._taken += n_entries

    def release(self, n_entries: int = 1) -> None:
        """Give slots of finished work back to the client."""
        self._released += n_entries
        assert self._released <= self._taken
        self._index[_CONSUMER] = self._released

    def discard(self) -> int:
        """Forget everything posted; returns how many entries were not even taken (a reset queue pair)."""
        n_entries = self.available
        self._taken += n_entries
        self._released = self._taken
        self._index[_CONSUMER] = self._released
        return n_entries


class CompletionProducer(_Ring):
    """The device's side of a completion ring."""

    def __init__(self, memory: Bytes, depth: int, fence: Callable[[], None]) -> None:
        super().__init__(memory, depth, CQE_BYTES)
        self._fence = fence
        self._next = 0
        self._consumer_seen = 0
        self._fresh = ARMED_NO  # the strongest kind of completion pushed since the last `fired`

    def push(
        self,
        wr_id: int,
        status: int,
        opcode: int,
        byte_len: int,
        imm: int,
        qp_num: int,
        src_qp: int,
        wc_flags: int,
        *,
        solicited: bool = False,
    ) -> bool:
        """Write one completion; False if the ring is full (overrun: the completion is lost).

        Raises:
            RingCorrupt: the client's consumer index is impossible.
        """
        at, consumer = self._next, self._index[_CONSUMER]
        if not self._consumer_seen <= consumer <= at:
            raise RingCorrupt(f"completion ring: consumer index {consumer} of {at} produced")
        self._consumer_seen = consumer
        if at - consumer >= self.depth:
            return False
        start = (at & self._mask) * CQE_BYTES
        _CQE.pack_into(self._bytes, start, wr_id, status, opcode, byte_len, imm, qp_num, src_qp, wc_flags, 0)
        self._index[_PRODUCER] = self._next = at + 1
        if solicited or status:
            self._fresh = ARMED_SOLICITED
        elif self._fresh == ARMED_NO:
            self._fresh = ARMED_NEXT
        return True

    def fired(self) -> bool:
        """Tell whether the client armed the ring for a completion that came; disarms it if so."""
        if self._fresh == ARMED_NO:
            return False
        fresh, self._fresh = self._fresh, ARMED_NO
        self._fence()  # the index must be visible before we read the flag, see the essay above
        armed = self._index[_ARMED]
        if armed == ARMED_NO or (armed == ARMED_SOLICITED and fresh != ARMED_SOLICITED):
            return False
        self._index[_ARMED] = ARMED_NO
        return True


class CompletionConsumer(_Ring):
    """The client's side of a completion ring."""

    def __init__(self, memory: Bytes, depth: int, fence: Callable[[], None]) -> None:
        super().__init__(memory, depth, CQE_BYTES)
        self._fence = fence
        self._next = self._index[_CONSUMER]

    def poll_one(self) -> tuple[int, ...] | None:
        """Take the oldest completion as (wr_id, status, opcode, byte_len, imm, qp, src_qp, flags, vendor_err)."""
        at = self._next
        if self._index[_PRODUCER] == at:
            return None
        entry = _CQE.unpack_from(self._bytes, (at & self._mask) * CQE_BYTES)
        self._next = at + 1
        self._index[_CONSUMER] = at + 1
        return entry

    def poll(self, n_max: int) -> NDArray[np.void]:
        """Take up to n_max completions, oldest first: (n,) CQE_DTYPE, a copy."""
        n_ready = min(n_max, self._index[_PRODUCER] - self._next)
        slots = (np.arange(self._next, self._next + n_ready) & self._mask).astype(np.intp)
        taken = self._entries[slots].reshape(-1).view(CQE_DTYPE)
        self._next += n_ready
        self._index[_CONSUMER] = self._next
        return taken

    @property
    def ready(self) -> bool:
        """True when a completion waits."""
        return self._index[_PRODUCER] != self._next

    def arm(self, *, solicited_only: bool = False) -> None:
        """Ask for a notice at the next completion. Look at `ready` once more before sleeping."""
        self._index[_ARMED] = ARMED_SOLICITED if solicited_only else ARMED_NEXT
        self._fence()
