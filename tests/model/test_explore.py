"""The explorer: it finds what is there, misses nothing by pruning, and its counter-examples can be played again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nopin.errors import UsageError
from nopin.lab.explore import Campaign, Piece, do
from nopin.lab.sweep import Sweep
from nopin.mm.effects import Backoff, Gate, Open, Pause
from nopin.model.effects import Acquire, Lock, Release, Work
from nopin.model.explore.digest import digest_of
from nopin.model.explore.guide import Guide
from nopin.model.explore.record import CounterExample, load, replay, save
from nopin.model.explore.run import run_once
from nopin.model.explore.scenario import Build, Scenario, named, scenarios
from nopin.model.explore.search import Bounds, search
from nopin.model.explore.shrink import shrink
from nopin.model.explore.wander import wander
from nopin.model.explore.world import Steps, World
from nopin.model.host.host import Host
from nopin.model.host.mapping import LOWEST_PAGE
from nopin.model.host.process import Process
from nopin.model.oracle.violation import violate


def of(build: Build) -> Scenario:
    return Scenario("of a test", build, "")


def counting(n_actors: int, *, locked: bool = False) -> Scenario:
    def build(world: World) -> None:
        Counter(world, n_actors, lock=Lock("value") if locked else None)

    return of(build)


class Counter:
    """Adds in two steps, as a processor does."""

    def __init__(self, world: World, n_actors: int, *, lock: Lock | None = None) -> None:
        self.value = 0
        self._lock = lock
        for at in range(n_actors):
            world.spawn(f"adds {at}", self._add())
        world.at_end(lambda: self._check(n_actors))

    def _add(self) -> Steps:
        if self._lock is not None:
            yield Acquire(self._lock)
        value = self.value
        yield Work("has read")
        self.value = value + 1
        yield Work("has written")
        if self._lock is not None:
            yield Release(self._lock)

    def _check(self, n: int) -> None:
        if self.value != n:
            violate("lost_write", f"{self.value} of {n} were added")


def test_a_race_is_found_and_shrunk_to_one_interruption() -> None:
    scenario = counting(3)
    found = search(scenario, Bounds())
    assert found.breach is not None
    assert found.breach.which == "lost_write"
    smallest = shrink(scenario, found.breach)
    assert sum(choice != 0 for choice in smallest.choices) == 1
    again = run_once(scenario, Guide(smallest.choices))
    assert again is not None
    assert again.which == "lost_write"


def test_a_lock_mends_it_in_all_orders() -> None:
    found = search(counting(3, locked=True), Bounds())
    assert found.finished
    assert found.breach is None


def independent(world: World) -> None:
    """Three that have nothing to do with each other: what a search need not tell apart."""

    def works() -> Steps:
        yield Work("first")
        yield Work("second")

    for who in "abc":
        world.spawn(who, works())


def states_and_ends(scenario: Scenario, *, prune: bool) -> tuple[set[bytes], int]:
    states: set[bytes] = set()
    found = search(scenario, Bounds(prune=prune), at_point=states.add)
    assert found.finished
    return states, found.n_schedules


@pytest.mark.parametrize(
    "scenario",
    [
        of(independent),
        "arena_device_store_vs_takeover",
        "arena_read_vs_dontneed",
        "arena_evict_vs_dontneed",
    ],
)
def test_pruning_reaches_every_state_that_is_there(scenario: Scenario | str) -> None:
    scenario = named(scenario) if isinstance(scenario, str) else scenario
    with_pruning, n_pruned = states_and_ends(scenario, prune=True)
    without, n_all = states_and_ends(scenario, prune=False)
    assert with_pruning == without
    assert n_pruned < n_all


def two_first_stores(world: World) -> Host:
    """Two programs touch memory for the first time, which takes the frames in either order, and one gives it back."""
    host = Host("host", world.scheduler, 4)
    processes = [host.spawn_process() for _ in range(2)]
    for process in processes:
        world.prepare(process.mmap(1))

    def works(process: Process, *, stays: bool) -> Steps:
        page = yield from host.new_page()
        process.map(LOWEST_PAGE, page, writable=True)
        host.frames.write(page.frame, 0, process.name.encode())
        yield Work("has stored")
        if not stays:
            entry = process.take_out(LOWEST_PAGE)
            assert entry is not None
            host.let_go(entry)

    for process in processes:
        world.spawn(process.name, works(process, stays=process is processes[0]))
    return host


FRAMES: dict[bytes, set[int]] = {}
"""In which the page that stays was at the end, by state; not reached from a world, or it would be a part of that."""


def void(_: object) -> None:
    """Return nothing."""


def test_which_frame_holds_what_is_no_part_of_the_state() -> None:
    scenario = of(lambda world: void(two_first_stores(world)))
    with_pruning, _ = states_and_ends(scenario, prune=True)
    without, _ = states_and_ends(scenario, prune=False)
    assert with_pruning == without

    def build(world: World) -> None:
        host = two_first_stores(world)
        world.at_end(lambda: FRAMES.setdefault(digest_of(world), set()).update(page.frame for page in host.lru))

    assert search(of(build), Bounds(prune=False)).finished
    assert max(len(frames) for frames in FRAMES.values()) == 2, "the page that stays is in one frame or in the other"


def test_the_place_in_a_loop_is_part_of_the_state() -> None:
    """It is nowhere but on the generator's stack: the items of the list are equal."""
    digests: list[bytes] = []

    def loops(world: World) -> Steps:
        for _ in [7, 7, 7]:
            digests.append(digest_of(world))
            yield Work("same")

    def build(world: World) -> None:
        def looks() -> Steps:
            for _ in range(3):
                digests.append(digest_of(world))
                yield Backoff(1)

        def same() -> Steps:
            for _ in [7, 7, 7]:
                yield Backoff(1)

        world.spawn("same", same())
        world.spawn("looks", looks())

    assert run_once(of(build), Guide()) is None
    assert len(set(digests)) == 3


