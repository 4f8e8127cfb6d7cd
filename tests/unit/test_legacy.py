"""What a server leaves to its successor: servers may be killed at any moment, while they start as well."""

from __future__ import annotations

from pathlib import Path

from nopin.control.legacy import Legacy
from nopin.server.registry import Place, Record, Registry

ONE, TWO, THREE = (Record(pid, 1, ((1, pid),)) for pid in (10, 20, 30))
PLACE = Place("127.0.0.1", "127.0.0.1", 4000)


def test_what_was_left_counts_until_there_is_nothing_behind_it() -> None:
    legacy = Legacy("ab")
    legacy.add("c")
    legacy.add("a")
    assert list(legacy.records) == ["a", "b", "c"]
    assert legacy.remove("b")
    assert not legacy.remove("b")
    assert list(legacy.records) == ["a", "c"]
    assert legacy.left == ("a", "b")
    legacy.disown()
    assert list(legacy.records) == ["c"]


def test_a_successor_that_is_killed_while_it_takes_over_leaves_all_to_the_next(tmp_path: Path) -> None:
    first = Registry(tmp_path / "registry")
    first.place = PLACE
    first.add_arena(ONE)
    first.add_arena(TWO)
    first.add_book(THREE)
    second = Registry(tmp_path / "registry")
    second.place = second.left.place
    second.add_arena(ONE)
    left = Registry(tmp_path / "registry").left
    assert (left.place, left.arenas, left.books) == (PLACE, [ONE, TWO], [THREE])


def test_a_server_that_takes_nothing_over_leaves_only_its_own(tmp_path: Path) -> None:
    first = Registry(tmp_path / "registry")
    first.add_book(ONE)
    second = Registry(tmp_path / "registry")
    second.disown()
    second.add_book(TWO)
    assert Registry(tmp_path / "registry").left.books == [TWO]
    second.remove_book(TWO)
    assert not (tmp_path / "registry").exists()
