"""The allocator against memory that remembers: blocks never overlap, and what is said to be zero is zero."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from nopin.errors import UsageError
from nopin.units import PAGE_BYTES
from nopin.verbs.allocator import ALIGN_BYTES, SIZES, SLAB_PAGES, SMALL_BYTES_MAX, Allocator, Block

N_PAGES = 512
_LENGTHS = st.one_of(
    st.integers(0, 600), st.integers(0, SMALL_BYTES_MAX + 1), st.integers(0, 100 * PAGE_BYTES), st.sampled_from(SIZES)
)


class AllocatorMachine(RuleBasedStateMachine):
    """Every byte given out is stamped with its owner, and every free stamp is checked."""

    blocks: Bundle[tuple[int, int]] = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(N_PAGES)
        self.memory = np.zeros(N_PAGES * PAGE_BYTES, np.uint8)
        self.owner = np.zeros(N_PAGES * PAGE_BYTES, bool)
        self.n_blocks = 0

    @rule(target=blocks, length=_LENGTHS, zero=st.booleans())
    def allocate(self, length: int, zero: bool) -> tuple[int, int]:
        block = self.allocator.allocate(length, zero=zero)
        if block is None:
            return -1, 0
        span = slice(block.offset, block.offset + max(1, length))
        assert block.offset % ALIGN_BYTES == 0
        assert self.allocator.length_of(block.offset) >= length
        assert span.stop <= self.memory.size
        assert not self.owner[span].any(), "it belongs to another block"
        if block.zero:
            assert not self.memory[span].any(), "it is not zero"
        self.owner[span] = True
        self.memory[span] = 0xFF
        self.n_blocks += 1
        return block.offset, max(1, length)

    @rule(block=consumes(blocks))
    def free(self, block: tuple[int, int]) -> None:
        offset, length = block
        if offset < 0:
            return
        self.allocator.free(offset)
        self.owner[offset : offset + length] = False
        self.n_blocks -= 1
        with pytest.raises(UsageError, match="freed twice"):
            self.allocator.free(offset)

    @rule(works=st.booleans())
    def discard(self, works: bool) -> None:
        for run in self.allocator.take_used():
            span = slice(run.first * PAGE_BYTES, (run.first + run.n) * PAGE_BYTES)
            assert not self.owner[span].any(), "a page in use was to be discarded"
            if works:
                self.memory[span] = 0
                self.allocator.discarded(run)
            else:
                self.allocator.kept(run)

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.n_blocks == self.n_blocks
        assert self.allocator.n_used_free + self.allocator.n_zero_free <= N_PAGES


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestAllocator = AllocatorMachine.TestCase


def must(block: Block | None) -> Block:
    assert block is not None
    return block


def test_a_hundred_thousand_small_blocks_take_little_more_than_their_bytes() -> None:
    allocator = Allocator(1 << 20)
    offsets = [must(allocator.allocate(64, zero=True)).offset for _ in range(100_000)]
    assert len(set(offsets)) == 100_000
    taken = (1 << 20) - allocator.n_zero_free
    assert taken * PAGE_BYTES <= 100_000 * 64 + SLAB_PAGES * PAGE_BYTES
    for offset in offsets:
        allocator.free(offset)
    assert allocator.n_used_free + allocator.n_zero_free >= (1 << 20) - SLAB_PAGES


def test_all_pages_are_one_run_again_once_all_is_freed_and_discarded() -> None:
    allocator = Allocator(64)
    blocks = [must(allocator.allocate(8 * PAGE_BYTES, zero=False)) for _ in range(8)]
    assert allocator.allocate(PAGE_BYTES * 5, zero=False) is None
    for block in blocks[::2] + blocks[1::2]:
        allocator.free(block.offset)
    for run in allocator.take_used():
        allocator.discarded(run)
    assert allocator.allocate(64 * PAGE_BYTES, zero=True) == Block(0, zero=True)


def test_empty_reuses_what_was_just_freed_and_zeros_takes_what_was_never_used() -> None:
    allocator = Allocator(256)
    first = must(allocator.allocate(10 * PAGE_BYTES, zero=True))
    allocator.free(first.offset)
    fresh = must(allocator.allocate(10 * PAGE_BYTES, zero=True))
    assert fresh.zero
    assert fresh.offset != first.offset
    assert must(allocator.allocate(10 * PAGE_BYTES, zero=False)) == Block(first.offset, zero=False)


def test_size_classes_waste_at_most_an_eighth_beyond_half_a_kilobyte() -> None:
    assert SIZES[-1] == SMALL_BYTES_MAX
    for smaller, larger in itertools.pairwise(SIZES):
        assert larger - smaller <= max(ALIGN_BYTES, smaller // 8)


def test_slabs_kept_for_reuse_give_way_to_a_large_block() -> None:
    allocator = Allocator(64)
    for size in (64, 8192):
        allocator.free(must(allocator.allocate(size, zero=True)).offset)
    for run in allocator.take_used():
        allocator.discarded(run)
    assert allocator.allocate(33 * PAGE_BYTES, zero=True) is None, "freed blocks are used pages: between the zero ones"
    for run in allocator.take_used():
        allocator.discarded(run)
    assert allocator.allocate(64 * PAGE_BYTES, zero=True) == Block(0, zero=True)


@pytest.mark.parametrize("offset", [1, 64, 5 * PAGE_BYTES, 255 * PAGE_BYTES])
def test_freeing_what_is_no_block_is_an_error(offset: int) -> None:
    allocator = Allocator(256)
    allocator.allocate(20 * PAGE_BYTES, zero=False)
    with pytest.raises(UsageError, match="no block"):
        allocator.free(offset)
