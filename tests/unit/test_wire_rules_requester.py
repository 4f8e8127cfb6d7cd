"""The requester's rules of reliable connections, one test each, judged by the packets it puts on the wire.

The peer here is the test itself: it answers by hand, or does not. Numbers in comments are sections of IBTA volume 1.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from nopin.nic.abi import QpState, SendFlags, WcStatus, WrOpcode
from nopin.nic.requester import ACK_EVERY_PACKETS
from nopin.nic.wire.aeth import SYNDROME_ACK, Nak
from nopin.nic.wire.batch import Path
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.opcodes import Opcode as Op
from nopin.testing.packets import Seen, aeth_bytes, make_packet, sealed_batch, seen
from nopin.testing.pair import connect, make_side
from nopin.units import MS_NS

MTU = 256
FIRST = 0xFFFFFC
"""The first PSN: the tests run over the wrap."""
REMOTE = 0x10_0000
TIMEOUT_NS = 4096 << 14


class Requester:
    """A NIC that asks, and the hand that writes its peer's answers."""

    def __init__(self, **options: Any) -> None:
        self.side = make_side("10.0.0.1", seed=1, n_pages=64)
        self.peer = make_side("10.0.0.2", seed=2, n_pages=1)
        connect(self.side, self.peer, mtu=MTU, psn=FIRST, **options)
        self.qp = self.side.qp
        self.memory = self.side.space.memory
        self.memory[:] = np.arange(len(self.memory)) % 251
        self.path = Path(self.side.nic.endpoint, self.peer.nic.endpoint)
        self.now = 0

    def post(self, opcode: WrOpcode, length: int = 8, **more: Any) -> None:
        self.side.post(opcode, 0, length, remote=REMOTE, rkey=77, **more)

    def sent(self) -> list[Seen]:
        """What the NIC sends now, posted work taken."""
        out: list[Seen] = []
        nic = self.side.nic
        while nic.poll_rings(self.now) or nic.busy:
            for batch in nic.transmit(self.now):
                for offset, length, stride in batch.segments:
                    for at in range(offset, offset + length, stride):
                        out.append(seen(batch.staging.array[at : min(at + stride, offset + length)].tobytes()))
        return out

    def answer(self, opcode: int, n: int, headers: bytes = b"", payload: bytes = b"") -> bytes:
        return make_packet(Bth(opcode, self.qp.qpn, (FIRST + n) & 0xFFFFFF), headers, payload)

    def ack(self, n: int, syndrome: int = SYNDROME_ACK) -> bytes:
        return self.answer(Op.ACKNOWLEDGE, n, aeth_bytes(syndrome, 0))

    def response(self, opcode: Op, n: int, payload: bytes) -> bytes:
        aeth = b"" if opcode is Op.READ_RESPONSE_MIDDLE else aeth_bytes(SYNDROME_ACK, 1)
        return self.answer(opcode, n, aeth, payload)

    def arrive(self, *packets: bytes) -> list[Seen]:
        """Let answers arrive, ICRC right, and return what is sent next."""
        self.side.nic.receive(sealed_batch(packets, self.path), self.now)
        return self.sent()

    def wait(self, ns: int) -> list[Seen]:
        """Let time pass, firing what is due on the way, and return what is sent."""
        out: list[Seen] = []
        end = self.now + ns
        while (due := self.side.nic.next_deadline()) is not None and due <= end:
            self.now = due
            self.side.nic.on_deadline(due)
            out += self.sent()
        self.now = end
        return out

    def statuses(self) -> list[WcStatus]:
        return [status for _, status in self.side.poll()]

    def count(self, name: str) -> int:
        return self.side.nic.counters.as_dict()[name]


@pytest.fixture
def r() -> Requester:
    return Requester()


def psns(packets: list[Seen]) -> list[int]:
    """PSNs counted from the first."""
    return [(packet.bth.psn - FIRST) & 0xFFFFFF for packet in packets]


def opcodes(packets: list[Seen]) -> list[Op]:
    return [packet.opcode for packet in packets]


OK = WcStatus.SUCCESS


# --- what goes out --------------------------------------------------------------------------------------------


