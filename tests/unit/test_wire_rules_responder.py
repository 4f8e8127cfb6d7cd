"""The responder's rules of reliable connections, one test each, judged by the packets it puts on the wire.

The peer here is the test itself: it makes each packet by hand. Numbers in comments are sections of IBTA volume 1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nopin.nic.abi import Access, QpState, WcStatus
from nopin.nic.attributes import QpAttr
from nopin.nic.wire import icrc
from nopin.nic.wire.aeth import SYNDROME_ACK, Nak
from nopin.nic.wire.batch import Endpoint, Path
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.gid import gid_of
from nopin.nic.wire.opcodes import Opcode as Op
from nopin.testing.packets import Seen, aeth_bytes, atomic_bytes, make_packet, reth_bytes, sealed_batch, seen
from nopin.testing.pair import ALL_RIGHTS, connect, make_side

MTU = 256
FIRST = 0xFFFFF0
"""The PSN expected first: the tests run over the wrap."""

Ext = bytes


def psn_of(n: int) -> int:
    """The PSN n packets after the first."""
    return (FIRST + n) & 0xFFFFFF


class Responder:
    """A NIC that answers, and the hand that writes its peer's packets."""

    def __init__(self, access: Access = ALL_RIGHTS) -> None:
        self.side = make_side("10.0.0.1", seed=1, n_pages=16, access=access)
        self.peer = make_side("10.0.0.2", seed=2, n_pages=1)
        connect(self.side, self.peer, mtu=MTU, psn=FIRST)
        self.qp = self.side.qp
        self.memory = self.side.space.memory
        self.address = self.side.region.iova
        self.rkey = self.side.region.rkey
        self.path = Path(self.side.nic.endpoint, self.peer.nic.endpoint)
        self.memory[:] = np.arange(len(self.memory)) % 251

    def packet(
        self, opcode: int, n: int, ext: Ext = b"", payload: bytes = b"", *, ack: bool = True, **bth: Any
    ) -> bytes:
        """A packet at the n-th PSN."""
        return make_packet(Bth(opcode, self.qp.qpn, psn_of(n), ack_req=ack)._replace(**bth), ext, payload)

    def write(self, n: int, at: int, payload: bytes, *, ack: bool = True) -> bytes:
        """A whole WRITE in one packet."""
        return self.packet(Op.WRITE_ONLY, n, self.reth(at, len(payload)), payload, ack=ack)

    def read(self, n: int, at: int, length: int) -> bytes:
        return self.packet(Op.READ_REQUEST, n, self.reth(at, length))

    def add(self, n: int, at: int, value: int) -> bytes:
        return self.packet(Op.FETCH_ADD, n, atomic_bytes(self.address + at, self.rkey, value))

    def reth(self, at: int, length: int, rkey: int | None = None) -> bytes:
        return reth_bytes(self.address + at, self.rkey if rkey is None else rkey, length)

    def arrive(self, *packets: bytes, path: Path | None = None) -> list[Seen]:
        """Let packets arrive, ICRC right, and return everything that is sent in answer."""
        self.side.nic.receive(sealed_batch(packets, path or self.path), 0)
        return self.sent()

    def sent(self) -> list[Seen]:
        """What the NIC sends now."""
        out: list[Seen] = []
        while self.side.nic.busy:
            for batch in self.side.nic.transmit(0):
                for offset, length, stride in batch.segments:
                    for at in range(offset, offset + length, stride):
                        raw = batch.staging.array[at : min(at + stride, offset + length)].tobytes()
                        out.append(seen(raw))
        return out

    def count(self, name: str) -> int:
        return self.side.nic.counters.as_dict()[name]


@pytest.fixture
def r() -> Responder:
    return Responder()


def told(replies: list[Seen]) -> list[tuple[Op, int, int, int]]:
    """Opcode, PSN counted from the first, syndrome and MSN of each answer."""
    out = []
    for reply in replies:
        assert reply.aeth is not None
        out.append((reply.opcode, (reply.bth.psn - FIRST) & 0xFFFFFF, reply.aeth.syndrome, reply.aeth.msn))
    return out


