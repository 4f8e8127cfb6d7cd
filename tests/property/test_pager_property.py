"""The pager against an oracle: in whatever order faults, evictions and kills come, no byte is lost or stale."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from arena_work import N_PAGES, Run
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.mm.effects import SERVER
from nopin.mm.eviction import batch_pages
from nopin.testing.arena_machine import Access, ArenaMachine


@given(seed=st.integers(0, 1 << 40), budget=st.integers(3, 12))
@settings(max_examples=60, deadline=None)
def test_every_access_finds_what_was_stored_last(seed: int, budget: int) -> None:
    run = Run(seed, budget)
    for _ in range(600):
        run.one()
    run.settle()
    run.read_all()
    run.machine.check_books()
    assert run.machine.n_most_resident <= run.most_budget + batch_pages(run.most_budget)


@given(seed=st.integers(0, 1 << 40), budget=st.integers(3, 12))
@settings(max_examples=60, deadline=None)
def test_a_server_killed_between_any_two_effects_loses_nothing(seed: int, budget: int) -> None:
    run = Run(seed, budget, kills=True)
    for _ in range(500):
        run.one()
    run.settle()
    run.read_all()
    run.machine.check_books()
    assert not run.machine.lost


@given(seed=st.integers(0, 1 << 40), chance=st.floats(0.05, 0.6))
@settings(max_examples=40, deadline=None)
def test_swap_that_cannot_be_written_costs_no_byte(seed: int, chance: float) -> None:
    run = Run(seed, 6)
    run.machine.fail_write = lambda _offset, _length: errno.ENOSPC if run.draw.random() < chance else 0
    for _ in range(400):
        run.one()
    run.machine.fail_write = lambda _offset, _length: 0
    run.settle()
    run.machine.check_books()


@given(seed=st.integers(0, 1 << 40))
@settings(max_examples=40, deadline=None)
def test_a_full_swap_refuses_some_and_loses_nothing(seed: int) -> None:
    run = Run(seed, 4)
    run.machine = ArenaMachine(N_PAGES, 4, swap_limit_bytes=5 * 4096)
    for _ in range(500):
        run.one()
    run.settle()
    run.machine.check_books()
    assert not run.machine.lost


def test_pages_that_fit_into_frames_and_swap_together_are_never_refused() -> None:
    run = Run(7, 8)
    run.machine = ArenaMachine(14, 8, swap_limit_bytes=7 * 4096, compress=False)
    for _ in range(300):
        value = run.draw.choice((None, run.draw.randrange(1, 1 << 60)))
        access = Access(1, run.draw.randrange(14), value)
        run.accesses = [access]
        run.settle()
        assert not access.killed
    run.machine.check_books()


def flip_a_bit(run: Run, page: int) -> None:
    at = int(run.machine.table.units[page]) * 512
    run.machine.swap_file[at + 5] ^= 0x10


def cannot_be_read(run: Run, _page: int) -> None:
    run.machine.fail_read = lambda _offset, _length: errno.EIO


@pytest.mark.parametrize("spoil", [flip_a_bit, cannot_be_read])
@pytest.mark.parametrize("mapper", [1, SERVER])
def test_a_spoilt_page_is_an_error_for_whoever_wants_it_and_for_nobody_else(
    spoil: Callable[[Run, int], None], mapper: int
) -> None:
    run = Run(1, 8)
    for page in (3, 4, 5):
        run.accesses = [Access(1, page, 0x0123456789ABCDEF * page & (1 << 64) - 1)]
        run.settle()
    run.machine.start(run.machine.pager.give_back(8))
    run.settle()
    spoil(run, 4)
    access = Access(mapper, 4, None)
    run.accesses = [access]
    run.settle()
    assert access.killed
    assert run.machine.lost == {4}
    run.machine.fail_read = lambda _offset, _length: 0
    for page in (3, 5):
        other = Access(mapper, page, None)
        run.accesses = [other]
        run.settle()
        assert not other.killed
    run.machine.check_books()
    again = Access(2, 4, None)
    run.accesses = [again]
    run.settle()
    assert again.killed, "it stays lost, and is never zeros"
