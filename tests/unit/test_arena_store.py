"""What a successor finds about an arena, and what it refuses to believe."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest

from nopin.errors import UsageError
from nopin.linux import memfd
from nopin.linux.fd_store import FdStore
from nopin.mm.page_table import PageTable
from nopin.server.arena_maker import ArenaMaker
from nopin.server.arena_store import VERSION, ArenaEntry, ArenaStore, MapperEntry
from nopin.server.config import ServeConfig
from nopin.units import PAGE_BYTES


def arena_entry(n_pages: int, family_pages: int = 100) -> ArenaEntry:
    return ArenaEntry(VERSION, "test", n_pages, None, 7, family_pages)


def mapper_entry(number: int, address: int) -> MapperEntry:
    return MapperEntry(number, [(0, 4, address)] if address else [], worker=False, pid=1)


def known(store: ArenaStore) -> tuple[int, dict[int, int]]:
    """What a successor would learn: the budget, and where each mapper has the pages."""
    successor = ArenaStore(FdStore(*(os.dup(end) for end in store.ends)))
    left = successor.left()
    successor.close()
    assert left is not None
    for fd in [*left.fds, *(fd for mapped in left.mappers for fd in mapped.fds)]:
        os.close(fd)
    return left.entry.family_pages, {each.entry.number: each.entry.places[0][2] for each in left.mappers}


def test_a_mapping_in_more_pieces_than_fit_is_counted_and_the_last_that_fitted_stays() -> None:
    store = ArenaStore(FdStore.create())
    fd = os.memfd_create("test")
    store.put_arena(arena_entry(4000), fd, fd, fd)
    store.put_mapper(MapperEntry(1, [(0, 4000, 1 << 40)], worker=False, pid=1), [fd, fd])
    pieces = [(page, 1, (1 << 40) + page * PAGE_BYTES) for page in range(0, 4000, 2)]
    store.put_mapper(MapperEntry(1, pieces, worker=False, pid=1), [fd, fd])
    assert store.n_refused == 1
    left = store.left()
    assert left is not None
    assert [mapped.entry.places for mapped in left.mappers] == [[(0, 4000, 1 << 40)]]
    for each in (fd, *left.fds, *(fd for mapped in left.mappers for fd in mapped.fds)):
        os.close(each)
    store.close()


def test_files_that_could_be_cut_short_are_not_taken_over(tmp_path: Path) -> None:
    maker = ArenaMaker.of(ServeConfig(socket_path=tmp_path / "server.sock", swap_dir=tmp_path))
    store = ArenaStore(FdStore.create())
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4 * PAGE_BYTES)
    table = memfd.create("test", PageTable.bytes_needed(4))
    with pytest.raises(UsageError, match="cut short"):
        maker.adopt(arena_entry(4), [unsealed, table, table], store)
    os.close(unsealed)
    os.close(table)
    store.close()


def test_forks_exits_and_moves_without_end_do_not_fill_it_and_a_successor_always_knows_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looked at before each removal as well: that is where a server could be killed."""
    draw, checked = random.Random(3), 0
    store, fd = ArenaStore(FdStore.create()), os.memfd_create("test")
    budget = 1
    places: dict[int, int] = {}

    def drop_after_a_look(queue: FdStore) -> None:
        nonlocal checked
        if draw.random() < 0.02:
            checked += 1
            found, at = known(store)
            assert found == budget
            assert at.items() >= places.items()
        drop(queue)

    drop = FdStore.drop_oldest
    monkeypatch.setattr(FdStore, "drop_oldest", drop_after_a_look)
    store.put_arena(arena_entry(4, budget), fd, fd, fd)
    last = 0
    for _ in range(20_000):
        action = draw.random()
        number = draw.choice(list(places)) if places else 0
        if action < 0.3 or not places:
            last += 1
            place = draw.randrange(1, 1 << 30)
            store.put_mapper(mapper_entry(last, place), [fd, fd])
            places[last] = place
        elif action < 0.5:
            place = places.pop(number) + 1
            store.put_mapper(mapper_entry(number, place), [fd, fd])
            places[number] = place
        elif action < 0.75:  # it unmaps everything
            del places[number]
            store.put_mapper(mapper_entry(number, 0), [fd, fd])
            store.forget_mapper(number)
        elif action < 0.95:  # it exits
            del places[number]
            store.forget_mapper(number)
        else:
            store.put_arena(arena_entry(4, budget), fd, fd, fd)
    assert store.n_refused == 0
    assert checked > 100
    found, at = known(store)
    assert (found, {number: at[number] for number in places}) == (budget, places)
    assert len(at) < len(places) + 200, "what has exited is forgotten in the end"
    os.close(fd)
    store.close()


def test_a_successor_turns_over_what_it_found() -> None:
    store, fd = ArenaStore(FdStore.create()), os.memfd_create("test")
    store.put_arena(arena_entry(4), fd, fd, fd)
    for number in range(1, 60):
        store.put_mapper(mapper_entry(number, number), [fd, fd])
    second = ArenaStore(FdStore(*(os.dup(end) for end in store.ends)))
    store.close()
    left = second.left()
    assert left is not None
    for address in range(100_000, 130_000):
        second.put_mapper(mapper_entry(60, address), [fd, fd])
    assert second.n_refused == 0
    assert known(second) == (100, {number: number for number in range(1, 60)} | {60: 129_999})
    for each in [fd, *left.fds, *(fd for mapped in left.mappers for fd in mapped.fds)]:
        os.close(each)
    second.close()


def test_an_owner_that_takes_entries_out_disturbs_only_itself() -> None:
    store, fd = ArenaStore(FdStore.create()), os.memfd_create("test")
    owner = FdStore(*(os.dup(end) for end in store.ends))
    store.put_arena(arena_entry(4), fd, fd, fd)
    for address in range(1, 10_000):
        store.put_mapper(mapper_entry(1, address), [fd, fd])
        if address % 100 == 0:
            with contextlib.suppress(BlockingIOError):
                while True:
                    owner.drop_oldest()
    for each in (store, owner):
        each.close()
    os.close(fd)
