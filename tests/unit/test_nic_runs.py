"""Small WRITEs that are held as one run end exactly as they do one by one, whatever happens to some of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from nopin.model.net.client import SendOptions
from nopin.nic import requester
from nopin.nic.abi import QpState, SendFlags, WcStatus, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.runs import RUN_MIN, WriteRun, decode_writes
from nopin.testing.pair import Pair, Wire, make_pair, send_entry
from nopin.units import U64_MAX

WRITE, READ, SEND = WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.SEND
N = 40
MTU = 1024

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
        assert in_runs == play()
    return in_runs


def writes(pair: Pair, n: int = N, special: SendOptions | None = None) -> None:
    """Post WRITEs of growing length all over three pages of ours and theirs; the one in the middle is `special`."""
    for k in range(n):
        options: SendOptions = {"wr_id": k}
        if special and k == n // 2:
            options.update(special)
        pair.a.post(WRITE, k * 300 + 5, k + 1, to=pair.b.region, at=k * 300 + 9, **options)


def nothing(_pair: Pair) -> None:
    pass


def test_a_run_is_one_from_the_ring_to_its_completion() -> None:
    pair = make_pair(mtu=MTU)
    pair.a.space.memory[:] = 7
    writes(pair)
    pair.a.nic.poll_rings(0)
    (batch,) = pair.a.nic.transmit(0)
    (run,) = pair.a.qp.send.works
    assert isinstance(run, WriteRun)
    assert run.n_psn == N
    pair._deliver(batch, pair.b)
    pair.run()
    assert pair.a.poll() == [(k, WcStatus.SUCCESS) for k in range(N)]
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


@pytest.mark.parametrize(
    ("spoil", "n_succeeded"), [(nothing, N), (_local_hole, None), (_remote_hole, None), (_slow, N), (_no_key, 0)]
)
def test_a_run_ends_like_its_works(monkeypatch: pytest.MonkeyPatch, spoil: Spoil, n_succeeded: int | None) -> None:
    outcome = both_ways(monkeypatch, lambda: played(writes, spoil))
    statuses = [status for _, status in outcome.completions]
    assert [wr_id for wr_id, _ in outcome.completions] == list(range(N))
    n_good = statuses.count(WcStatus.SUCCESS)
    assert statuses[:n_good] == [WcStatus.SUCCESS] * n_good
    assert statuses[n_good + 1 :] == [WcStatus.WR_FLUSH_ERR] * (N - n_good - 1)
    if n_succeeded is None:
        assert 0 < n_good < N
    else:
        assert n_good == n_succeeded


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
def test_a_run_goes_as_far_as_works_are_alike(monkeypatch: pytest.MonkeyPatch, special: SendOptions) -> None:
    both_ways(monkeypatch, lambda: played(lambda pair: writes(pair, special=special), nothing))


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
    assert (outcome.completions[-1][1] == WcStatus.SUCCESS) == (opcode != 99)


@pytest.mark.parametrize("sge", [(0, 8, None), (0, 8, 12345), (-8, 8, None), (0, MTU + 1, None), (0, 0, None)])
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


@pytest.mark.parametrize("seed", range(6))
def test_lost_packets_of_runs_are_sent_again(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def play() -> Outcome:
        rng = random.Random(seed)

        def post(pair: Pair) -> None:
            for _ in range(5):
                writes(pair, 45)

        return played(post, nothing, lambda packet, _number: [] if rng.random() < 0.2 else [packet])

    outcome = both_ways(monkeypatch, play)
    assert [status for _, status in outcome.completions] == [WcStatus.SUCCESS] * 225


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
        assert pair.a.poll() == [(k, WcStatus.SUCCESS) for k in range(90)]
        assert np.array_equal(pair.b.space.memory[1000 * nth :][:720], pair.a.space.memory[1000 * nth :][:720])


def test_a_run_under_way_goes_no_further_in_sqd() -> None:
    """SQD finishes what is on the wire; what the window kept back waits for RTS."""
    pair = make_pair(mtu=MTU)
    pair.a.qp.send.window = 16
    writes(pair)
    pair.a.nic.poll_rings(0)
    list(pair.a.nic.transmit(0))  # lost on the way
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.SQD), 0)
    pair.run()
    assert [wr_id for wr_id, _ in pair.a.poll()] == list(range(16))
    assert pair.a.qp.drained
    pair.a.nic.modify_qp(pair.a.qp, QpAttr(state=QpState.RTS), pair.now)
    pair.run()
    assert pair.a.poll() == [(k, WcStatus.SUCCESS) for k in range(16, N)]


def test_an_acknowledgement_inside_a_run_completes_what_it_covers() -> None:
    pair = make_pair(mtu=MTU)
    pair.a.qp.send.window = 16
    writes(pair)
    pair.a.nic.poll_rings(0)
    (batch,) = pair.a.nic.transmit(0)
    pair._deliver(batch, pair.b)
    for reply in pair.b.nic.transmit(0):
        pair._deliver(reply, pair.a)
    assert [wr_id for wr_id, _ in pair.a.poll()] == list(range(16))
    (run,) = pair.a.qp.send.works
    assert run.n_psn == N - 16
    assert run.first_psn == pair.a.qp.send.una


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
    assert statuses == [WcStatus.SUCCESS] * 16 + [WcStatus.LOC_PROT_ERR] + [WcStatus.WR_FLUSH_ERR] * (N - 17)


def test_too_few_make_no_run() -> None:
    pair = make_pair(mtu=MTU)
    region = pair.a.region
    entry = send_entry(WRITE, [(region.iova, 8, region.lkey)]).ljust(128, b"\0")
    regions, pd = pair.a.nic._core.regions, pair.a.qp.pd
    posts = np.frombuffer(entry * RUN_MIN, np.uint8).reshape(-1, 128)
    assert decode_writes(posts, regions, pd, MTU) is not None
    assert decode_writes(posts[1:], regions, pd, MTU) is None