def test_a_write_announces_its_whole_length_once_and_asks_for_an_ack_at_its_end(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE, 3 * MTU - 3)
    packets = r.sent()
    assert opcodes(packets) == [Op.WRITE_FIRST, Op.WRITE_MIDDLE, Op.WRITE_LAST]
    assert packets[0].reth == (REMOTE, 77, 3 * MTU - 3)
    assert [packet.bth.ack_req for packet in packets] == [False, False, True]
    assert [len(packet.payload) for packet in packets] == [MTU, MTU, MTU - 3]
    assert [packet.bth.pad for packet in packets] == [0, 0, 3]
    assert packets[2].raw[-7:-4] == bytes(3), "pad bytes are zero"
    assert b"".join(packet.payload for packet in packets) == r.memory[: 3 * MTU - 3].tobytes()


def test_psns_run_on_over_the_wrap_and_a_read_takes_one_for_each_response(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE, 2 * MTU)
    r.post(WrOpcode.RDMA_READ, 4 * MTU + 1)
    r.post(WrOpcode.ATOMIC_FETCH_AND_ADD)
    r.post(WrOpcode.SEND, 0)
    packets = r.sent()
    assert psns(packets) == [0, 1, 2, 7, 8]
    assert opcodes(packets)[2:] == [Op.READ_REQUEST, Op.FETCH_ADD, Op.SEND_ONLY]
    assert [packet.bth.psn for packet in packets][-2:] == [3, 4]
    assert all(packet.bth.ack_req for packet in packets[1:])


def test_inside_a_long_message_an_ack_is_asked_for_now_and_then_and_at_its_end(r: Requester) -> None:
    r.side.qp.send.window = 4 * ACK_EVERY_PACKETS
    n_packets = 2 * ACK_EVERY_PACKETS + 40
    r.post(WrOpcode.RDMA_WRITE, n_packets * MTU)
    asked = [n for n, packet in enumerate(r.sent()) if packet.bth.ack_req]
    assert asked == [ACK_EVERY_PACKETS - 1, 2 * ACK_EVERY_PACKETS - 1, n_packets - 1]


def test_long_reads_are_asked_for_together_once_half_the_window_is_free(r: Requester) -> None:
    r.side.qp.send.window = 8
    for n in range(5):
        r.post(WrOpcode.RDMA_READ, 2 * MTU, wr_id=n)
    assert psns(r.sent()) == [0, 2, 4, 6]
    data = bytes(MTU)
    for psn in (0, 2):
        first = r.arrive(r.response(Op.READ_RESPONSE_FIRST, psn, data))
        last = r.arrive(r.response(Op.READ_RESPONSE_LAST, psn + 1, data))
        assert (psns(first), psns(last)) == ([], [8] if psn else [])


def test_the_packet_that_closes_the_window_asks_for_an_ack(r: Requester) -> None:
    r.side.qp.send.window = 20
    r.post(WrOpcode.RDMA_WRITE, 50 * MTU)
    assert [n for n, packet in enumerate(r.sent()) if packet.bth.ack_req] == [19]


def test_no_more_reads_and_atomics_than_agreed_are_outstanding(r: Requester) -> None:
    for _ in range(6):
        r.post(WrOpcode.ATOMIC_FETCH_AND_ADD)
    assert psns(r.sent()) == [0, 1, 2, 3]
    value = aeth_bytes(SYNDROME_ACK, 1) + struct.pack(">Q", 5)
    assert psns(r.arrive(r.answer(Op.ATOMIC_ACKNOWLEDGE, 0, value))) == [4]


def test_a_fenced_request_waits_for_the_reads_before_it(r: Requester) -> None:
    r.post(WrOpcode.RDMA_READ, 8)
    r.post(WrOpcode.RDMA_WRITE, 8, flags=SendFlags.SIGNALED | SendFlags.FENCE)
    assert opcodes(r.sent()) == [Op.READ_REQUEST]
    assert opcodes(r.arrive(r.response(Op.READ_RESPONSE_ONLY, 0, b"12345678"))) == [Op.WRITE_ONLY]


def test_immediates_and_solicited_bits_are_on_the_last_packet(r: Requester) -> None:
    r.post(WrOpcode.SEND_WITH_IMM, MTU + 1, imm=0xABCD, flags=SendFlags.SIGNALED | SendFlags.SOLICITED)
    first, last = r.sent()
    assert (first.opcode, last.opcode) == (Op.SEND_FIRST, Op.SEND_LAST_IMM)
    assert (first.bth.solicited, last.bth.solicited) == (False, True)
    assert last.raw[12:16] == struct.pack(">I", 0xABCD)


