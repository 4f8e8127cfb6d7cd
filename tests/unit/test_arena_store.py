"""What a successor finds about an arena, and what it refuses to believe."""

from __future__ import annotations

import os
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


def test_a_mapping_in_more_pieces_than_fit_is_counted_and_the_last_that_fitted_stays() -> None:
    store = ArenaStore(FdStore.create())
    fd = os.memfd_create("test")
    store.put_arena(ArenaEntry(VERSION, "test", 4000, None), fd, fd, fd)
    store.put_mapper(MapperEntry(1, [(0, 4000, 1 << 40)], worker=False, pid=None), [fd])
    pieces = [(page, 1, (1 << 40) + page * PAGE_BYTES) for page in range(0, 4000, 2)]
    store.put_mapper(MapperEntry(1, pieces, worker=False, pid=None), [fd])
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
        maker.adopt(ArenaEntry(VERSION, "test", 4, None), [unsealed, table, table], store, maker.client_budget())
    os.close(unsealed)
    os.close(table)
    store.close()