def test_a_bound_of_depth_looks_at_the_first_choices_only() -> None:
    scenario = counting(3)
    plain = search(scenario, Bounds(depth=0))
    assert plain.finished
    assert plain.n_schedules == 1
    assert plain.breach is None


def deadlock(world: World) -> None:
    gates = Gate(), Gate()

    def waits(mine: Gate, other: Gate) -> Steps:
        yield Pause(other)
        yield Open(mine)

    world.spawn("a", waits(*gates))
    world.spawn("b", waits(*reversed(gates)))


def livelock(world: World) -> None:
    def polls() -> Steps:
        while True:
            yield Backoff(10)

    world.spawn("polls", polls())


def crash(world: World) -> None:
    def crashes() -> Steps:
        yield Work("before")
        raise KeyError("nothing there")

    world.spawn("crashes", crashes())


@pytest.mark.parametrize(
    ("build", "which"), [(deadlock, "unanswered_fault"), (livelock, "no_progress"), (crash, "crash")]
)
def test_what_never_ends_or_crashes_is_a_breach(build: Build, which: str) -> None:
    breach = run_once(of(build), Guide())
    assert breach is not None
    assert breach.which == which


def trouble(world: World) -> None:
    """Something fails now and then, and breaks only if it fails twice."""
    failures: list[str] = []

    def tries(who: str) -> Steps:
        yield Work("begins")
        if world.may("fails"):
            failures.append(who)
        yield Work("ends")
        if len(failures) == 2:
            violate("no_progress", "both failed")

    world.spawn("a", tries("a"))
    world.spawn("b", tries("b"))


@pytest.mark.parametrize(("n_faults", "breaks"), [(0, False), (1, False), (2, True)])
def test_a_search_has_as_much_trouble_as_it_is_allowed(n_faults: int, breaks: bool) -> None:
    found = search(of(trouble), Bounds(n_faults=n_faults))
    assert (found.breach is not None) is breaks


def test_drawn_runs_find_trouble_too_and_say_what_happened_how_often() -> None:
    found = wander(of(trouble), range(500))
    assert found.breach is not None
    assert found.fired["fails"] >= 2
    assert found.seed == found.n_schedules - 1
    again = wander(of(trouble), range(found.seed, found.seed + 1))
    assert again.breach == found.breach


@pytest.fixture
def example(tmp_path: Path) -> tuple[CounterExample, Path]:
    result = do(Piece("arena_store_vs_evict", "stores_go_on_while_a_page_is_copied", Bounds()))
    assert result.example is not None
    path = tmp_path / "cex.json"
    save(result.example, path)
    return result.example, path


def test_a_counter_example_plays_the_same_events_in_another_process(example: tuple[CounterExample, Path]) -> None:
    stored, path = example
    assert load(path) == stored
    seen = replay(stored)
    assert seen.breach is not None
    assert seen.breach.which == stored.property
    assert seen.trace.digest() == stored.trace
    assert len(seen.turns) == sum(choice != 0 for choice in stored.choices)
    command = [sys.executable, "-m", "nopin", "replay", str(path)]
    ended = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert ended.returncode == 4, ended.stderr
    assert len(ended.stdout.splitlines()) == 1 + len(seen.trace.events)
    assert stored.detail in ended.stdout


def test_a_file_that_is_no_counter_example_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cex.json"
    with pytest.raises(UsageError, match="cannot read"):
        load(path)
    path.write_text('{"scenario": 3}')
    with pytest.raises(UsageError, match="no counter-example"):
        load(path)


def test_the_number_of_processes_changes_nothing() -> None:
    mutant = "stores_go_on_while_a_page_is_copied"
    drawn = Campaign("arena_store_vs_evict", mutant=mutant, seeds=range(300))
    searched = Campaign("arena_store_vs_evict", mutant=mutant)
    for campaign in (drawn, searched):
        with Sweep(1) as here, Sweep(2) as elsewhere:
            results = campaign.run(here)
            assert results == campaign.run(elsewhere)
        assert any(result.example for result in results)


def test_a_campaign_ends_with_the_first_scenario_in_which_something_breaks() -> None:
    campaign = Campaign("all", mutant="drop_retry")
    with Sweep(1) as sweep:
        *held, broken = campaign.run(sweep)
    assert broken.example is not None
    assert broken.piece.scenario == "fault_vs_munmap"
    assert [result.example for result in held] == [None] * len(held)
    assert len(held) + 1 < len(campaign.pieces)


SAMPLE = [name for at, name in enumerate(scenarios()) if at % 16 == 0]
"""All of them are for `nopin explore all`, which looks further, too."""


@pytest.mark.parametrize("name", SAMPLE)
def test_the_code_as_it_is_passes(name: str) -> None:
    found = search(named(name), Bounds(max_schedules=60))
    assert found.breach is None, found.breach


def test_drawn_schedules_of_all_scenarios_are_shared_out_and_come_to_as_many_as_were_asked_for() -> None:
    n = len(scenarios())
    campaign = Campaign("all", seeds=range(7, 7 + 2 * n + 3))
    assert sorted(seed for piece in campaign.pieces for seed in piece.seeds or ()) == list(range(7, 7 + 2 * n + 3))
    assert {piece.scenario for piece in campaign.pieces} == set(scenarios())
    few = Campaign("all", seeds=range(3))
    assert [(piece.scenario, piece.seeds) for piece in few.pieces] == [
        (name, range(at, 3, n)) for at, name in enumerate(list(scenarios())[:3])
    ]