def test_compare_and_swap_carries_swap_before_compare(r: Requester) -> None:
    r.post(WrOpcode.ATOMIC_CMP_AND_SWP, 8, compare_add=11, swap=22)
    (packet,) = r.sent()
    assert struct.unpack(">QIQQ", packet.raw[12:40]) == (REMOTE, 77, 22, 11)


# --- acknowledgements -----------------------------------------------------------------------------------------


def test_one_ack_completes_everything_up_to_it(r: Requester) -> None:
    for k in range(4):
        r.post(WrOpcode.RDMA_WRITE, 8, wr_id=k)
    r.sent()
    r.arrive(r.ack(2))
    assert r.side.poll() == [(0, OK), (1, OK), (2, OK)]


@pytest.mark.parametrize("code", [0, 1, 5, 12, 30, 31])
def test_any_credit_code_is_taken(r: Requester, code: int) -> None:
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    r.arrive(r.ack(0, code))
    assert r.statuses() == [OK]


@pytest.mark.parametrize("n", [-1, -5, 1, 100, 1 << 22])
def test_an_ack_of_nothing_outstanding_is_a_ghost(r: Requester, n: int) -> None:
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    assert r.arrive(r.ack(n)) == []
    assert r.count("ghost_response") == 1
    assert r.statuses() == []
    r.arrive(r.ack(0))
    assert r.statuses() == [OK]


@pytest.mark.parametrize("syndrome", [0x40, 0x80, 0xFF, 0x64, 0x7F])
def test_a_reserved_syndrome_completes_nothing_and_fails_nothing(r: Requester, syndrome: int) -> None:
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    r.arrive(r.ack(0, syndrome))
    assert r.statuses() == []
    assert r.qp.state is QpState.RTS
    assert r.count("malformed_drop") == 1


def test_a_read_response_acknowledges_the_writes_before_it(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE, 8, wr_id=1)
    r.post(WrOpcode.RDMA_READ, 8, wr_id=2)
    r.sent()
    r.arrive(r.response(Op.READ_RESPONSE_ONLY, 1, b"12345678"))
    assert r.side.poll() == [(1, OK), (2, OK)]
    assert r.memory[:8].tobytes() == b"12345678"


def test_an_ack_beyond_a_read_means_its_answer_was_lost_so_it_is_asked_again(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE, 8, wr_id=1)
    r.post(WrOpcode.RDMA_READ, 8, wr_id=2)
    r.post(WrOpcode.RDMA_WRITE, 8, wr_id=3)
    r.sent()
    again = r.arrive(r.ack(2))
    assert r.side.poll() == [(1, OK)]
    assert (opcodes(again), psns(again)) == ([Op.READ_REQUEST, Op.WRITE_ONLY], [1, 2])
    assert r.arrive(r.ack(2)) == [], "once for a gap; what else is lost is the timer's"
    r.arrive(r.response(Op.READ_RESPONSE_ONLY, 1, b"12345678"), r.ack(2))
    assert r.side.poll() == [(2, OK), (3, OK)]


def test_an_ack_beyond_an_atomic_means_the_same(r: Requester) -> None:
    r.post(WrOpcode.ATOMIC_FETCH_AND_ADD)
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    assert opcodes(r.arrive(r.ack(1))) == [Op.FETCH_ADD, Op.WRITE_ONLY]
    assert r.statuses() == []


def test_an_atomic_answer_is_stored_in_our_byte_order(r: Requester) -> None:
    r.post(WrOpcode.ATOMIC_FETCH_AND_ADD)
    r.sent()
    value = 0x0102030405060708
    r.arrive(r.answer(Op.ATOMIC_ACKNOWLEDGE, 0, aeth_bytes(SYNDROME_ACK, 1) + struct.pack(">Q", value)))
    assert r.statuses() == [OK]
    assert struct.unpack("=Q", r.memory[:8].tobytes()) == (value,)


@pytest.mark.parametrize("sizes", [(MTU - 1, 1), (MTU, 0), (MTU, 2), (MTU + 4, 1)])
def test_read_responses_of_the_wrong_size_are_a_bad_response(r: Requester, sizes: tuple[int, int]) -> None:
    r.post(WrOpcode.RDMA_READ, MTU + 1)
    r.sent()
    r.arrive(
        r.response(Op.READ_RESPONSE_FIRST, 0, b"a" * sizes[0]), r.response(Op.READ_RESPONSE_LAST, 1, b"b" * sizes[1])
    )
    assert r.statuses() == [WcStatus.BAD_RESP_ERR]
    assert r.qp.state is QpState.ERR
    assert (r.memory[MTU + 1 : MTU + 300] == np.arange(MTU + 1, MTU + 300) % 251).all()


