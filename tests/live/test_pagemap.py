"""Residency of a real process, by the scan and by reading the table, and its mappings both ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from owner_process import MADV_DONTNEED, Owner
from zram_swap import zram_swap

from nopin.linux.pagemap import Pagemap
from nopin.linux.proc import Maps
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
N_PAGES = 2000


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture(params=[True, False], ids=["scan", "entries"])
def pagemap(owner: Owner, request: pytest.FixtureRequest) -> Iterator[Pagemap]:
    pagemap = Pagemap(owner.pid, use_scan=request.param)
    yield pagemap
    pagemap.close()


@pytest.fixture(params=[True, False], ids=["query", "text"])
def maps(owner: Owner, request: pytest.FixtureRequest) -> Iterator[Maps]:
    maps = Maps(owner.pid, use_query=request.param)
    yield maps
    maps.close()


def absent_pages(pagemap: Pagemap, address: int) -> set[int]:
    runs = pagemap.absent(address, address + N_PAGES * PAGE)
    return {(at - address) // PAGE for run in runs for at in range(run.where.start, run.where.end, PAGE)}


def test_every_other_page_touched_is_told_apart(owner: Owner, pagemap: Pagemap) -> None:
    """More runs than one call returns."""
    address = owner.do("map", N_PAGES * PAGE)
    assert absent_pages(pagemap, address) == set(range(N_PAGES))
    for page in range(0, N_PAGES, 2):
        owner.begin("put", address + page * PAGE, b"x")
        owner.finish()
    assert absent_pages(pagemap, address) == set(range(1, N_PAGES, 2))
    owner.do("advise", address, 100 * PAGE, MADV_DONTNEED)
    assert absent_pages(pagemap, address) == set(range(100)) | set(range(101, N_PAGES, 2))


def test_looking_touches_nothing(owner: Owner, pagemap: Pagemap) -> None:
    address = owner.do("map", N_PAGES * PAGE)
    for _ in range(3):
        assert len(absent_pages(pagemap, address)) == N_PAGES


def test_addresses_no_process_can_have_have_no_absent_pages_in_the_scan(owner: Owner) -> None:
    pagemap = Pagemap(owner.pid)
    if not pagemap.has_scan:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    assert pagemap.absent(1 << 63, (1 << 63) + PAGE) == []
    pagemap.close()


@pytest.mark.needs_root
def test_swapped_pages_are_told_from_untouched_ones(owner: Owner, pagemap: Pagemap) -> None:
    with zram_swap():
        address = owner.do("map", N_PAGES * PAGE)
        owner.do("put", address, bytes(range(256)) * 16 * 8)
        owner.do("page_out", address, 8 * PAGE)
        runs = pagemap.absent(address, address + 16 * PAGE)
        assert [(run.where.start - address, run.where.end - address, run.swapped) for run in runs] == [
            (0, 8 * PAGE, True),
            (8 * PAGE, 16 * PAGE, False),
        ]
        assert owner.do("get", address, 8 * PAGE) == bytes(range(256)) * 16 * 8


def test_mappings_tell_files_from_anonymous_memory(owner: Owner, maps: Maps, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(2 * PAGE))
    anonymous, mapped = owner.do("map", 2 * PAGE), owner.do("map_file", str(file), 2 * PAGE)
    (found,) = maps.within(Range.of_length(mapped, PAGE))
    assert (found.where, found.shared, found.file_backed) == (Range.of_length(mapped, 2 * PAGE), True, True)
    (found,) = maps.within(Range.of_length(anonymous, PAGE))
    assert (found.readable, found.writable, found.file_backed) == (True, True, False)


def test_a_hole_has_no_mapping(owner: Owner, maps: Maps) -> None:
    address = owner.do("map", 3 * PAGE)
    owner.do("unmap", address + PAGE, PAGE)
    assert list(maps.within(Range.of_length(address + PAGE, PAGE))) == []
    assert len(list(maps.within(Range.of_length(address, 3 * PAGE)))) == 2