def ack(n: int, msn: int) -> tuple[Op, int, int, int]:
    return (Op.ACKNOWLEDGE, n, SYNDROME_ACK, msn)


def nak(n: int, code: int, msn: int) -> tuple[Op, int, int, int]:
    return (Op.ACKNOWLEDGE, n, code, msn)


# --- acknowledgements (9.7.5) ---------------------------------------------------------------------------------


def test_the_first_acknowledgement_carries_msn_1_and_no_credit_limit(r: Responder) -> None:
    assert told(r.arrive(r.write(0, 0, b"x" * 8))) == [ack(0, 1)]


def test_nothing_is_acknowledged_that_did_not_ask(r: Responder) -> None:
    assert r.arrive(r.write(0, 0, b"x" * 8, ack=False)) == []
    assert told(r.arrive(r.write(1, 0, b"y" * 8))) == [ack(1, 2)]


def test_acknowledgements_of_one_batch_are_coalesced(r: Responder) -> None:
    assert told(r.arrive(*(r.write(n, 8 * n, b"x" * 8) for n in range(20)))) == [ack(19, 20)]


def test_the_msn_counts_messages_not_packets(r: Responder) -> None:
    long = [
        r.packet(Op.WRITE_FIRST, 0, r.reth(0, 3 * MTU), b"a" * MTU),
        r.packet(Op.WRITE_MIDDLE, 1, b"", b"b" * MTU),
        r.packet(Op.WRITE_LAST, 2, b"", b"c" * MTU),
    ]
    assert told(r.arrive(*long[:2])) == [ack(1, 0)]
    assert told(r.arrive(long[2])) == [ack(2, 1)]
    assert r.memory[: 3 * MTU].tobytes() == b"a" * MTU + b"b" * MTU + b"c" * MTU


def test_read_and_atomic_answers_carry_the_msn_after_them(r: Responder) -> None:
    replies = r.arrive(r.write(0, 0, b"x" * 8), r.read(1, 0, 2 * MTU), r.add(3, 512, 1))
    first, read_first, read_last, atomic = replies
    assert told([first, read_first, read_last, atomic]) == [
        ack(0, 1),
        (Op.READ_RESPONSE_FIRST, 1, SYNDROME_ACK, 2),
        (Op.READ_RESPONSE_LAST, 2, SYNDROME_ACK, 2),
        (Op.ATOMIC_ACKNOWLEDGE, 3, SYNDROME_ACK, 3),
    ]


def test_a_read_takes_one_psn_for_each_response(r: Responder) -> None:
    replies = r.arrive(r.read(0, 10, 4 * MTU + 1))
    assert [reply.opcode for reply in replies] == [
        Op.READ_RESPONSE_FIRST,
        *[Op.READ_RESPONSE_MIDDLE] * 3,
        Op.READ_RESPONSE_LAST,
    ]
    assert [reply.bth.psn for reply in replies] == [psn_of(n) for n in range(5)]
    assert [len(reply.payload) for reply in replies] == [MTU] * 4 + [1]
    assert replies[-1].bth.pad == 3
    assert b"".join(reply.payload for reply in replies) == r.memory[10 : 10 + 4 * MTU + 1].tobytes()
    assert told(r.arrive(r.write(5, 0, b"x"))) == [ack(5, 2)]


def test_a_read_of_nothing_is_answered_by_one_empty_response_without_looking_at_its_key(r: Responder) -> None:
    (reply,) = r.arrive(r.packet(Op.READ_REQUEST, 0, reth_bytes(0, 0, 0)))
    assert told([reply]) == [(Op.READ_RESPONSE_ONLY, 0, SYNDROME_ACK, 1)]
    assert reply.payload == b""


def test_answers_go_to_the_peers_queue_pair(r: Responder) -> None:
    (reply,) = r.arrive(r.write(0, 0, b"x"))
    assert reply.bth.qpn == r.peer.qp.qpn
    assert (reply.bth.pkey, reply.bth.version, reply.bth.ack_req) == (0xFFFF, 0, False)


# --- duplicates (9.7.5.1.4) -----------------------------------------------------------------------------------


