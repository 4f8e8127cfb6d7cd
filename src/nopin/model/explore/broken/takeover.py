"""Mutants of what outlives a killed server: the share book, and what attached arrays do when a connection breaks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nopin.control import mending
from nopin.control.exchange import Attach
from nopin.control.legacy import Legacy
from nopin.control.mending import Broken, Mending
from nopin.control.share_book import ShareBook
from nopin.model.explore.mutants import Patch, mutant
from nopin.nic.abi import WrOpcode


@mutant("share_store_vs_takeover")
def shares_are_not_written_down(patch: Patch) -> None:
    """A share is in its owner's book before the owner is answered: a successor knows nothing else."""
    patch.setattr(ShareBook, "note", lambda _book, _entry: None)


@mutant("share_withdraw_vs_takeover")
def shares_that_ended_stay_in_the_book(patch: Patch) -> None:
    """A share that ends is struck out of the book, or a successor publishes it again."""
    patch.setattr(ShareBook, "strike", lambda _book, _name: None)


@mutant("share_two_books_vs_takeovers")
def a_successor_forgets_what_it_has_not_come_to(patch: Patch) -> None:
    """What was left counts until it was looked at: a successor may be killed while it takes over."""
    original = Legacy.__init__

    def forgetful(legacy: Legacy[Any], left: Iterable[Any] = ()) -> None:
        original(legacy, left)
        legacy._records.clear()

    patch.setattr(Legacy, "__init__", forgetful)


@mutant("share_two_writes_vs_cut")
def the_connection_that_was_lost_is_kept(patch: Patch) -> None:
    """Who attaches again names the queue pair it had: late packets of that reach memory no more."""
    patch.setattr(Attach, "is_replaced_by", lambda _attach, _later: False)


@mutant("share_adds_vs_takeover_of_ours")
def atomics_are_repeated(patch: Patch) -> None:
    """An atomic that may have been carried out is not posted again."""
    patch.setattr(mending, "REPEATABLE", mending.REPEATABLE | {WrOpcode.ATOMIC_FETCH_AND_ADD})


@mutant("share_row_of_writes_vs_takeover_of_theirs")
def what_was_under_way_is_posted_in_another_order(patch: Patch) -> None:
    """What was under way is posted again in the order in which it was submitted."""
    take = Mending.take
    patch.setattr(Mending, "take", lambda mending: take(mending)[::-1])


@mutant("share_write_vs_takeover_of_theirs")
def what_was_under_way_is_forgotten(patch: Patch) -> None:
    """What was under way when a connection broke is posted again, or fails."""
    broke = Mending.broke

    def forgets(mending: Mending[Any], tasks: list[Any]) -> Broken[Any]:
        return broke(mending, [each for each in tasks if not each.n_posted])

    patch.setattr(Mending, "broke", forgets)
