"""A small record that is always whole: what a server writes down for its successor.

The record lies twice in a piece of shared memory. A write goes to the older half: first the body, then the header with
its sequence number and a checksum over everything. A writer that is killed leaves at worst that half broken, and the
other is still there; a reader takes the newest half that checks out. (A killed process leaves its stores in shared
memory in program order; a crash of the machine loses the memory itself.)
"""

from __future__ import annotations

import struct
import zlib

from nopin.mm.space import Bytes

JOURNAL_BYTES = 1 << 20
_HEADER = struct.Struct("<QII")  # sequence number, length of the body, checksum over both and the body


class Journal:
    """A record in shared memory.

    Args:
        memory: (n,) uint8, kept by the caller; each half holds a record of n / 2 - 16 bytes. The other side may write
            here too, so what is read is only checked for wholeness: it must be judged like any other input.
    """

    def __init__(self, memory: Bytes) -> None:
        half = len(memory) // 2
        assert half > _HEADER.size
        self._halves = memory.data[:half], memory.data[half : 2 * half]
        self.capacity_bytes = half - _HEADER.size

    def write(self, record: bytes) -> None:
        """Replace the record.

        Raises:
            ValueError: it is longer than `capacity_bytes`; the old one stays.
        """
        if len(record) > self.capacity_bytes:
            raise ValueError(f"a record of {len(record)} bytes does not fit into {self.capacity_bytes}")
        found = [_load(half) for half in self._halves]
        ages = [-1 if each is None else each[0] for each in found]
        target = self._halves[0 if ages[0] <= ages[1] else 1]
        sequence = max(ages) + 1
        target[_HEADER.size : _HEADER.size + len(record)] = record
        _HEADER.pack_into(target, 0, sequence, len(record), _checksum(sequence, record))

    def read(self) -> bytes | None:
        """Return the newest whole record, or None if there is none."""
        found = [each for each in map(_load, self._halves) if each is not None]
        return max(found)[1] if found else None


def _load(half: memoryview) -> tuple[int, bytes] | None:
    """Return sequence number and body of a half that is whole. An untouched half is not."""
    sequence, length, checksum = _HEADER.unpack_from(half)
    if length > len(half) - _HEADER.size:
        return None
    body = bytes(half[_HEADER.size : _HEADER.size + length])
    return (sequence, body) if checksum == _checksum(sequence, body) else None


def _checksum(sequence: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<QI", sequence, len(body)), 1))
