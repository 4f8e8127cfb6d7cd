"""Random work on a machine in memory, by seed: what the property tests of the pager and their mutants run."""

from __future__ import annotations

import random

from nopin.mm.effects import SERVER, PageRun
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
        elif kind >= 0.99:
            if self.kills:
                self.kill()
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
            self.discard(self.run_of_pages())
        else:
            self.fill()

    def run_of_pages(self) -> PageRun:
        first = self.draw.randrange(self.machine.n_pages)
        return PageRun(first, self.draw.randrange(1, self.machine.n_pages - first + 1))

    def fill(self) -> None:
        """Have the device install pages, which it may be beaten to by a discard of one of them."""
        if self.machine.pager.n_held:
            return  # a small budget must not be held as a whole
        run = PageRun(self.draw.randrange(self.machine.n_pages - 1), 2)
        mirror = self.machine.mirror
        self.machine.start(mirror.fill(run, write=self.draw.random() < 0.5), lambda came: mirror.unhold(run, came))

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

    def discard(self, run: PageRun) -> None:
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
