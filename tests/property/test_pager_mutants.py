"""Would the oracle notice? Each mutant breaks one rule that keeps bytes safe, and must be caught.

A property test that passes says little unless it fails when the code is wrong. So each rule that `mm/pager.py` and the
files it names rely upon is broken here, one at a time, and random work on the machine in memory must end in a failed
check within a bounded number of seeds: a stale or lost byte, a touch of a page that is not there, books that do not
agree, or work that never ends. The same seeds pass with the code as it is.

These are large storms; the explorer's small scenarios see the same mutants in `tests/model/test_mutants.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType

import pytest

from nopin.mm import eviction, giving_up
from nopin.mm.effects import Quiesce, Unprotect
from nopin.model.arena.storm import Storm, StormSettings
from nopin.model.explore.broken import arena
from nopin.model.explore.mutants import Break, Mutant, mutants

N_SEEDS = 12
Work = Callable[[int], None]


def plain_work(seed: int) -> None:
    finish(storm_of(seed))


def work_with_kills(seed: int) -> None:
    """Kill the server between two steps, three times."""
    storm = Storm(seed)
    for _ in range(3):
        kill_after(storm, storm.random.randrange(20, 300))
        with contextlib.suppress(ServerKilled):
            storm.blow(200)
        storm.scheduler.after_step = storm.check
        storm.server_is_killed()
    finish(storm)
    assert not storm.lost


def work_with_removals(seed: int) -> None:
    storm = Storm(seed, StormSettings(removals=True))
    storm.blow(250)
    finish(storm)


def work_with_slow_reads(seed: int) -> None:
    storm = Storm(seed, StormSettings(slow_reads=True))
    storm.blow(250)
    finish(storm)


def work_with_a_bad_medium(seed: int) -> None:
    """Flip a bit in each unit of swap: pages may be lost, and none may be wrong."""
    storm = storm_of(seed)
    storm.calm()
    for at in range(5, len(storm.machine.swap), 512):
        storm.machine.swap[at] ^= 0x10
    storm.read_everything()


class ServerKilled(BaseException):
    """Stands for SIGKILL."""


def kill_after(storm: Storm, n_effects: int) -> None:
    last = storm.machine.n_effects + n_effects

    def after_step() -> None:
        storm.check()
        if storm.machine.n_effects >= last:
            raise ServerKilled

    storm.scheduler.after_step = after_step


def storm_of(seed: int) -> Storm:
    storm = Storm(seed)
    storm.blow(250)
    return storm


def finish(storm: Storm) -> None:
    storm.calm()
    storm.read_everything()


WORK: dict[str, Work] = {
    "pages_are_punched_before_their_entries_are_written": work_with_kills,
    "copies_are_not_checked": work_with_a_bad_medium,
    "entries_outlive_their_pages": work_with_kills,
    "a_successor_believes_entries_of_pages_in_the_file": work_with_kills,
    "a_successor_takes_all_swap_for_free": work_with_kills,
    "devices_hear_of_giving_up_when_it_is_dealt_with": work_with_removals,
}
"""What shows a mutant, where it is not plain work."""

SEEN_BY_CHANCE = {
    "stores_stay_forbidden_where_pages_have_left",
    "devices_hear_of_giving_up_late",
    "a_successor_finds_copies_of_what_was_given_up",
    "what_is_given_up_is_noted_when_its_word_has_been_read",
    "a_successor_leaves_doomed_pages_in_the_file",
    "pages_given_up_stay_doomed",
    "a_fill_goes_on_although_a_message_was_read",
}
"""They take a store, or a kill, in the right moment, which the explorer finds and few storms do."""

MUTANTS = [
    mutant
    for mutant in mutants().values()
    if mutant.break_rule.__module__ == arena.__name__ and mutant.name not in SEEN_BY_CHANCE
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_rule_is_caught(mutant: Mutant) -> None:
    work = WORK.get(mutant.name, plain_work)
    with mutant.applied():
        for seed in range(N_SEEDS):
            try:
                work(seed)
            except AssertionError:
                return
    pytest.fail(f"{N_SEEDS} runs saw nothing wrong")


@pytest.mark.parametrize(
    "work", [plain_work, work_with_kills, work_with_removals, work_with_slow_reads, work_with_a_bad_medium]
)
def test_the_same_work_passes_with_the_code_as_it_is(work: Work) -> None:
    for seed in range(N_SEEDS):
        work(seed)


@pytest.mark.parametrize("part", [eviction, giving_up], ids=lambda part: part.__name__)
def test_fences_that_are_not_waited_for_are_noticed(part: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "Quiesce", lambda _fences: Quiesce(()))
    for seed in range(N_SEEDS):
        try:
            work_with_slow_reads(seed)
        except AssertionError:
            return
    pytest.fail(f"{N_SEEDS} runs saw nothing wrong")


def test_reads_of_a_slow_device_are_waited_for() -> None:
    n_waited_for = 0
    for seed in range(N_SEEDS):
        storm = Storm(seed, StormSettings(slow_reads=True))
        storm.blow(250)
        n_waited_for += storm.slow.n_waited_for
    assert n_waited_for > N_SEEDS


def test_protection_that_stays_too_long_costs_faults_and_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    original = eviction._give_frames_back
    monkeypatch.setattr(eviction, "_give_frames_back", lambda *args: arena.without(original(*args), Unprotect))
    for seed in range(N_SEEDS):
        plain_work(seed)


@pytest.mark.parametrize(
    "break_rule", [arena.dirty_bits_are_not_asked_for, arena.device_faults_do_not_say_that_they_write]
)
def test_device_writes_are_heard_in_two_ways_and_either_is_enough(
    break_rule: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    for seed in range(N_SEEDS):
        plain_work(seed)