def test_an_answer_of_the_wrong_kind_completes_nothing(r: Requester) -> None:
    r.post(WrOpcode.RDMA_READ, 8)
    r.sent()
    r.arrive(r.answer(Op.ATOMIC_ACKNOWLEDGE, 0, aeth_bytes(SYNDROME_ACK, 1) + bytes(8)))
    assert r.statuses() == []
    assert (r.memory[:8] == np.arange(8)).all()


# --- retries --------------------------------------------------------------------------------------------------


def test_a_sequence_nak_acknowledges_what_lies_before_and_resends_the_rest(r: Requester) -> None:
    for k in range(4):
        r.post(WrOpcode.RDMA_WRITE, 8, wr_id=k)
    r.sent()
    assert psns(r.arrive(r.ack(2, Nak.SEQUENCE_ERROR))) == [2, 3]
    assert r.side.poll() == [(0, OK), (1, OK)]


def test_a_long_write_resumes_in_its_middle(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE, 5 * MTU)
    r.sent()
    again = r.arrive(r.ack(2, Nak.SEQUENCE_ERROR))
    assert (opcodes(again), psns(again)) == ([Op.WRITE_MIDDLE, Op.WRITE_MIDDLE, Op.WRITE_LAST], [2, 3, 4])
    assert again[0].payload == r.memory[2 * MTU : 3 * MTU].tobytes()


def test_a_read_resumes_with_a_new_request_for_what_is_missing(r: Requester) -> None:
    r.post(WrOpcode.RDMA_READ, 4 * MTU + 9)
    r.sent()
    r.arrive(r.response(Op.READ_RESPONSE_FIRST, 0, b"a" * MTU), r.response(Op.READ_RESPONSE_MIDDLE, 1, b"b" * MTU))
    (again,) = r.wait(TIMEOUT_NS)
    assert (again.opcode, psns([again])) == (Op.READ_REQUEST, [2])
    assert again.reth == (REMOTE + 2 * MTU, 77, 2 * MTU + 9)


def test_a_read_response_out_of_order_is_not_delivered(r: Requester) -> None:
    r.post(WrOpcode.RDMA_READ, 3 * MTU)
    r.sent()
    r.arrive(r.response(Op.READ_RESPONSE_LAST, 2, b"c" * MTU))
    assert r.count("out_of_seq_response") == 1
    assert (r.memory[: 3 * MTU] == np.arange(3 * MTU) % 251).all()


@pytest.mark.parametrize("retry_cnt", [0, 1, 3, 7])
def test_retry_cnt_is_how_often_it_is_sent_again_without_progress(retry_cnt: int) -> None:
    r = Requester(retry_cnt=retry_cnt)
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    assert len(r.wait(20 * TIMEOUT_NS)) == retry_cnt
    assert r.statuses() == [WcStatus.RETRY_EXC_ERR]
    assert r.count("ack_timeout") == retry_cnt + 1


def test_progress_refills_the_retries() -> None:
    r = Requester(retry_cnt=2)
    r.post(WrOpcode.RDMA_WRITE)
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    assert psns(r.wait(2 * TIMEOUT_NS)) == [0, 1, 0, 1]
    r.arrive(r.ack(0))
    assert psns(r.wait(2 * TIMEOUT_NS)) == [1, 1]
    assert r.statuses() == [OK]
    r.wait(TIMEOUT_NS)
    assert r.statuses() == [WcStatus.RETRY_EXC_ERR]


@pytest.mark.parametrize("code", [1, 10, 14])
def test_the_acknowledge_timer_is_4096_ns_times_two_to_its_code(code: int) -> None:
    r = Requester(timeout=code)
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    assert r.wait((4096 << code) - 1) == []
    assert psns(r.wait(1)) == [0]


def test_timer_code_0_waits_for_ever() -> None:
    r = Requester(timeout=0)
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    assert r.side.nic.next_deadline() is None


