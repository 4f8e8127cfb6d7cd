"""Work requests and completions as programs see them, and their encoding as ring entries."""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nopin.errors import UsageError
from nopin.nic.abi import (
    ONE_SGE,
    WQE_HEADER_BYTES,
    SendFlags,
    WcFlags,
    WcOpcode,
    WcStatus,
    WrOpcode,
    one_sge_dtype,
)

_HEADER = struct.Struct("<QBBHIQIIQQ16x")
_SGE = struct.Struct("<QII")
assert _HEADER.size == WQE_HEADER_BYTES

_BITS = {
    "wr_id": 64,
    "opcode": 8,
    "flags": 8,
    "imm": 32,
    "remote_address": 64,
    "rkey": 32,
    "compare_add": 64,
    "swap": 64,
}
_SGE_BITS = {"address": 64, "length": 32, "lkey": 32}
"""How wide fields of a ring entry are."""

_INLINE = int(SendFlags.INLINE)
_INLINE_ALLOWED = frozenset(
    {
        WrOpcode.RDMA_WRITE,
        WrOpcode.RDMA_WRITE_WITH_IMM,
        WrOpcode.SEND,
        WrOpcode.SEND_WITH_IMM,
        WrOpcode.SEND_WITH_INV,
    }
)


class Sge(NamedTuple):
    """A piece of local memory: `length` bytes at `address`, inside the region of `lkey`."""

    address: int
    length: int
    lkey: int


@dataclass(slots=True)
class SendWr:
    """A send work request, names as in ``ibv_send_wr``.

    Attributes:
        imm: immediate data; for SEND_WITH_INV the rkey to invalidate.
        compare_add: what FETCH_ADD adds, what CMP_AND_SWP compares with.
        swap: what CMP_AND_SWP stores.
        inline: these bytes are sent instead of `sges`; they may be reused at once.
    """

    opcode: WrOpcode
    sges: Sequence[Sge] = ()
    wr_id: int = 0
    flags: SendFlags = SendFlags.SIGNALED
    remote_address: int = 0
    rkey: int = 0
    imm: int = 0
    compare_add: int = 0
    swap: int = 0
    inline: bytes | None = None


@dataclass(slots=True)
class RecvWr:
    """A receive work request: where the next message goes."""

    sges: Sequence[Sge] = ()
    wr_id: int = 0


class Wc(NamedTuple):
    """A completion, names as in ``ibv_wc``. After an error only wr_id, status, qp_num and vendor_err count."""

    wr_id: int
    status: WcStatus
    opcode: WcOpcode
    byte_len: int
    imm: int
    qp_num: int
    src_qp: int
    wc_flags: WcFlags
    vendor_err: int


_STATUS = {int(status): status for status in WcStatus}
_OPCODE = {int(opcode): opcode for opcode in WcOpcode}
_FLAGS = {flags: WcFlags(flags) for flags in range(16)}


def decode_completion(entry: tuple[int, ...]) -> Wc:
    """Give a completion entry its types. Lookups: an enumeration's constructor costs ten times as much."""
    wr_id, status, opcode, byte_len, imm, qp_num, src_qp, wc_flags, vendor_err = entry
    return Wc(wr_id, _STATUS[status], _OPCODE[opcode], byte_len, imm, qp_num, src_qp, _FLAGS[wc_flags], vendor_err)


def encode_send(wr: SendWr, *, max_sge: int, max_inline: int) -> bytes:
    """Encode a send work request.

    Raises:
        UsageError: too many scatter entries, too many inline bytes, or a number that does not fit its field.
    """
    if wr.inline is not None or int(wr.flags) & _INLINE:  # the operator of flags costs ten times as much
        return _encode_inline(wr, max_inline)
    sges = wr.sges
    n_sges = len(sges)
    if n_sges > max_sge:
        raise UsageError(f"{n_sges} scatter entries; this queue pair takes {max_sge} (QpCaps.max_send_sge)")
    key, there = wr.rkey, wr.remote_address
    try:
        if n_sges == 1:  # nearly always
            return ONE_SGE.pack(
                wr.wr_id, wr.opcode, wr.flags, 1, wr.imm, there, key, 0, wr.compare_add, wr.swap, *sges[0]
            )
        header = _HEADER.pack(wr.wr_id, wr.opcode, wr.flags, n_sges, wr.imm, there, key, 0, wr.compare_add, wr.swap)
        return header + b"".join([_SGE.pack(*sge) for sge in sges])
    except (struct.error, TypeError) as problem:
        raise _misfit(wr, problem) from None


