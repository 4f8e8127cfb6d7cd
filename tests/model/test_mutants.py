"""Every rule that keeps bytes safe, broken one at a time: the explorer must see each of them."""

from __future__ import annotations

import pytest

from nopin.lab.explore import hunt
from nopin.model.explore.mutants import mutants
from nopin.model.explore.scenario import named
from nopin.model.explore.search import Bounds, search
from nopin.model.oracle.violation import PROPERTIES

ALL = mutants()


def test_there_are_mutants_enough_and_each_says_what_it_breaks() -> None:
    assert len(ALL) >= 25
    assert all(mutant.rule.endswith((".", ".)")) for mutant in ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_a_broken_rule_is_seen(name: str) -> None:
    caught = hunt(name)
    assert caught.example is not None, f"{caught.n_schedules} schedules saw nothing wrong"
    assert caught.example.property in PROPERTIES


@pytest.mark.parametrize("scenario", sorted({mutant.scenarios[0] for mutant in ALL.values()}))
def test_the_code_as_it_is_passes_where_mutants_are_seen(scenario: str) -> None:
    found = search(named(scenario), Bounds(max_schedules=100))
    assert found.breach is None, found.breach