def test_a_duplicate_write_is_acknowledged_with_the_newest_psn_and_not_executed(r: Responder) -> None:
    r.arrive(r.write(0, 0, b"old!" * 2), r.write(1, 100, b"x"))
    assert told(r.arrive(r.write(0, 0, b"new!" * 2))) == [ack(1, 2)]
    assert r.memory[:8].tobytes() == b"old!old!"


def test_a_duplicate_send_takes_no_second_receive(r: Responder) -> None:
    r.side.post_recv(0, 64, wr_id=1)
    r.side.post_recv(0, 64, wr_id=2)
    send = r.packet(Op.SEND_ONLY, 0, b"", b"hello")
    r.arrive(send)
    assert told(r.arrive(send)) == [ack(0, 1)]
    assert r.side.poll() == [(1, WcStatus.SUCCESS)]


def test_a_duplicate_read_is_read_again(r: Responder) -> None:
    r.arrive(r.read(0, 0, 2 * MTU))
    r.memory[:] = 7
    replies = r.arrive(r.read(0, 0, 2 * MTU))
    assert b"".join(reply.payload for reply in replies) == b"\x07" * (2 * MTU)
    assert [reply.bth.psn for reply in replies] == [psn_of(0), psn_of(1)]


def test_a_duplicate_read_may_start_in_the_middle(r: Responder) -> None:
    r.arrive(r.read(0, 0, 4 * MTU))
    replies = r.arrive(r.read(2, 2 * MTU, 2 * MTU))
    assert told(replies) == [
        (Op.READ_RESPONSE_FIRST, 2, SYNDROME_ACK, 1),
        (Op.READ_RESPONSE_LAST, 3, SYNDROME_ACK, 1),
    ]
    assert b"".join(reply.payload for reply in replies) == r.memory[2 * MTU : 4 * MTU].tobytes()


@pytest.mark.parametrize(("at", "length", "wrong_key"), [(1, 256, 0), (-1, 256, 0), (0, 513, 0), (0, 256, 1)])
def test_a_duplicate_read_of_anything_else_is_dropped(r: Responder, at: int, length: int, wrong_key: int) -> None:
    r.arrive(r.read(0, MTU, MTU))
    assert r.arrive(r.packet(Op.READ_REQUEST, 0, r.reth(MTU + at, length, r.rkey ^ wrong_key))) == []
    assert r.count("duplicate_drop") == 1
    assert r.qp.state is QpState.RTS


def test_a_duplicate_atomic_gets_the_saved_value_and_is_not_executed(r: Responder) -> None:
    r.memory[:8] = np.frombuffer(struct.pack("<Q", 40), np.uint8)
    first = r.arrive(r.add(0, 0, 2))
    r.memory[:8] = np.frombuffer(struct.pack("<Q", 1000), np.uint8)
    again = r.arrive(r.add(0, 0, 2))
    assert first[0].raw[16:24] == again[0].raw[16:24] == struct.pack(">Q", 40)
    assert told(again) == [(Op.ATOMIC_ACKNOWLEDGE, 0, SYNDROME_ACK, 1)]
    assert struct.unpack("<Q", r.memory[:8].tobytes()) == (1000,)


def test_saved_requests_are_recycled_oldest_first(r: Responder) -> None:
    r.arrive(*(r.add(n, 8 * n, 1) for n in range(5)))  # four can be saved
    assert r.arrive(r.add(0, 0, 1)) == []
    assert [reply.bth.psn for reply in r.arrive(r.add(1, 8, 1))] == [psn_of(1)]
    assert r.count("duplicate_drop") == 1


def test_an_old_request_of_the_wrong_kind_is_dropped(r: Responder) -> None:
    r.arrive(r.add(0, 0, 1))
    assert r.arrive(r.read(0, 0, 8)) == []
    assert r.qp.state is QpState.RTS


def test_half_the_circle_back_still_counts_as_old(r: Responder) -> None:
    assert told(r.arrive(r.write(-(1 << 23), 0, b"x"))) == [ack(-1 & 0xFFFFFF, 0)]
    assert r.count("duplicate_request") == 1