def encode_one(
    opcode: int,
    wr_id: int,
    flags: int,
    remote_address: int,
    rkey: int,
    compare_add: int,
    swap: int,
    local: tuple[int, int, int],
) -> bytes:
    """Encode a one-sided request with one scatter entry; arguments are in range. The short way."""
    return ONE_SGE.pack(
        wr_id, opcode, flags, 1, 0, remote_address, rkey, 0, compare_add, swap, local[0], local[1], local[2]
    )


def encode_recv(wr: RecvWr, *, max_sge: int) -> bytes:
    """Encode a receive work request.

    Raises:
        UsageError: as `encode_send`.
    """
    if len(wr.sges) > max_sge:
        raise UsageError(f"{len(wr.sges)} scatter entries; this queue pair takes {max_sge} (QpCaps.max_recv_sge)")
    try:
        header = _HEADER.pack(wr.wr_id, 0, 0, len(wr.sges), 0, 0, 0, 0, 0, 0)
        return header + b"".join([_SGE.pack(*sge) for sge in wr.sges])
    except (struct.error, TypeError) as problem:
        raise _misfit(wr, problem) from None


def _encode_inline(wr: SendWr, max_inline: int) -> bytes:
    data = wr.inline
    if data is None:
        raise UsageError("SendFlags.INLINE needs the bytes in SendWr.inline")
    if not isinstance(data, bytes):
        data = _bytes_of(data)
    if wr.opcode not in _INLINE_ALLOWED:
        raise UsageError(f"{getattr(wr.opcode, 'name', wr.opcode)} takes no inline bytes")
    if wr.sges:
        raise UsageError("give inline bytes or scatter entries, not both")
    if len(data) > max_inline:
        raise UsageError(f"{len(data)} inline bytes; this queue pair takes {max_inline} (QpCaps.max_inline)")
    try:
        flags = wr.flags | SendFlags.INLINE
        header = _HEADER.pack(wr.wr_id, wr.opcode, flags, 0, wr.imm, wr.remote_address, wr.rkey, len(data), 0, 0)
    except (struct.error, TypeError) as problem:
        raise _misfit(wr, problem) from None
    return header + data


def _bytes_of(data: object) -> bytes:
    try:
        return bytes(memoryview(data))  # type: ignore[arg-type]  # TypeError: it has no buffer
    except TypeError:
        raise UsageError(f"SendWr.inline takes bytes, not {type(data).__name__}") from None


def _misfit(wr: SendWr | RecvWr, problem: Exception) -> UsageError:
    """Say which field of a work request cannot be encoded."""
    fields = [(name, getattr(wr, name, 0), n_bits) for name, n_bits in _BITS.items()]
    for at, sge in enumerate(wr.sges):
        if not isinstance(sge, Sequence) or len(sge) != len(_SGE_BITS):
            return UsageError(f"sges[{at}] of {wr} is no Sge(address, length, lkey)")
        fields += [(f"sges[{at}].{name}", sge[i], n_bits) for i, (name, n_bits) in enumerate(_SGE_BITS.items())]
    for name, value, n_bits in fields:
        try:
            fits = 0 <= operator.index(value) < 1 << n_bits
        except TypeError:
            return UsageError(f"{name} of {wr} has to be an integer")
        if not fits:
            return UsageError(f"{name} of {wr} does not fit: it has {n_bits} bits and no sign")
    return UsageError(f"{wr} cannot be encoded: {problem}")


def encode_array(
    n: int,
    stride: int,
    *,
    opcode: int,
    wr_id: ArrayLike,
    flags: ArrayLike,
    remote_address: ArrayLike,
    rkey: int,
    local_address: ArrayLike,
    length: ArrayLike,
    lkey: int,
) -> NDArray[np.uint8]:
    """Encode n one-sided requests of one scatter entry each, by numpy.

    Returns entries of `stride` bytes, shape (n, stride); every array argument has shape (n,) or is one number.

    Raises:
        UsageError: shapes differ from n, or a number does not fit its field.
    """
    try:
        entries = np.zeros((n, stride), np.uint8)
        fields = entries.reshape(-1).view(one_sge_dtype(stride))
        fields["wr_id"] = wr_id
        fields["opcode"] = opcode
        fields["flags"] = flags
        fields["num_sge"] = 1
        fields["remote_address"] = remote_address
        fields["rkey"] = rkey
        fields["local_address"] = local_address
        fields["local_length"] = length
        fields["local_lkey"] = lkey
    except (ValueError, OverflowError, TypeError) as problem:
        raise UsageError(f"cannot encode {n!r} work requests: {problem}") from None
    return entries
