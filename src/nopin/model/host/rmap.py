"""The reverse map: from pages to the places where they are mapped, and taking all of those away at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nopin.mm.causes import Cause
from nopin.model.effects import Procedure, Quiesce
from nopin.model.host.page import Page
from nopin.ranges import Range, coalesce

if TYPE_CHECKING:
    from nopin.model.host.host import Host
    from nopin.model.host.process import Process

Places = dict[int, Page]
"""Pages of one process, by the number that each is mapped at."""


def places_of(host: Host, pages: Iterable[Page]) -> dict[Process, Places]:
    """Return where pages are mapped: by process, in order of pages and of their mappings."""
    places: dict[Process, Places] = {}
    for page in pages:
        for pid, number in page.mappings:
            places.setdefault(host.processes[pid], {})[number] = page
    return places


def ranges_of(numbers: Iterable[int]) -> list[Range]:
    """Return page numbers as ranges, sorted and disjoint."""
    return coalesce(Range(number, number + 1) for number in numbers)


def unmap_everywhere(host: Host, pages: list[Page], cause: Cause) -> Procedure[None]:
    """Take every mapping of pages away, one bracket a process, and give their references back.

    Requires: the pages are locked, so no fault maps them anew; the cause is a must-now one.
    """
    while places := places_of(host, pages):  # again for what has been moved meanwhile
        for process, here in places.items():
            yield from _unmap(process, here, cause)


def _unmap(process: Process, places: Places, cause: Cause) -> Procedure[None]:
    host = process.host
    bracket = process.begin(ranges_of(places), cause)
    yield host.steps.notify
    if bracket.fences:
        yield Quiesce(bracket.fences)
    gone: list[Page] = []
    for number, page in places.items():
        if (process.pid, number) in page.mappings:
            process.take_out(number)
            gone.append(page)
            if len(gone) % host.pages_per_step == 0:
                yield host.steps.clear
    yield host.steps.flush
    bracket.end()
    yield host.steps.free
    for page in gone:
        host.put_page(page)
