"""Work requests become the ring entries that the device reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nopin.errors import UsageError
from nopin.nic.abi import (
    SGE_DTYPE,
    WQE_HEADER,
    WQE_HEADER_BYTES,
    SendFlags,
    WcFlags,
    WcOpcode,
    WcStatus,
    WrOpcode,
    wqe_stride,
)
from nopin.verbs.pieces import pieces_of
from nopin.verbs.selection import select
from nopin.verbs.wr import (
    RecvWr,
    SendWr,
    Sge,
    decode_completion,
    encode_array,
    encode_one,
    encode_recv,
    encode_send,
)


def header(entry: bytes) -> dict[str, int]:
    fields: Any = np.frombuffer(entry[:WQE_HEADER_BYTES], WQE_HEADER)[0]
    return {name: int(fields[name]) for name in WQE_HEADER.names or ()}


def test_every_field_lands_where_the_layout_says() -> None:
    wr = SendWr(
        WrOpcode.ATOMIC_CMP_AND_SWP,
        [Sge(0x7F00_0000_1000, 8, 0xABCD)],
        wr_id=1 << 63,
        flags=SendFlags.SIGNALED | SendFlags.FENCE,
        remote_address=0x1234_5678_9ABC,
        rkey=0xFFFF_FFFF,
        imm=7,
        compare_add=(1 << 64) - 1,
        swap=5,
    )
    entry = encode_send(wr, max_sge=1, max_inline=0)
    assert header(entry) == {
        "wr_id": 1 << 63,
        "opcode": 5,
        "flags": 3,
        "num_sge": 1,
        "imm": 7,
        "remote_address": 0x1234_5678_9ABC,
        "rkey": 0xFFFF_FFFF,
        "inline_length": 0,
        "compare_add": (1 << 64) - 1,
        "swap": 5,
    }
    sge: Any = np.frombuffer(entry[WQE_HEADER_BYTES:], SGE_DTYPE)
    assert sge.tolist() == [(0x7F00_0000_1000, 8, 0xABCD)]


def test_inline_bytes_follow_the_header() -> None:
    entry = encode_send(SendWr(WrOpcode.SEND, inline=b"hello"), max_sge=0, max_inline=8)
    assert entry[WQE_HEADER_BYTES:] == b"hello"
    assert header(entry)["inline_length"] == 5
    assert header(entry)["flags"] & SendFlags.INLINE


def test_the_short_way_equals_the_long_way() -> None:
    wr = SendWr(WrOpcode.RDMA_READ, [Sge(1, 2, 3)], wr_id=4, remote_address=5, rkey=6, compare_add=7, swap=8)
    assert encode_one(4, 4, 2, 5, 6, 7, 8, (1, 2, 3)) == encode_send(wr, max_sge=1, max_inline=0)


def test_numpy_encoding_equals_one_by_one() -> None:
    stride = wqe_stride(4, 64)
    addresses = np.arange(5, dtype=np.uint64) * 4096
    entries = encode_array(
        5,
        stride,
        opcode=WrOpcode.RDMA_WRITE,
        wr_id=np.arange(5),
        flags=[0, 0, 0, 0, 2],
        remote_address=addresses + 8,
        rkey=9,
        local_address=addresses,
        length=100,
        lkey=10,
    )
    for i in range(5):
        wr = SendWr(
            WrOpcode.RDMA_WRITE,
            [Sge(4096 * i, 100, 10)],
            wr_id=i,
            flags=SendFlags(2 if i == 4 else 0),
            remote_address=4096 * i + 8,
            rkey=9,
        )
        assert entries[i].tobytes() == encode_send(wr, max_sge=4, max_inline=0).ljust(stride, b"\0")


def test_a_receive_uses_the_same_layout() -> None:
    entry = encode_recv(RecvWr([Sge(1, 2, 3), Sge(4, 5, 6)], wr_id=9), max_sge=2)
    assert header(entry)["wr_id"] == 9
    assert header(entry)["num_sge"] == 2


@pytest.mark.parametrize(
    "wr",
    [
        SendWr(WrOpcode.SEND, [Sge(0, 1, 1)] * 3),
        SendWr(WrOpcode.SEND, inline=bytes(65)),
        SendWr(WrOpcode.RDMA_READ, inline=b"x"),
        SendWr(WrOpcode.SEND, [Sge(0, 1, 1)], inline=b"x"),
        SendWr(WrOpcode.SEND, flags=SendFlags.INLINE),
        SendWr(WrOpcode.SEND, wr_id=-1),
        SendWr(WrOpcode.RDMA_WRITE, rkey=1 << 32),
        SendWr(WrOpcode.RDMA_WRITE, [Sge(0, 1 << 32, 0)]),
        SendWr(WrOpcode.RDMA_WRITE, remote_address="here"),  # type: ignore[arg-type]  # what is tested
    ],
)
def test_what_does_not_fit_is_refused(wr: SendWr) -> None:
    with pytest.raises(UsageError):
        encode_send(wr, max_sge=2, max_inline=64)


def test_numbers_that_do_not_fit_an_array_are_refused() -> None:
    with pytest.raises(UsageError, match="3 work requests"):
        encode_array(
            3,
            128,
            opcode=0,
            wr_id=[1, 2],
            flags=0,
            remote_address=0,
            rkey=0,
            local_address=0,
            length=0,
            lkey=0,
        )


def test_completions_get_their_types() -> None:
    wc = decode_completion((5, 10, 2, 100, 1, 17, 18, 2, 0))
    assert (wc.status, wc.opcode, wc.wc_flags) == (WcStatus.REM_ACCESS_ERR, WcOpcode.RDMA_READ, WcFlags.WITH_IMM)


def test_long_runs_are_cut_into_pieces() -> None:
    pieces = pieces_of(WrOpcode.RDMA_READ, select(slice(0, 25), (30,), (1,), 1), 1000, 5000, piece_bytes=10)
    assert pieces.n == 3
    assert pieces.cut is not None
    batch = pieces.cut(0, 3)
    assert batch.remote_address.tolist() == [1000, 1010, 1020]
    assert batch.local_address.tolist() == [5000, 5010, 5020]
    assert batch.length.tolist() == [10, 10, 5]


def test_cut_runs_of_several_rows_stay_in_order() -> None:
    selection = select((slice(None), slice(2, 6)), (3, 8), (8, 1), 1)
    pieces = pieces_of(WrOpcode.RDMA_WRITE, selection, 0, 0, piece_bytes=3)
    assert pieces.cut is not None
    assert pieces.n == 6
    late = pieces.cut(3, 3)
    assert late.remote_address.tolist() == [13, 18, 21]
    assert late.local_address.tolist() == [7, 8, 11]
    assert late.length.tolist() == [1, 3, 1]


@pytest.mark.parametrize(
    ("wr", "said"),
    [
        (SendWr(WrOpcode.SEND, wr_id=1 << 64), "wr_id .* does not fit: it has 64 bits"),
        (SendWr(WrOpcode.SEND_WITH_IMM, imm=-1), "imm .* does not fit: it has 32 bits"),
        (SendWr(WrOpcode.RDMA_READ, [Sge(0, 1, 2), Sge(0, 1 << 32, 2)]), r"sges\[1\].length .* does not fit"),
        (SendWr(WrOpcode.RDMA_WRITE, remote_address="0x7f"), "remote_address .* has to be an integer"),  # type: ignore[arg-type]
        (SendWr(WrOpcode.RDMA_WRITE, [(0, 1)]), r"sges\[0\] .* is no Sge"),  # type: ignore[list-item]  # the wrong move
        (SendWr(WrOpcode.SEND, inline="text"), "takes bytes, not str"),  # type: ignore[arg-type]  # the wrong move
        (RecvWr(wr_id=-1), "wr_id .* does not fit"),
    ],
)
def test_what_cannot_be_encoded_is_named(wr: SendWr | RecvWr, said: str) -> None:
    def encode() -> bytes:
        return encode_send(wr, max_sge=2, max_inline=64) if isinstance(wr, SendWr) else encode_recv(wr, max_sge=2)

    with pytest.raises(UsageError, match=said):
        encode()


def test_inline_bytes_of_any_buffer_are_counted_in_bytes() -> None:
    numbers = np.arange(4, dtype=np.float64)
    entry = encode_send(SendWr(WrOpcode.SEND, inline=numbers), max_sge=0, max_inline=32)  # type: ignore[arg-type]
    assert header(entry)["inline_length"] == 32
    assert entry[WQE_HEADER_BYTES:] == numbers.tobytes()
    with pytest.raises(UsageError, match="32 inline bytes; this queue pair takes 31"):
        encode_send(SendWr(WrOpcode.SEND, inline=numbers), max_sge=0, max_inline=31)  # type: ignore[arg-type]  # wrong


@pytest.mark.parametrize("n", [-1, "two", 2.5])
def test_a_number_of_requests_is_a_number(n: Any) -> None:
    with pytest.raises(UsageError, match="work requests"):
        encode_array(n, 128, opcode=0, wr_id=0, flags=0, remote_address=0, rkey=0, local_address=0, length=0, lkey=0)
