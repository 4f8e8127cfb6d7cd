"""A lone packet goes without arrays: the same outcome as in company, and no timer is forgotten for it."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.nic.abi import WcStatus, WrOpcode
from nopin.testing.pair import make_pair

READ, WRITE, ADD = WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.ATOMIC_FETCH_AND_ADD
SEND, SEND_IMM, SEND_INV = WrOpcode.SEND, WrOpcode.SEND_WITH_IMM, WrOpcode.SEND_WITH_INV
PAGE_BYTES = 4096
_AT = PAGE_BYTES + 5
"""On the owner's second page; the region's odd address makes it a multiple of 8."""


def outcome(opcode: WrOpcode, n: int, spoil: str) -> tuple[list[WcStatus], dict[str, int], bytes, bytes]:
    """Post n equal works at once; return statuses, what the owner's side refused, and both memories."""
    pair = make_pair()
    rng = np.random.default_rng(3)
    for side in (pair.a, pair.b):
        side.space.memory[:] = rng.integers(0, 256, len(side.space.memory), np.uint8)
    if spoil == "remote":
        pair.b.space.hole.add(1)
    elif spoil == "local":
        pair.a.space.hole.add(2)
    elif spoil == "key":
        pair.b.nic.deregister(pair.b.region)
    for _ in range(n):
        pair.a.post(opcode, 2 * PAGE_BYTES, 8, to=pair.b.region, at=_AT, compare_add=0)
    pair.run()
    counters = pair.b.nic.counters
    refused = {"access_error": counters.access_error, "sent_nak": counters.sent_nak}
    memories = pair.a.space.memory.tobytes(), pair.b.space.memory.tobytes()
    return [status for _, status in pair.a.poll()], refused, *memories


@pytest.mark.parametrize("spoil", ["nothing", "remote", "local", "key"])
@pytest.mark.parametrize("opcode", [READ, WRITE, ADD])
def test_a_lone_packet_ends_like_the_first_of_several(opcode: WrOpcode, spoil: str) -> None:
    alone, many = outcome(opcode, 1, spoil), outcome(opcode, 3, spoil)
    assert alone[0] == many[0][:1]
    assert (alone[0] == [WcStatus.SUCCESS]) == (spoil == "nothing")
    assert alone[1:] == many[1:]


def sent(opcode: WrOpcode, n: int, spoil: str) -> tuple[WcStatus, WcStatus | None, bytes]:
    """Send n equal messages at once; return how the first ended at either side, and what the receiver has then."""
    pair = make_pair(rnr_retry=0)
    rng = np.random.default_rng(3)
    for side in (pair.a, pair.b):
        side.space.memory[:] = rng.integers(0, 256, len(side.space.memory), np.uint8)
    if spoil == "memory":
        pair.b.space.hole.add(1)
    for _ in range(0 if spoil == "no receive" else n):
        pair.b.post_recv(PAGE_BYTES + 5, 7 if spoil == "short receive" else 9)
    length = 0 if spoil == "no bytes" else 8
    for _ in range(n):
        pair.a.post(opcode, 2 * PAGE_BYTES, length, imm=77 if spoil == "key" else pair.b.region.rkey)
    pair.run()
    received = [status for _, status in pair.b.poll()]
    return pair.a.poll()[0][1], received[0] if received else None, pair.b.space.memory.tobytes()


@pytest.mark.parametrize("spoil", ["nothing", "no bytes", "memory", "short receive", "no receive", "key"])
@pytest.mark.parametrize("opcode", [SEND, SEND_IMM, SEND_INV])
def test_a_lone_send_ends_like_the_first_of_several(opcode: WrOpcode, spoil: str) -> None:
    alone = sent(opcode, 1, spoil)
    assert alone == sent(opcode, 3, spoil)
    fails = spoil in ("memory", "short receive", "no receive") or (spoil == "key" and opcode is SEND_INV)
    assert (alone[0] == WcStatus.SUCCESS) == (not fails)


@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_due_says_the_same_as_the_deadline(opcode: WrOpcode) -> None:
    pair = make_pair()
    nic = pair.a.nic
    assert not nic.is_due(1 << 62)
    pair.a.post(opcode, 0, 8, to=pair.b.region)
    nic.poll_rings(0)
    assert len(list(nic.transmit(0))) == 1
    at = nic.next_deadline()
    assert at is not None
    assert not nic.is_due(at - 1)
    assert nic.is_due(at)


def test_a_timer_that_was_stopped_is_not_due() -> None:
    pair = make_pair()
    pair.a.post(WRITE, 0, 8, to=pair.b.region)
    pair.run()
    assert pair.a.poll() == [(0, WcStatus.SUCCESS)]
    assert pair.a.nic.next_deadline() is None
    assert not pair.a.nic.is_due(1 << 62)