# --- gaps (9.7.5.1.5) -----------------------------------------------------------------------------------------


def test_a_gap_is_told_once_and_everything_dropped_until_it_is_filled(r: Responder) -> None:
    assert told(r.arrive(r.write(0, 0, b"x"), r.write(2, 0, b"z"), r.write(3, 0, b"z"))) == [
        nak(1, Nak.SEQUENCE_ERROR, 1),
    ]
    assert r.arrive(r.write(4, 0, b"z")) == []
    assert r.memory[0] == ord("x")
    assert told(r.arrive(r.write(1, 0, b"y"), r.write(2, 0, b"z"))) == [ack(2, 3)]


def test_the_next_gap_is_told_again(r: Responder) -> None:
    r.arrive(r.write(1, 0, b"z"))
    r.arrive(r.write(0, 0, b"x"))
    assert told(r.arrive(r.write(2, 0, b"z"))) == [nak(1, Nak.SEQUENCE_ERROR, 1)]


def test_just_below_half_the_circle_ahead_is_a_gap(r: Responder) -> None:
    assert told(r.arrive(r.write((1 << 23) - 1, 0, b"x"))) == [nak(0, Nak.SEQUENCE_ERROR, 0)]


# --- receiver not ready (9.7.5.2.8) ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 12, 31])
def test_a_send_without_a_receive_gets_rnr_with_our_timer_and_the_psn_stays(r: Responder, code: int) -> None:
    r.side.nic.modify_qp(r.qp, QpAttr(min_rnr_timer=code), 0)
    send = r.packet(Op.SEND_ONLY, 0, b"", b"hello")
    assert told(r.arrive(send)) == [nak(0, 0x20 | code, 0)]
    r.side.post_recv(0, 64, wr_id=3)
    assert told(r.arrive(send)) == [ack(0, 1)]
    assert r.side.poll() == [(3, WcStatus.SUCCESS)]


def test_what_follows_an_rnr_nak_is_dropped_in_silence(r: Responder) -> None:
    replies = r.arrive(r.packet(Op.SEND_ONLY, 0, b"", b"hello"), r.write(1, 0, b"x"))
    assert told(replies) == [nak(0, 0x20 | 12, 0)]
    assert r.arrive(r.write(1, 0, b"x")) == []


def test_a_write_with_immediate_waits_at_its_last_packet(r: Responder) -> None:
    first = r.packet(Op.WRITE_FIRST, 0, r.reth(0, MTU + 4), b"a" * MTU, ack=False)
    last = r.packet(Op.WRITE_LAST_IMM, 1, b"\0\0\0\7", b"last")
    assert told(r.arrive(first, last)) == [nak(1, 0x20 | 12, 0)]
    r.side.post_recv(0, 0, wr_id=5)
    assert told(r.arrive(last)) == [ack(1, 1)]
    (completion,) = r.side.completions.poll(4)
    assert (int(completion["wr_id"]), int(completion["imm"]), int(completion["byte_len"])) == (5, 7, MTU + 4)


# --- invalid requests: NAK 61 (9.7.5.2.5) ---------------------------------------------------------------------


def first_write(r: Responder, length: int = 3 * MTU) -> bytes:
    return r.packet(Op.WRITE_FIRST, 0, r.reth(0, length), b"w" * MTU, ack=False)


def first_send(r: Responder) -> bytes:
    return r.packet(Op.SEND_FIRST, 0, b"", b"s" * MTU, ack=False)


Bad = Callable[[Responder], list[bytes]]

