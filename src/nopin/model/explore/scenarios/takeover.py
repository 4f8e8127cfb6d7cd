"""Shares of plain memory whose servers are killed: the array attaches again, and all goes on.

The server of either process, or of both, dies at any step of what ours does with the array, and of what happens to the
memory; a successor restores shares from the book. See `sharing.py` for what must hold.
"""

from __future__ import annotations

from collections.abc import Callable

from nopin.model.explore.scenario import add, scenario
from nopin.model.explore.sharing import LONG, SHORT, Served, Sharing
from nopin.model.explore.world import Steps, World
from nopin.model.host.advice import Advice
from nopin.model.host.errors import ModelFault
from nopin.units import PAGE_BYTES

Act = Callable[[Sharing], Steps]


def _maps_anew(of: Sharing) -> Steps:
    yield from of.owner.munmap(of.va, 2 * PAGE_BYTES)
    yield from of.owner.mmap(2, at=of.va)


def _forks(of: Sharing) -> Steps:
    child = yield from of.owner.fork()
    yield from child.store(of.there, of.fresh())
    yield from child.exit()


TRANSFERS: dict[str, Act] = {
    "write": lambda of: of.writes(),
    "read": lambda of: of.reads(),
    "two_writes": lambda of: of.writes_twice(),
    "row_of_writes": lambda of: of.writes_in_a_row(),
}

EVENTS: dict[str, Act] = {
    "withdraw": lambda of: of.withdraws(),
    "exit": lambda of: of.exits(),
    "map_anew": _maps_anew,
    "discard": lambda of: of.owner.madvise(of.va, 2 * PAGE_BYTES, Advice.DONTNEED),
    "store": lambda of: of.owner.store(of.there, of.fresh()),
    "fork": _forks,
    "reclaim": lambda of: of.theirs.host.reclaim(2),
}

WHOSE: dict[str, Callable[[Sharing], Served]] = {
    "theirs": lambda of: of.theirs,
    "ours": lambda of: of.ours,
    "both": lambda of: of.theirs,
}


def _unless_refused(procedure: Steps) -> Steps:
    try:
        yield from procedure
    except ModelFault:
        return


def _build(whose: str, acts: dict[str, Act], *, length: int = SHORT, twice: bool = False) -> Callable[[World], None]:
    def build(world: World) -> None:
        of = Sharing(world, length, one_server=whose == "both")
        for who, (name, act) in zip("abc", acts.items(), strict=False):
            world.spawn(f"{who}: {name}", _unless_refused(act(of)))
        served = WHOSE[whose](of)
        world.spawn("takeover", served.is_replaced_twice() if twice else served.is_replaced())

    return build


for _whose in WHOSE:
    for _name, _act in TRANSFERS.items():
        _about = f"an attached array: {_name} while the server of {_whose} is killed and another takes over"
        add(f"share_{_name}_vs_takeover_of_{_whose}", _build(_whose, {_name: _act}), _about)

for _name in ("write", "read"):
    _about = f"an attached array: a {_name} of two packets while the owner's server is killed and another takes over"
    add(f"share_long_{_name}_vs_takeover", _build("theirs", {_name: TRANSFERS[_name]}, length=LONG), _about)

for _name in ("write", "read"):
    _about = f"an attached array: {_name} while the server of theirs is killed, and the next one, too, while it starts"
    add(f"share_{_name}_vs_takeovers", _build("theirs", {_name: TRANSFERS[_name]}, twice=True), _about)

for _name in ("withdraw", "exit", "store"):
    _about = f"shared plain memory: {_name} by its owner while its server is killed, and the next one while it starts"
    add(f"share_{_name}_vs_takeovers", _build("theirs", {_name: EVENTS[_name]}, twice=True), _about)

for _name, _act in EVENTS.items():
    _about = f"shared plain memory: {_name} by its owner while its server is killed and another takes over"
    add(f"share_{_name}_vs_takeover", _build("theirs", {_name: _act}), _about)
    _about = f"shared plain memory is written by a peer: {_name} by its owner, and a takeover"
    add(f"share_write_vs_{_name}_and_takeover", _build("theirs", {"write": TRANSFERS["write"], _name: _act}), _about)


@scenario("share_adds_vs_takeover")
def share_adds_vs_takeover(world: World) -> None:
    """Atomics on an attached array while the owner's server is killed: each counts once, or raises."""
    _adds(world, lambda of: of.theirs)


@scenario("share_adds_vs_takeover_of_ours")
def share_adds_vs_takeover_of_ours(world: World) -> None:
    """Atomics on an attached array while the peer's server is killed: each counts once, or raises."""
    _adds(world, lambda of: of.ours)


def _adds(world: World, whose: Callable[[Sharing], Served]) -> None:
    of = Sharing(world)
    world.spawn("a: adds", of.adds())
    world.spawn("takeover", whose(of).is_replaced())
    of.expect_sum()


@scenario("share_takeover_vs_takeover")
def share_takeover_vs_takeover(world: World) -> None:
    """The servers of both ends are killed while the array is written."""
    of = Sharing(world)
    world.spawn("a: write", of.writes())
    world.spawn("theirs", of.theirs.is_replaced())
    world.spawn("ours", of.ours.is_replaced())


@scenario("share_two_writes_vs_cut")
def share_two_writes_vs_cut(world: World) -> None:
    """A peer is cut off from a server that lives and does not know it; a packet of the lost connection comes late."""
    of = Sharing(world)
    world.spawn("cut", of.is_cut_off())
    world.spawn("a: two writes", of.writes_twice())


@scenario("share_two_books_vs_takeovers")
def share_two_books_vs_takeovers(world: World) -> None:
    """Two processes share memory by one server, which is killed, and the next one, too, while it starts."""
    of = Sharing(world, one_server=True, both_share=True)
    world.spawn("takeover", of.theirs.is_replaced_twice())
