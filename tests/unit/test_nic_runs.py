"""WRITEs and READs that are handled as one run end exactly as they do one by one, whatever happens to some of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from nopin.model.net.client import SendOptions
from nopin.nic import requester, whole_reads, whole_writes
from nopin.nic.abi import QpState, SendFlags, WcStatus, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.plan import Plan
from nopin.nic.runs import RUN_MIN, Run, decode_run
from nopin.nic.wire.batch import Path
from nopin.nic.wire.bth import PAD_SHIFT
from nopin.nic.wire.opcodes import Opcode
from nopin.nic.wire.psn import psn_add
from nopin.testing.packets import sealed_batch
from nopin.testing.pair import Pair, Wire, make_pair, send_entry
from nopin.units import PAGE_BYTES, U64_MAX

OK, FLUSHED = WcStatus.SUCCESS, WcStatus.WR_FLUSH_ERR
ALL_WRITES = (Opcode.WRITE_ONLY, Opcode.WRITE_FIRST, Opcode.WRITE_MIDDLE, Opcode.WRITE_LAST)
WRITE, READ, SEND = WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.SEND
N = 40
MTU = 1024
SHORT, LONG = 1, 130
"""By how many bytes each WRITE is longer than the one before: all of one packet, or up to five."""

Post = Callable[..., None]
Spoil = Callable[[Pair], None]


@dataclass
class Outcome:
    """What a client and its peer see of some work."""

    completions: list[tuple[int, WcStatus]]
    ours: bytes
    theirs: bytes
    refused: int


def played(post: Callable[[Pair], None], spoil: Spoil, wire: Wire | None = None) -> Outcome:
    pair = make_pair(wire, mtu=MTU)
    rng = np.random.default_rng(3)
    for side in (pair.a, pair.b):
        side.space.memory[:] = rng.integers(0, 256, len(side.space.memory), np.uint8)
    spoil(pair)
    post(pair)
    pair.run()
    ours, theirs = pair.a.space.memory.tobytes(), pair.b.space.memory.tobytes()
    return Outcome(pair.a.poll(), ours, theirs, pair.b.nic.counters.access_error)


def both_ways(monkeypatch: pytest.MonkeyPatch, play: Callable[[], Outcome]) -> Outcome:
    """Play something with runs and without, which must come to the same; returns that."""
    in_runs = play()
    with monkeypatch.context() as patch:
        patch.setattr(requester, "RUN_MIN", 1 << 30)
        patch.setattr(whole_reads, "RUN_MIN", 1 << 30)
        patch.setattr(whole_writes, "RUN_MIN", 1 << 30)
        assert in_runs == play()
    return in_runs


def reads(pair: Pair, n: int = N, special: SendOptions | None = None, step: int = SHORT) -> None:
    """Post READs of growing length all over three pages of ours and theirs; the one in the middle is `special`."""
    writes(pair, n, special, step, READ)


def writes(
    pair: Pair, n: int = N, special: SendOptions | None = None, step: int = SHORT, opcode: WrOpcode = WRITE
) -> None:
    """Post WRITEs of growing length all over three pages of ours and theirs; the one in the middle is `special`."""
    for k in range(n):
        options: SendOptions = {"wr_id": k}
        if special and k == n // 2:
            options.update(special)
        pair.a.post(opcode, k * 300 + 5, k * step + 1, to=pair.b.region, at=k * 300 + 9, **options)


def n_packets(n: int, step: int) -> int:
    """Packets of the first n of those WRITEs."""
    return sum(-(-(k * step + 1) // MTU) for k in range(n))


def nothing(_pair: Pair) -> None:
    pass


@pytest.mark.parametrize("step", [SHORT, LONG])
def test_a_run_is_one_from_the_ring_to_its_completion(step: int) -> None:
    pair = make_pair(mtu=MTU)
    pair.a.space.memory[:] = 7
    writes(pair, step=step)
    pair.a.nic.poll_rings(0)
    (batch,) = pair.a.nic.transmit(0)
    (run,) = pair.a.qp.send.works
    assert isinstance(run, Run)
    assert run.n_psn == n_packets(N, step)
    n_before = pair.b.space.n_copies
    pair._deliver(batch, pair.b)
    assert pair.b.space.n_copies == n_before + 1
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(N)]
    assert not pair.a.qp.send.works


def _local_hole(pair: Pair) -> None:
    pair.a.space.hole.add(1)


def _remote_hole(pair: Pair) -> None:
    pair.b.space.hole.add(1)


def _slow(pair: Pair) -> None:
    pair.a.space.slow |= {0, 2}
    pair.b.space.slow |= {1, 2}


def _no_key(pair: Pair) -> None:
    pair.b.nic.deregister(pair.b.region)


@pytest.mark.parametrize("post", [writes, reads])
@pytest.mark.parametrize("step", [SHORT, LONG])
@pytest.mark.parametrize(
    ("spoil", "n_succeeded"), [(nothing, N), (_local_hole, None), (_remote_hole, None), (_slow, N), (_no_key, 0)]
)
def test_a_run_ends_like_its_works(
    monkeypatch: pytest.MonkeyPatch, spoil: Spoil, n_succeeded: int | None, step: int, post: Post
) -> None:
    outcome = both_ways(monkeypatch, lambda: played(lambda pair: post(pair, step=step), spoil))
    statuses = [status for _, status in outcome.completions]
    assert [wr_id for wr_id, _ in outcome.completions] == list(range(N))
    n_good = statuses.count(OK)
    assert statuses[:n_good] == [OK] * n_good
    assert statuses[n_good + 1 :] == [FLUSHED] * (N - n_good - 1)
    if n_succeeded is None:
        assert 0 < n_good < N
    else:
        assert n_good == n_succeeded


@pytest.mark.parametrize("post", [writes, reads])
@pytest.mark.parametrize("step", [SHORT, LONG])
@pytest.mark.parametrize(
    "special",
    [
        {"flags": SendFlags.NONE},
        {"flags": SendFlags.SIGNALED | SendFlags.FENCE},
        {"flags": SendFlags.SIGNALED | SendFlags.SOLICITED},
        {"inline": b"twelve bytes"},
        {"imm": 5},
        {"rkey": 1},
        {"remote": U64_MAX},
    ],
)
def test_a_run_goes_as_far_as_works_are_alike(
    monkeypatch: pytest.MonkeyPatch, special: SendOptions, step: int, post: Post
) -> None:
    both_ways(monkeypatch, lambda: played(lambda pair: post(pair, special=special, step=step), nothing))


@pytest.mark.parametrize("opcode", [READ, SEND, WrOpcode.ATOMIC_FETCH_AND_ADD, 99])
def test_work_of_another_kind_ends_a_run_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch, opcode: int) -> None:
    def post(pair: Pair) -> None:
        for k in range(4):
            pair.b.post_recv(200_000 + 100 * k, 100, wr_id=k)
        for k in range(3):
            writes(pair, 10)
            sge = (pair.a.region.iova + 50_000 + 8 * k, 8, pair.a.region.lkey)
            at = pair.b.region.iova + 5 + 8 * k + -(pair.b.region.iova + 5) % 8
            entry = send_entry(opcode, [sge], wr_id=100 + k, remote=at, rkey=pair.b.region.rkey)  # type: ignore[arg-type]  # 99 is what a client may write
            pair.a.sends.post([entry])
        writes(pair, 10)

    outcome = both_ways(monkeypatch, lambda: played(post, nothing))
    assert (outcome.completions[-1][1] == OK) == (opcode != 99)


@pytest.mark.parametrize("sge", [(0, 8, None), (0, 8, 12345), (-8, 8, None), (0, 256 * MTU + 1, None), (0, 0, None)])
def test_a_work_that_does_not_fit_a_run_ends_it(
    monkeypatch: pytest.MonkeyPatch, sge: tuple[int, int, int | None]
) -> None:
    def post(pair: Pair) -> None:
        at, length, lkey = sge
        region = pair.a.region
        writes(pair, 10)
        local = (region.iova + at, length, region.lkey if lkey is None else lkey)
        pair.a.sends.post([send_entry(WRITE, [local], remote=pair.b.region.iova, rkey=pair.b.region.rkey)])
        writes(pair, 10)

    both_ways(monkeypatch, lambda: played(post, nothing))


@pytest.mark.parametrize("post", [writes, reads])
@pytest.mark.parametrize("step", [SHORT, LONG])
@pytest.mark.parametrize("seed", range(6))
def test_lost_packets_of_runs_are_sent_again(monkeypatch: pytest.MonkeyPatch, seed: int, step: int, post: Post) -> None:
    def play() -> Outcome:
        rng = random.Random(seed)

        def several(pair: Pair) -> None:
            for _ in range(5):
                post(pair, 45, step=step)

        loss = 0.1 if step == SHORT else 0.05
        return played(several, nothing, lambda packet, _number: [] if rng.random() < loss else [packet])

    outcome = both_ways(monkeypatch, play)
    assert [status for _, status in outcome.completions] == [OK] * 225


def test_reads_of_a_run_are_answered_and_placed_by_one_copy_a_batch_at_either_end() -> None:
    pair = make_pair(mtu=MTU, max_rd_atomic=64)
    pair.b.space.memory[:] = 7
    reads(pair, step=LONG)
    n_before = pair.a.space.n_copies
    pair.run()
    assert pair.b.space.n_copies == 1
    assert pair.b.qp.recv.msn == N
    assert len(pair.b.qp.recv.saved) == N
    assert pair.a.poll() == [(k, OK) for k in range(N)]
    assert all((pair.a.space.memory[k * 300 + 5 :][: k * LONG + 1] == 7).all() for k in range(N))
    assert pair.a.space.n_copies - n_before == 1


def test_a_source_that_is_deregistered_while_a_run_is_answered_ends_it_at_the_response_that_is_next() -> None:
    pair = make_pair(mtu=MTU, max_rd_atomic=64)
    pair.b.nic._core.plan = Plan(16)
    pair.b.space.memory[:] = 7
    for k in range(6):
        pair.a.post(READ, k * 5 * MTU, 5 * MTU, to=pair.b.region, wr_id=k)
    pair.a.nic.poll_rings(0)
    for batch in pair.a.nic.transmit(0):
        pair._deliver(batch, pair.b)
    for batch in pair.b.nic.transmit(0):
        assert len(batch.arrived().offsets) == 15, "not as many whole READs as fit"
        pair._deliver(batch, pair.a)
    pair.b.nic.deregister(pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, OK), (1, OK), (2, OK), (3, WcStatus.REM_ACCESS_ERR), *[(k, FLUSHED) for k in (4, 5)]]
    assert (pair.a.space.memory[: 15 * MTU] == 7).all()
    assert not pair.a.space.memory[15 * MTU :].any()


def test_a_page_that_is_out_holds_up_only_its_read_and_those_behind() -> None:
    pair = make_pair(mtu=4096, max_rd_atomic=64)
    length, n, bad = 20_000, 12, 7
    pair.b.space.memory[:] = 7
    pair.b.space.slow.add((bad * length + 10_000) // PAGE_BYTES)
    pair.b.answer_faults = False
    for k in range(n):
        pair.a.post(READ, k * length, length, to=pair.b.region, at=k * length, wr_id=k)
    for _ in range(3):
        pair._step()
    assert pair.b.qp.recv.stream_parked_at is not None
    assert pair.a.poll() == [(k, OK) for k in range(bad)]
    pair.b.answer_faults = True
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(bad, n)]
    assert (pair.a.space.memory[: n * length] == 7).all()


def test_reads_of_a_run_wait_while_more_are_under_way_than_may_be_now() -> None:
    pair = make_pair(mtu=MTU, max_rd_atomic=8)
    pair.b.space.memory[:] = 7
    pair.b.space.slow.add(0)
    pair.b.answer_faults = False
    reads(pair)
    pair._step()
    assert len(pair.a.qp.send.asked) == 8
    pair.a.qp.attr.max_rd_atomic = 2
    pair.a.nic._core.ready[pair.a.qp] = None
    pair._step()
    assert len(pair.a.qp.send.asked) == 8
    pair.b.answer_faults = True
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(N)]


def test_reads_of_a_run_that_do_not_fit_the_window_any_more_are_asked_for_in_parts() -> None:
    """Requests are lost until the window is smaller than one READ."""
    n_lost = 0

    def wire(packet: bytes, _number: int) -> list[bytes]:
        nonlocal n_lost
        lost = packet[0] == Opcode.READ_REQUEST and n_lost < 6
        n_lost += lost
        return [] if lost else [packet]

    pair = make_pair(wire, mtu=MTU)
    pair.b.space.memory[:] = 7
    pair.a.qp.send.window = 256
    for k in range(8):
        pair.a.post(READ, 0, 100 * MTU, to=pair.b.region, wr_id=k)
    pair._step()
    assert isinstance(pair.a.qp.send.works[0], Run)
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(8)]
    assert (pair.a.space.memory[: 100 * MTU] == 7).all()
    assert pair.a.nic.counters.ack_timeout >= 3, "the window was never smaller than a READ"


def test_only_signaled_works_of_a_run_complete() -> None:
    pair = make_pair(mtu=MTU)
    for k in range(N):
        flags = SendFlags.SIGNALED if k in (3, 20, 21) else SendFlags.NONE
        pair.a.post(WRITE, k, 8, to=pair.b.region, at=8 * k, wr_id=k, flags=flags)
    pair.run()
    assert [wr_id for wr_id, _ in pair.a.poll()] == [3, 20, 21]
    assert pair.a.sends.free == pair.a.sends.depth


def test_runs_follow_each_other_round_the_ring() -> None:
    pair = make_pair(mtu=MTU)
    pair.a.space.memory[:] = np.arange(len(pair.a.space.memory)) % 251
    for nth in range(20):
        for k in range(90):
            at = 1000 * nth + 8 * k
            pair.a.post(WRITE, at, 8, to=pair.b.region, at=at, wr_id=k)
        pair.run()
        assert pair.a.poll() == [(k, OK) for k in range(90)]
        assert np.array_equal(pair.b.space.memory[1000 * nth :][:720], pair.a.space.memory[1000 * nth :][:720])


@pytest.mark.parametrize("post", [writes, reads])
def test_a_run_under_way_goes_no_further_in_sqd(post: Post) -> None:
    """SQD finishes what is on the wire; what the window kept back waits for RTS."""
    pair = make_pair(mtu=MTU, max_rd_atomic=64)
    pair.a.qp.send.window = 16
    post(pair)
    pair.a.nic.poll_rings(0)
    list(pair.a.nic.transmit(0))  # lost on the way
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.SQD), 0)
    pair.run()
    assert [wr_id for wr_id, _ in pair.a.poll()] == list(range(16))
    assert pair.a.qp.drained
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.RTS), pair.now)
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(16, N)]


def test_a_message_in_the_middle_that_may_not_be_written_ends_all_at_its_first_packet() -> None:
    pair = make_pair(mtu=MTU)
    pair.a.space.memory[:] = 7
    middle = N // 2
    writes(pair, special={"remote": pair.b.region.iova + pair.b.region.length - 1}, step=LONG)
    first = pair.b.qp.recv.epsn
    pair.run()
    statuses = [status for _, status in pair.a.poll()]
    assert statuses == [OK] * middle + [WcStatus.REM_ACCESS_ERR] + [FLUSHED] * (N - middle - 1)
    assert pair.b.qp.recv.epsn == psn_add(first, n_packets(middle, LONG))
    assert pair.b.qp.recv.msn == middle
    written = max(k * 300 + 9 + k * LONG + 1 for k in range(middle))
    assert pair.b.space.memory[written - 1] == 7
    assert not pair.b.space.memory[written:].any()


def test_a_page_that_is_out_holds_up_only_its_message_and_those_behind() -> None:
    pair = make_pair(mtu=4096)
    length, n, bad = 20_000, 12, 7
    pair.a.space.memory[:] = 7
    pair.b.space.slow.add((bad * length + 10_000) // PAGE_BYTES)
    pair.b.answer_faults = False
    for k in range(n):
        pair.a.post(WRITE, 0, length, to=pair.b.region, at=k * length, wr_id=k)
    pair._step()
    assert pair.b.qp.recv.parked_at is not None
    assert pair.b.qp.recv.msn >= bad - bad % 3, "those before it, but for the two that were looked at with it, waited"
    assert not pair.b.space.memory[bad * length :].any()
    pair.b.answer_faults = True
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(n)]
    assert (pair.b.space.memory[: n * length] == 7).all()


def test_a_target_that_is_deregistered_between_two_batches_ends_the_run_there() -> None:
    pair = make_pair(mtu=MTU)
    pair.a.space.memory[:] = 7
    pair.a.qp.send.window = 32
    writes(pair, step=LONG)
    pair._step()
    n_done = pair.b.qp.recv.msn
    pair.b.nic.deregister(pair.b.region)
    before = pair.b.space.memory.copy()
    pair.run()
    statuses = [status for _, status in pair.a.poll()]
    assert 0 < n_done < N - 1
    assert statuses == [OK] * n_done + [WcStatus.REM_ACCESS_ERR] + [FLUSHED] * (N - n_done - 1)
    assert np.array_equal(pair.b.space.memory, before)


def test_a_batch_ends_with_a_message_where_that_leaves_it_half_full() -> None:
    pair = make_pair(mtu=MTU)
    pair.a.qp.send.window = 16
    for k in range(8):
        pair.a.post(WRITE, 0, 5 * MTU, to=pair.b.region, wr_id=k)
    pair.a.nic.poll_rings(0)
    (batch,) = pair.a.nic.transmit(0)
    assert len(batch.arrived().offsets) == 15
    for k in range(2):
        pair.a.post(WRITE, 0, 5 * MTU, to=pair.b.region, wr_id=8 + k)
    pair.run()
    assert pair.a.poll() == [(k, OK) for k in range(10)]


@pytest.mark.parametrize("seed", range(12))
def test_a_packet_that_does_not_belong_into_its_message_is_refused_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def play() -> Outcome:
        rng = random.Random(seed)
        paths: list[Path] = []

        def post(pair: Pair) -> None:
            assert pair.b.qp.path is not None
            paths.append(pair.b.qp.path)
            writes(pair, step=LONG)

        def wire(packet: bytes, number: int) -> list[bytes]:
            return [changed(packet, paths[0], rng)] if number == 30 + seed else [packet]

        return played(post, nothing, wire)

    outcome = both_ways(monkeypatch, play)
    assert {status for _, status in outcome.completions} & {WcStatus.REM_INV_REQ_ERR, WcStatus.REM_ACCESS_ERR}


def changed(packet: bytes, path: Path, rng: random.Random) -> bytes:
    """Return a packet with another opcode, pad or length, and the right ICRC for that."""
    body = bytearray(packet)
    change = rng.choice(["opcode", "pad", "length"])
    if change == "opcode":
        body[0] = rng.choice([op for op in ALL_WRITES if op != body[0]])
    elif change == "pad":
        body[1] ^= rng.choice([1, 2, 3]) << PAD_SHIFT
    else:
        del body[-8:-4]
    return sealed_batch([bytes(body)], path).buffer.tobytes()


@pytest.mark.parametrize("step", [SHORT, LONG])
def test_an_acknowledgement_inside_a_run_completes_what_it_covers(step: int) -> None:
    pair = make_pair(mtu=MTU)
    pair.a.qp.send.window = 16
    writes(pair, step=step)
    pair.a.nic.poll_rings(0)
    (batch,) = pair.a.nic.transmit(0)
    pair._deliver(batch, pair.b)
    for reply in pair.b.nic.transmit(0):
        pair._deliver(reply, pair.a)
    n_done = next(n for n in range(N) if n_packets(n + 1, step) > 16)
    assert [wr_id for wr_id, _ in pair.a.poll()] == list(range(n_done))
    (run,) = pair.a.qp.send.works
    assert run.n_psn == n_packets(N, step) - n_packets(n_done, step)
    assert psn_add(run.first_psn, pair.a.qp.send.acked) == pair.a.qp.send.una


def test_a_region_that_goes_takes_its_run_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def play() -> Outcome:
        def post(pair: Pair) -> None:
            pair.a.qp.send.window = 16
            writes(pair)
            pair.a.nic.poll_rings(0)
            for batch in pair.a.nic.transmit(0):
                pair._deliver(batch, pair.b)
            pair.a.nic.deregister(pair.a.region)

        return played(post, nothing)

    outcome = both_ways(monkeypatch, play)
    statuses = [status for _, status in outcome.completions]
    assert statuses == [OK] * 16 + [WcStatus.LOC_PROT_ERR] + [FLUSHED] * (N - 17)


def test_too_few_make_no_run() -> None:
    pair = make_pair(mtu=MTU)
    region = pair.a.region
    entry = send_entry(WRITE, [(region.iova, 8, region.lkey)]).ljust(128, b"\0")
    regions, pd = pair.a.nic._core.regions, pair.a.qp.pd
    posts = np.frombuffer(entry * RUN_MIN, np.uint8).reshape(-1, 128)
    assert decode_run(posts, regions, pd, MTU, 1024) is not None
    assert decode_run(posts[1:], regions, pd, MTU, 1024) is None