def test_the_timer_runs_only_while_something_is_outstanding(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    r.arrive(r.ack(0))
    assert r.side.nic.next_deadline() is None


# --- receiver not ready ---------------------------------------------------------------------------------------

RNR_NS = {1: 10_000, 5: 60_000, 12: 640_000, 31: 491_520_000, 0: 655_360_000}


@pytest.mark.parametrize("code", RNR_NS)
def test_an_rnr_nak_is_waited_out_for_the_time_it_names(code: int) -> None:
    r = Requester(timeout=0)
    r.post(WrOpcode.SEND)
    r.sent()
    assert r.arrive(r.ack(0, 0x20 | code)) == []
    assert r.wait(RNR_NS[code] - 1) == []
    assert psns(r.wait(1)) == [0]


def test_an_rnr_nak_acknowledges_what_lies_before_it(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE, 8, wr_id=1)
    r.post(WrOpcode.SEND, 8, wr_id=2)
    r.sent()
    r.arrive(r.ack(1, 0x20 | 12))
    assert r.side.poll() == [(1, OK)]
    assert psns(r.wait(MS_NS)) == [1]


@pytest.mark.parametrize("rnr_retry", [0, 1, 6])
def test_rnr_retry_is_how_often_it_is_tried_again(rnr_retry: int) -> None:
    r = Requester(rnr_retry=rnr_retry)
    r.post(WrOpcode.SEND)
    r.sent()
    for _ in range(rnr_retry):
        r.arrive(r.ack(0, 0x21))
        assert psns(r.wait(10_000)) == [0]
    assert r.statuses() == []
    r.arrive(r.ack(0, 0x21))
    assert r.statuses() == [WcStatus.RNR_RETRY_EXC_ERR]


def test_rnr_retry_7_never_runs_out(r: Requester) -> None:
    r.post(WrOpcode.SEND)
    r.sent()
    for _ in range(100):
        r.arrive(r.ack(0, 0x21))
        assert psns(r.wait(10_000)) == [0]
    r.arrive(r.ack(0))
    assert r.statuses() == [OK]


def test_the_acknowledge_timer_does_not_count_while_an_rnr_wait_runs(r: Requester) -> None:
    r.post(WrOpcode.SEND)
    r.sent()
    r.arrive(r.ack(0, 0x20))  # 655 ms, ten times the timer
    assert r.wait(RNR_NS[0] - 1) == []
    assert r.count("ack_timeout") == 0


# --- fatal answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Nak.INVALID_REQUEST, WcStatus.REM_INV_REQ_ERR),
        (Nak.REMOTE_ACCESS_ERROR, WcStatus.REM_ACCESS_ERR),
        (Nak.REMOTE_OPERATIONAL_ERROR, WcStatus.REM_OP_ERR),
    ],
)
def test_a_fatal_nak_fails_the_request_it_names_and_flushes_the_rest(r: Requester, code: int, status: WcStatus) -> None:
    for k in range(4):
        r.post(WrOpcode.RDMA_WRITE, 8, wr_id=k, flags=SendFlags.SIGNALED if k < 2 else SendFlags.NONE)
    r.sent()
    assert r.arrive(r.ack(1, code)) == []
    assert r.side.poll() == [(0, OK), (1, status), (2, WcStatus.WR_FLUSH_ERR), (3, WcStatus.WR_FLUSH_ERR)]
    assert r.qp.state is QpState.ERR
    r.arrive(r.ack(3))
    assert r.count("wrong_state_drop") == 1


def test_a_fatal_nak_beyond_an_unanswered_read_is_first_a_lost_answer(r: Requester) -> None:
    r.post(WrOpcode.RDMA_READ, 8, wr_id=1)
    r.post(WrOpcode.RDMA_WRITE, 8, wr_id=2)
    r.sent()
    again = r.arrive(r.ack(1, Nak.REMOTE_ACCESS_ERROR))
    assert opcodes(again) == [Op.READ_REQUEST, Op.WRITE_ONLY]
    assert r.statuses() == []


def test_requests_are_not_taken_for_answers(r: Requester) -> None:
    r.post(WrOpcode.RDMA_WRITE)
    r.sent()
    replies = r.arrive(r.answer(Op.READ_RESPONSE_ONLY, 0, aeth_bytes(SYNDROME_ACK, 1), b"12345678"))
    assert replies == []
    assert r.count("ghost_response") == 1
    assert r.statuses() == []
