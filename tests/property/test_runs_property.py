"""Messages in rows, of any sizes, over a bad wire, into memory that is slow, gone or forbidden: as one after the other.

What a client may rely on is simple, and is all that is compared: works complete in order; those before the first that
is bad succeed, that one says what is wrong (or that nobody answers, if the wire loses the only NAK of a queue pair in
error), those behind it are flushed; every byte of a success has arrived, and no byte has changed that was not named.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.nic.abi import SendFlags, WcStatus, WrOpcode
from nopin.testing.pair import Pair, Wire, make_pair, send_entry
from nopin.units import PAGE_BYTES

READ, WRITE, SEND = WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.SEND
OK, FLUSHED = WcStatus.SUCCESS, WcStatus.WR_FLUSH_ERR
REMOTE, LOCAL = WcStatus.REM_ACCESS_ERR, WcStatus.LOC_PROT_ERR
SOURCE, TARGET = 0, 512
"""Pages that bytes come from and go to, on either side."""

GOOD, WRONG_KEY, BEYOND, THEIR_HOLE, OUR_HOLE = "good", "wrong key", "beyond the region", "their hole", "our hole"


@dataclass(frozen=True)
class Work:
    """One request: `slot` is the first byte of its own place, the same on both sides and in both areas."""

    opcode: WrOpcode
    slot: int
    length: int
    signaled: bool
    trouble: str = GOOD

    @property
    def status(self) -> WcStatus:
        return OK if self.trouble == GOOD else LOCAL if self.trouble == OUR_HOLE else REMOTE


rows = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE, READ, WRITE, SEND]),
        st.lists(st.integers(1, 3000) | st.sampled_from([1, 255, 256, 257, 512, 9000]), min_size=1, max_size=12),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
troubles = st.none() | st.tuples(st.integers(0, 60), st.sampled_from([WRONG_KEY, BEYOND, THEIR_HOLE, OUR_HOLE]))
wires = st.tuples(st.integers(0, 1 << 20), st.sampled_from([0.0, 0.02, 0.1]), st.booleans())


def works_of(drawn: list[tuple[WrOpcode, list[int], bool]], trouble: tuple[int, str] | None) -> list[Work]:
    works, at = [], 0
    for opcode, lengths, signaled in drawn:
        for length in lengths:
            works.append(Work(opcode, at, length, signaled))
            at += length + 7
    if trouble is None:
        return works
    nth, what = trouble[0] % len(works), trouble[1]
    bad = works[nth]
    if bad.opcode is SEND and what != OUR_HOLE:
        return works
    # a place of its own, so that its hole is nobody else's
    page = -(-at // PAGE_BYTES) + 1
    works[nth] = Work(bad.opcode, page * PAGE_BYTES + 100, bad.length, True, what)
    return works


def bad_wire(seed: int, rate: float, mixes: bool) -> Wire:
    rng = random.Random(seed)
    held: dict[bytes, list[bytes]] = {}  # by destination

    def wire(packet: bytes, _number: int) -> list[bytes]:
        late = held.setdefault(packet[5:8], [])
        out, late[:] = list(late), []
        if rng.random() < rate:
            return out
        if mixes and rng.random() < rate:
            late.append(packet)
            return out
        return [packet, *out] + ([packet] if mixes and rng.random() < rate else [])

    return wire


def spoil(pair: Pair, works: list[Work]) -> None:
    for work in works:
        first, last = work.slot // PAGE_BYTES, (work.slot + work.length - 1) // PAGE_BYTES
        if work.trouble == THEIR_HOLE:
            pair.b.space.hole.add((SOURCE if work.opcode is READ else TARGET) + last)
        elif work.trouble == OUR_HOLE:
            pair.a.space.hole.add((TARGET if work.opcode is READ else SOURCE) + first)


def post(pair: Pair, works: list[Work]) -> None:
    a, b = pair.a, pair.b
    for nth, work in enumerate(works):
        ours, theirs = (TARGET, SOURCE) if work.opcode is READ else (SOURCE, TARGET)
        flags = SendFlags.SIGNALED if work.signaled or nth == len(works) - 1 else 0
        sge = [(a.region.iova + ours * PAGE_BYTES + work.slot, work.length, a.region.lkey)]
        at = b.region.iova + theirs * PAGE_BYTES + work.slot
        if work.trouble == BEYOND:
            at = b.region.iova + b.region.length - work.length + 1
        if work.opcode is SEND:
            b.post_recv(TARGET * PAGE_BYTES + work.slot, work.length, wr_id=nth)
        rkey = b.region.rkey ^ (1 if work.trouble == WRONG_KEY else 0)
        a.sends.post([send_entry(work.opcode, sge, wr_id=nth, flags=flags, remote=at, rkey=rkey)])


@settings(max_examples=300, deadline=None)
@given(rows, troubles, wires, st.sampled_from([256, 1024]), st.integers(1, 16), st.sets(st.integers(0, 40), max_size=8))
def test_rows_of_messages_end_as_they_do_one_by_one(
    drawn: list[tuple[WrOpcode, list[int], bool]],
    trouble: tuple[int, str] | None,
    wire: tuple[int, float, bool],
    mtu: int,
    max_rd_atomic: int,
    slow: set[int],
) -> None:
    works = works_of(drawn, trouble)
    pair = make_pair(bad_wire(*wire), mtu=mtu, max_rd_atomic=max_rd_atomic)
    a, b = pair.a, pair.b
    rng = np.random.default_rng(3)
    for side in (a, b):
        side.space.memory[:] = rng.integers(0, 256, len(side.space.memory), np.uint8)
        side.space.slow = {area + page for area in (SOURCE, TARGET) for page in slow}
    want_a, want_b = a.space.memory.copy(), b.space.memory.copy()
    spoil(pair, works)
    post(pair, works)
    pair.run()

    n_good = next((nth for nth, work in enumerate(works) if work.trouble != GOOD), len(works))
    found = a.poll()
    unanswered = [wr_id for wr_id, status in found if status is WcStatus.RETRY_EXC_ERR]
    n_sure = min([n_good, *unanswered])
    assert not unanswered or (wire[1] and works[n_good].status is REMOTE), "only a NAK is sent but once"
    last = len(works) - 1
    asked = [nth for nth, work in enumerate(works) if work.signaled or nth == last or nth >= n_sure]
    status = WcStatus.RETRY_EXC_ERR if unanswered else works[n_sure].status if n_sure < len(works) else OK
    assert found == [(nth, OK if nth < n_sure else status if nth == n_sure else FLUSHED) for nth in asked]

    for nth, work in enumerate(works):
        source = slice(SOURCE * PAGE_BYTES + work.slot, SOURCE * PAGE_BYTES + work.slot + work.length)
        target = slice(TARGET * PAGE_BYTES + work.slot, TARGET * PAGE_BYTES + work.slot + work.length)
        want, is_there, sent = want_b, b.space.memory, a.space.memory
        if work.opcode is READ:
            want, is_there, sent = want_a, a.space.memory, b.space.memory
        if nth < n_sure:
            want[target] = sent[source]
        elif nth <= n_good or works[n_good].opcode is READ:
            # What fails on the way may have begun, and what follows a READ need not wait for it (IBTA, table of order).
            want[target] = is_there[target]
    assert np.array_equal(a.space.memory, want_a)
    assert np.array_equal(b.space.memory, want_b)
