"""What client and device agree on: enumerations with the verbs' own values, and the ring entry layouts.

Values are those of ``infiniband/verbs.h`` (rdma-core), so that a number seen in another tool means the same
here. Ring entries are little-endian and of fixed size; the device copies an entry before it looks at it,
because the client owns that memory and may change it at any time.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from functools import lru_cache

import numpy as np

from nopin.codes import Code


class WcStatus(Code):
    """Completion status (``ibv_wc_status``)."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_EEC_OP_ERR = 3
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    MW_BIND_ERR = 6
    BAD_RESP_ERR = 7
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    LOC_RDD_VIOL_ERR = 14
    REM_INV_RD_REQ_ERR = 15
    REM_ABORT_ERR = 16
    INV_EECN_ERR = 17
    INV_EEC_STATE_ERR = 18
    FATAL_ERR = 19
    RESP_TIMEOUT_ERR = 20
    GENERAL_ERR = 21


class WcOpcode(Code):
    """What completed (``ibv_wc_opcode``)."""

    SEND = 0
    RDMA_WRITE = 1
    RDMA_READ = 2
    COMP_SWAP = 3
    FETCH_ADD = 4
    RECV = 128
    RECV_RDMA_WITH_IMM = 129


class WcFlags(IntFlag):
    """Extra meaning of a completion (``ibv_wc_flags``)."""

    NONE = 0
    GRH = 1
    WITH_IMM = 2
    WITH_INV = 8


class WrOpcode(Code):
    """Send work request operations (``ibv_wr_opcode``)."""

    RDMA_WRITE = 0
    RDMA_WRITE_WITH_IMM = 1
    SEND = 2
    SEND_WITH_IMM = 3
    RDMA_READ = 4
    ATOMIC_CMP_AND_SWP = 5
    ATOMIC_FETCH_AND_ADD = 6
    SEND_WITH_INV = 9


class SendFlags(IntFlag):
    """Flags of a send work request (``ibv_send_flags``)."""

    NONE = 0
    FENCE = 1
    SIGNALED = 2
    SOLICITED = 4
    INLINE = 8


class Access(IntFlag):
    """Rights of a region or queue pair (``ibv_access_flags``)."""

    NONE = 0
    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4
    REMOTE_ATOMIC = 8
    ON_DEMAND = 64


class Discipline(Code):
    """How a region's pages are held; selectable so that they can be compared on the same work."""

    ON_DEMAND = 0
    """Walk the process's page table at each access; park when a page has to come from a medium."""
    SHORT_TERM = 1
    """Make a whole operation's pages present, copy, hold nothing in between."""
    PINNED = 2
    """Frames held from registration to deregistration (a real long-term pin)."""


class QpState(Code):
    """Queue pair state (``ibv_qp_state``)."""

    RESET = 0
    INIT = 1
    RTR = 2
    RTS = 3
    SQD = 4
    SQE = 5
    ERR = 6


class AsyncEventType(Code):
    """Asynchronous events; up to 19 as ``ibv_event_type``, from 1000 on nopin's own."""

    CQ_ERR = 0
    QP_FATAL = 1
    QP_REQ_ERR = 2
    QP_ACCESS_ERR = 3
    COMM_EST = 4
    SQ_DRAINED = 5
    DEVICE_FATAL = 8
    QP_LAST_WQE_REACHED = 16
    REGION_INVALIDATED = 1000
    """Part of a registered range was unmapped, moved, dropped or forked; the event names cause and range."""
    PREFETCH_DONE = 1001
    """A prefetch has ended; the event says with how many bytes, and why early."""
    ARENA_PAGES_LOST = 1002
    """Bytes of an arena are lost: swap gave back something else, or an error. Accesses to them fail."""
    ARENA_SWAP_FULL = 1003
    """Memory could not be made room for, because swap is full; the access that needed it failed."""
    SERVER_REPLACED = 1004
    """The device server was killed, and the device goes on with its successor: arenas and shares are as they were;
    queue pairs, completion queues and regions are gone. The event names shares and arenas that did not come along."""


SGE_DTYPE = np.dtype([("address", "<u8"), ("length", "<u4"), ("lkey", "<u4")])

WQE_HEADER_BYTES = 64
WQE_HEADER = np.dtype(
    {
        "names": [
            "wr_id",
            "opcode",
            "flags",
            "num_sge",
            "imm",
            "remote_address",
            "rkey",
            "inline_length",
            "compare_add",
            "swap",
        ],
        "formats": ["<u8", "u1", "u1", "<u2", "<u4", "<u8", "<u4", "<u4", "<u8", "<u8"],
        "offsets": [0, 8, 9, 10, 12, 16, 24, 28, 32, 40],
        "itemsize": WQE_HEADER_BYTES,
    }
)
"""Send entry header; scatter entries or inline bytes follow. `imm` is the rkey for SEND_WITH_INV.

A receive entry has the same layout and uses wr_id and num_sge only.
"""

ONE_SGE = struct.Struct("<QBBHIQIIQQ16xQII")
"""A send entry with one scatter entry: the fields of `WQE_HEADER`, then those of `SGE_DTYPE`."""
assert ONE_SGE.size == WQE_HEADER_BYTES + SGE_DTYPE.itemsize


@lru_cache(maxsize=64)
def one_sge_dtype(stride: int) -> np.dtype[np.void]:
    """Return a send entry of so many bytes with one scatter entry, whose fields begin with ``local_``."""
    parts = [(WQE_HEADER, 0, ""), (SGE_DTYPE, WQE_HEADER_BYTES, "local_")]
    fields = [
        (prefix + name, part[name], start + _offset(part, name))
        for part, start, prefix in parts
        for name in part.names or ()
    ]
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": stride})


def _offset(dtype: np.dtype[np.void], name: str) -> int:
    assert dtype.fields is not None
    return dtype.fields[name][1]


CQE_BYTES = 64
CQE_DTYPE = np.dtype(
    {
        "names": [
            "wr_id",
            "status",
            "opcode",
            "byte_len",
            "imm",
            "qp_num",
            "src_qp",
            "wc_flags",
            "vendor_err",
        ],
        "formats": ["<u8", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4"],
        "offsets": [0, 8, 12, 16, 20, 24, 28, 32, 36],
        "itemsize": CQE_BYTES,
    }
)

CONTROL_BYTES = 4096
"""Bytes before a ring's entries: its indexes, each on a cache line of its own."""
PRODUCER_OFFSET = 0
CONSUMER_OFFSET = 64
ARMED_OFFSET = 128
"""u64 in a completion ring: 0 no notice wanted, 1 at the next completion, 2 at the next solicited one."""
UNATTENDED_OFFSET = 192
"""u64 in a send ring: 1 while the device does not look at it, so that who posts has to ring."""


def wqe_stride(max_sge: int, max_inline: int) -> int:
    """Return the bytes of one work queue entry, a multiple of 64."""
    body = max(max_sge * SGE_DTYPE.itemsize, max_inline)
    return WQE_HEADER_BYTES + ((body + 63) & ~63)


def ring_bytes(depth: int, entry_bytes: int) -> int:
    """Return the bytes a ring of depth entries takes, control page included, rounded to pages."""
    return CONTROL_BYTES + ((depth * entry_bytes + 4095) & ~4095)