BAD_ORDER: dict[str, Bad] = {
    "middle without first": lambda r: [r.packet(Op.WRITE_MIDDLE, 0, b"", b"x" * MTU)],
    "last without first": lambda r: [r.packet(Op.SEND_LAST, 0, b"", b"x")],
    "first after first": lambda r: [first_write(r), r.packet(Op.WRITE_FIRST, 1, r.reth(0, 2 * MTU), b"x" * MTU)],
    "only inside a message": lambda r: [first_write(r), r.write(1, 0, b"x")],
    "send inside a write": lambda r: [first_write(r), r.packet(Op.SEND_MIDDLE, 1, b"", b"x" * MTU)],
    "write inside a send": lambda r: [first_send(r), r.packet(Op.WRITE_LAST, 1, b"", b"x")],
    "read inside a message": lambda r: [first_write(r), r.read(1, 0, 8)],
    "atomic inside a message": lambda r: [first_send(r), r.add(1, 0, 1)],
}
BAD_LENGTH: dict[str, Bad] = {
    "first shorter than the path MTU": lambda r: [r.packet(Op.WRITE_FIRST, 0, r.reth(0, 600), b"x" * (MTU - 4))],
    "first longer than the path MTU": lambda r: [r.packet(Op.WRITE_FIRST, 0, r.reth(0, 600), b"x" * (MTU + 4))],
    "only longer than the path MTU": lambda r: [r.write(0, 0, b"x" * (MTU + 4))],
    "only shorter than its RETH says": lambda r: [r.packet(Op.WRITE_ONLY, 0, r.reth(0, 9), b"x" * 8)],
    "only longer than its RETH says": lambda r: [r.packet(Op.WRITE_ONLY, 0, r.reth(0, 7), b"x" * 8)],
    "first for what fits in one": lambda r: [r.packet(Op.WRITE_FIRST, 0, r.reth(0, MTU), b"x" * MTU)],
    "more packets than its RETH says": lambda r: [
        first_write(r, MTU + 9),
        r.packet(Op.WRITE_MIDDLE, 1, b"", b"x" * MTU),
    ],
    "last longer than what is left": lambda r: [first_write(r, MTU + 9), r.packet(Op.WRITE_LAST, 1, b"", b"x" * 10)],
    "last shorter than what is left": lambda r: [first_write(r, MTU + 9), r.packet(Op.WRITE_LAST, 1, b"", b"x" * 8)],
    "empty last": lambda r: [first_write(r, 2 * MTU), r.packet(Op.WRITE_LAST, 1)],
    "pad in a middle": lambda r: [first_write(r), r.packet(Op.WRITE_MIDDLE, 1, b"", b"x" * (MTU - 1))],
    "pad missing": lambda r: [r.packet(Op.WRITE_ONLY, 0, r.reth(0, 6), b"x" * 8)[:-6] + bytes(4)],
    "payload on a read": lambda r: [r.packet(Op.READ_REQUEST, 0, r.reth(0, 8), b"x" * 4)],
    "message over 2 GiB": lambda r: [r.packet(Op.READ_REQUEST, 0, r.reth(0, (1 << 31) + 1))],
    "misaligned atomic": lambda r: [r.add(0, 4, 1)],
}


@pytest.mark.parametrize("name", [*BAD_ORDER, *BAD_LENGTH])
def test_an_invalid_request_is_refused_at_its_psn_and_fails_the_queue_pair(r: Responder, name: str) -> None:
    r.side.post_recv(4096, 4096, wr_id=1)
    packets = (BAD_ORDER | BAD_LENGTH)[name](r)
    replies = told(r.arrive(*packets))
    assert replies[-1] == nak(len(packets) - 1, Nak.INVALID_REQUEST, 0)
    assert r.qp.state is QpState.ERR
    assert r.arrive(r.write(len(packets) - 1, 0, b"x")) == [], "a failed queue pair answers nothing"
    assert r.count("wrong_state_drop") == 1
    written = r.memory[: MTU if len(packets) == 2 and packets[0][0] == Op.WRITE_FIRST else 0]
    assert written.tobytes() == b"w" * len(written)
    assert np.array_equal(r.memory[len(written) : 4096], np.arange(len(written), 4096) % 251), "the bad packet wrote"


def test_without_responder_resources_reads_and_atomics_are_invalid() -> None:
    for make in (Responder.read, Responder.add):
        r = Responder()
        r.qp.attr.max_dest_rd_atomic = 0
        assert told(r.arrive(make(r, 0, 0, 8))) == [nak(0, Nak.INVALID_REQUEST, 0)]


