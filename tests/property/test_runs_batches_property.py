"""Any WRITEs and READs, in batches and windows of any size, end with runs as they do one by one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.nic import requester, whole_reads, whole_writes
from nopin.nic.abi import SendFlags, WcStatus, WrOpcode
from nopin.nic.plan import Plan
from nopin.testing.pair import make_pair
from nopin.units import PAGE_BYTES

MTU = 256
N_PAGES = 16
HALF = N_PAGES * PAGE_BYTES // 2
"""WRITEs go from lower half to lower half, READs between the upper ones: which of the two is first does not show."""


class Posted(NamedTuple):
    """One work request: offsets of the two ends in their half, and bytes."""

    opcode: WrOpcode
    ours: int
    theirs: int
    length: int
    signaled: bool


@dataclass
class Circumstances:
    """What may be special about memory, wire and device.

    Attributes:
        holes, slow: pages of ours and of theirs.
        loss: of a packet, as a probability.
        window: packets that may be outstanding at first.
        plan: packets of a batch.
    """

    holes: tuple[set[int], set[int]]
    slow: tuple[set[int], set[int]]
    loss: float
    window: int
    plan: int
    max_rd_atomic: int
    seed: int


OFFSETS = st.integers(0, HALF - 9 * MTU)
WORK = st.builds(
    Posted,
    st.sampled_from([WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ]),
    OFFSETS,
    OFFSETS,
    st.integers(1, 9 * MTU) | st.just(MTU) | st.just(4 * MTU),
    st.booleans(),
)
WORKS = st.lists(st.lists(WORK, min_size=1, max_size=3).map(lambda few: few * 5), min_size=1, max_size=8).map(
    lambda groups: list(chain.from_iterable(groups))
)
"""Several times the same few, which makes runs."""
PAGES = st.sets(st.integers(0, N_PAGES - 1), max_size=2)
CIRCUMSTANCES = st.builds(
    Circumstances,
    st.tuples(st.just(set[int]()) | PAGES, st.just(set[int]()) | PAGES),
    st.tuples(PAGES, PAGES),
    st.sampled_from([0.0, 0.0, 0.03]),
    st.sampled_from([16, 64, 1024]),
    st.sampled_from([7, 16, 512]),
    st.sampled_from([1, 4, 64]),
    st.integers(0, 1 << 16),
)


def played(works: list[Posted], given: Circumstances) -> tuple[list[tuple[int, WcStatus]], bytes, bytes]:
    """Carry works out; returns completions, and both memories afterwards."""
    rng = random.Random(given.seed)
    loss = given.loss
    pair = make_pair(
        lambda packet, _number: [] if rng.random() < loss else [packet], mtu=MTU, max_rd_atomic=given.max_rd_atomic
    )
    for side, holes, slow in zip((pair.a, pair.b), given.holes, given.slow, strict=True):
        side.nic._core.plan = Plan(given.plan)
        side.space.memory[:] = np.random.default_rng(side is pair.a).integers(0, 256, len(side.space.memory), np.uint8)
        side.space.hole |= holes
        side.space.slow |= slow
    pair.a.qp.send.window = given.window
    for nth, work in enumerate(works):
        half = HALF if work.opcode is WrOpcode.RDMA_READ else 0
        flags = SendFlags.SIGNALED if work.signaled else SendFlags.NONE
        ours, theirs = half + work.ours, half + work.theirs
        pair.a.post(work.opcode, ours, work.length, to=pair.b.region, at=theirs, wr_id=nth, flags=flags)
        if not rng.randrange(20):
            pair._step()
    pair.run()
    assert pair.a.sends.free == pair.a.sends.depth
    return pair.a.poll(), pair.a.space.memory.tobytes(), pair.b.space.memory.tobytes()


@settings(max_examples=150, deadline=None)
@given(WORKS, CIRCUMSTANCES)
def test_works_end_with_runs_as_one_by_one(works: list[Posted], given: Circumstances) -> None:
    in_runs = played(works, given)
    never = 1 << 30
    with (
        patch.object(requester, "RUN_MIN", never),
        patch.object(whole_reads, "RUN_MIN", never),
        patch.object(whole_writes, "RUN_MIN", never),
    ):
        one_by_one = played(works, given)
    if given.loss:  # which packets are lost is not the same then, nor what a failing work had written
        assert [wr_id for wr_id, _ in in_runs[0]] == [wr_id for wr_id, _ in one_by_one[0]]
        if any(given.holes):
            return
    assert in_runs[0] == one_by_one[0]
    failed = next((works[wr_id] for wr_id, status in in_runs[0] if status is not WcStatus.SUCCESS), None)
    if failed is None or failed.opcode is not WrOpcode.RDMA_READ:  # what follows a READ need not wait for it (IBTA)
        assert in_runs == one_by_one
