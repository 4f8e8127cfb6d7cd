"""The pager against an oracle: in whatever order faults, evictions and kills come, no byte is lost or stale."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.mm.effects import SERVER, PageRun
from nopin.mm.eviction import batch_pages
from nopin.testing.arena_machine import Access, ArenaMachine

N_PAGES = 20


class Run:
    """Random work on one machine, by seed."""

    def __init__(self, seed: int, budget: int, *, kills: bool = False, n_pages: int = N_PAGES) -> None:
        self.draw = random.Random(seed)
        self.machine = ArenaMachine(n_pages, budget)
        self.kills = kills
        self.accesses: list[Access] = []
        self.n_made = 0
        self.discarding: set[int] = set()
        self.most_budget = budget

    def one(self) -> None:
        machine, draw = self.machine, self.draw
        kind = draw.random()
        if kind < 0.45:
            machine.step(draw.randrange(1000))
        elif kind < 0.75:
            self.go_on()
        elif kind < 0.90:
            self.begin()
        elif not machine.may_use_device:
            machine.step(0)
        elif kind < 0.93:
            machine.start(machine.pager.give_back(draw.randrange(1, 8)))
        elif kind < 0.95:
            machine.start(machine.pager.prefetch(self.run_of_pages(), write=draw.random() < 0.5))
        elif kind < 0.96:
            machine.start(machine.pager.reclaim())
        elif kind < 0.97:
            budget = draw.randrange(3, 14)
            self.most_budget = max(self.most_budget, budget)
            machine.start(machine.pager.set_budget(budget))
        elif kind < 0.98:
            self.discard()
        elif self.kills:
            self.kill()

    def run_of_pages(self) -> PageRun:
        first = self.draw.randrange(self.machine.n_pages)
        return PageRun(first, self.draw.randrange(1, self.machine.n_pages - first + 1))

    def begin(self) -> None:
        if len(self.accesses) >= 8:
            return
        page = self.draw.randrange(self.machine.n_pages)
        if page in self.discarding:
            return
        mapper = self.draw.choice((1, 2, SERVER))
        self.n_made += 1
        value = (
            None if self.draw.random() < 0.5 else self.draw.choice((0, self.n_made, self.n_made * 0x9E3779B97F4A7C15))
        )
        self.accesses.append(Access(mapper, page, value if value is None else value & (1 << 64) - 1))

    def go_on(self) -> None:
        awake = [a for a in self.accesses if not a.asleep and (a.mapper != SERVER or self.machine.may_use_device)]
        if awake:
            access = self.draw.choice(awake)
            if not access.done:
                self.machine.attempt(access)
        self.accesses = [a for a in self.accesses if not a.done]

    def discard(self) -> None:
        run = self.run_of_pages()
        pages = set(range(run.first, run.end))
        if pages & ({access.page for access in self.accesses} | self.discarding):
            return  # what a racing access may find is not defined
        self.discarding |= pages

        def done(_result: object) -> None:
            self.discarding -= pages

        for page in pages:
            self.machine.truth[page] = 0
        self.machine.start(self.machine.pager.discard(run), done)

    def kill(self) -> None:
        if self.discarding:
            return  # a discard that is cut off may or may not have happened
        self.machine.kill_server()
        self.accesses = [a for a in self.accesses if a.mapper != SERVER]

    def settle(self) -> None:
        """Let everything come to its end."""
        for _ in range(200_000):
            if not self.machine.busy and not self.accesses:
                return
            self.machine.step(self.draw.randrange(1000))
            self.go_on()
        raise AssertionError(f"never comes to an end: {self.accesses}")

    def read_all(self) -> None:
        for page in range(self.machine.n_pages):
            self.accesses.append(Access(self.draw.choice((1, 2, SERVER)), page, None))
            self.settle()


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