def test_a_send_longer_than_its_receive_is_invalid(r: Responder) -> None:
    r.side.post_recv(0, 4, wr_id=9)
    assert told(r.arrive(r.packet(Op.SEND_ONLY, 0, b"", b"12345678"))) == [nak(0, Nak.INVALID_REQUEST, 0)]
    assert r.side.poll() == [(9, WcStatus.LOC_LEN_ERR)]


# --- access errors: NAK 62 ------------------------------------------------------------------------------------


def test_an_access_error_names_its_psn_and_acknowledges_all_before(r: Responder) -> None:
    replies = r.arrive(
        r.write(0, 0, b"x"), r.packet(Op.WRITE_ONLY, 1, r.reth(0, 1, r.rkey ^ 5), b"y"), r.write(2, 0, b"z")
    )
    assert told(replies)[-1] == nak(1, Nak.REMOTE_ACCESS_ERROR, 1)
    assert r.memory[0] == ord("x")


@pytest.mark.parametrize(("at", "length"), [(16 * 4096, 1), (16 * 4096 - 3, 4), (-1, 4), (1 << 40, 8)])
@pytest.mark.parametrize("kind", ["write", "read"])
def test_outside_the_region_is_an_access_error(r: Responder, at: int, length: int, kind: str) -> None:
    packet = r.write(0, at, b"x" * length) if kind == "write" else r.read(0, at, length)
    assert told(r.arrive(packet)) == [nak(0, Nak.REMOTE_ACCESS_ERROR, 0)]


def test_a_read_that_loses_its_region_ends_with_a_nak_at_the_first_response_that_is_missing(r: Responder) -> None:
    r.side.space.hole = {1}
    replies = r.arrive(r.read(0, 4096 - 2 * MTU, 4 * MTU))
    assert [reply.opcode for reply in replies] == [Op.READ_RESPONSE_FIRST, Op.READ_RESPONSE_MIDDLE, Op.ACKNOWLEDGE]
    assert told(replies[-1:]) == [nak(2, Nak.REMOTE_ACCESS_ERROR, 0)]


def test_a_receive_that_cannot_be_written_is_an_operational_error(r: Responder) -> None:
    r.side.post_recv(0, 64, wr_id=2)
    r.side.space.hole = {0}
    assert told(r.arrive(r.packet(Op.SEND_ONLY, 0, b"", b"hello"))) == [nak(0, Nak.REMOTE_OPERATIONAL_ERROR, 0)]
    assert r.side.poll() == [(2, WcStatus.LOC_PROT_ERR)]


# --- dropped in silence (9.6) ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        ({"version": 1}, "malformed_drop"),
        ({"pkey": 0x1234}, "malformed_drop"),
        ({"opcode": 0x1F}, "malformed_drop"),
        ({"opcode": 0x64}, "malformed_drop"),
        ({"opcode": 0x81}, "malformed_drop"),
        ({"qpn": 1}, "unknown_qpn_drop"),
        ({"qpn": 0xFFFFFF}, "unknown_qpn_drop"),
    ],
    ids=str,
)
def test_what_the_header_checks_reject_is_dropped_and_counted(
    r: Responder, change: dict[str, Any], counter: str
) -> None:
    packet = r.packet(
        change.get("opcode", Op.WRITE_ONLY),
        0,
        r.reth(0, 4),
        b"abcd",
        **{k: v for k, v in change.items() if k != "opcode"},
    )
    assert r.arrive(packet) == []
    assert r.count(counter) == 1
    assert told(r.arrive(r.write(0, 0, b"x"))) == [ack(0, 1)]


def test_a_limited_members_pkey_matches(r: Responder) -> None:
    packet = r.packet(Op.WRITE_ONLY, 0, r.reth(0, 4), b"abcd", pkey=0x7FFF)
    assert told(r.arrive(packet)) == [ack(0, 1)]


@pytest.mark.parametrize("byte", [0, 3, 5, 11, 20, 29, -1])
def test_a_wrong_icrc_is_dropped_and_counted(r: Responder, byte: int) -> None:
    batch = sealed_batch([r.write(0, 0, b"abcd")], r.path)
    batch.buffer[byte] ^= 0x04
    r.side.nic.receive(batch, 0)
    assert r.sent() == []
    assert r.count("icrc_drop") + r.count("malformed_drop") == 1


