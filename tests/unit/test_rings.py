"""Rings in shared memory: what goes in comes out, and nonsense from the other side is found out."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.errors import QueueFull
from nopin.nic.abi import CONSUMER_OFFSET, CQE_BYTES, PRODUCER_OFFSET, ring_bytes
from nopin.nic.errors import RingCorrupt
from nopin.nic.rings import CompletionConsumer, CompletionProducer, WorkConsumer, WorkProducer
from nopin.testing.pair import no_fence

DEPTH, STRIDE = 8, 128


def work_ring() -> tuple[WorkProducer, WorkConsumer, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    memory = np.zeros(ring_bytes(DEPTH, STRIDE), np.uint8)
    return WorkProducer(memory, DEPTH, STRIDE), WorkConsumer(memory, DEPTH, STRIDE), memory


def completion_ring() -> tuple[CompletionConsumer, CompletionProducer, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    memory = np.zeros(ring_bytes(DEPTH, CQE_BYTES), np.uint8)
    return CompletionConsumer(memory, DEPTH, no_fence), CompletionProducer(memory, DEPTH, no_fence), memory


def push(ring: CompletionProducer, wr_id: int, *, status: int = 0, solicited: bool = False) -> bool:
    return ring.push(wr_id, status, 0, 0, 0, 0, 0, 0, solicited=solicited)


def poke(memory: np.ndarray[tuple[int], np.dtype[np.uint8]], offset: int, value: int) -> None:
    memory[offset : offset + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)


def test_entries_come_out_in_order_across_the_wrap() -> None:
    producer, consumer, _ = work_ring()
    got = []
    for k in range(30):
        producer.post([bytes([k]), bytes([k, 1])])
        assert consumer.available == 2
        got += [consumer.take()[0], consumer.take()[0]]
        consumer.release(2)
    assert got == [k for k in range(30) for _ in range(2)]


def test_array_post_wraps() -> None:
    producer, consumer, _ = work_ring()
    for k in range(5):
        rows = np.full((6, STRIDE), k, np.uint8)
        producer.post_array(rows)
        assert [consumer.take()[STRIDE - 1] for _ in range(6)] == [k] * 6
        consumer.release(6)


def test_a_slot_is_free_only_after_release() -> None:
    producer, consumer, _ = work_ring()
    producer.post([b"x"] * DEPTH)
    for _ in range(DEPTH):
        consumer.take()
    with pytest.raises(QueueFull, match="1 work requests for 0 free of 8"):
        producer.post([b"y"])
    consumer.release()
    producer.post([b"y"])


@pytest.mark.parametrize("index", [DEPTH + 1, 1 << 63, (1 << 64) - 1])
def test_an_impossible_producer_index_is_corruption(index: int) -> None:
    _, consumer, memory = work_ring()
    poke(memory, PRODUCER_OFFSET, index)
    with pytest.raises(RingCorrupt):
        _ = consumer.available


def test_a_producer_index_that_runs_back_is_corruption() -> None:
    producer, consumer, memory = work_ring()
    producer.post([b"x", b"y"])
    consumer.take()
    poke(memory, PRODUCER_OFFSET, 0)
    with pytest.raises(RingCorrupt):
        _ = consumer.available


def test_completions_come_out_both_ways() -> None:
    consumer, producer, _ = completion_ring()
    for k in range(3):
        assert push(producer, k, status=k)
    first = consumer.poll_one()
    assert first is not None
    assert first[:2] == (0, 0)
    assert consumer.poll(8)["wr_id"].tolist() == [1, 2]
    assert consumer.poll_one() is None


def test_overrun_is_reported_not_overwritten() -> None:
    consumer, producer, _ = completion_ring()
    assert [push(producer, k) for k in range(DEPTH + 1)] == [True] * DEPTH + [False]
    assert consumer.poll(99)["wr_id"].tolist() == list(range(DEPTH))


@pytest.mark.parametrize("index", [5, (1 << 64) - 1])
def test_an_impossible_consumer_index_is_corruption(index: int) -> None:
    _, producer, memory = completion_ring()
    push(producer, 1)
    poke(memory, CONSUMER_OFFSET, index)
    with pytest.raises(RingCorrupt):
        push(producer, 2)


def test_arming_fires_once_and_only_for_what_was_asked() -> None:
    consumer, producer, _ = completion_ring()
    push(producer, 1)
    assert not producer.fired(), "nobody armed it"
    consumer.arm()
    push(producer, 2)
    assert producer.fired()
    push(producer, 3)
    assert not producer.fired(), "a notice is for one completion"
    consumer.arm(solicited_only=True)
    push(producer, 4)
    assert not producer.fired()
    push(producer, 5, solicited=True)
    assert producer.fired()
    consumer.arm(solicited_only=True)
    push(producer, 6, status=5)
    assert producer.fired(), "an error always wakes"