def test_congestion_marks_are_outside_the_icrc_and_ignored(r: Responder) -> None:
    batch = sealed_batch([r.write(0, 0, b"abcd")], r.path)
    batch.buffer[4] ^= 0xC0
    r.side.nic.receive(batch, 0)
    assert told(r.sent()) == [ack(0, 1)]


def test_the_icrc_covers_the_addresses(r: Responder) -> None:
    elsewhere = Path(r.path.local, Endpoint(gid_of("10.0.0.3"), 4791))
    batch = sealed_batch([r.write(0, 0, b"abcd")], elsewhere)
    assert not icrc.verify(batch.buffer, batch.offsets, batch.lengths, r.path).any()


def test_another_sender_is_dropped_and_counted(r: Responder) -> None:
    elsewhere = Path(r.path.local, Endpoint(gid_of("10.0.0.3"), 4791))
    assert r.arrive(r.write(0, 0, b"abcd"), path=elsewhere) == []
    assert r.count("wrong_path_drop") == 1


def test_another_source_port_of_the_peer_is_taken(r: Responder) -> None:
    other_port = Path(r.path.local, r.path.remote._replace(port=50000))
    assert told(r.arrive(r.write(0, 0, b"abcd"), path=other_port)) == [ack(0, 1)]


@pytest.mark.parametrize("state", [QpState.RESET, QpState.INIT, QpState.ERR])
def test_states_that_do_not_receive_drop_and_count(state: QpState) -> None:
    r = Responder()
    r.side.nic.modify_qp(r.qp, QpAttr(state=QpState.ERR if state is QpState.ERR else QpState.RESET), 0)
    if state is QpState.INIT:
        r.side.nic.modify_qp(r.qp, QpAttr(state=state, pkey_index=0, port_num=1, access=int(ALL_RIGHTS)), 0)
    before = r.memory.copy()
    assert r.arrive(r.write(0, 0, b"abcd")) == []
    assert r.count("wrong_state_drop") == 1
    assert np.array_equal(r.memory, before)


def test_what_is_too_short_for_a_base_header_is_dropped(r: Responder) -> None:
    whole = sealed_batch([r.write(0, 0, b"abcd")] * 2, r.path)
    whole.lengths[:] = (15, 0)
    r.side.nic.receive(whole, 0)
    assert r.sent() == []
    assert r.count("malformed_drop") == 2


def test_what_is_too_short_for_its_own_headers_is_an_invalid_request(r: Responder) -> None:
    cut = r.write(0, 0, b"abcd")[:20] + bytes(4)
    assert told(r.arrive(cut)) == [nak(0, Nak.INVALID_REQUEST, 0)]


# --- details --------------------------------------------------------------------------------------------------


def test_pad_bytes_are_not_written(r: Responder) -> None:
    packet = make_packet(Bth(Op.WRITE_ONLY, r.qp.qpn, FIRST, ack_req=True), r.reth(0, 5), b"12345", pad_with=b"\xff")
    r.arrive(packet)
    assert r.memory[:9].tobytes() == b"12345" + bytes([5, 6, 7, 8])


def test_the_solicited_bit_marks_the_completion(r: Responder) -> None:
    r.side.post_recv(0, 64)
    r.side.completions.arm(solicited_only=True)
    r.arrive(r.packet(Op.SEND_ONLY, 0, b"", b"x"))
    assert r.side.nic.take_notices() == []
    r.side.post_recv(0, 64)
    r.arrive(r.packet(Op.SEND_ONLY, 1, b"", b"x", solicited=1))
    assert [cq.ring for cq in r.side.nic.take_notices()] == [r.qp.recv_cq.ring]


def test_an_answer_sent_to_a_responder_is_a_ghost(r: Responder) -> None:
    assert r.arrive(r.packet(Op.ACKNOWLEDGE, 0, aeth_bytes(SYNDROME_ACK, 0))) == []
    assert r.count("ghost_response") == 1
